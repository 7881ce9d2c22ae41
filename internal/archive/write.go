package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// The kinds of things an archive is made of, as the product's JSON names them.
const (
	File      = "file"
	Directory = "directory"
	Symlink   = "symlink"
)

// Kind says what name below root is, without following a link at its end.
// Anything but a file, a directory or a link is ErrInvalid.
func Kind(root *os.Root, name string) (string, error) {
	fi, err := root.Lstat(name)
	if err != nil {
		return "", pathCause(err)
	}
	switch fi.Mode().Type() {
	case 0:
		return File, nil
	case fs.ModeDir:
		return Directory, nil
	case fs.ModeSymlink:
		return Symlink, nil
	}
	return "", api.Errorf(api.ErrInvalid, "it is neither a file, a directory nor a symbolic link")
}

// Write writes name below root as a tar to w. A directory's entries are named
// relative to it, sorted within each directory, without an entry for itself; a
// file or link is one entry with its base name. Links are kept as links, hard
// links become copies, owners are dropped. Devices, FIFOs and sockets are
// skipped.
//
// A file that grows meanwhile is cut at the size it had; one that shrinks is
// ErrBusy.
func Write(ctx context.Context, root *os.Root, name string, w io.Writer, limits Limits) (Result, error) {
	p := &packer{ctx: ctx, root: root, limits: limits.withDefaults(), w: w}
	p.tw = tar.NewWriter(w)
	if err := p.top(name); err != nil {
		return p.result, err
	}
	if err := p.tw.Close(); err != nil {
		return p.result, err
	}
	return p.result, nil
}

// Measure returns what Write would write and the exact size of its tar, without
// reading any file. A tree that changes in between makes them differ.
func Measure(ctx context.Context, root *os.Root, name string, limits Limits) (size int64, result Result, err error) {
	p := &packer{ctx: ctx, root: root, limits: limits.withDefaults(), dry: true}
	if err := p.top(name); err != nil {
		return 0, p.result, err
	}
	// Two blocks of zeros end a tar.
	return p.size + 1024, p.result, nil
}

type packer struct {
	ctx    context.Context
	root   *os.Root
	limits Limits
	w      io.Writer
	tw     *tar.Writer
	dry    bool
	size   int64 // of the tar, when dry
	result Result
	buf    []byte
}

func (p *packer) top(name string) error {
	fi, err := p.root.Lstat(name)
	if err != nil {
		return pathCause(err)
	}
	if fi.IsDir() {
		return p.dir(name, "", 0)
	}
	return p.entry(name, path.Base(name), fi, 0)
}

// dirBatch is how many names of a directory are read at once at first; a
// directory's names are all held for sorting.
const dirBatch = 1024

func (p *packer) dir(name, inTar string, depth int) error {
	if depth > maxDepth {
		return api.Errorf(api.ErrExhausted, "%q nests deeper than %d directories", shorten(name), maxDepth)
	}
	d, err := p.root.Open(name)
	if err != nil {
		return fmt.Errorf("opening %q: %w", shorten(name), pathCause(err))
	}
	var names []string
	for {
		batch, err := d.Readdirnames(dirBatch)
		names = append(names, batch...)
		if int64(len(names)) > p.limits.Entries {
			_ = d.Close()
			return p.tooMany()
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			_ = d.Close()
			return fmt.Errorf("reading %q: %w", shorten(name), pathCause(err))
		}
	}
	_ = d.Close()
	slices.Sort(names)
	for _, n := range names {
		full, sub := path.Join(name, n), path.Join(inTar, n)
		fi, err := p.root.Lstat(full)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return fmt.Errorf("looking at %q: %w", shorten(full), pathCause(err))
		}
		if err := p.entry(full, sub, fi, depth); err != nil {
			return err
		}
	}
	return nil
}

func (p *packer) tooMany() error {
	return api.Errorf(api.ErrExhausted, "there are more than %d entries", p.limits.Entries)
}

func (p *packer) entry(name, inTar string, fi fs.FileInfo, depth int) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	hdr := &tar.Header{
		Name:    inTar,
		Mode:    int64(fi.Mode().Perm()),
		ModTime: fi.ModTime().Truncate(time.Second), // more would cost a PAX header
	}
	switch fi.Mode().Type() {
	case 0:
		hdr.Typeflag, hdr.Size = tar.TypeReg, fi.Size()
	case fs.ModeDir:
		hdr.Typeflag, hdr.Name = tar.TypeDir, inTar+"/"
	case fs.ModeSymlink:
		target, err := p.root.Readlink(name)
		if err != nil {
			return fmt.Errorf("reading the link %q: %w", shorten(name), pathCause(err))
		}
		hdr.Typeflag, hdr.Linkname = tar.TypeSymlink, target
	default:
		p.result.skip(inTar, "not a file, directory or link")
		return nil
	}
	if p.result.Entries++; p.result.Entries > p.limits.Entries {
		return p.tooMany()
	}
	if hdr.Size > p.limits.Bytes-p.result.Bytes {
		return api.Errorf(api.ErrExhausted, "there are more than %d bytes", p.limits.Bytes)
	}
	p.result.Bytes += hdr.Size
	if err := p.write(name, hdr); err != nil {
		return fmt.Errorf("packing %q: %w", shorten(name), err)
	}
	if fi.IsDir() {
		return p.dir(name, inTar, depth+1)
	}
	return nil
}

func (p *packer) write(name string, hdr *tar.Header) error {
	if p.dry {
		var n countingWriter
		if err := tar.NewWriter(&n).WriteHeader(hdr); err != nil {
			return api.Errorf(api.ErrInvalid, "it does not fit a tar: %w", err)
		}
		const block = 512
		p.size += int64(n) + (hdr.Size+block-1)/block*block
		return nil
	}
	if hdr.Typeflag != tar.TypeReg {
		return p.header(hdr)
	}
	f, err := openFile(p.root, name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.header(hdr); err != nil {
		return err
	}
	if p.buf == nil {
		p.buf = make([]byte, copyBuffer)
	}
	n, err := io.CopyBuffer(struct{ io.Writer }{contextWriter{p.ctx, p.tw}}, struct{ io.Reader }{io.LimitReader(f, hdr.Size)}, p.buf)
	if err != nil {
		return err
	}
	if n < hdr.Size {
		return api.Errorf(api.ErrBusy, "it shrank from %d to %d bytes while it was read", hdr.Size, n)
	}
	return nil
}

// openFile opens a regular file, also where a FIFO has taken its place
// meanwhile: opening one would wait for a writer.
func openFile(root *os.Root, name string) (*os.File, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|oNonblock, 0)
	if err != nil {
		return nil, pathCause(err)
	}
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		_ = f.Close()
		return nil, api.Errorf(api.ErrBusy, "it was replaced while the tree was read")
	}
	return f, nil
}

func (p *packer) header(hdr *tar.Header) error {
	if err := p.tw.WriteHeader(hdr); err != nil {
		if errors.Is(err, tar.ErrHeader) {
			return api.Errorf(api.ErrInvalid, "it does not fit a tar: %w", err)
		}
		return err
	}
	return nil
}

type countingWriter int64

func (c *countingWriter) Write(b []byte) (int, error) {
	*c += countingWriter(len(b))
	return len(b), nil
}

// contextWriter stops a long copy when ctx ends.
type contextWriter struct {
	ctx context.Context
	w   io.Writer
}

func (c contextWriter) Write(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.w.Write(b)
}
