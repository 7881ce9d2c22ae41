package seed

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// An input is a source that was opened and measured, ready to be copied.
type input interface {
	// size is what an image of it has to hold.
	size() size
	// topTime is the modification time of the top, in nanoseconds.
	topTime() int64
	// sorted says that copy keeps the order of manifests.
	sorted() bool
	copy(to linkSink) error
	// info says what was copied, after copy.
	info() api.WorkspaceSeed
	close()
}

// A linkSink also takes hard links, which only archives have.
type linkSink interface {
	sink
	link(path, target string, it item) error
}

// open finds out what a source is and measures it.
func open(ctx context.Context, src Source, progress func(api.Progress)) (input, error) {
	if progress == nil {
		progress = func(api.Progress) {}
	}
	if src.Path == "" {
		return emptyInput{}, nil
	}
	full, err := filepath.Abs(src.Path)
	if err != nil {
		return nil, err
	}
	src.Path = full
	fi, err := os.Stat(src.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, api.Errorf(api.ErrNotFound, "seed path %s does not exist", src.Path)
	case errors.Is(err, fs.ErrPermission):
		return nil, api.Errorf(api.ErrDenied, "seed path %s cannot be read: permission denied", src.Path)
	case err != nil:
		return nil, err
	case fi.IsDir():
		return openDirectory(ctx, src, progress)
	case fi.Mode().IsRegular():
		return openArchive(ctx, src, progress)
	}
	return nil, api.Errorf(api.ErrInvalid, "seed path %s is neither a directory nor an archive", src.Path)
}

type emptyInput struct{}

func (emptyInput) size() size          { return size{} }
func (emptyInput) topTime() int64      { return 0 }
func (emptyInput) sorted() bool        { return true }
func (emptyInput) copy(linkSink) error { return nil }
func (emptyInput) close()              {}
func (emptyInput) info() api.WorkspaceSeed {
	return api.WorkspaceSeed{Mode: api.SeedEmpty, Destination: api.WorkspacePath, Skipped: []api.SkippedEntry{}}
}

// A directoryInput is a directory, in a Git checkout or not.
type directoryInput struct {
	w              *walker
	path           string
	top            int64
	total          size
	entries, bytes int64
}

func openDirectory(ctx context.Context, src Source, progress func(api.Progress)) (_ input, err error) {
	w := &walker{ctx: ctx, opts: src, git: findGit(), progress: progress}
	in := &directoryInput{w: w, path: src.Path}
	defer func() {
		if err != nil {
			in.close()
		}
	}()
	root, err := w.addRoot(src.Path)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) {
			return nil, api.Errorf(api.ErrDenied, "seed path %s cannot be read: permission denied", src.Path)
		}
		return nil, fmt.Errorf("opening seed path %s: %w", src.Path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(w.roots[root].Fd()), &st); err != nil {
		return nil, err
	}
	in.top = st.Mtim.Nano()
	f, err := w.openPlace(place{root: root})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fr := frame{sources: []source{{place{root: root}, f}}}
	if err := unix.Fstatat(int(f.Fd()), ".git", &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err := w.enterAround(&fr, src.Path); err != nil {
			return nil, err
		}
	}
	if err := w.walk(fr); err != nil {
		return nil, fmt.Errorf("measuring %s: %w", src.Path, err)
	}
	for _, it := range w.items {
		in.total.add(it)
	}
	return in, nil
}

func (in *directoryInput) size() size     { return in.total }
func (in *directoryInput) topTime() int64 { return in.top }
func (in *directoryInput) sorted() bool   { return true }
func (in *directoryInput) close()         { in.w.close() }

func (in *directoryInput) copy(to linkSink) (err error) {
	in.entries, in.bytes, err = in.w.load(to)
	return err
}

func (in *directoryInput) info() api.WorkspaceSeed {
	s := api.WorkspaceSeed{
		Mode: api.SeedDirectory, SeedPath: &in.path, Destination: api.WorkspacePath,
		EntryCount: in.entries, BytesWritten: in.bytes,
		Skipped: in.w.report.list(), SkippedCount: in.w.report.count,
	}
	if in.w.isGit {
		kind := api.SeedGit
		s.Mode, s.OriginKind = api.SeedGit, &kind
		if in.w.commit != "" {
			s.OriginRef = &in.w.commit
		}
	}
	return s
}

// list is never nil: it becomes JSON.
func (r *report) list() []api.SkippedEntry {
	return append([]api.SkippedEntry{}, r.skipped...)
}
