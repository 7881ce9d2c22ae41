package guestconn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/pyro-mcp/pyro/api"
)

// A SplicedPipe is one byte stream over one connection after another. gVisor
// saves no sandbox that holds a connection to its host; so the host takes the
// connection away while both ends keep the stream, and whatever goes over it,
// until the guest has dialled again. Nothing is sent twice and nothing is lost,
// because both directions of a connection come to their end first: the host ends
// its own, the guest reads up to that end and closes, the host reads up to the
// close.
//
// While there is no connection Read and Write wait. They may be called
// concurrently, as may all methods; each of the two by one caller at a time.
type SplicedPipe struct {
	role Role
	// writing is held, by a value in it, while a Write goes on, and from the end
	// of one connection to the next.
	writing chan struct{}
	closed  chan struct{}

	mu       sync.Mutex // guards the following
	changed  *sync.Cond // in has, or the pipe is closed
	in, out  *part      // nil while detached; they differ until in has come to its end
	ending   *part      // what the host has ended its direction of
	last     *part      // what was attached last
	isClosed bool
}

// A part is one of the connections.
type part struct {
	net.Conn
	ended chan struct{} // closed when nothing of the pipe's is in it any more
}

// NewSplicedPipe returns a pipe that begins on conn, a connection that can end
// one direction alone.
func NewSplicedPipe(conn net.Conn, role Role) *SplicedPipe {
	c := &part{conn, make(chan struct{})}
	p := &SplicedPipe{role: role, writing: make(chan struct{}, 1), closed: make(chan struct{}), in: c, out: c, last: c}
	p.changed = sync.NewCond(&p.mu)
	return p
}

// Read reads what comes over the connections. The end of a connection that
// nobody detached is the pipe's for the host, and for the guest the host's way
// to detach it.
func (p *SplicedPipe) Read(b []byte) (int, error) {
	for {
		conn, err := p.source()
		if err != nil {
			return 0, err
		}
		n, err := conn.Read(b)
		if n > 0 || !errors.Is(err, io.EOF) {
			return n, err
		}
		if !p.atEnd(conn) {
			return 0, io.EOF
		}
	}
}

// source returns the connection to read from, as soon as there is one.
func (p *SplicedPipe) source() (*part, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.in == nil && !p.isClosed {
		p.changed.Wait()
	}
	if p.isClosed {
		return nil, net.ErrClosed
	}
	return p.in, nil
}

// atEnd gives conn up, which was read to its end, and reports whether another may
// follow.
func (p *SplicedPipe) atEnd(conn *part) bool {
	if p.role == Guest {
		// What is being written still arrives: the host reads until the close.
		select {
		case p.writing <- struct{}{}:
		case <-p.closed:
			return false
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.role == Guest {
		p.ending, p.out = conn, nil
	}
	if p.ending != conn || p.isClosed {
		return false
	}
	_ = conn.Close()
	close(conn.ended)
	p.in, p.ending = p.out, nil
	return true
}

// Write writes b to the connection, waiting for one.
func (p *SplicedPipe) Write(b []byte) (int, error) {
	select {
	case p.writing <- struct{}{}:
	case <-p.closed:
		return 0, net.ErrClosed
	}
	defer func() { <-p.writing }()
	p.mu.Lock()
	conn := p.out
	p.mu.Unlock()
	return conn.Write(b)
}

// Detach takes the connection from the pipe; only the host does. When it returns
// without an error, the guest has closed its end. When it does not, because ctx
// has ended or the guest's end broke, the pipe may be without a connection or on
// its way there: Attach mends both.
func (p *SplicedPipe) Detach(ctx context.Context) error {
	select {
	case p.writing <- struct{}{}:
	case <-p.closed:
		return net.ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("waiting for the guest to read: %w", ctx.Err())
	}
	p.mu.Lock()
	if p.ending != nil {
		p.mu.Unlock()
		<-p.writing
		return api.Errorf(api.ErrUnavailable, "the guest has not ended its last connection")
	}
	conn := p.out
	p.ending, p.out = conn, nil
	p.mu.Unlock()
	half, ok := conn.Conn.(interface{ CloseWrite() error })
	if !ok {
		return api.Errorf(api.ErrInternal, "a %T cannot end one direction alone", conn.Conn)
	}
	if err := half.CloseWrite(); err != nil {
		return fmt.Errorf("ending the connection: %w", err)
	}
	select {
	case <-conn.ended:
		return nil
	case <-p.closed:
		return net.ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("waiting for the guest to end its connection: %w", ctx.Err())
	}
}

// Attached reports whether there is a connection to write to.
func (p *SplicedPipe) Attached() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out != nil
}

// Detached is closed when the connection that the pipe was given last is not its
// own any more.
func (p *SplicedPipe) Detached() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last.ended
}

// Attach lets the stream go on over conn, which must be new. A pipe that has a
// connection, or is closed, refuses it with ErrState.
func (p *SplicedPipe) Attach(conn net.Conn) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.isClosed || p.out != nil {
		return api.Errorf(api.ErrState, "the session waits for no connection")
	}
	p.out = &part{conn, make(chan struct{})}
	p.last = p.out
	if p.in == nil {
		p.in = p.out
		p.changed.Broadcast()
	}
	<-p.writing
	return nil
}

// Close ends the pipe and its connection. Safe to call twice.
func (p *SplicedPipe) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.isClosed {
		return nil
	}
	p.isClosed = true
	close(p.closed)
	p.changed.Broadcast()
	for _, c := range []*part{p.in, p.out} {
		if c != nil {
			_ = c.Close()
		}
	}
	return nil
}
