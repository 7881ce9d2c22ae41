package network_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/network"
)

// A guest is a TCP/IP stack that plays the guest's kernel, joined to a gateway as
// the guest agent would do it.
type guest struct {
	*network.Gateway
	stack *stack.Stack
}

// newGuest returns a guest with a gateway of its own. Both end with the test.
func newGuest(t testing.TB, c network.Config) *guest {
	t.Helper()
	gateway, err := network.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(gateway.Close)
	g := &guest{Gateway: gateway, stack: stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})}
	link := channel.New(1024, network.MTU, "")
	if err := g.stack.CreateNIC(1, link); err != nil {
		t.Fatal(err)
	}
	address := tcpip.ProtocolAddress{Protocol: header.IPv4ProtocolNumber, AddressWithPrefix: tcpip.AddrFromSlice(network.Guest4.Addr().AsSlice()).WithPrefix()}
	if err := g.stack.AddProtocolAddress(1, address, stack.AddressProperties{}); err != nil {
		t.Fatal(err)
	}
	g.stack.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 1}})
	ours, theirs := socketPair(t)
	served := make(chan error, 1)
	go func() { served <- gateway.Serve(context.Background(), ours) }()
	ctx, cancel := context.WithCancel(context.Background())
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		frames := guestproto.NewPacketWriter(theirs)
		for {
			p := link.ReadContext(ctx)
			if p == nil {
				return
			}
			view := p.ToView()
			n := copy(frames.Room(), view.AsSlice())
			view.Release()
			p.DecRef()
			if frames.Commit(n) != nil || frames.Flush() != nil {
				return
			}
		}
	}()
	received := make(chan struct{})
	go func() {
		defer close(received)
		frames := guestproto.NewFrameReader(theirs)
		for {
			_, payload, err := frames.Next()
			if err != nil {
				theirs.Close() // the device is gone
				return
			}
			if err := guestproto.Packets(payload, func(b []byte) error {
				p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
				link.InjectInbound(header.IPv4ProtocolNumber, p)
				p.DecRef()
				return nil
			}); err != nil {
				t.Errorf("from the gateway: %v", err)
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		theirs.Close()
		<-sent
		<-received
		if err := <-served; err == nil {
			t.Error("Serve ended without an error")
		}
		g.stack.Destroy()
	})
	return g
}

func socketPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		conns[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	return conns[0], conns[1]
}

func full(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}
}

// dial connects as a program in the guest.
func (g *guest) dial(ctx context.Context, to netip.AddrPort) (*gonet.TCPConn, error) {
	return gonet.DialContextTCP(ctx, g.stack, full(to), header.IPv4ProtocolNumber)
}

func (g *guest) mustDial(t testing.TB, to netip.AddrPort) *gonet.TCPConn {
	t.Helper()
	c, err := g.dial(t.Context(), to)
	if err != nil {
		t.Fatalf("connecting to %s: %v", to, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// datagrams returns a socket of the guest's connected to that address.
func (g *guest) datagrams(t testing.TB, to netip.AddrPort) *gonet.UDPConn {
	t.Helper()
	at := full(to)
	c, err := gonet.DialUDP(g.stack, nil, &at, header.IPv4ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// names is a resolver that knows some names, by the names with a dot.
type names map[string][]netip.Addr

func (n names) LookupNetIP(_ context.Context, kind, host string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, a := range n[host] {
		if a.Is4() == (kind == "ip4") {
			out = append(out, a)
		}
	}
	if host == "broken.test." {
		return nil, errors.New("the resolver is broken")
	}
	if len(out) == 0 {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return out, nil
}

func addrPort(a net.Addr) netip.AddrPort {
	p, err := netip.ParseAddrPort(a.String())
	if err != nil {
		panic(fmt.Sprint(a, err))
	}
	return p
}
