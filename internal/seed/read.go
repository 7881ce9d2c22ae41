package seed

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// Manifest yields the seed's entries. A damaged manifest ends it with
// ErrDamaged.
func (s *Seed) Manifest(ctx context.Context) iter.Seq2[manifest.Entry, error] {
	return func(yield func(manifest.Entry, error) bool) {
		f, err := os.Open(filepath.Join(s.dir, manifestName))
		if err != nil {
			yield(manifest.Entry{}, api.Errorf(api.ErrDamaged, "seed %s: %w", s.Digest, err))
			return
		}
		defer f.Close()
		for e, err := range manifest.Read(f) {
			if err == nil && ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			if err != nil {
				yield(manifest.Entry{}, fmt.Errorf("seed %s: %w", s.Digest, err))
				return
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// Content writes the regular file at path to w. Nothing there is ErrNotFound,
// anything but a regular file ErrInvalid.
func (s *Seed) Content(ctx context.Context, path string, w io.Writer) error {
	files, err := s.Files(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = files.Close() }()
	r, err := files.Open(ctx, path)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(w, r)
	return err
}

// Files is a seed's image, open for reading. Its methods may be called
// concurrently. What it opened is not to be read after Close.
type Files struct {
	f   *os.File
	fs  *ext4.FS
	top *ext4.Inode

	mu sync.Mutex
	// dirs are directories that were looked into, one below the other: files
	// are mostly asked for in order.
	dirs []listing
}

// A listing is one directory with the inode numbers in it.
type listing struct {
	path   string
	inodes map[string]uint32
}

// Files opens the seed's image. The caller closes it.
func (s *Seed) Files(ctx context.Context) (_ *Files, err error) {
	f, err := os.Open(s.ImagePath)
	if err != nil {
		return nil, api.Errorf(api.ErrDamaged, "seed %s: %w", s.Digest, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			err = fmt.Errorf("seed %s: %w", s.Digest, err)
		}
	}()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	t := &Files{f: f}
	if t.fs, err = ext4.Open(ctx, f, fi.Size()); err != nil {
		return nil, err
	}
	if t.top, err = t.fs.Inode(ext4.RootInode); err != nil {
		return nil, err
	}
	budget := &ext4.Budget{DirBytes: maxDirBytes}
	for name := range strings.SplitSeq(topPath, "/") {
		n, ok, err := t.fs.Lookup(ctx, t.top, budget, name)
		if err != nil {
			return nil, err
		}
		if !ok {
			return nil, api.Errorf(api.ErrDamaged, "its image has no %s", topPath)
		}
		if t.top, err = t.fs.Inode(n); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// maxDirBytes is more than a directory of a million names of 255 bytes takes.
const maxDirBytes = 1 << 30

// Close closes the image.
func (t *Files) Close() error { return t.f.Close() }

// Open returns the content of the regular file at path. Nothing there is
// ErrNotFound, anything but a regular file ErrInvalid.
func (t *Files) Open(ctx context.Context, path string) (io.ReadCloser, error) {
	ino, err := t.inode(ctx, path)
	if err != nil {
		return nil, err
	}
	if !ino.IsRegular() {
		return nil, api.Errorf(api.ErrInvalid, "%.200q in the seed is no regular file", path)
	}
	f, err := t.fs.OpenFile(ino)
	if err != nil {
		return nil, err
	}
	return io.NopCloser(io.NewSectionReader(f, 0, f.Size())), nil
}

func (t *Files) inode(ctx context.Context, p string) (*ext4.Inode, error) {
	if err := manifest.CheckPath(p); err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	dir, name := path.Split(p)
	l, err := t.list(ctx, strings.TrimSuffix(dir, "/"))
	if err != nil {
		return nil, err
	}
	n, ok := l.inodes[name]
	if !ok {
		return nil, api.Errorf(api.ErrNotFound, "%.200q is not in the seed", p)
	}
	return t.fs.Inode(n)
}

// list returns what is in the directory at dir, "" for the top.
func (t *Files) list(ctx context.Context, dir string) (listing, error) {
	for len(t.dirs) > 0 {
		last := t.dirs[len(t.dirs)-1]
		if last.path == dir {
			return last, nil
		}
		if last.path == "" || strings.HasPrefix(dir, last.path+"/") {
			break
		}
		t.dirs = t.dirs[:len(t.dirs)-1]
	}
	ino := t.top
	if dir != "" {
		up, name := path.Split(dir)
		l, err := t.list(ctx, strings.TrimSuffix(up, "/"))
		if err != nil {
			return listing{}, err
		}
		n, ok := l.inodes[name]
		if !ok {
			return listing{}, api.Errorf(api.ErrNotFound, "%.200q is not in the seed", dir)
		}
		if ino, err = t.fs.Inode(n); err != nil {
			return listing{}, err
		}
		if !ino.IsDir() {
			return listing{}, api.Errorf(api.ErrNotFound, "%.200q is no directory of the seed", dir)
		}
	}
	l := listing{dir, map[string]uint32{}}
	err := t.fs.ReadDir(ctx, ino, &ext4.Budget{DirBytes: maxDirBytes}, func(d ext4.Dirent) error {
		l.inodes[d.Name] = d.Inode
		return nil
	})
	if err != nil {
		return listing{}, err
	}
	t.dirs = append(t.dirs, l)
	return l, nil
}

// WriteTar streams the files as a tar relative to the workspace's top, for
// guests that cannot mount the image: in PAX format, owned by root, with
// permissions and modification times.
func (s *Seed) WriteTar(ctx context.Context, w io.Writer) error {
	files, err := s.Files(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = files.Close() }()
	sink := &tarSink{tar.NewWriter(w)}
	for e, err := range s.Manifest(ctx) {
		if err != nil {
			return err
		}
		if err := files.send(ctx, sink, e); err != nil {
			return fmt.Errorf("sending %.200q of seed %s: %w", e.Path, s.Digest, err)
		}
	}
	return sink.tw.Close()
}

func (t *Files) send(ctx context.Context, sink *tarSink, e manifest.Entry) error {
	ino, err := t.inode(ctx, e.Path)
	if err != nil {
		return err
	}
	it := item{path: e.Path, typ: e.Type, mode: e.Mode, size: e.Size, target: e.Target, mtime: ino.Mtime*1e9 + int64(ino.Nanos)}
	if e.Type != manifest.File {
		return sink.put(it, nil)
	}
	if !ino.IsRegular() || ino.Size != e.Size {
		return api.Errorf(api.ErrDamaged, "the image and its manifest differ")
	}
	f, err := t.fs.OpenFile(ino)
	if err != nil {
		return err
	}
	c := &content{ctx: ctx, r: io.NewSectionReader(f, 0, e.Size), left: e.Size, moved: func(int64) {}}
	if err := sink.put(it, c); err != nil {
		if c.failed != nil && !errors.Is(c.failed, io.EOF) {
			return c.failed
		}
		return err
	}
	return nil
}
