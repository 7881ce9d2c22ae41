package guestagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/archive"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// checkPath returns a guest path in its shortest absolute form. A relative one
// is taken from the workspace.
func checkPath(p string) (string, error) {
	const maxPath = 4096 // PATH_MAX, limits.h
	switch {
	case p == "":
		return "", api.Errorf(api.ErrInvalid, "the path is empty")
	case len(p) > maxPath:
		return "", api.Errorf(api.ErrInvalid, "the path has %d bytes, the limit is %d", len(p), maxPath)
	case strings.ContainsRune(p, 0):
		return "", api.Errorf(api.ErrInvalid, "the path has a NUL in it")
	}
	if !path.IsAbs(p) {
		p = path.Join(defaultCwd, p)
	}
	return path.Clean(p), nil
}

// openDir opens a guest directory. Below a root of its own, links that leave
// that root are refused; in a guest they are the guest's affair.
func (s *Server) openDir(p string, create bool) (*os.Root, error) {
	if s.Root == "/" {
		if create {
			if err := os.MkdirAll(p, 0o755); err != nil {
				return nil, err
			}
		}
		return os.OpenRoot(p)
	}
	top, err := os.OpenRoot(s.Root)
	if err != nil {
		return nil, err
	}
	rel := strings.TrimPrefix(p, "/")
	if rel == "" {
		return top, nil
	}
	defer top.Close()
	if create {
		if err := top.MkdirAll(rel, 0o755); err != nil {
			return nil, err
		}
	}
	return top.OpenRoot(filepath.FromSlash(rel))
}

// openTarget opens dir, which an archive is packed from or unpacked into because
// somebody asked for p. Within the workspace it is held to what the file tools
// are held to, and what is made in it belongs to owner; elsewhere it is wherever
// the guest's links lead.
func (s *Server) openTarget(p, dir string, create bool) (_ *os.Root, owner *archive.Owner, err error) {
	if dir != defaultCwd && !strings.HasPrefix(dir, defaultCwd+"/") {
		root, err := s.openDir(dir, create)
		if err != nil {
			return nil, nil, pathError(p, err)
		}
		return root, nil, nil
	}
	at, err := s.openPlace(guestproto.Path(dir))
	if err != nil {
		return nil, nil, err
	}
	defer at.close()
	at.abs = guestproto.Path(p)
	if owner, err = s.owner(at.workspace); err != nil {
		return nil, nil, err
	}
	var d *directory
	if create {
		d, err = at.makeDirectory(at.rel, owner)
	} else {
		d, err = at.openDirectory()
	}
	if err != nil {
		return nil, nil, err
	}
	defer d.release()
	root, err := d.openRoot(".")
	if err != nil {
		return nil, nil, fileError(at.abs, err)
	}
	return root, owner, nil
}

// pathError classes what opening a guest path met.
func pathError(p string, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	class := api.ErrUnavailable
	switch {
	case errors.Is(err, fs.ErrNotExist):
		class = api.ErrNotFound
	case errors.Is(err, fs.ErrPermission), strings.Contains(err.Error(), "escapes"):
		class = api.ErrDenied
	case errors.Is(err, fs.ErrExist), strings.Contains(err.Error(), "not a directory"):
		class = api.ErrInvalid
	}
	return api.Errorf(class, "%s: %w", p, err)
}

func (q *request) extract(ctx context.Context, line []byte) error {
	var req guestproto.ExtractArchive
	if err := decodeRequest(line, &req, "destination"); err != nil {
		return err
	}
	if !q.stream {
		if err := decodeRequest(line, &req, "archive_size"); err != nil {
			return err
		}
		if req.ArchiveSize < 0 {
			return api.Errorf(api.ErrInvalid, "archive_size is %d", req.ArchiveSize)
		}
	}
	dest, err := checkPath(req.Destination)
	if err != nil {
		return err
	}
	root, owner, err := q.server.openTarget(dest, dest, true)
	if err != nil {
		return fmt.Errorf("opening the destination: %w", err)
	}
	defer root.Close()
	var src io.Reader = &exactReader{r: q.r, left: req.ArchiveSize}
	if q.stream {
		src = &dataReader{fr: guestproto.NewFrameReader(q.r)}
	}
	res, err := archive.Extract(ctx, root, src, archive.ExtractOptions{Owner: owner})
	if err != nil {
		return fmt.Errorf("unpacking into %s: %w", dest, err)
	}
	// What follows the archive's end marker is padding, but must be there: a
	// transfer that was cut must not look complete.
	if _, err := io.Copy(io.Discard, src); err != nil {
		return fmt.Errorf("unpacking into %s: %w", dest, err)
	}
	return q.reply(guestproto.ExtractReply{Destination: dest, EntryCount: res.Entries, BytesWritten: res.Bytes})
}

// exactReader ends after left bytes and calls an earlier end an error.
type exactReader struct {
	r    io.Reader
	left int64
}

func (e *exactReader) Read(b []byte) (int, error) {
	if e.left <= 0 {
		return 0, io.EOF
	}
	n, err := e.r.Read(b[:min(int64(len(b)), e.left)])
	e.left -= int64(n)
	if errors.Is(err, io.EOF) && e.left > 0 {
		err = api.Errorf(api.ErrDamaged, "the archive ends %d bytes early", e.left)
	}
	return n, err
}

// dataReader yields the payloads of FrameData up to FrameDataEnd.
type dataReader struct {
	fr   *guestproto.FrameReader
	rest []byte
	done bool
}

func (d *dataReader) Read(b []byte) (int, error) {
	for len(d.rest) == 0 {
		if d.done {
			return 0, io.EOF
		}
		typ, p, err := d.fr.Next()
		switch {
		case errors.Is(err, io.EOF):
			return 0, api.Errorf(api.ErrDamaged, "the caller hung up before the data's end")
		case err != nil:
			return 0, err
		case typ == guestproto.FrameDataEnd:
			d.done = true
		case typ == guestproto.FrameData:
			d.rest = p
		default:
			return 0, api.Errorf(api.ErrInvalid, "the caller sent a frame of type %d within the data", typ)
		}
	}
	n := copy(b, d.rest)
	d.rest = d.rest[n:]
	return n, nil
}

func (q *request) export(ctx context.Context, line []byte) error {
	var req guestproto.ExportArchive
	if err := decodeRequest(line, &req, "path"); err != nil {
		return err
	}
	p, err := checkPath(req.Path)
	if err != nil {
		return err
	}
	dir, name := path.Split(p)
	if p == "/" {
		name = "."
	}
	root, _, err := q.server.openTarget(p, path.Clean(dir), false)
	if err != nil {
		return fmt.Errorf("opening what to pack: %w", err)
	}
	defer root.Close()
	kind, err := archive.Kind(root, name)
	if err != nil {
		return fmt.Errorf("looking at %s: %w", p, err)
	}
	head := guestproto.ExportHeader{WorkspacePath: p, ArtifactType: kind}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if q.stream {
		return q.exportFrames(ctx, root, name, head)
	}
	return q.exportPlain(ctx, root, name, head)
}

func (q *request) exportFrames(ctx context.Context, root *os.Root, name string, head guestproto.ExportHeader) error {
	line, err := guestproto.Encode(head)
	if err != nil {
		return err
	}
	if err := q.frame(guestproto.FrameHeader, line[:len(line)-1]); err != nil {
		q.gone = true
		return errGone
	}
	w := &dataWriter{q: q, buf: make([]byte, 0, outputChunk)}
	res, err := archive.Write(ctx, root, name, w, archive.Limits{})
	if err == nil {
		err = w.flush()
	}
	if w.failed {
		q.gone = true
		return errGone
	}
	if err != nil {
		return fmt.Errorf("packing %s: %w", head.WorkspacePath, err)
	}
	if err := q.frame(guestproto.FrameDataEnd, nil); err != nil {
		q.gone = true
		return errGone
	}
	head.ArchiveSize, head.EntryCount, head.BytesWritten = w.total, res.Entries, res.Bytes
	return q.reply(head)
}

// dataWriter sends FrameData, gathering a tar's many small writes.
type dataWriter struct {
	q      *request
	buf    []byte
	total  int64
	failed bool // the caller reads no more
}

func (w *dataWriter) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		k := min(len(b), cap(w.buf)-len(w.buf))
		w.buf = append(w.buf, b[:k]...)
		b = b[k:]
		if len(w.buf) == cap(w.buf) {
			if err := w.flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

func (w *dataWriter) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	if err := w.q.frame(guestproto.FrameData, w.buf); err != nil {
		w.failed = true
		return err
	}
	w.total += int64(len(w.buf))
	w.buf = w.buf[:0]
	return nil
}

// exportPlain measures first, because the header announces the size, and packs
// then. A tree that changed in between cannot be announced any more: the caller
// gets a short archive and knows.
func (q *request) exportPlain(ctx context.Context, root *os.Root, name string, head guestproto.ExportHeader) error {
	size, res, err := archive.Measure(ctx, root, name, archive.Limits{})
	if err != nil {
		return fmt.Errorf("packing %s: %w", head.WorkspacePath, err)
	}
	head.ArchiveSize, head.EntryCount, head.BytesWritten = size, res.Entries, res.Bytes
	line, err := guestproto.Encode(head)
	if err != nil {
		return err
	}
	q.answered = true
	if _, err := q.conn.Write(line); err != nil {
		q.gone = true
		return errGone
	}
	w := &boundedWriter{w: q.conn, left: size}
	_, err = archive.Write(ctx, root, name, w, archive.Limits{})
	if err != nil || w.left > 0 {
		q.server.Logger.Warn("packing for the plain form", "path", head.WorkspacePath, "missing", w.left, "err", err)
		q.gone = true
	}
	return nil
}

// boundedWriter refuses to write more than was announced.
type boundedWriter struct {
	w    io.Writer
	left int64
}

func (b *boundedWriter) Write(p []byte) (int, error) {
	if int64(len(p)) > b.left {
		return 0, api.Errorf(api.ErrBusy, "the tree grew while it was packed")
	}
	n, err := b.w.Write(p)
	b.left -= int64(n)
	return n, err
}
