package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// wholeFile is how large a file may be that WriteList reads before it writes
// its header, so that one which shrinks meanwhile is written as it is.
const wholeFile = 256 << 10

// WriteList writes the entries that names yields, which are local, as a tar to w,
// in their order and under their names. A directory is one entry without its
// content; links are kept as links, owners are dropped. What is not there, is
// neither a file, a directory nor a link, or cannot be read is left out and
// counted as skipped.
//
// The directory that an entry lies in is what open returns for its path, which
// is as clean as the name, "." for none. WriteList closes it, and asks again
// only where the next entry lies elsewhere. [os.Root.OpenRoot] is such a function.
//
// A file that grows meanwhile is cut at the size it had; a large one that
// shrinks is ErrBusy.
func WriteList(ctx context.Context, open func(dir string) (*os.Root, error), names iter.Seq[string], w io.Writer, limits Limits) (Result, error) {
	p := &packer{ctx: ctx, limits: limits.withDefaults(), w: w}
	p.tw = tar.NewWriter(w)
	last := "" // the directory that p.root is, if any
	defer func() {
		if p.root != nil {
			_ = p.root.Close()
		}
	}()
	for name := range names {
		if err := ctx.Err(); err != nil {
			return p.result, err
		}
		if p.result.Entries+p.result.SkippedCount >= p.limits.Entries {
			return p.result, p.tooMany()
		}
		if dir := path.Dir(name); p.root == nil || dir != last {
			root, err := open(dir)
			if err != nil {
				p.result.skip(name, "not there")
				continue
			}
			if p.root != nil {
				_ = p.root.Close()
			}
			p.root, last = root, dir
		}
		if err := p.listed(name); err != nil {
			return p.result, err
		}
	}
	return p.result, p.tw.Close()
}

// listed writes one entry of a list, which lies in p.root.
func (p *packer) listed(name string) error {
	base := path.Base(name)
	fi, err := p.root.Lstat(base)
	if err != nil {
		p.result.skip(name, "not there")
		return nil
	}
	hdr := &tar.Header{Name: name, Mode: int64(fi.Mode().Perm()), ModTime: fi.ModTime().Truncate(time.Second)}
	var content io.Reader = bytes.NewReader(nil)
	switch fi.Mode().Type() {
	case 0:
		f, err := openFile(p.root, base)
		if err != nil {
			p.result.skip(name, "not readable")
			return nil
		}
		defer f.Close()
		if content, hdr.Size, err = p.content(f); err != nil {
			p.result.skip(name, "not readable")
			return nil
		}
		hdr.Typeflag = tar.TypeReg
	case fs.ModeDir:
		hdr.Typeflag, hdr.Name = tar.TypeDir, name+"/"
	case fs.ModeSymlink:
		target, err := p.root.Readlink(base)
		if err != nil {
			p.result.skip(name, "not readable")
			return nil
		}
		hdr.Typeflag, hdr.Linkname = tar.TypeSymlink, target
	default:
		p.result.skip(name, "not a file, directory or link")
		return nil
	}
	if hdr.Size > p.limits.Bytes-p.result.Bytes {
		return api.Errorf(api.ErrExhausted, "there are more than %d bytes", p.limits.Bytes)
	}
	if err := p.header(hdr); err != nil {
		return err
	}
	n, err := io.Copy(struct{ io.Writer }{contextWriter{p.ctx, p.tw}}, content)
	if err != nil {
		return err
	}
	if n < hdr.Size {
		return api.Errorf(api.ErrBusy, "packing %q: it shrank from %d to %d bytes while it was read", shorten(name), hdr.Size, n)
	}
	p.result.Entries++
	p.result.Bytes += n
	return nil
}

// content returns a file's content and its size, which for a small file is true.
func (p *packer) content(f *os.File) (io.Reader, int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if fi.Size() > wholeFile {
		return io.LimitReader(f, fi.Size()), fi.Size(), nil
	}
	if p.buf == nil {
		p.buf = make([]byte, wholeFile)
	}
	n, err := io.ReadFull(f, p.buf[:fi.Size()])
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, 0, err
	}
	return bytes.NewReader(p.buf[:n]), int64(n), nil
}
