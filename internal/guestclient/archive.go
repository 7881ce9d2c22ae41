package guestclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// UploadArchive unpacks the tar or tar.gz that r yields below destination in
// the guest, without knowing its size before.
func (c *Client) UploadArchive(ctx context.Context, destination string, r io.Reader) (guestproto.ExtractReply, error) {
	req := guestproto.ExtractArchive{
		Envelope:    guestproto.Envelope{Action: guestproto.ActionExtractArchive, Stream: true},
		Destination: destination,
	}
	reply, err := c.upload(ctx, req, func(l *link) error {
		buf := make([]byte, 32<<10)
		for {
			n, err := r.Read(buf)
			if n > 0 {
				_ = l.conn.SetWriteDeadline(time.Now().Add(l.patience))
				if err := guestproto.WriteFrame(l.conn, guestproto.FrameData, buf[:n]); err != nil {
					return err
				}
			}
			if errors.Is(err, io.EOF) {
				return guestproto.WriteFrame(l.conn, guestproto.FrameDataEnd, nil)
			}
			if err != nil {
				return &sourceError{err}
			}
		}
	}, func(l *link) (guestproto.ExtractReply, error) {
		var reply guestproto.ExtractReply
		typ, p, err := newFrames(l).next(0)
		switch {
		case err != nil:
			return reply, err
		case typ == guestproto.FrameError:
			return reply, remoteError(p)
		case typ != guestproto.FrameResult:
			return reply, unexpectedFrame(typ)
		}
		err = guestproto.Decode(p, &reply, "entry_count", "bytes_written")
		return reply, err
	})
	return reply, err
}

// UploadArchivePlain is UploadArchive in the plain form: r must yield exactly
// size bytes.
func (c *Client) UploadArchivePlain(ctx context.Context, destination string, r io.Reader, size int64) (guestproto.ExtractReply, error) {
	if size < 0 {
		return guestproto.ExtractReply{}, api.Errorf(api.ErrInvalid, "unpacking an archive in the guest: its size is %d", size)
	}
	req := guestproto.ExtractArchive{
		Envelope:    guestproto.Envelope{Action: guestproto.ActionExtractArchive},
		Destination: destination,
		ArchiveSize: size,
	}
	return c.upload(ctx, req, func(l *link) error {
		src := &sourceReader{r: io.LimitReader(r, size)}
		n, err := io.CopyBuffer(deadlineWriter{l}, struct{ io.Reader }{src}, make([]byte, 32<<10))
		switch {
		case src.err != nil:
			return &sourceError{src.err}
		case err == nil && n < size:
			return &sourceError{api.Errorf(api.ErrInvalid, "it ends after %d of %d bytes", n, size)}
		}
		return err
	}, func(l *link) (guestproto.ExtractReply, error) {
		var reply guestproto.ExtractReply
		_ = l.conn.SetReadDeadline(time.Time{})
		err := l.readReply(&reply, "entry_count", "bytes_written")
		return reply, err
	})
}

// upload sends an archive and reads the answer. Unpacking may take long after
// the last byte, so the answer is waited for until ctx ends.
func (c *Client) upload(ctx context.Context, req any, send func(*link) error,
	receive func(*link) (guestproto.ExtractReply, error)) (guestproto.ExtractReply, error) {
	const doing = "unpacking an archive in the guest"
	l, err := c.open(ctx, req)
	if err != nil {
		return guestproto.ExtractReply{}, fmt.Errorf("%s: %w", doing, err)
	}
	defer l.close()
	sendErr := send(l)
	var src *sourceError
	if errors.As(sendErr, &src) {
		return guestproto.ExtractReply{}, fmt.Errorf("%s: reading the archive: %w", doing, l.caller(ctx, src.err))
	}
	if sendErr != nil && !hungUp(sendErr) {
		return guestproto.ExtractReply{}, fmt.Errorf("%s: sending it: %w", doing, l.cause(ctx, sendErr))
	}
	// A guest that hung up in the middle has said why.
	reply, err := receive(l)
	if err == nil && sendErr != nil {
		err = api.Errorf(api.ErrDamaged, "the guest reports success without having read the archive")
	}
	if err == nil {
		err = reply.Check()
	}
	if err != nil {
		return guestproto.ExtractReply{}, fmt.Errorf("%s: %w", doing, l.cause(ctx, err))
	}
	return reply, nil
}

// caller is cause for an error of the caller's own reader or writer.
func (l *link) caller(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// hungUp reports whether a write failed because the peer reads no more.
func hungUp(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.ErrClosedPipe)
}

// sourceError marks an error of the caller's reader.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

type sourceReader struct {
	r   io.Reader
	err error
}

func (s *sourceReader) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// deadlineWriter gives every write the guest's patience.
type deadlineWriter struct{ l *link }

func (w deadlineWriter) Write(b []byte) (int, error) {
	if err := w.l.write(b); err != nil {
		return 0, err
	}
	return len(b), nil
}

// ExportArchive writes the tar of path in the guest to w. The header's counts
// are the guest's claims. What was written to w before an error is to be
// thrown away.
func (c *Client) ExportArchive(ctx context.Context, path string, w io.Writer) (guestproto.ExportHeader, error) {
	req := guestproto.ExportArchive{
		Envelope: guestproto.Envelope{Action: guestproto.ActionExportArchive, Stream: true},
		Path:     path,
	}
	return c.export(ctx, req, func(l *link) (guestproto.ExportHeader, error) {
		return c.receiveFrames(l, w)
	})
}

func (c *Client) receiveFrames(l *link, w io.Writer) (guestproto.ExportHeader, error) {
	var head, result guestproto.ExportHeader
	fr := newFrames(l)
	typ, p, err := fr.next(l.patience)
	switch {
	case err != nil:
		return head, err
	case typ == guestproto.FrameError:
		return head, remoteError(p)
	case typ != guestproto.FrameHeader:
		return head, unexpectedFrame(typ)
	}
	if err := guestproto.Decode(p, &head, "workspace_path", "artifact_type"); err != nil {
		return head, fmt.Errorf("reading the archive's header: %w", err)
	}
	if err := head.Check(c.opts.MaxArchive); err != nil {
		return head, err
	}
	var total int64
	ended := false
	pace := newPace(l)
	for {
		typ, p, err := fr.next(l.patience)
		if err != nil {
			return head, err
		}
		switch {
		case typ == guestproto.FrameData && !ended:
			if total += int64(len(p)); total > c.opts.MaxArchive {
				return head, api.Errorf(api.ErrExhausted, "the guest's archive is longer than the limit of %d bytes", c.opts.MaxArchive)
			}
			if err := pace.write(w, p); err != nil {
				return head, err
			}
		case typ == guestproto.FrameDataEnd && !ended:
			ended = true
		case typ == guestproto.FrameError:
			return head, remoteError(p)
		case typ == guestproto.FrameResult && ended:
			if err := guestproto.Decode(p, &result, "archive_size", "entry_count", "bytes_written"); err != nil {
				return head, fmt.Errorf("reading the archive's result: %w", err)
			}
			if result.ArchiveSize != total {
				return head, api.Errorf(api.ErrDamaged, "the guest sent %d bytes of archive and reports %d", total, result.ArchiveSize)
			}
			return result, result.Check(c.opts.MaxArchive)
		default:
			return head, unexpectedFrame(typ)
		}
	}
}

// ExportArchivePlain is ExportArchive in the plain form.
func (c *Client) ExportArchivePlain(ctx context.Context, path string, w io.Writer) (guestproto.ExportHeader, error) {
	req := guestproto.ExportArchive{
		Envelope: guestproto.Envelope{Action: guestproto.ActionExportArchive},
		Path:     path,
	}
	return c.export(ctx, req, func(l *link) (guestproto.ExportHeader, error) {
		var head guestproto.ExportHeader
		_ = l.conn.SetReadDeadline(time.Time{}) // the guest measures the tree first
		if _, err := l.r.Peek(1); err != nil {
			return head, err
		}
		_ = l.conn.SetReadDeadline(time.Now().Add(l.patience))
		line, err := guestproto.ReadLine(l.r, guestproto.MaxHeaderLine)
		if err != nil {
			return head, err
		}
		if err := guestproto.DecodeReply(line, &head, "workspace_path", "artifact_type", "archive_size", "entry_count", "bytes_written"); err != nil {
			return head, err
		}
		if err := head.Check(c.opts.MaxArchive); err != nil {
			return head, err
		}
		return head, c.receiveRaw(l, w, head.ArchiveSize)
	})
}

// receiveRaw copies exactly size bytes to w and wants the end right there.
func (c *Client) receiveRaw(l *link, w io.Writer, size int64) error {
	buf := make([]byte, 32<<10)
	pace := newPace(l)
	for left := size; left > 0; {
		n, err := l.r.Read(buf[:min(int64(len(buf)), left)])
		left -= int64(n)
		if n > 0 {
			if werr := pace.write(w, buf[:n]); werr != nil {
				return werr
			}
		}
		if err != nil && left > 0 {
			if errors.Is(err, io.EOF) {
				return api.Errorf(api.ErrDamaged, "the guest's archive ends %d bytes before the %d it announced", left, size)
			}
			return err
		}
	}
	if _, err := l.r.ReadByte(); !errors.Is(err, io.EOF) {
		if err != nil {
			return err
		}
		return api.Errorf(api.ErrDamaged, "the guest's archive is longer than the %d bytes it announced", size)
	}
	return nil
}

func (c *Client) export(ctx context.Context, req any, receive func(*link) (guestproto.ExportHeader, error)) (guestproto.ExportHeader, error) {
	const doing = "fetching an archive from the guest"
	l, err := c.open(ctx, req)
	if err != nil {
		return guestproto.ExportHeader{}, fmt.Errorf("%s: %w", doing, err)
	}
	defer l.close()
	head, err := receive(l)
	var own *sourceError
	switch {
	case errors.As(err, &own):
		return guestproto.ExportHeader{}, fmt.Errorf("%s: writing it: %w", doing, l.caller(ctx, own.err))
	case err != nil:
		return guestproto.ExportHeader{}, fmt.Errorf("%s: %w", doing, l.cause(ctx, err))
	}
	return head, nil
}

// A pace gives up on a guest that sends less than progress bytes in patience.
// The time that the caller's writer takes does not count.
type pace struct {
	l     *link
	got   int
	since time.Time
}

func newPace(l *link) *pace {
	p := &pace{l: l, since: time.Now()}
	p.setDeadline()
	return p
}

func (p *pace) setDeadline() {
	_ = p.l.conn.SetReadDeadline(p.since.Add(p.l.patience))
}

// write passes on b, which has just arrived.
func (p *pace) write(w io.Writer, b []byte) error {
	arrived := time.Now()
	p.got += len(b)
	if p.got < progress && arrived.Sub(p.since) > p.l.patience {
		return api.Errorf(api.ErrDeadline, "the guest sends too slowly: %d bytes in %s", p.got, p.l.patience)
	}
	if _, err := w.Write(b); err != nil {
		return &sourceError{err}
	}
	now := time.Now()
	if p.got >= progress {
		p.got, p.since = 0, now
	} else {
		p.since = p.since.Add(now.Sub(arrived))
	}
	p.setDeadline()
	return nil
}
