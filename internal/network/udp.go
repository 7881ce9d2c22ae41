package network

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// maxUDPFlows is how many pairs of ports may talk at once. The datagram
	// that would make one more is lost.
	maxUDPFlows = 256
	// udpIdle ends a pair over which nothing has come for that long; the least
	// that RFC 4787 (REQ-5) wants of a translator is two minutes.
	udpIdle = 2 * time.Minute
	// udpBuffer bounds what waits in the stack for the host's socket.
	udpBuffer = 128 << 10
	// maxDatagram is the largest payload that fits the device.
	maxDatagram = deviceMTU - 28
)

// A udpFlow is one pair of ports that talk.
type udpFlow struct {
	inside         tcpip.Endpoint
	queue          *waiter.Queue
	outside        *net.UDPConn
	closed         chan struct{}
	once           sync.Once
	to             netip.AddrPort
	began          time.Time
	last           atomic.Int64 // unix nanoseconds of the last datagram
	sent, received atomic.Int64
}

// forwardUDP answers the first datagram of a pair of ports. It is called by the
// stack with a packet in hand and does not wait. False makes the stack tell the
// guest that the port is unreachable.
func (g *Gateway) forwardUDP(r *udp.ForwarderRequest) bool {
	to := destination(r.ID())
	if slices.Contains(g.own, to.Addr()) {
		return false
	}
	if g.counts.udpOpen.Add(1) > g.maxUDP {
		g.counts.udpOpen.Add(-1)
		g.tell(Event{Protocol: "udp", Destination: to, Verdict: Limited, Reason: "too many pairs of ports are in use"})
		return true
	}
	outside, err := g.dial(g.ctx, "udp", to) // sends nothing
	if err != nil {
		g.counts.udpOpen.Add(-1)
		g.tell(refused("udp", to, err))
		return false
	}
	var queue waiter.Queue
	endpoint, terr := r.CreateEndpoint(&queue)
	if terr != nil {
		g.counts.udpOpen.Add(-1)
		outside.Close()
		return false
	}
	endpoint.SocketOptions().SetReceiveBufferSize(udpBuffer, true)
	g.counts.udp.Add(1)
	f := &udpFlow{
		inside: endpoint, queue: &queue, outside: outside.(*net.UDPConn),
		closed: make(chan struct{}), to: to, began: time.Now(),
	}
	f.last.Store(f.began.UnixNano())
	if !g.begin() {
		g.counts.udpOpen.Add(-1)
		f.close()
		return false
	}
	go g.runUDP(f)
	return true
}

// runUDP carries datagrams both ways until none came for udpIdle.
func (g *Gateway) runUDP(f *udpFlow) {
	defer g.flows.Done()
	defer g.counts.udpOpen.Add(-1)
	defer context.AfterFunc(g.ctx, f.close)()
	var wg sync.WaitGroup
	wg.Go(func() { f.send(); f.close() })
	wg.Go(func() { f.receive(); f.close() })
	wg.Wait()
	g.tell(Event{
		Protocol: "udp", Destination: f.to, Verdict: Allowed,
		Sent: f.sent.Load(), Received: f.received.Load(), Duration: time.Since(f.began),
	})
}

// close ends the flow. Safe to call twice.
func (f *udpFlow) close() {
	f.once.Do(func() {
		close(f.closed)
		f.inside.Close()
		f.outside.Close()
	})
}

// left is how long the flow may still be quiet.
func (f *udpFlow) left() time.Duration {
	return time.Until(time.Unix(0, f.last.Load()).Add(udpIdle))
}

// send carries what the guest says. A flow that waits holds no buffer.
func (f *udpFlow) send() {
	entry, readable := waiter.NewChannelEntry(waiter.ReadableEvents)
	f.queue.EventRegister(&entry)
	defer f.queue.EventUnregister(&entry)
	timer := time.NewTimer(udpIdle)
	defer timer.Stop()
	for {
		buf := datagrams.Get().(*[]byte)
		w := tcpip.SliceWriter((*buf)[:])
		r, err := f.inside.Read(&w, tcpip.ReadOptions{})
		if err == nil {
			f.last.Store(time.Now().UnixNano())
			// A datagram that the host cannot send is lost, as anywhere.
			if _, werr := f.outside.Write((*buf)[:r.Count]); werr == nil {
				f.sent.Add(int64(r.Count))
			}
		}
		datagrams.Put(buf)
		if err == nil {
			continue
		}
		if _, wait := err.(*tcpip.ErrWouldBlock); !wait {
			return
		}
		timer.Reset(f.left())
		select {
		case <-readable:
		case <-f.closed:
			return
		case <-timer.C:
			if f.left() <= 0 {
				return
			}
		}
	}
}

// receive carries the answers.
func (f *udpFlow) receive() {
	raw, err := f.outside.SyscallConn()
	if err != nil {
		return
	}
	for {
		_ = f.outside.SetReadDeadline(time.Now().Add(f.left()))
		var failed error
		err := raw.Read(func(fd uintptr) bool {
			failed = f.receiveOne(int(fd))
			return failed != unix.EAGAIN
		})
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if f.left() <= 0 {
				return
			}
		case err != nil:
			return
		case failed == unix.ECONNREFUSED:
			// It says nothing about the next datagram.
		case failed != nil:
			return
		}
	}
}

// receiveOne passes on one datagram, if there is one.
func (f *udpFlow) receiveOne(fd int) error {
	buf := datagrams.Get().(*[]byte)
	defer datagrams.Put(buf)
	n, _, err := unix.Recvfrom(fd, *buf, unix.MSG_DONTWAIT)
	for err == unix.EINTR {
		n, _, err = unix.Recvfrom(fd, *buf, unix.MSG_DONTWAIT)
	}
	if err != nil {
		return err
	}
	f.last.Store(time.Now().UnixNano())
	// What the stack does not take is lost, as anywhere.
	if _, terr := f.inside.Write(bytes.NewReader((*buf)[:n]), tcpip.WriteOptions{}); terr == nil {
		f.received.Add(int64(n))
	}
	return nil
}

// datagrams are buffers for the largest one.
var datagrams = sync.Pool{New: func() any { b := make([]byte, maxDatagram); return &b }}
