package network

import (
	"errors"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

var (
	Check       = check
	RefuseRange = refuseRange
	HostName    = hostName
	Gateway4    = gateway4
	Guest4      = guest4
)

// MTU is the device's.
const MTU = deviceMTU

// Admit reports whether a packet of the guest's reaches the stack.
func Admit(packet []byte) bool {
	_, ok := admit(packet, []netip.Addr{guest4.Addr(), guest6.Addr()}, []netip.Addr{gateway4, gateway6})
	return ok
}

// ReachNothing makes the gateway's dialer fail, for guests that send anything.
func (g *Gateway) ReachNothing() {
	g.dialer.Control = func(string, string, syscall.RawConn) error { return errors.New("nothing is dialled in this test") }
}

// Inject gives the stack a packet as Serve does.
func (g *Gateway) Inject(packet []byte) { g.link.inject(packet, g.guests, g.own) }

// Held is how many TCP connections the stack holds, also after their end.
func (g *Gateway) Held() (n int) {
	for _, endpoint := range g.stack.RegisteredEndpoints() {
		if t, ok := endpoint.(*tcp.Endpoint); ok && t.EndpointState() != tcp.StateListen {
			n++
		}
	}
	return n
}
