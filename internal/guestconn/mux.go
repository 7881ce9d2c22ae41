package guestconn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/libp2p/go-yamux/v5"

	"github.com/pyro-mcp/pyro/api"
)

// A Role says which end of a multiplexed pipe this process is.
type Role int

// The two ends. Only the host opens streams; only the guest accepts them.
const (
	Host Role = iota
	Guest
)

// The sizes of a multiplexed session. What a peer can make this process hold
// is maxStreams times streamWindow, plus the one frame in flight.
const (
	// streamWindow is how much of one stream the receiver buffers. It is the
	// least that yamux allows, and enough for 60 MB/s over virtio-serial.
	streamWindow = 256 << 10
	// maxStreams is how many streams a guest serves at once.
	maxStreams = 1024
	// muxFrame is the largest frame, so that one stream cannot hold up others.
	muxFrame = 32 << 10
	// never stands for no time limit where the library wants one. A guest may
	// be paused for hours, or be busy under emulation: that it says nothing is
	// no reason to declare it dead. What ends a session is the pipe's end.
	never = 100 * 365 * 24 * time.Hour
)

// A Mux carries many streams over one pipe. Its methods may be called
// concurrently.
type Mux struct {
	session *yamux.Session
	role    Role
}

// NewMux makes the pipe's two ends agree that a new session starts and returns
// when they have, or when ctx ends. Both ends must call it, in any order: a
// virtio-serial port outlives the host process that used it, so the pipe may
// still hold the middle of an older session, which NewMux reads over. See
// docs/guest-protocol.md for the exchange.
//
// The Mux owns pipe: a failed NewMux and Close both close it. A pipe that ends
// while the peers are still agreeing is an io.EOF.
func NewMux(ctx context.Context, pipe io.ReadWriteCloser, role Role) (*Mux, error) {
	stop := context.AfterFunc(ctx, func() { _ = pipe.Close() })
	err := synchronize(pipe, role)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = pipe.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("agreeing on a session with the %s: %w", role.peer(), err)
	}
	return startMux(pipe, role)
}

func startMux(pipe io.ReadWriteCloser, role Role) (*Mux, error) {
	config := yamux.DefaultConfig()
	config.EnableKeepAlive = false
	config.MeasureRTTInterval = never
	config.ConnectionWriteTimeout = never
	config.InitialStreamWindowSize = streamWindow
	config.MaxStreamWindowSize = streamWindow
	config.MaxMessageSize = muxFrame
	config.ReadBufSize = muxFrame
	config.LogOutput = io.Discard // every fault reaches a caller as an error
	open, maxIncoming := yamux.Client, uint32(0)
	if role == Guest {
		open, maxIncoming = yamux.Server, maxStreams
	}
	config.MaxIncomingStreams = maxIncoming
	s, err := open(pipeConn{ReadWriteCloser: pipe, guard: &frameGuard{r: pipe}}, config, nil)
	if err != nil {
		_ = pipe.Close()
		return nil, api.Errorf(api.ErrInternal, "starting a multiplexed session: %w", err)
	}
	return &Mux{session: s, role: role}, nil
}

func (r Role) peer() string {
	if r == Host {
		return "guest"
	}
	return "host"
}

// Open opens a stream to the guest. It does not wait for the guest to accept
// it. A session that has ended is [ErrRefused].
func (m *Mux) Open(ctx context.Context) (net.Conn, error) {
	s, err := m.session.OpenStream(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("opening a stream to the guest: %w", ctx.Err())
		}
		return nil, fmt.Errorf("opening a stream to the guest: %w (%w)", ErrRefused, err)
	}
	return &muxStream{s}, nil
}

// Accept waits for the host's next stream. It fails with net.ErrClosed when
// the session has ended.
func (m *Mux) Accept() (net.Conn, error) {
	s, err := m.session.AcceptStream()
	if err != nil {
		return nil, fmt.Errorf("waiting for a stream of the host: %w (%w)", net.ErrClosed, err)
	}
	return &muxStream{s}, nil
}

// Done is closed when the session has ended, by Close or by the pipe's end.
func (m *Mux) Done() <-chan struct{} { return m.session.CloseChan() }

// Close ends the session, all its streams and the pipe. Safe to call twice.
func (m *Mux) Close() error { return m.session.Close() }

// Addr is a name for logs; a multiplexed session has no address.
func (m *Mux) Addr() net.Addr { return pipeAddr{} }

// muxStream is one stream as a net.Conn.
//
// CloseWrite ends the sending direction; what was sent arrives. Close ends
// both: unless both had ended before, it is an abort, which the peer sees as
// an error in Read and Write, and which may overtake bytes that the peer has
// not read yet. So whoever answers and wants to be heard calls CloseWrite and
// reads to the end before Close.
type muxStream struct {
	*yamux.Stream
}

func (s *muxStream) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, err := s.Stream.Read(b)
	return n, streamError(err)
}

func (s *muxStream) Write(b []byte) (int, error) {
	n, err := s.Stream.Write(b)
	return n, streamError(err)
}

func (s *muxStream) Close() error { return s.Stream.Reset() }

func (s *muxStream) CloseWrite() error { return streamError(s.Stream.CloseWrite()) }

// streamError gives the library's time-out the identity that users of net.Conn
// look for.
func streamError(err error) error {
	if errors.Is(err, yamux.ErrTimeout) {
		return os.ErrDeadlineExceeded
	}
	return err
}

// pipeConn makes the net.Conn that the library wants of a pipe. Deadlines are
// ignored: see never.
type pipeConn struct {
	io.ReadWriteCloser
	guard *frameGuard
}

func (p pipeConn) Read(b []byte) (int, error) { return p.guard.Read(b) }

func (pipeConn) LocalAddr() net.Addr              { return pipeAddr{} }
func (pipeConn) RemoteAddr() net.Addr             { return pipeAddr{} }
func (pipeConn) SetDeadline(time.Time) error      { return nil }
func (pipeConn) SetReadDeadline(time.Time) error  { return nil }
func (pipeConn) SetWriteDeadline(time.Time) error { return nil }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "mux" }
func (pipeAddr) String() string  { return "guest" }
