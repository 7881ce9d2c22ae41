package seed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

// The bounds of one seed.
const (
	maxEntries = manifest.MaxEntries
	maxBytes   = 64 << 30
	// maxSkipped is how many left-out files are named; more are counted.
	maxSkipped = 1000
)

// Reasons for leaving a file out.
const (
	reasonSpecial = "it is a device, a pipe or a socket"
	reasonChanged = "it changed while it was read"
	reasonPath    = "its path is too long"
)

// An item is one thing that was found and is to be taken.
type item struct {
	path string // in the seed
	typ  string // of package manifest
	mode uint32
	size int64
	// mtime is in nanoseconds since 1970.
	mtime  int64
	target string
	// root and src say where a file's content is; it is content itself where
	// that is not nil.
	root    int
	src     string
	content []byte
}

// A report counts what was left out.
type report struct {
	skipped []api.SkippedEntry
	count   int64
}

func (r *report) skip(path, reason string) {
	r.count++
	if len(r.skipped) < maxSkipped {
		r.skipped = append(r.skipped, api.SkippedEntry{Path: path, Reason: reason})
	}
}

// reasonOf puts an error about one file into a phrase without its path.
func reasonOf(err error) string {
	if pe := (*os.PathError)(nil); errors.As(err, &pe) {
		err = pe.Err
	}
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return "it cannot be read: permission denied"
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		return reasonChanged
	}
	return "it cannot be read: " + err.Error()
}

// A place is a directory below one of the walker's roots.
type place struct {
	root int
	path string // "" for the root itself
}

// A walker finds out what to take, without reading any file. No link is ever
// followed: directories are opened one below the other.
type walker struct {
	ctx      context.Context
	opts     Source
	git      *git // nil where git is missing
	roots    []*os.File
	items    []item
	bytes    int64
	report   report
	progress func(api.Progress)
	buffers  chan []byte // for small files, used again
	// origin of the top, where that is a checkout.
	isGit  bool
	commit string
}

func (w *walker) close() {
	for _, r := range w.roots {
		r.Close()
	}
}

// addRoot opens the directory at a host path, whose links are followed: it is
// the user who named it.
func (w *walker) addRoot(hostPath string) (int, error) {
	f, err := os.OpenFile(hostPath, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return 0, err
	}
	w.roots = append(w.roots, f)
	return len(w.roots) - 1, nil
}

const openDir = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC

// openIn opens name in dir without following a link. A pipe does not block it.
func openIn(dir *os.File, name string, flags int) (*os.File, error) {
	for {
		fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}

// openPlace opens a directory, part by part. The caller closes it.
func (w *walker) openPlace(p place) (*os.File, error) {
	dir, err := openIn(w.roots[p.root], ".", openDir)
	if err != nil || p.path == "" {
		return dir, err
	}
	for name := range strings.SplitSeq(p.path, "/") {
		next, err := openIn(dir, name, openDir)
		dir.Close()
		if err != nil {
			return nil, err
		}
		dir = next
	}
	return dir, nil
}

// A source is one of the directories that a directory of the seed is made of.
type source struct {
	place
	f *os.File
}

// A frame is one directory of the seed while it is walked.
type frame struct {
	dst     string // "" for the top
	sources []source
	depth   int
	rules   *rules
	// inGit says that this is Git's own directory, in which nothing is ignored
	// and nothing is a checkout.
	inGit bool
	// leave, if not nil, says what of a source is not taken, by its path below
	// that source's beginning.
	leave func(source int, rel string) bool
	rel   string
}

// walk takes everything in a frame. An unreadable directory is reported and
// left out.
func (w *walker) walk(fr frame) error {
	if err := w.ctx.Err(); err != nil {
		return context.Cause(w.ctx)
	}
	names, err := w.names(&fr)
	if err != nil {
		return err
	}
	if !fr.inGit && slices.Contains(names, ".git") {
		if err := w.enterCheckout(&fr); err != nil {
			return err
		}
	}
	for _, name := range names {
		if err := w.entry(&fr, name); err != nil {
			return err
		}
	}
	return nil
}

// names returns what is in the frame's sources, sorted.
func (w *walker) names(fr *frame) ([]string, error) {
	var all []string
	for _, s := range fr.sources {
		for {
			batch, err := s.f.Readdirnames(4096)
			all = append(all, batch...)
			if len(all)+len(w.items) > 2*maxEntries {
				return nil, tooManyEntries()
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				w.report.skip(fr.dst, reasonOf(err))
				break
			}
		}
	}
	slices.Sort(all)
	if len(fr.sources) > 1 {
		all = slices.Compact(all)
	}
	return all, nil
}

func tooManyEntries() error {
	return api.WithHint(api.Errorf(api.ErrExhausted, "there are more than %d entries", maxEntries), "name a smaller directory")
}

// entry takes one name of a directory, with all below it.
func (w *walker) entry(fr *frame, name string) error {
	dst, rel := path.Join(fr.dst, name), path.Join(fr.rel, name)
	if fr.rules.ignores(dst) {
		return nil
	}
	if len(dst) > manifest.MaxPath || fr.depth >= manifest.MaxDepth {
		w.report.skip(dst, reasonPath)
		return nil
	}
	var st unix.Stat_t
	var has []int // the sources in which it is, all directories if several
	for i := len(fr.sources) - 1; i >= 0; i-- {
		if fr.leave != nil && fr.leave(i, rel) {
			continue
		}
		var cur unix.Stat_t
		err := unix.Fstatat(int(fr.sources[i].f.Fd()), name, &cur, unix.AT_SYMLINK_NOFOLLOW)
		switch {
		case err != nil && len(fr.sources) > 1, err == nil && len(has) > 0 && cur.Mode&unix.S_IFMT != unix.S_IFDIR:
			continue
		case err != nil:
			w.report.skip(dst, reasonOf(err))
			return nil
		}
		if len(has) == 0 {
			st = cur
		}
		has = append(has, i)
		if cur.Mode&unix.S_IFMT != unix.S_IFDIR {
			break
		}
	}
	if len(has) == 0 {
		return nil
	}
	from := fr.sources[has[0]]
	it := item{
		path: dst, mode: uint32(st.Mode) & 0o777, mtime: st.Mtim.Nano(),
		root: from.root, src: dst,
	}
	if len(fr.sources) > 1 || fr.dst != from.path {
		it.src = path.Join(from.path, name)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return w.directory(fr, it, name, has)
	case unix.S_IFREG:
		if name == ".git" && !fr.inGit {
			return w.gitFile(fr, it)
		}
		it.typ, it.size = manifest.File, st.Size
	case unix.S_IFLNK:
		target, err := readLink(from.f, name)
		if err != nil {
			w.report.skip(dst, reasonOf(err))
			return nil
		}
		it.typ, it.mode, it.size, it.target = manifest.Symlink, 0o777, int64(len(target)), target
	default:
		w.report.skip(dst, reasonSpecial)
		return nil
	}
	return w.add(it)
}

func readLink(dir *os.File, name string) (string, error) {
	buf := make([]byte, manifest.MaxTarget)
	n, err := unix.Readlinkat(int(dir.Fd()), name, buf)
	if err != nil {
		return "", err
	}
	if n == 0 || n >= len(buf) {
		return "", api.Errorf(api.ErrInvalid, "its target is empty or too long")
	}
	return string(buf[:n]), nil
}

func (w *walker) directory(fr *frame, it item, name string, has []int) error {
	next := frame{
		dst: it.path, depth: fr.depth + 1, rules: fr.rules, leave: fr.leave, rel: path.Join(fr.rel, name),
		inGit: fr.inGit || name == ".git",
	}
	if next.inGit && !fr.inGit {
		next.rules = nil
	}
	slices.Reverse(has) // the order of the sources
	// leave counts the sources of the beginning, so none may be dropped.
	if fr.leave != nil && len(has) < len(fr.sources) {
		only := fr.leave
		kept := slices.Clone(has)
		next.leave = func(i int, rel string) bool { return only(kept[i], rel) }
	}
	for _, i := range has {
		f, err := openIn(fr.sources[i].f, name, openDir)
		if err != nil {
			w.report.skip(it.path, reasonOf(err))
			return nil
		}
		defer f.Close()
		next.sources = append(next.sources, source{place{fr.sources[i].root, path.Join(fr.sources[i].path, name)}, f})
	}
	it.typ, it.size = manifest.Directory, 0
	if err := w.add(it); err != nil {
		return err
	}
	return w.walk(next)
}

// measureEvery is after how many entries the caller hears how many there are.
const measureEvery = 10_000

func (w *walker) add(it item) error {
	if len(w.items) >= maxEntries {
		return tooManyEntries()
	}
	if it.typ == manifest.File {
		if it.size > maxBytes-w.bytes {
			return api.WithHint(api.Errorf(api.ErrExhausted, "there are more than %d GiB of files", maxBytes>>30), "name a smaller directory")
		}
		w.bytes += it.size
	}
	w.items = append(w.items, it)
	if len(w.items)%measureEvery == 0 {
		w.progress(api.Progress{Phase: "measuring", Message: fmt.Sprintf("found %d files and directories", len(w.items)), Done: int64(len(w.items))})
	}
	return nil
}
