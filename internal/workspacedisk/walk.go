package workspacedisk

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// A WalkEntry is one file, directory or symlink that [Disk.Walk] meets.
type WalkEntry struct {
	Path    string // below the walked directory, without a slash before; any bytes but NUL
	Type    string // api.ArtifactFile, api.ArtifactDirectory, api.ArtifactSymlink
	Mode    uint32 // permission bits with set-user-id, set-group-id and sticky, at most 07777
	Size    int64  // of a file's content or a symlink's target, in bytes; else 0
	Target  string // of a symlink; any bytes but NUL
	ModTime time.Time
}

// Walk calls fn for everything below the directory at guestPath, whatever the
// bytes of its name, until fn returns an error, which it returns. A directory
// comes before what is in it, and the entries of each directory come in the
// order of the bytes of their names. Devices, pipes and sockets are left out,
// and count only towards [Limits]. A path that does not exist is ErrNotFound,
// one of anything but a directory, a symlink included, is ErrInvalid; more than
// Limits allows is ErrExhausted, and a directory that contains itself or two
// entries of one name is ErrDamaged.
func (d *Disk) Walk(ctx context.Context, guestPath string, fn func(WalkEntry) error) error {
	return d.WalkContent(ctx, guestPath, func(e WalkEntry, _ func() (io.Reader, error)) error { return fn(e) })
}

// WalkContent is Walk for who also reads the files: open returns the content of
// a regular file from its beginning, without looking for its path again. What
// it returns needs no closing and serves until the disk is closed or ctx ends.
func (d *Disk) WalkContent(ctx context.Context, guestPath string, fn func(e WalkEntry, open func() (io.Reader, error)) error) error {
	guestPath, err := cleanPath(guestPath)
	if err != nil {
		return err
	}
	w := walker{d: d, budget: d.budget(), visited: map[fileID]bool{}, fn: fn}
	dir, err := d.resolve(ctx, guestPath, w.budget, false)
	if err != nil {
		return err
	}
	if !dir.IsDir() {
		return api.Errorf(api.ErrInvalid, "workspace disk path is not a directory: %s", guestPath)
	}
	if err := w.walk(ctx, dir); err != nil {
		return fmt.Errorf("walking %s: %w", guestPath, err)
	}
	return nil
}

type walker struct {
	d         *Disk
	budget    *ext4.Budget
	visited   map[fileID]bool // directories
	entries   int
	pathBytes int64
	fn        func(e WalkEntry, open func() (io.Reader, error)) error
}

// A walked is an entry that is still to come.
type walked struct {
	path string
	file file
}

// walk goes without recursion of its own: the image decides the depth.
func (w *walker) walk(ctx context.Context, top file) error {
	pending, err := w.entriesOf(ctx, "", top) // a stack, the next at its end
	for err == nil && len(pending) > 0 {
		at := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		if err = w.show(ctx, at); err != nil || !at.file.IsDir() {
			continue
		}
		var more []walked
		more, err = w.entriesOf(ctx, at.path+"/", at.file)
		pending = append(pending, more...)
	}
	return err
}

// entriesOf returns what is in dir, the last name first.
func (w *walker) entriesOf(ctx context.Context, prefix string, dir file) ([]walked, error) {
	for _, p := range dir.parts() {
		if w.visited[p.id()] {
			return nil, api.Errorf(api.ErrDamaged, "directory inode %d appears twice in the tree", p.dir.Number)
		}
		w.visited[p.id()] = true
	}
	var out []walked
	err := w.d.readDir(ctx, dir, w.budget, func(name string, f file) error {
		p := prefix + name
		if len(p) > maxPathLen {
			return api.Errorf(api.ErrExhausted, "a path is longer than %d bytes", maxPathLen)
		}
		if w.entries++; w.entries > w.d.opts.Limits.MaxEntries {
			return api.Errorf(api.ErrExhausted, "it has more than %d entries", w.d.opts.Limits.MaxEntries)
		}
		if w.pathBytes += int64(len(p)); w.pathBytes > w.d.opts.Limits.MaxPathBytes {
			return api.Errorf(api.ErrExhausted, "its paths take more than %d bytes", w.d.opts.Limits.MaxPathBytes)
		}
		if f.IsDir() || f.IsRegular() || f.IsSymlink() {
			out = append(out, walked{p, f})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(out, func(a, b walked) int { return cmp.Compare(b.path, a.path) })
	for i := range out[:max(len(out)-1, 0)] {
		if out[i].path == out[i+1].path {
			return nil, api.Errorf(api.ErrDamaged, "a directory has two entries of the name %q", strings.TrimPrefix(out[i].path, prefix))
		}
	}
	return out, nil
}

func (w *walker) show(ctx context.Context, at walked) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	f := at.file
	e := WalkEntry{Path: at.path, Mode: uint32(f.Mode & 0o7777), ModTime: time.Unix(f.Mtime, int64(f.Nanos))}
	switch {
	case f.IsDir():
		e.Type = api.ArtifactDirectory
	case f.IsRegular():
		e.Type, e.Size = api.ArtifactFile, f.Size
	default:
		e.Type, e.Size = api.ArtifactSymlink, f.Size
		if e.Target, err = f.fs.ReadLink(f.Inode); err != nil {
			return fmt.Errorf("%q: %w", at.path, err)
		}
	}
	return w.fn(e, func() (io.Reader, error) {
		if !f.IsRegular() {
			return nil, api.Errorf(api.ErrInvalid, "%q is a %s, not a file", at.path, e.Type)
		}
		opened, err := f.fs.OpenFile(f.Inode)
		if err != nil {
			return nil, fmt.Errorf("opening %q: %w", at.path, err)
		}
		return &contextReader{ctx, io.NewSectionReader(opened, 0, opened.Size())}, nil
	})
}

// A contextReader reads until ctx, that of the one call it belongs to, ends.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *contextReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}
