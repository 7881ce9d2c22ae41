package guestagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/guestagent/boot"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// A source brings connections to the server until ctx ends or it fails.
type source func(context.Context, *Server, *slog.Logger) error

// TokenVariable is where the agent finds the token that it shows a host it
// dials. It is removed from the environment before any command runs.
const TokenVariable = "PYRO_AGENT_TOKEN"

// openSource opens what the options name, so that a wrong name is known at once.
func openSource(o options) (source, error) {
	if o.dial != "" {
		token := os.Getenv(TokenVariable)
		if err := os.Unsetenv(TokenVariable); err != nil {
			return nil, err
		}
		if token == "" || strings.ContainsAny(token, "\r\n") || len(token) > 256 {
			return nil, fmt.Errorf("--dial needs a token of one line in %s", TokenVariable)
		}
		return dialHost(strings.TrimPrefix(o.dial, "unix:"), token), nil
	}
	l, err := openListener(o.listen)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, s *Server, logger *slog.Logger) error {
		return guestconn.HandleHybrid(ctx, l, func(ctx context.Context, r *guestconn.HybridRequest) {
			if r.Port != guestproto.Port {
				_ = r.Conn.Close() // nobody listens on that port
				return
			}
			if err := r.Accept(); err != nil {
				_ = r.Conn.Close()
				return
			}
			s.Handle(ctx, r.Conn)
		}, logger)
	}, nil
}

func openListener(name string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(name, "unix:"); ok {
		return guestconn.ListenUnix(path)
	}
	number, ok := strings.CutPrefix(name, "fd:")
	if !ok {
		return nil, fmt.Errorf("--listen %s: want unix:PATH or fd:N", name)
	}
	fd, err := strconv.Atoi(number)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("--listen %s: want the number of an inherited descriptor from 3 on", name)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("--listen %s: descriptor %d is not a listening socket: %w", name, fd, err)
	}
	return l, nil
}

// redial bounds the pause between two attempts to reach the host, which hangs
// up on purpose before it saves the sandbox and listens again soon after.
const (
	redialMin  = 10 * time.Millisecond
	redialMax  = 250 * time.Millisecond
	redialSoon = 2 * time.Second // for how long it stays at redialMin
)

// A dialler keeps up the session of an agent that connects to its host.
type dialler struct {
	path, token string
	server      *Server
	logger      *slog.Logger

	pipe *guestconn.SplicedPipe // of the session, nil without one
	over chan struct{}          // closed when the session has ended
}

// dialHost connects to the host's socket, shows the token and serves a
// multiplexed session, again and again. The host says whether a connection
// carries on the session that there is or begins a new one, as it does with a
// copy of this guest: then the one that there is ends, with its requests.
func dialHost(path, token string) source {
	return func(ctx context.Context, s *Server, logger *slog.Logger) error {
		d := &dialler{path: path, token: token, server: s, logger: logger}
		lost := time.Now()
		pause := redialMin
		for ctx.Err() == nil {
			if err := d.connect(ctx); err != nil {
				logger.Debug("dialling the host", "err", err)
			} else {
				d.wait(ctx)
				lost, pause = time.Now(), 0
			}
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
			if time.Since(lost) > redialSoon {
				pause = min(2*pause, redialMax)
			}
			pause = max(pause, redialMin)
		}
		return nil
	}
}

// connect gives the session a connection, or begins one on it.
func (d *dialler) connect(ctx context.Context) (err error) {
	c, err := guestconn.DialUnix(ctx, d.path)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = c.Close()
		}
	}()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if _, err := io.WriteString(c, d.token+"\n"); err != nil {
		return err
	}
	next, err := guestconn.ReadGreeting(c)
	if err != nil {
		return err
	}
	if next == "" {
		if d.pipe == nil {
			return errors.New("the host goes on with a session that there is not")
		}
		return d.pipe.Attach(c)
	}
	d.token = next
	if d.pipe != nil {
		_ = d.pipe.Close()
		<-d.over
	}
	d.pipe, d.over = guestconn.NewSplicedPipe(c, guestconn.Guest), make(chan struct{})
	go func(pipe *guestconn.SplicedPipe, over chan struct{}) {
		defer close(over)
		if err := serveMux(ctx, pipe, d.server); err != nil {
			d.logger.Debug("serving the host", "err", err)
		}
	}(d.pipe, d.over)
	return nil
}

// wait returns when the session is without a connection, or at its end.
func (d *dialler) wait(ctx context.Context) {
	select {
	case <-d.pipe.Detached():
	case <-d.over:
		_ = d.pipe.Close()
		d.pipe = nil
	case <-ctx.Done():
	}
}

// serveMux serves one multiplexed session to its end.
func serveMux(ctx context.Context, pipe io.ReadWriteCloser, s *Server) error {
	m, err := guestconn.NewMux(ctx, pipe, guestconn.Guest)
	if err != nil {
		return err
	}
	defer m.Close()
	defer context.AfterFunc(ctx, func() { _ = m.Close() })()
	return s.Serve(ctx, m)
}

// serveChannels serves a machine's host by every way there is: the virtio port
// named "agent" and AF_VSOCK. port is nil if it is not open yet. It returns only
// if there is none.
func serveChannels(ctx context.Context, port *os.File, s *Server, logger *slog.Logger) error {
	ways := 0
	if l, err := guestconn.ListenVsock(guestproto.Port); err == nil {
		ways++
		go func() {
			logger.Error("serving AF_VSOCK", "err", s.Serve(ctx, l))
		}()
	}
	var err error
	if port == nil {
		port, err = boot.OpenPort()
	}
	if err != nil && ways == 0 {
		return fmt.Errorf("looking for a way to the host: %w, and AF_VSOCK is not there either", err)
	}
	fmt.Fprintln(os.Stderr, "pyro-agent: ready")
	if err != nil {
		select {}
	}
	return servePort(ctx, port, s, logger)
}

// hostPoll is how often the agent looks whether a host has connected. Without
// one every read of the port ends at once, and poll(2) reports POLLHUP at once
// (port_fops_poll in drivers/char/virtio_console.c), so nothing can be waited
// for.
const hostPoll = 20 * time.Millisecond

// servePort serves one host after another on the port, which stays open: a
// second open would be refused until the first is really closed.
func servePort(ctx context.Context, port *os.File, s *Server, logger *slog.Logger) error {
	defer port.Close()
	for ctx.Err() == nil {
		if !hostConnected(port) {
			select {
			case <-ctx.Done():
			case <-time.After(hostPoll):
			}
			continue
		}
		_ = port.SetDeadline(time.Time{})
		if err := serveMux(ctx, portSession{port}, s); err != nil {
			logger.Debug("serving the host", "err", err)
		}
	}
	return ctx.Err()
}

func hostConnected(port *os.File) bool {
	raw, err := port.SyscallConn()
	if err != nil {
		return false
	}
	connected := false
	_ = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, 0)
		connected = err == nil && fds[0].Revents&unix.POLLHUP == 0
	})
	return connected
}

// portSession is one session's use of the port: closing it ends what waits in
// it and leaves the port open.
type portSession struct{ *os.File }

func (p portSession) Close() error { return p.SetDeadline(time.Unix(1, 0)) }
