package network

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
)

// A Conn can end its sending direction alone.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// Relay joins a and b until both directions have ended, and closes them. An end
// of one side's data becomes one on the other. A fault of one, or an end that
// cannot be passed on, is returned after abort, which must break both at once in
// a way that their peers see as such. large takes larger buffers; see
// [LargeBuffers].
func Relay(a, b Conn, abort func(), large bool) (aToB, bToA int64, err error) {
	var once sync.Once
	fault := func(cause error) {
		once.Do(func() {
			err = cause
			abort()
		})
	}
	var wg sync.WaitGroup
	direction := func(to, from Conn, n *int64) {
		var err error
		if *n, err = copyStream(to, from, large); err == nil {
			err = to.CloseWrite()
			if errors.Is(err, syscall.ENOTCONN) {
				err = nil // to has ended in both directions, with nothing lost
			}
		}
		if err != nil {
			fault(err)
		}
	}
	wg.Go(func() { direction(b, a, &aToB) })
	wg.Go(func() { direction(a, b, &bToA) })
	wg.Wait()
	a.Close()
	b.Close()
	return aToB, bToA, err
}

// Reset closes c in a way that its peer takes for a fault and not for an end of
// data, where its kind of connection can.
func Reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	c.Close()
}

// copyStream copies to the end of from.
func copyStream(to io.Writer, from io.Reader, large bool) (n int64, err error) {
	pool := &smallChunks
	if large {
		pool = &largeChunks
	}
	buf := pool.Get().(*[]byte)
	defer pool.Put(buf)
	for {
		k, err := from.Read(*buf)
		if k > 0 {
			if _, werr := to.Write((*buf)[:k]); werr != nil {
				return n, werr
			}
			n += int64(k)
		}
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// The buffers for copying, two of which a relay holds.
const (
	largeChunk = 64 << 10
	smallChunk = 4 << 10
	// LargeBuffers is up to how many relays of one kind may have large ones.
	LargeBuffers = 64
)

var (
	largeChunks = sync.Pool{New: func() any { b := make([]byte, largeChunk); return &b }}
	smallChunks = sync.Pool{New: func() any { b := make([]byte, smallChunk); return &b }}
)
