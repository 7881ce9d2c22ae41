package network

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/pyro-mcp/pyro/api"
)

const (
	// maxTCPFlows is how many connections a guest may have open, or be making.
	// A package manager opens some dozens. The SYN of one more is lost, so that
	// the guest's kernel tries again after a second.
	maxTCPFlows = 1024
	// dialTimeout is how long the other side may take; the guest's kernel gives
	// up after two minutes.
	dialTimeout = 30 * time.Second
)

// forwardTCP answers one SYN of the guest's. It runs in a goroutine of its own.
func (g *Gateway) forwardTCP(r *tcp.ForwarderRequest) {
	to := destination(r.ID())
	if slices.Contains(g.own, to.Addr()) {
		r.Complete(true) // the name server listens elsewhere; there is nothing more
		return
	}
	if !g.begin() {
		r.Complete(true)
		return
	}
	defer g.flows.Done()
	if g.counts.tcpOpen.Add(1) > maxTCPFlows {
		g.counts.tcpOpen.Add(-1)
		r.Complete(false)
		g.tell(Event{Protocol: "tcp", Destination: to, Verdict: Limited, Reason: "too many connections are open"})
		return
	}
	defer g.counts.tcpOpen.Add(-1)
	began := time.Now()
	outside, err := g.dial(g.ctx, "tcp", to)
	if err != nil {
		r.Complete(true)
		g.tell(refused("tcp", to, err))
		return
	}
	defer outside.Close()
	var queue waiter.Queue
	endpoint, terr := r.CreateEndpoint(&queue)
	r.Complete(false)
	if terr != nil {
		// The guest took its SYN back, or never answered.
		g.tell(Event{Protocol: "tcp", Destination: to, Verdict: Failed, Reason: "the guest did not complete the connection", Duration: time.Since(began)})
		return
	}
	size := g.bufferSize()
	endpoint.SocketOptions().SetSendBufferSize(size, true)
	endpoint.SocketOptions().SetReceiveBufferSize(size, true)
	g.counts.tcp.Add(1)
	inside := gonet.NewTCPConn(&queue, endpoint)
	stop := context.AfterFunc(g.ctx, func() {
		endpoint.Abort()
		outside.Close()
	})
	defer stop()
	sent, received, err := relay(inside, endpoint, outside.(*net.TCPConn), g.chunk)
	e := Event{Protocol: "tcp", Destination: to, Verdict: Allowed, Sent: sent, Received: received, Duration: time.Since(began)}
	if err != nil {
		e.Reason = err.Error()
	}
	g.tell(e)
}

// dial is the one place from which this package reaches out. It connects to
// exactly the address that was checked.
func (g *Gateway) dial(ctx context.Context, protocol string, to netip.AddrPort) (net.Conn, error) {
	if err := check(to.Addr(), g.config.Allow); err != nil {
		return nil, err
	}
	return g.dialer.DialContext(ctx, protocol, to.String())
}

// refused is the event of a connection that was not made because of err.
func refused(protocol string, to netip.AddrPort, err error) Event {
	e := Event{Protocol: protocol, Destination: to, Verdict: Failed, Reason: err.Error()}
	if errors.Is(err, api.ErrDenied) {
		e.Verdict = Denied
	}
	return e
}

// destination is where the guest wants to connect to: the stack plays that
// address, so it is the local one.
func destination(id stack.TransportEndpointID) netip.AddrPort {
	addr, _ := netip.AddrFromSlice(id.LocalAddress.AsSlice())
	return netip.AddrPortFrom(addr, id.LocalPort)
}

// relay joins the two connections until both directions have ended. An end of
// one side's data becomes one on the other; a connection that breaks breaks the
// other one. It closes both.
func relay(inside *gonet.TCPConn, endpoint tcpip.Endpoint, outside *net.TCPConn, chunk func() (*[]byte, func())) (sent, received int64, err error) {
	var once sync.Once
	abort := func(cause error) {
		once.Do(func() {
			err = cause
			_ = outside.SetLinger(0) // a reset, not an end
			outside.Close()
			endpoint.Abort()
		})
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		var cerr error
		if sent, cerr = copyStream(outside, inside, chunk); cerr == nil {
			cerr = outside.CloseWrite()
		}
		if cerr != nil {
			abort(cerr)
		}
	})
	wg.Go(func() {
		var cerr error
		if received, cerr = copyStream(inside, outside, chunk); cerr == nil {
			cerr = inside.CloseWrite()
		}
		if cerr != nil {
			abort(cerr)
		}
	})
	wg.Wait()
	inside.Close()
	outside.Close()
	if errors.Is(err, syscall.ENOTCONN) {
		err = nil // the other side had ended everything before
	}
	return sent, received, err
}

// copyStream copies to the end of from. Many connections that wait must not hold
// a large buffer each, so its size is of the moment.
func copyStream(to io.Writer, from io.Reader, chunk func() (*[]byte, func())) (n int64, err error) {
	buf, free := chunk()
	defer free()
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

// The buffers for copying: large ones while few connections are open.
const (
	largeChunk  = 64 << 10
	smallChunk  = 4 << 10
	fewTCPFlows = 64
)

var (
	largeChunks = sync.Pool{New: func() any { b := make([]byte, largeChunk); return &b }}
	smallChunks = sync.Pool{New: func() any { b := make([]byte, smallChunk); return &b }}
)

func (g *Gateway) chunk() (*[]byte, func()) {
	pool := &largeChunks
	if g.counts.tcpOpen.Load() > fewTCPFlows {
		pool = &smallChunks
	}
	b := pool.Get().(*[]byte)
	return b, func() { pool.Put(b) }
}
