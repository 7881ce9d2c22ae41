package network_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/network"
	"github.com/pyro-mcp/pyro/test/netns"
)

// events collects what a gateway tells.
type events struct {
	mu   sync.Mutex
	list []network.Event
	more chan struct{} // holds a value after each event
}

func newEvents() *events { return &events{more: make(chan struct{}, 1)} }

func (e *events) tell(ev network.Event) {
	e.mu.Lock()
	e.list = append(e.list, ev)
	e.mu.Unlock()
	select {
	case e.more <- struct{}{}:
	default:
	}
}

// wait returns the first event that fits.
func (e *events) wait(t *testing.T, fits func(network.Event) bool) network.Event {
	t.Helper()
	for {
		e.mu.Lock()
		for _, ev := range e.list {
			if fits(ev) {
				e.mu.Unlock()
				return ev
			}
		}
		list := e.list
		e.mu.Unlock()
		select {
		case <-e.more:
		case <-time.After(20 * time.Second):
			t.Fatalf("it did not come among %+v", list)
		}
	}
}

func TestTCP(t *testing.T) {
	t.Parallel()
	outside := netns.New(t)
	told := newEvents()
	g := newGuest(t, network.Config{Allow: []netip.Prefix{outside.Network}, Events: told.tell})
	to := outside.Echo(t)

	t.Run("Echo", func(t *testing.T) {
		c := g.mustDial(t, to)
		data := make([]byte, 8<<20)
		_, _ = rand.Read(data)
		go func() {
			_, _ = c.Write(data)
			_ = c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
			t.Errorf("%d bytes came back of %d, %v", len(got), len(data), err)
		}
		e := told.wait(t, func(e network.Event) bool { return e.Sent > 0 })
		if e.Protocol != "tcp" || e.Verdict != network.Allowed || e.Destination != to || e.Sent != int64(len(data)) || e.Received != e.Sent || e.Reason != "" {
			t.Errorf("told %+v", e)
		}
	})
	t.Run("Refused", func(t *testing.T) {
		began := time.Now()
		_, err := g.dial(t.Context(), netip.AddrPortFrom(outside.Addr, 1))
		if err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("got %v", err)
		}
		if d := time.Since(began); d > 30*time.Second {
			t.Errorf("took %v", d)
		}
		told.wait(t, func(e network.Event) bool { return e.Verdict == network.Failed })
	})
	t.Run("OwnAddress", func(t *testing.T) {
		// This host listens there, and the range is open to the test.
		host, err := net.Listen("tcp", netip.AddrPortFrom(outside.Host, 0).String())
		if err != nil {
			t.Fatal(err)
		}
		defer host.Close()
		if _, err := g.dial(t.Context(), addrPort(host.Addr())); err == nil {
			t.Error("connected to this host")
		}
		e := told.wait(t, func(e network.Event) bool { return e.Verdict == network.Denied })
		if e.Destination != addrPort(host.Addr()) || !strings.Contains(e.Reason, "this host") {
			t.Errorf("told %+v", e)
		}
	})
	t.Run("Reset", func(t *testing.T) {
		broken := outside.Listen(t)
		go func() {
			c, err := broken.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 1))
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}()
		c := g.mustDial(t, addrPort(broken.Addr()))
		_, _ = c.Write([]byte("x"))
		if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("a reset reads as %d, %v", n, err)
		}
	})
	t.Run("ResetByGuest", func(t *testing.T) {
		ended := make(chan error, 1)
		waiting := outside.Listen(t)
		go func() {
			c, err := waiting.Accept()
			if err != nil {
				ended <- err
				return
			}
			defer c.Close()
			_, err = c.Read(make([]byte, 1))
			if err == nil {
				_, err = c.Read(make([]byte, 1))
			}
			ended <- err
		}()
		c := g.mustDial(t, addrPort(waiting.Addr()))
		_, _ = c.Write([]byte("x"))
		c.Close()
		// A whole close, with nothing unread, is an end.
		if err := <-ended; !errors.Is(err, io.EOF) {
			t.Errorf("the other side reads %v", err)
		}
	})
	t.Run("BrokenByGuest", func(t *testing.T) {
		ended := make(chan error, 1)
		talking := outside.Listen(t)
		go func() {
			c, err := talking.Accept()
			if err != nil {
				ended <- err
				return
			}
			defer c.Close()
			_, _ = c.Write([]byte("hello"))
			_, err = io.Copy(io.Discard, c)
			ended <- err
		}()
		c := g.mustDial(t, addrPort(talking.Addr()))
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		c.Close() // with bytes unread, which is a reset
		if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the other side reads %v", err)
		}
	})
	t.Run("SlowReader", func(t *testing.T) {
		// Far more than the sockets' own buffers, the stack's and a chunk: the
		// kernel's two may grow to tens of MB (tcp_rmem, tcp_wmem).
		const limit = 256 << 20
		taken := make(chan int64, 1)
		fast := outside.Listen(t)
		go func() {
			c, err := fast.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			var n int64
			buf := make([]byte, 64<<10)
			for n < limit {
				_ = c.SetWriteDeadline(time.Now().Add(2 * time.Second))
				k, err := c.Write(buf)
				n += int64(k)
				if err != nil {
					break
				}
			}
			taken <- n
		}()
		g.mustDial(t, addrPort(fast.Addr())) // and reads nothing
		if n := <-taken; n >= limit {
			t.Errorf("%d bytes were taken for a reader that takes none", n)
		}
	})
}

func TestManyConnections(t *testing.T) {
	t.Parallel()
	outside := netns.New(t)
	g := newGuest(t, network.Config{Allow: []netip.Prefix{outside.Network}})
	to := outside.Echo(t)
	var wg sync.WaitGroup
	work := make(chan int)
	for range 100 {
		wg.Go(func() {
			for range work {
				c, err := g.dial(t.Context(), to)
				if err != nil {
					t.Error(err)
					continue
				}
				_, _ = c.Write([]byte("hello"))
				_ = c.CloseWrite()
				if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
					t.Errorf("got %q, %v", got, err)
				}
				c.Close()
			}
		})
	}
	for i := range 2000 {
		work <- i
	}
	close(work)
	wg.Wait()
	noneOpen(t, g) // which is when they are counted
	if s := g.Stats(); s.TCP != 2000 || s.Sent != 10_000 {
		t.Errorf("counted %+v", s)
	}
}

// noneOpen waits until the gateway is done with every connection.
func noneOpen(t *testing.T, g *guest) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); g.Stats().TCPOpen > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d connections stay open", g.Stats().TCPOpen)
		}
	}
}

// standstill is a clock by which what is due at once happens, and nothing else.
type standstill struct{ tcpip.Clock }

func (s standstill) AfterFunc(d time.Duration, f func()) tcpip.Timer {
	if d > 0 {
		d = 1000 * time.Hour
	}
	return s.Clock.AfterFunc(d, f)
}

// A port of the guest's from which a connection has ended is free for the next
// one to the same server, whoever has ended it first and however soon that is.
func TestPortAgain(t *testing.T) {
	t.Parallel()
	outside := netns.New(t)
	listener := outside.Listen(t)
	g := newGuest(t, network.Config{Allow: []netip.Prefix{outside.Network}, Clock: standstill{tcpip.NewStdClock()}})
	from, to := full(netip.AddrPortFrom(network.Guest4.Addr(), 4000)), full(addrPort(listener.Addr()))
	for range 3 {
		// The guest's own stack may need a moment for letting go of the port.
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		inside, err := gonet.DialTCPWithBind(ctx, g.stack, from, to, header.IPv4ProtocolNumber)
		for ; err != nil && strings.Contains(err.Error(), "Bind"); time.Sleep(time.Millisecond) {
			inside, err = gonet.DialTCPWithBind(ctx, g.stack, from, to, header.IPv4ProtocolNumber)
		}
		if err != nil {
			t.Fatal(err)
		}
		c, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if b, err := io.ReadAll(inside); err != nil || len(b) > 0 {
			t.Errorf("the guest has read %q, %v", b, err)
		}
		inside.Close()
		for g.Held() > 0 {
			if ctx.Err() != nil {
				t.Fatal("the connection has ended and is not forgotten")
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// A guest that opens more than it may gets the next one when one has ended.
func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	outside := netns.New(t)
	told := newEvents()
	g := newGuest(t, network.Config{Allow: []netip.Prefix{outside.Network}, Events: told.tell})
	to := outside.Echo(t)
	const limit = 1024
	var open []io.Closer
	for range limit {
		open = append(open, g.mustDial(t, to))
	}
	if s := g.Stats(); s.TCPOpen != limit {
		t.Fatalf("counted %+v", s)
	}
	one := make(chan error, 1)
	go func() {
		c, err := g.dial(t.Context(), to)
		if err == nil {
			c.Close()
		}
		one <- err
	}()
	told.wait(t, func(e network.Event) bool { return e.Verdict == network.Limited })
	select {
	case err := <-one:
		t.Fatalf("one more than may be: %v", err)
	default:
	}
	open[0].Close()
	if err := <-one; err != nil {
		t.Errorf("after another has ended: %v", err)
	}
}

func TestUDP(t *testing.T) {
	t.Parallel()
	outside := netns.New(t)
	told := newEvents()
	g := newGuest(t, network.Config{Allow: []netip.Prefix{outside.Network}, Events: told.tell})
	peer := outside.ListenPacket(t)
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := peer.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = peer.WriteTo(buf[:n], from)
		}
	}()
	c := g.datagrams(t, addrPort(peer.LocalAddr()))
	for _, size := range []int{0, 1, 1400, network.MTU - 28} {
		sent := make([]byte, size)
		_, _ = rand.Read(sent)
		if _, err := c.Write(sent); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 1<<16)
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := c.Read(got)
		if err != nil || !bytes.Equal(got[:n], sent) {
			t.Errorf("of %d bytes came %d, %v", size, n, err)
		}
	}
	t.Run("Denied", func(t *testing.T) {
		host, err := net.ListenPacket("udp4", netip.AddrPortFrom(outside.Host, 0).String())
		if err != nil {
			t.Fatal(err)
		}
		defer host.Close()
		c := g.datagrams(t, addrPort(host.LocalAddr()))
		_, _ = c.Write([]byte("x"))
		told.wait(t, func(e network.Event) bool { return e.Verdict == network.Denied && e.Protocol == "udp" })
		_ = host.SetReadDeadline(time.Now())
		if n, _, err := host.ReadFrom(make([]byte, 10)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("this host got %d bytes, %v", n, err)
		}
	})
	t.Run("Limit", func(t *testing.T) {
		for range 300 {
			_, _ = g.datagrams(t, addrPort(peer.LocalAddr())).Write([]byte("x"))
		}
		told.wait(t, func(e network.Event) bool { return e.Verdict == network.Limited })
		if s := g.Stats(); s.UDPOpen > 256 {
			t.Errorf("counted %+v", s)
		}
	})
}

// A guest whose device is taken away learns of it on every connection, also where
// data is under way, and both sides of the gateway are done with them.
func TestDetach(t *testing.T) {
	t.Parallel()
	outside := netns.New(t)
	g := newGuest(t, network.Config{Allow: []netip.Prefix{outside.Network}})
	to := outside.Echo(t)
	idle, busy := g.mustDial(t, to), g.mustDial(t, to)
	for _, c := range []io.ReadWriter{idle, busy} {
		if _, err := io.WriteString(c, "x"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan error, 3)
	go func() { _, err := idle.Read(make([]byte, 1)); ended <- err }()
	go func() {
		for {
			if _, err := busy.Write(make([]byte, 100<<10)); err != nil {
				ended <- err
				return
			}
		}
	}()
	go func() {
		_, _ = io.Copy(io.Discard, busy) // one of the two learns of the reset
		ended <- net.ErrClosed
	}()
	time.Sleep(20 * time.Millisecond) // for data to be under way
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := g.Detach(ctx); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		select {
		case err := <-ended:
			if err == nil {
				t.Error("a connection has ended in good order")
			}
		case <-ctx.Done():
			t.Fatal("a connection hangs")
		}
	}
	noneOpen(t, g)
	if err := g.Detach(ctx); err != nil {
		t.Errorf("once more: %v", err)
	}
}

// After Close nothing is left, whatever was going on.
func TestCloseLeavesNothing(t *testing.T) {
	outside := netns.New(t)
	before := runtime.NumGoroutine()
	t.Run("Use", func(t *testing.T) {
		g := newGuest(t, network.Config{Allow: []netip.Prefix{outside.Network}})
		to := outside.Echo(t)
		peer := outside.ListenPacket(t)
		for range 20 {
			c := g.mustDial(t, to)
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			_, _ = g.datagrams(t, addrPort(peer.LocalAddr())).Write([]byte("x"))
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, _ = g.dial(ctx, to) // given up half-way
		g.Close()
		g.Close()
		if s := g.Stats(); s.TCPOpen != 0 || s.UDPOpen != 0 {
			t.Errorf("counted %+v", s)
		}
	})
	deadline := time.Now().Add(20 * time.Second)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<16)
			t.Fatalf("%d goroutines were there, %d are left:\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// A guest may say anything on the connection of its network.
func TestServeDistrusts(t *testing.T) {
	for _, test := range []struct {
		name  string
		send  []byte
		class error
	}{
		{"Nothing", nil, api.ErrUnavailable},
		{"HugeFrame", []byte{byte(guestproto.FramePackets), 0xff, 0xff, 0xff, 0xff}, api.ErrDamaged},
		{"OtherFrame", []byte{byte(guestproto.FrameStdout), 0, 0, 0, 1, 'x'}, api.ErrDamaged},
		{"EmptyPacket", []byte{byte(guestproto.FramePackets), 0, 0, 0, 2, 0, 0}, api.ErrDamaged},
		{"LongPacket", []byte{byte(guestproto.FramePackets), 0, 0, 0, 4, 0, 3, 1, 2}, api.ErrDamaged},
		{"HalfLength", []byte{byte(guestproto.FramePackets), 0, 0, 0, 1, 0}, api.ErrDamaged},
		{"JSON", []byte(`{"error":"no"}`), api.ErrDamaged},
	} {
		t.Run(test.name, func(t *testing.T) {
			g, err := network.New(network.Config{})
			if err != nil {
				t.Fatal(err)
			}
			defer g.Close()
			ours, theirs := socketPair(t)
			go func() {
				_, _ = theirs.Write(test.send)
				theirs.Close()
			}()
			if err := g.Serve(t.Context(), ours); !errors.Is(err, test.class) {
				t.Errorf("got %v, want %s", err, api.Code(test.class))
			}
		})
	}
	t.Run("Canceled", func(t *testing.T) {
		g, err := network.New(network.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer g.Close()
		ours, theirs := socketPair(t)
		defer theirs.Close()
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(10*time.Millisecond, cancel)
		if err := g.Serve(ctx, ours); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}
