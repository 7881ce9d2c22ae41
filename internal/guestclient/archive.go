package guestclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// UploadArchive unpacks the tar or tar.gz that r yields below destination in
// the guest, without knowing its size before.
func (c *Client) UploadArchive(ctx context.Context, destination string, r io.Reader) (guestproto.ExtractReply, error) {
	req := guestproto.ExtractArchive{
		Envelope:    guestproto.Envelope{Action: guestproto.ActionExtractArchive, Stream: true},
		Destination: destination,
	}
	return upload(ctx, c, unpacking, req, sendData(r), resultOf((*guestproto.ExtractReply).Check, "entry_count", "bytes_written"))
}

// unpacking is what an upload of an archive does.
const unpacking = "unpacking an archive in the guest"

// sendData sends what r yields as FrameData, and FrameDataEnd behind it.
func sendData(r io.Reader) func(*link) error {
	return func(l *link) error {
		buf := make([]byte, 32<<10)
		for {
			n, err := r.Read(buf)
			if n > 0 {
				_ = l.conn.SetWriteDeadline(time.Now().Add(l.patience))
				if err := guestproto.WriteFrame(l.conn, guestproto.FrameData, buf[:n]); err != nil {
					return err
				}
				failpoint.Hit("upload/sent")
			}
			if errors.Is(err, io.EOF) {
				return guestproto.WriteFrame(l.conn, guestproto.FrameDataEnd, nil)
			}
			if err != nil {
				return &sourceError{err}
			}
		}
	}
}

// resultOf reads the one FrameResult or FrameError that answers an upload.
func resultOf[R any](check func(*R) error, required ...string) func(*link) (R, error) {
	return func(l *link) (R, error) {
		var reply, none R
		typ, p, err := newFrames(l).next(0)
		switch {
		case err != nil:
			return none, err
		case typ == guestproto.FrameError:
			return none, remoteError(p)
		case typ != guestproto.FrameResult:
			return none, unexpectedFrame(typ)
		}
		if err := guestproto.Decode(p, &reply, required...); err != nil {
			return none, err
		}
		return reply, check(&reply)
	}
}

// UploadArchivePlain is UploadArchive in the plain form: r must yield exactly
// size bytes.
func (c *Client) UploadArchivePlain(ctx context.Context, destination string, r io.Reader, size int64) (guestproto.ExtractReply, error) {
	if size < 0 {
		return guestproto.ExtractReply{}, api.Errorf(api.ErrInvalid, "%s: its size is %d", unpacking, size)
	}
	req := guestproto.ExtractArchive{
		Envelope:    guestproto.Envelope{Action: guestproto.ActionExtractArchive},
		Destination: destination,
		ArchiveSize: size,
	}
	return upload(ctx, c, unpacking, req, func(l *link) error {
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
		if err := l.readReply(&reply, "entry_count", "bytes_written"); err != nil {
			return reply, err
		}
		return reply, reply.Check()
	})
}

// upload sends a request with data behind it and reads the answer. What the
// guest does with the data may take long after the last byte, so the answer is
// waited for until ctx ends.
func upload[R any](ctx context.Context, c *Client, doing string, req any, send func(*link) error, receive func(*link) (R, error)) (R, error) {
	var none R
	l, err := c.open(ctx, req)
	if err != nil {
		return none, fmt.Errorf("%s: %w", doing, err)
	}
	defer l.close()
	sendErr := send(l)
	var src *sourceError
	if errors.As(sendErr, &src) {
		return none, fmt.Errorf("%s: reading what to send: %w", doing, l.caller(ctx, src.err))
	}
	if sendErr != nil && !hungUp(sendErr) {
		return none, fmt.Errorf("%s: sending it: %w", doing, l.cause(ctx, sendErr))
	}
	// A guest that hung up in the middle has said why.
	reply, err := receive(l)
	if err == nil && sendErr != nil {
		err = api.Errorf(api.ErrDamaged, "the guest reports success without having read it all")
	}
	if err != nil {
		return none, fmt.Errorf("%s: %w", doing, l.cause(ctx, err))
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
	if err := receiveHeader(fr, l.patience, &head, "workspace_path", "artifact_type"); err != nil {
		return head, err
	}
	if err := head.Check(c.opts.MaxArchive); err != nil {
		return head, err
	}
	var total int64
	pace := newPace(l)
	err := receiveData(fr, l.patience, func(p []byte) error {
		if total += int64(len(p)); total > c.opts.MaxArchive {
			return api.Errorf(api.ErrExhausted, "the guest's archive is longer than the limit of %d bytes", c.opts.MaxArchive)
		}
		defer failpoint.Hit("download/received")
		return pace.write(w, p)
	}, &result, "archive_size", "entry_count", "bytes_written")
	if err != nil {
		return head, err
	}
	if result.ArchiveSize != total {
		return head, api.Errorf(api.ErrDamaged, "the guest sent %d bytes of archive and reports %d", total, result.ArchiveSize)
	}
	return result, result.Check(c.opts.MaxArchive)
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
