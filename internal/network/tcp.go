package network

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

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
	if g.counts.tcpOpen.Add(1) > g.maxTCP {
		g.counts.tcpOpen.Add(-1)
		r.Complete(false)
		g.tell(Event{Protocol: "tcp", Destination: to, Verdict: Limited, Reason: "too many connections are open"})
		return
	}
	defer g.counts.tcpOpen.Add(-1)
	began := time.Now()
	now := g.currentEpoch()
	if now == nil || !now.begin() {
		r.Complete(true)
		return
	}
	made := sync.OnceFunc(now.done)
	defer made()
	outside, err := g.dial(now.ctx, "tcp", to)
	if err != nil {
		r.Complete(true)
		g.tell(refused("tcp", to, err))
		return
	}
	defer outside.Close()
	var queue waiter.Queue
	endpoint, terr := r.CreateEndpoint(&queue)
	r.Complete(false)
	made()
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
	abort := func() {
		Reset(outside)
		endpoint.Abort()
	}
	sent, received, err := Relay(inside, outside.(*net.TCPConn), abort, g.counts.tcpOpen.Load() <= LargeBuffers)
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
