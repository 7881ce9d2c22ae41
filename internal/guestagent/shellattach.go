package guestagent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// attachShell connects the caller with a shell until one of the two ends it.
// The shell is never slowed down by a caller that reads slowly: such a caller
// misses output, and is told so.
func (q *request) attachShell(ctx context.Context, line []byte) error {
	var req guestproto.AttachShell
	if err := q.streamOnly(guestproto.ActionAttachShell); err != nil {
		return err
	}
	sh, err := q.namedShell(line, &req, &req.ShellID)
	if err != nil {
		return err
	}
	_, end, _ := sh.out.Bounds()
	cursor := end
	if req.Cursor != nil {
		cursor = *req.Cursor
	}
	if cursor < 0 || cursor > end {
		return api.Errorf(api.ErrInvalid, "the cursor %d is not between 0 and %d, which is all that shell %q has written", cursor, end, sh.id)
	}
	sh.resize(guestproto.Resize{Cols: req.Cols, Rows: req.Rows})
	if err := q.sendHeader(guestproto.ShellAttached{Shell: sh.message(), Cursor: cursor}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	a := &attachment{q: q, shell: sh, granting: make(chan struct{}, 1)}
	received := make(chan struct{})
	go func() {
		defer close(received)
		cancel(a.receive())
	}()
	err = a.deliver(ctx, cursor)
	_ = q.conn.SetReadDeadline(time.Unix(1, 0))
	<-received
	if err != nil {
		q.gone = q.gone || errors.Is(err, errGone)
		return err
	}
	return q.reply(sh.message())
}

// An attachment is one caller's connection with a shell.
type attachment struct {
	q     *request
	shell *shell

	ahead    atomic.Int64 // stdin that was received and not granted again
	grants   atomic.Int64 // stdin that may be granted again
	granting chan struct{}
}

// taken notes that the terminal has taken input. It is called by whoever feeds
// the terminal and must not wait.
func (a *attachment) taken(n int) {
	a.grants.Add(int64(n))
	select {
	case a.granting <- struct{}{}:
	default:
	}
}

// deliver sends the shell's output until it ends, or why it cannot go on.
func (a *attachment) deliver(ctx context.Context, cursor int64) error {
	buf := chunks.Get().(*[outputChunk]byte)
	defer chunks.Put(buf)
	for {
		changed := a.shell.out.Changed()
		_, end, ended := a.shell.out.Bounds()
		at, n := a.shell.out.ReadAt(buf[:], cursor)
		if at > cursor {
			text := fmt.Sprintf("pyro-agent: %d bytes of output were missed\n", at-cursor)
			if err := a.q.sent(a.q.frame(guestproto.FrameStderr, []byte(text))); err != nil {
				return err
			}
		}
		cursor = at + int64(n)
		if n > 0 {
			if err := a.q.sent(a.q.frame(guestproto.FrameStdout, buf[:n])); err != nil {
				return err
			}
		}
		if granted := a.grants.Swap(0); granted > 0 {
			a.ahead.Add(-granted)
			var grant [4]byte
			binary.BigEndian.PutUint32(grant[:], uint32(granted))
			if err := a.q.sent(a.q.frame(guestproto.FrameStdinWindow, grant[:])); err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if n > 0 {
			continue
		}
		if ended && cursor >= end {
			<-a.shell.done
			return nil
		}
		select {
		case <-changed:
		case <-a.granting:
		case <-ctx.Done():
		}
	}
}

// receive takes the caller's frames until the connection ends, and returns why.
func (a *attachment) receive() error {
	fr := guestproto.NewFrameReader(a.q.r)
	for {
		typ, p, err := fr.Next()
		switch {
		case errors.Is(err, api.ErrDamaged):
			return api.Errorf(api.ErrInvalid, "reading the caller's frames: %w", err)
		case err != nil:
			return errGone
		}
		if err := a.frame(typ, p); err != nil {
			return err
		}
	}
}

func (a *attachment) frame(typ guestproto.FrameType, p []byte) error {
	switch typ {
	case guestproto.FrameStdin:
		if a.ahead.Add(int64(len(p))) > guestproto.StdinWindow {
			return api.Errorf(api.ErrInvalid, "more stdin was sent than the window of %d bytes allows", guestproto.StdinWindow)
		}
		err := a.shell.write(slices.Clone(p), a.taken)
		if errors.Is(err, api.ErrState) {
			return nil // the result is on its way
		}
		return err
	case guestproto.FrameStdinClose: // no more will be typed: the shell goes on
		return nil
	case guestproto.FrameResize:
		var size guestproto.Resize
		if err := decodeRequest(p, &size, "cols", "rows"); err != nil {
			return err
		}
		a.shell.resize(size)
		return nil
	case guestproto.FrameSignal:
		var s guestproto.Signal
		if err := decodeRequest(p, &s, "signal"); err != nil {
			return err
		}
		sig, ok := signals[s.Name]
		if !ok {
			return api.Errorf(api.ErrInvalid, "the signal %q is none of HUP, INT, TERM, KILL", s.Name)
		}
		a.shell.signal(sig)
		return nil
	}
	return api.Errorf(api.ErrInvalid, "the caller sent a frame of type %d, which belongs to nothing here", typ)
}
