// Package netns makes a network namespace that stands for the outside world in a
// test: reachable from this host, and no address of this host. It needs root.
package netns

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/rtnetlink"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// An Outside is a network namespace joined to this host by a pair of devices. It
// is held by one thread of this process, so nothing of it outlives the process.
type Outside struct {
	// Host is this host's address on the pair, Addr the one outside.
	Host, Addr netip.Addr
	// Network holds both, and nothing else that exists.
	Network netip.Prefix

	calls chan func()
}

// New makes one; it ends with the test. Without root, or without the rights that
// it usually has, the test is skipped.
func New(t testing.TB) *Outside {
	t.Helper()
	_, err := exec.LookPath("ip")
	testenv.Require(t, "netns", os.Geteuid() == 0 && err == nil, "making a network namespace takes root and the command ip")
	// In the range for benchmarks, RFC 2544, which no network has in earnest.
	// A random one, for tests of other processes may have theirs.
	n := rand.Uint32N(1<<14) << 2
	addr := func(i uint32) netip.Addr {
		n := n + i
		return netip.AddrFrom4([4]byte{198, 18 + byte(n>>16&1), byte(n >> 8), byte(n)})
	}
	o := &Outside{Host: addr(1), Addr: addr(2), Network: netip.PrefixFrom(addr(0), 30), calls: make(chan func())}
	ready := make(chan error)
	go func() {
		// Never unlocked, so the thread ends with the goroutine, and with it
		// the namespace and both devices.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ready <- err
			return
		}
		ready <- nil
		for call := range o.calls {
			call()
		}
	}()
	if err := <-ready; err != nil {
		testenv.Require(t, "netns", false, fmt.Sprintf("making a network namespace: %v", err))
	}
	t.Cleanup(func() { close(o.calls) })
	o.connect(t, fmt.Sprintf("pyrot%d", n>>2))
	return o
}

func (o *Outside) connect(t testing.TB, device string) {
	t.Helper()
	var thread int
	o.Do(func() { thread = unix.Gettid() })
	const inside = "out0"
	run(t, "ip", "link", "add", device, "type", "veth", "peer", "name", inside, "netns", fmt.Sprint(thread))
	t.Cleanup(func() { _ = exec.Command("ip", "link", "delete", device).Run() })
	configure(t, device, netip.PrefixFrom(o.Host, 30))
	o.Do(func() {
		configure(t, inside, netip.PrefixFrom(o.Addr, 30))
		configure(t, "lo", netip.Prefix{})
	})
}

func configure(t testing.TB, device string, address netip.Prefix) {
	t.Helper()
	dev, err := net.InterfaceByName(device)
	if err == nil {
		err = rtnetlink.SetUp(dev.Index, dev.MTU)
	}
	if err == nil && address.IsValid() {
		err = rtnetlink.AddAddress(dev.Index, address)
	}
	if err != nil {
		t.Fatalf("setting up %s: %v", device, err)
	}
}

func run(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// Do calls f in the namespace: sockets that it opens, and processes that it
// starts, are and stay outside.
func (o *Outside) Do(f func()) {
	done := make(chan struct{})
	o.calls <- func() {
		defer close(done)
		f()
	}
	<-done
}

// Listen listens on a TCP port outside until the test ends.
func (o *Outside) Listen(t testing.TB) net.Listener {
	t.Helper()
	var l net.Listener
	var err error
	o.Do(func() { l, err = net.Listen("tcp4", netip.AddrPortFrom(o.Addr, 0).String()) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// Echo listens on a TCP port outside until the test ends, and sends back what
// each connection brings, up to its end.
func (o *Outside) Echo(t testing.TB) netip.AddrPort {
	t.Helper()
	l := o.Listen(t)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
				_ = c.(*net.TCPConn).CloseWrite()
			}()
		}
	}()
	at := l.Addr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// ListenPacket listens on a UDP port outside until the test ends.
func (o *Outside) ListenPacket(t testing.TB) net.PacketConn {
	t.Helper()
	var c net.PacketConn
	var err error
	o.Do(func() { c, err = net.ListenPacket("udp4", netip.AddrPortFrom(o.Addr, 0).String()) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
