package network_test

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/pyro-mcp/pyro/internal/network"
)

// packet4 is an IPv4 packet of the guest's with a payload of that protocol.
func packet4(to netip.Addr, protocol uint8, payload []byte) []byte {
	b := make([]byte, header.IPv4MinimumSize+len(payload))
	ip := header.IPv4(b)
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(b)), TTL: 64, Protocol: protocol,
		SrcAddr: tcpip.AddrFromSlice(network.Guest4.Addr().AsSlice()), DstAddr: tcpip.AddrFromSlice(to.AsSlice()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	copy(b[header.IPv4MinimumSize:], payload)
	return b
}

func packet6(from, to string, next uint8, payload []byte) []byte {
	b := make([]byte, header.IPv6MinimumSize+len(payload))
	b[0] = 6 << 4
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)))
	b[6], b[7] = next, 64
	f, t := netip.MustParseAddr(from).As16(), netip.MustParseAddr(to).As16()
	copy(b[8:], f[:])
	copy(b[24:], t[:])
	copy(b[40:], payload)
	return b
}

func TestAdmit(t *testing.T) {
	const guest6, gateway6 = "fd70:7972:6f00::2", "fd70:7972:6f00::1"
	elsewhere := netip.MustParseAddr("93.184.216.34")
	change := func(b []byte, f func([]byte)) []byte { f(b); return b }
	for _, test := range []struct {
		name   string
		packet []byte
		ok     bool
	}{
		{"TCP", packet4(elsewhere, 6, make([]byte, 20)), true},
		{"UDP", packet4(elsewhere, 17, make([]byte, 8)), true},
		{"PingGateway", packet4(network.Gateway4, 1, []byte{8, 0, 0, 0, 0, 0, 0, 0}), true},
		{"PingElsewhere", packet4(elsewhere, 1, []byte{8, 0, 0, 0, 0, 0, 0, 0}), false},
		{"RedirectToGateway", packet4(network.Gateway4, 1, []byte{5, 0, 0, 0, 0, 0, 0, 0}), false},
		{"PingWithoutBody", packet4(network.Gateway4, 1, nil), false},
		{"PingWithLongHeader", change(packet4(network.Gateway4, 1, []byte{8}), func(b []byte) { b[0] = 0x4f }), false},
		{"IGMP", packet4(elsewhere, 2, make([]byte, 8)), false},
		{"GRE", packet4(elsewhere, 47, make([]byte, 8)), false},
		{"SCTP", packet4(elsewhere, 132, make([]byte, 12)), false},
		{"IPv6InIPv4", packet4(elsewhere, 41, make([]byte, 40)), false},
		{"FirstFragment", change(packet4(elsewhere, 17, make([]byte, 8)), func(b []byte) { b[6] = 0x20 }), false},
		{"LaterFragment", change(packet4(elsewhere, 17, make([]byte, 8)), func(b []byte) { b[7] = 1 }), false},
		{"DontFragment", change(packet4(elsewhere, 6, make([]byte, 20)), func(b []byte) { b[6] = 0x40 }), true},
		{"ForeignSource", change(packet4(elsewhere, 6, make([]byte, 20)), func(b []byte) { b[15]++ }), false},
		{"Short", packet4(elsewhere, 6, nil)[:19], false},
		{"Empty", nil, false},
		{"Version", change(packet4(elsewhere, 6, nil), func(b []byte) { b[0] = 0x55 }), false},
		{"TCP6", packet6(guest6, "2606:2800:220:1::1", 6, make([]byte, 20)), true},
		{"PingGateway6", packet6(guest6, gateway6, 58, []byte{128, 0, 0, 0, 0, 0, 0, 0}), true},
		{"PingElsewhere6", packet6(guest6, "2606:2800:220:1::1", 58, []byte{128, 0, 0, 0, 0, 0, 0, 0}), false},
		{"RouterSolicitation", packet6(guest6, "ff02::2", 58, []byte{133, 0, 0, 0, 0, 0, 0, 0}), false},
		{"HopByHop", packet6(guest6, "2606:2800:220:1::1", 0, make([]byte, 8)), false},
		{"Fragment6", packet6(guest6, "2606:2800:220:1::1", 44, make([]byte, 8)), false},
		{"ForeignSource6", packet6("fe80::1", "2606:2800:220:1::1", 6, make([]byte, 20)), false},
		{"ICMP4In6", packet6(guest6, gateway6, 1, []byte{8, 0, 0, 0}), false},
		{"Short6", packet6(guest6, gateway6, 6, nil)[:39], false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := network.Admit(test.packet); got != test.ok {
				t.Errorf("admitted %v", got)
			}
		})
	}
}

// FuzzInject feeds the stack packets that a guest's kernel would not send. It
// must survive them, and answer after.
func FuzzInject(f *testing.F) {
	g := newGuest(f, network.Config{Resolver: names{}})
	g.ReachNothing()
	syn := make([]byte, 20)
	header.TCP(syn).Encode(&header.TCPFields{SrcPort: 1000, DstPort: 80, SeqNum: 1, DataOffset: 20, Flags: header.TCPFlagSyn, WindowSize: 1000})
	udp := make([]byte, 8)
	header.UDP(udp).Encode(&header.UDPFields{SrcPort: 1000, DstPort: 53, Length: 8})
	for _, to := range []netip.Addr{network.Gateway4, netip.MustParseAddr("93.184.216.34")} {
		f.Add(packet4(to, 6, syn), true)
		f.Add(packet4(to, 17, udp), true)
		f.Add(packet4(to, 1, []byte{8, 0, 0, 0, 0, 0, 0, 0}), true)
	}
	f.Add(packet6("fd70:7972:6f00::2", "fd70:7972:6f00::1", 6, syn), false)
	f.Fuzz(func(t *testing.T, b []byte, mend bool) {
		if mend {
			b = mended(b)
		}
		if len(b) > 0 {
			g.Inject(b)
		}
	})
	if got := answers(g.ask(f, question(f, "one.test.", 1, false))); len(got) != 0 {
		f.Errorf("after it all: %v", got)
	}
}

// mended gives a packet the checksums that let it past the first look.
func mended(b []byte) []byte {
	if len(b) < 20 || b[0]>>4 != 4 {
		return b
	}
	b = append([]byte(nil), b...)
	start := int(b[0]&0xf) * 4
	copy(b[12:], network.Guest4.Addr().AsSlice())
	b[6], b[7] = 0, 0
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	if start < 20 || start > len(b) {
		return b
	}
	ip := header.IPv4(b)
	ip.SetChecksum(0)
	ip.SetChecksum(^ip.CalculateChecksum())
	payload := b[start:]
	at := map[uint8]int{6: 16, 17: 6, 1: 2}[b[9]]
	if at == 0 || len(payload) < at+2 {
		return b
	}
	payload[at], payload[at+1] = 0, 0
	sum := uint16(0)
	if b[9] != 1 {
		sum = header.PseudoHeaderChecksum(tcpip.TransportProtocolNumber(b[9]), ip.SourceAddress(), ip.DestinationAddress(), uint16(len(payload)))
	}
	binary.BigEndian.PutUint16(payload[at:], ^checksum.Checksum(payload, sum))
	return b
}
