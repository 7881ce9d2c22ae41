package guestagent

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestagent/process"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// start starts the command. in, where not nil, receives the agent's end of the
// command's stdin and, on a terminal, the terminal.
func (q *request) start(req *guestproto.ExecRequest, out sink, in *input) (*execution, error) {
	spec, err := q.server.spec(req)
	if err != nil {
		return nil, err
	}
	e := &execution{sink: out, unblock: func() { _ = q.conn.SetWriteDeadline(time.Unix(1, 0)) }}
	var mine, theirs []*os.File
	closeAll := func(files []*os.File) {
		for _, f := range files {
			_ = f.Close()
		}
	}
	defer func() { closeAll(theirs) }()
	if req.TTY != nil {
		master, slave, err := openTerminal(req.TTY)
		if err != nil {
			return nil, err
		}
		mine, theirs = append(mine, master), append(theirs, slave)
		spec.Files, spec.Terminal = [3]*os.File{slave, slave, slave}, true
		e.outputs[0] = &output{f: master, keep: true}
		in.terminal = master
		in.f = master
	} else {
		for i := range e.outputs {
			parent, child, err := newPipe(false)
			if err != nil {
				closeAll(mine)
				return nil, err
			}
			mine, theirs = append(mine, parent), append(theirs, child)
			e.outputs[i] = &output{f: parent}
			spec.Files[i+1] = child
		}
		if in != nil && req.Stdin {
			parent, child, err := newPipe(true)
			if err != nil {
				closeAll(mine)
				return nil, err
			}
			mine, theirs = append(mine, parent), append(theirs, child)
			spec.Files[0], in.f = child, parent
		} else {
			null, err := os.Open(os.DevNull)
			if err != nil {
				closeAll(mine)
				return nil, api.Errorf(api.ErrInternal, "opening %s: %w", os.DevNull, err)
			}
			theirs = append(theirs, null)
			spec.Files[0] = null
		}
	}
	e.started = time.Now()
	e.cmd, err = q.server.Runner.Start(spec)
	if err != nil {
		closeAll(mine)
		e.result, e.says, err = cannotStart(req, err)
		if err != nil {
			return nil, err
		}
	}
	return e, nil
}

// execStream runs a command with everything flowing while it runs.
func (q *request) execStream(ctx context.Context, req *guestproto.ExecRequest) error {
	types := [2]guestproto.FrameType{guestproto.FrameStdout, guestproto.FrameStderr}
	// No output overtakes FrameStarted.
	begun := make(chan struct{})
	out := func(stream int, p []byte) error {
		<-begun
		if err := q.frame(types[stream], p); err != nil {
			q.gone = true
			return errGone
		}
		return nil
	}
	in := &input{}
	e, err := q.start(req, out, in)
	if err != nil {
		return err
	}
	pid := 0
	if e.result == nil {
		pid = e.cmd.PID
	}
	line, err := guestproto.Encode(guestproto.Started{PID: pid})
	if err == nil {
		err = q.frame(guestproto.FrameStarted, line[:len(line)-1])
	}
	close(begun)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err != nil {
		cancel(errGone)
	}
	if e.result != nil {
		if err := q.frame(guestproto.FrameStderr, []byte(e.says)); err != nil {
			return err
		}
		return q.reply(e.result)
	}
	in.begin(e.cmd, q, cancel)
	reader := make(chan struct{})
	go func() {
		defer close(reader)
		in.receive(q)
	}()
	reply, err := e.finish(ctx, seconds(req.TimeoutSeconds))
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	cancel(nil) // before the reader is ended, which would count as hanging up
	in.end()
	_ = q.conn.SetReadDeadline(time.Unix(1, 0))
	<-reader
	if err != nil {
		q.gone = q.gone || errors.Is(err, errGone)
		return err
	}
	return q.reply(reply)
}

// An input feeds a command what the caller sends while it runs.
type input struct {
	f        *os.File // stdin's pipe or the terminal; nil if none
	terminal *os.File
	cmd      *process.Command
	cancel   context.CancelCauseFunc

	mu     sync.Mutex
	cond   *sync.Cond
	buf    []byte // at most StdinWindow: what was received and not written
	eof    bool
	broken bool // the command reads no more
	ended  bool
	writer sync.WaitGroup
}

func (in *input) begin(cmd *process.Command, q *request, cancel context.CancelCauseFunc) {
	in.cmd, in.cancel = cmd, cancel
	in.cond = sync.NewCond(&in.mu)
	if in.f != nil {
		in.writer.Go(func() { in.write(q) })
	}
}

// end stops the writer. The terminal is the output's to close.
func (in *input) end() {
	in.mu.Lock()
	in.ended = true
	in.mu.Unlock()
	in.cond.Broadcast()
	if in.f != nil {
		if in.terminal == nil {
			_ = in.f.Close()
		} else {
			_ = in.f.SetWriteDeadline(time.Unix(1, 0))
		}
	}
	in.writer.Wait()
	if in.terminal != nil {
		_ = in.terminal.Close()
	}
}

// receive reads the caller's frames until the connection ends or fails. A
// caller that hangs up, or breaks the protocol, ends the command.
func (in *input) receive(q *request) {
	fr := guestproto.NewFrameReader(q.r)
	for {
		typ, p, err := fr.Next()
		if err != nil {
			if errors.Is(err, api.ErrDamaged) {
				in.cancel(api.Errorf(api.ErrInvalid, "reading the caller's frames: %w", err))
			} else {
				in.cancel(errGone)
			}
			return
		}
		if err := in.frame(typ, p); err != nil {
			in.cancel(err)
			return
		}
	}
}

func (in *input) frame(typ guestproto.FrameType, p []byte) error {
	switch typ {
	case guestproto.FrameStdin:
		return in.feed(p)
	case guestproto.FrameStdinClose:
		in.mu.Lock()
		in.eof = true
		in.mu.Unlock()
		in.cond.Broadcast()
	case guestproto.FrameResize:
		var size guestproto.Resize
		if err := decodeRequest(p, &size, "cols", "rows"); err != nil {
			return err
		}
		in.resize(size)
	case guestproto.FrameSignal:
		var s guestproto.Signal
		if err := decodeRequest(p, &s, "signal"); err != nil {
			return err
		}
		sig, ok := signals[s.Name]
		if !ok {
			return api.Errorf(api.ErrInvalid, "the signal %q is none of HUP, INT, TERM, KILL", s.Name)
		}
		in.signal(sig)
	default:
		return api.Errorf(api.ErrInvalid, "the caller sent a frame of type %d, which belongs to nothing here", typ)
	}
	return nil
}

var signals = map[string]syscall.Signal{
	"HUP": unix.SIGHUP, "INT": unix.SIGINT, "TERM": unix.SIGTERM, "KILL": unix.SIGKILL,
}

// feed takes stdin. The caller never sends more than was granted, so taking it
// never waits, and frames behind it (signals) are read at once.
func (in *input) feed(p []byte) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	switch {
	case in.f == nil:
		return api.Errorf(api.ErrInvalid, "stdin was sent for a command without stdin")
	case in.broken || in.eof:
		return nil
	case len(in.buf)+len(p) > guestproto.StdinWindow:
		return api.Errorf(api.ErrInvalid, "more stdin was sent than the window of %d bytes allows", guestproto.StdinWindow)
	}
	in.buf = append(in.buf, p...)
	in.cond.Broadcast()
	return nil
}

// write passes stdin on and grants what it has passed. A command that closed
// its stdin is granted nothing any more.
func (in *input) write(q *request) {
	chunk := make([]byte, 0, outputChunk)
	for {
		in.mu.Lock()
		for len(in.buf) == 0 && !in.eof && !in.ended {
			in.cond.Wait()
		}
		if in.ended || len(in.buf) == 0 {
			in.mu.Unlock()
			in.closeStdin()
			return
		}
		n := copy(chunk[:outputChunk], in.buf)
		in.mu.Unlock()
		if _, err := in.f.Write(chunk[:n]); err != nil {
			in.mu.Lock()
			in.broken, in.buf = true, nil
			in.mu.Unlock()
			if in.terminal == nil {
				_ = in.f.Close()
			}
			return
		}
		in.mu.Lock()
		// Kept until written, so that the window counts it.
		in.buf = append(in.buf[:0], in.buf[n:]...)
		in.mu.Unlock()
		var grant [4]byte
		binary.BigEndian.PutUint32(grant[:], uint32(n))
		if err := q.frame(guestproto.FrameStdinWindow, grant[:]); err != nil {
			in.cancel(errGone)
			return
		}
	}
}

// closeStdin ends the command's stdin: on a terminal by its end-of-file
// character (0x04, termios(3) VEOF), which only has meaning in canonical mode.
func (in *input) closeStdin() {
	in.mu.Lock()
	eof := in.eof && !in.ended
	in.mu.Unlock()
	if in.terminal == nil {
		_ = in.f.Close()
	} else if eof {
		_, _ = in.f.Write([]byte{4})
	}
}

func (in *input) resize(size guestproto.Resize) {
	if in.terminal != nil {
		resizeTerminal(in.terminal, in.cmd, size)
	}
}

// signal reaches the foreground of a terminal, else the command's group.
func (in *input) signal(sig syscall.Signal) {
	if in.terminal == nil || !signalForeground(in.terminal, in.cmd, sig) {
		in.cmd.Signal(sig)
	}
}

// watchCaller ends the request when a caller of the plain form hangs up. A
// half-close is none: some callers end their sending side after the request.
// The channel is closed when the watch has ended.
func (q *request) watchCaller(ctx context.Context, cancel context.CancelFunc) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, err := io.Copy(io.Discard, q.r)
		if ctx.Err() != nil {
			return
		}
		if err != nil || guestconn.WaitPeerGone(ctx, q.conn) {
			cancel()
		}
	}()
	return done
}
