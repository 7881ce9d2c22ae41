package guestclient

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// ExecIO is what a command in the guest is connected to. Every field may be
// nil.
type ExecIO struct {
	// Stdin is copied to the command until it ends. A Read that blocks is not
	// waited for when the command has ended: the goroutine in it ends with the
	// next byte or the reader's close.
	Stdin io.Reader
	// Stdout and Stderr receive the command's output as it comes. A slow
	// writer slows the command down. An error of theirs ends the command.
	Stdout, Stderr io.Writer
	// Resize and Signals pass what happens at the caller's terminal.
	Resize  <-chan guestproto.Resize
	Signals <-chan guestproto.Signal
	// Started is called once with the command's process id in the guest.
	Started func(pid int)
}

// execSlack is the time beyond the command's own limit that the guest gets to
// end it (TERM, a grace, KILL) before the host gives up.
const execSlack = 30 * time.Second

// execLimit is when the host gives up on a command with a time limit. A guest that
// needs longer is not slow, it stands still.
func (c *Client) execLimit(timeout time.Duration) time.Duration {
	return timeout + execSlack + c.opts.Patience/4
}

// Exec runs one command in the streaming form and returns when it has ended
// and its output was written. The reply's Stdout and Stderr are empty. A
// command that exits non-zero is a reply, not an error. When ctx ends the
// guest kills the command's whole process tree.
//
// It always sets req.Action, Stream and Stdin, and Version to what a user needs.
func (c *Client) Exec(ctx context.Context, req guestproto.ExecRequest, streams ExecIO) (guestproto.ExecReply, error) {
	reply, err := c.exec(ctx, req, streams)
	if err != nil {
		return guestproto.ExecReply{}, fmt.Errorf("running a command in the guest: %w", err)
	}
	return reply, nil
}

func (c *Client) exec(ctx context.Context, req guestproto.ExecRequest, streams ExecIO) (guestproto.ExecReply, error) {
	var none guestproto.ExecReply
	req.Action, req.Stream, req.Stdin = guestproto.ActionExec, true, streams.Stdin != nil
	req.Version = max(req.Version, userVersion(req.User))
	timeout, err := execTimeout(req.TimeoutSeconds)
	if err != nil {
		return none, err
	}
	outer := ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, c.execLimit(timeout),
			api.Errorf(api.ErrDeadline, "the guest did not end the command at its time limit"))
		defer cancel()
	}
	l, err := c.open(ctx, req)
	if err != nil {
		return none, err
	}
	defer l.close()
	s := &execSession{link: l, frames: newFrames(l), streams: streams, credit: newCredit()}
	senders, stopSenders := context.WithCancel(ctx)
	s.startSenders(senders)
	reply, err := s.receive()
	stopSenders()
	s.credit.close()
	if err != nil {
		if werr := s.sendError(); werr != nil && ctx.Err() == nil {
			err = werr
		}
		err = l.cause(ctx, err)
		if outer.Err() != nil {
			err = context.Cause(outer)
		}
		return none, err
	}
	return reply, nil
}

// execTimeout checks a command's time limit and returns it.
func execTimeout(seconds float64) (time.Duration, error) {
	if math.IsNaN(seconds) || seconds < 0 || seconds > 365*24*3600 {
		return 0, api.Errorf(api.ErrInvalid, "a time limit of %v s is not between 0 and a year", seconds)
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

type execSession struct {
	link    *link
	frames  *frames
	streams ExecIO
	credit  *credit

	writeMu sync.Mutex
	errMu   sync.Mutex
	err     error
}

// receive reads frames up to the result.
func (s *execSession) receive() (guestproto.ExecReply, error) {
	var none guestproto.ExecReply
	typ, p, err := s.frames.next(s.link.patience)
	if err != nil {
		return none, err
	}
	switch typ {
	case guestproto.FrameStarted:
		var st guestproto.Started
		if err := guestproto.Decode(p, &st, "pid"); err != nil {
			return none, fmt.Errorf("reading that the command has started: %w", err)
		}
		if s.streams.Started != nil {
			s.streams.Started(st.PID)
		}
	case guestproto.FrameError:
		return none, remoteError(p)
	default:
		return none, unexpectedFrame(typ)
	}
	if p, err = s.pass(); err != nil {
		return none, err
	}
	var r guestproto.ExecReply
	if err := guestproto.Decode(p, &r, "exit_code"); err != nil {
		return none, fmt.Errorf("reading the command's result: %w", err)
	}
	r.Stdout, r.Stderr = "", ""
	if err := r.Check(); err != nil {
		return none, err
	}
	return r, nil
}

// pass delivers output up to the result, which it returns undecoded. It is
// valid until the next frame is read.
func (s *execSession) pass() (result []byte, err error) {
	for {
		typ, p, err := s.frames.next(0)
		if err != nil {
			return nil, err
		}
		switch typ {
		case guestproto.FrameStdout:
			err = deliver(s.streams.Stdout, p, "stdout")
		case guestproto.FrameStderr:
			err = deliver(s.streams.Stderr, p, "stderr")
		case guestproto.FrameStdinWindow:
			if len(p) != 4 {
				return nil, api.Errorf(api.ErrDamaged, "the guest's stdin window has %d bytes instead of 4", len(p))
			}
			err = s.credit.add(binary.BigEndian.Uint32(p))
		case guestproto.FrameResult:
			return p, nil
		case guestproto.FrameError:
			err = remoteError(p)
		default:
			err = unexpectedFrame(typ)
		}
		if err != nil {
			return nil, err
		}
	}
}

// deliver writes output to where the caller wants it.
func deliver(w io.Writer, p []byte, name string) error {
	if w == nil {
		return nil
	}
	if _, err := w.Write(p); err != nil {
		return api.Errorf(api.ErrCanceled, "writing the command's %s: %w", name, err)
	}
	return nil
}

// startSenders copies stdin, resizes and signals to the guest until ctx ends.
func (s *execSession) startSenders(ctx context.Context) {
	if s.streams.Stdin != nil {
		go s.sendStdin(ctx)
	}
	if s.streams.Resize == nil && s.streams.Signals == nil {
		return
	}
	go func() {
		resize, signals := s.streams.Resize, s.streams.Signals
		for {
			var typ guestproto.FrameType
			var v any
			select {
			case <-ctx.Done():
				return
			case r, ok := <-resize:
				if !ok {
					resize = nil
					continue
				}
				typ, v = guestproto.FrameResize, r
			case g, ok := <-signals:
				if !ok {
					signals = nil
					continue
				}
				typ, v = guestproto.FrameSignal, g
			}
			p, err := guestproto.Encode(v)
			if err == nil {
				err = s.send(typ, p[:len(p)-1])
			}
			if err != nil {
				s.fail(err)
				return
			}
		}
	}()
}

// sendStdin sends no byte that the guest has not granted room for.
func (s *execSession) sendStdin(ctx context.Context) {
	buf := make([]byte, 32<<10)
	for {
		n, err := s.streams.Stdin.Read(buf)
		if ctx.Err() != nil {
			return
		}
		for sent := 0; sent < n; {
			k := s.credit.take(n - sent)
			if k == 0 {
				return // the command has ended
			}
			if werr := s.send(guestproto.FrameStdin, buf[sent:sent+k]); werr != nil {
				s.fail(fmt.Errorf("sending stdin: %w", werr))
				return
			}
			sent += k
		}
		switch {
		case errors.Is(err, io.EOF):
			if werr := s.send(guestproto.FrameStdinClose, nil); werr != nil {
				s.fail(fmt.Errorf("ending stdin: %w", werr))
			}
			return
		case err != nil:
			s.fail(api.Errorf(api.ErrCanceled, "reading the command's stdin: %w", err))
			return
		}
	}
}

func (s *execSession) send(t guestproto.FrameType, p []byte) error {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	_ = s.link.conn.SetWriteDeadline(time.Now().Add(s.link.patience))
	return guestproto.WriteFrame(s.link.conn, t, p)
}

// fail records the first failure of a sender and ends the connection, so that
// the receiver stops too. A guest that has hung up already is the receiver's to
// explain: its last frames may still be on the way.
func (s *execSession) fail(err error) {
	if hungUp(err) {
		return
	}
	s.errMu.Lock()
	if s.err == nil {
		s.err = err
	}
	s.errMu.Unlock()
	_ = s.link.conn.Close()
}

func (s *execSession) sendError() error {
	s.errMu.Lock()
	defer s.errMu.Unlock()
	return s.err
}

// credit counts how many bytes of stdin the guest has room for.
type credit struct {
	mu     sync.Mutex
	cond   *sync.Cond
	n      int64
	closed bool
}

// maxCredit bounds what grants can add up to; an honest guest stays at
// StdinWindow.
const maxCredit = 64 << 20

func newCredit() *credit {
	c := &credit{n: guestproto.StdinWindow}
	c.cond = sync.NewCond(&c.mu)
	return c
}

func (c *credit) add(n uint32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n+int64(n) > maxCredit {
		return api.Errorf(api.ErrDamaged, "the guest grants a stdin window of %d bytes", c.n+int64(n))
	}
	c.n += int64(n)
	c.cond.Broadcast()
	return nil
}

// take waits for room and takes at most n bytes of it; 0 means closed.
func (c *credit) take(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.n == 0 && !c.closed {
		c.cond.Wait()
	}
	if c.closed {
		return 0
	}
	k := int(min(int64(n), c.n))
	c.n -= int64(k)
	return k
}

func (c *credit) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cond.Broadcast()
}

// ExecPlain runs one command in the plain form, which every agent speaks: no
// stdin, and outputs as text, cut by the guest. It sets req.Action.
func (c *Client) ExecPlain(ctx context.Context, req guestproto.ExecRequest) (guestproto.ExecReply, error) {
	var r guestproto.ExecReply
	const doing = "running a command in the guest"
	req.Action, req.Stream, req.Stdin, req.TTY = guestproto.ActionExec, false, false, nil
	req.Version = max(req.Version, userVersion(req.User))
	timeout, err := execTimeout(req.TimeoutSeconds)
	if err != nil {
		return r, fmt.Errorf("%s: %w", doing, err)
	}
	// Without a limit of its own the command runs until ctx ends.
	limit := time.Duration(math.MaxInt64 / 4)
	if timeout > 0 {
		limit = c.execLimit(timeout)
	}
	if err := c.ask(ctx, doing, limit, req, &r, "stdout", "stderr", "exit_code"); err != nil {
		return guestproto.ExecReply{}, err
	}
	if err := r.Check(); err != nil {
		return guestproto.ExecReply{}, fmt.Errorf("%s: %w", doing, err)
	}
	return r, nil
}
