package network

import (
	"encoding/binary"
	"io"
	"net/netip"
	"slices"
	"sync"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// maxQueued bounds the bytes on their way to the guest. It is more than a few
// connections may have in flight; beyond it packets are lost, and TCP slows
// down.
const maxQueued = 4 << 20

// A link is the stack's one device. Packets to the guest wait in a bounded queue
// for whoever holds the connection to it; without a connection they are lost, as
// on a cable that is not plugged in.
type link struct {
	mtu    uint32
	counts *counters

	mu         sync.Mutex
	dispatcher stack.NetworkDispatcher
	wake       *sync.Cond
	queue      []*stack.PacketBuffer
	queued     int // bytes
	plugged    bool
	finishing  bool // what is queued still goes
}

func newLink(mtu int, counts *counters) *link {
	l := &link{mtu: uint32(mtu), counts: counts}
	l.wake = sync.NewCond(&l.mu)
	return l
}

var _ stack.LinkEndpoint = (*link)(nil)

// MTU implements stack.LinkEndpoint, like all the methods up to WritePackets.
func (l *link) MTU() uint32                             { return l.mtu }
func (l *link) SetMTU(uint32)                           {}
func (l *link) MaxHeaderLength() uint16                 { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress          { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) Wait()                                   {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (l *link) AddHeader(*stack.PacketBuffer)           {}
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}

// Capabilities says that checksums need no look: nothing is damaged on the way
// from the guest, and one that lies about them only hurts itself.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}

func (l *link) Attach(d stack.NetworkDispatcher) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dispatcher = d
}

func (l *link) IsAttached() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dispatcher != nil
}

// WritePackets queues packets for the guest and never waits. A packet that has
// no room counts as sent: it is the network that has lost it.
func (l *link) WritePackets(list stack.PacketBufferList) (int, tcpip.Error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range list.AsSlice() {
		size := p.Size()
		if !l.plugged || size > guestproto.MaxPacket || l.queued+size > maxQueued {
			l.counts.overflows.Add(1)
			continue
		}
		l.queue = append(l.queue, p.Clone())
		l.queued += size
	}
	l.wake.Signal()
	return list.Len(), nil
}

// plug begins the delivery of packets; unplug ends it and empties the queue.
func (l *link) plug() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.plugged, l.finishing = true, false
}

// finish has deliver end when it has written what is queued.
func (l *link) finish() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.finishing = true
	l.wake.Broadcast()
}

func (l *link) isFinishing() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.finishing
}

func (l *link) unplug() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.plugged = false
	for _, p := range l.queue {
		p.DecRef()
	}
	l.queue, l.queued = nil, 0
	l.wake.Broadcast()
}

// take waits for packets and returns all there are, which the caller releases;
// nil after unplug and where finish leaves nothing to wait for. spare is a slice to fill next.
func (l *link) take(spare []*stack.PacketBuffer) []*stack.PacketBuffer {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.queue) == 0 {
		if !l.plugged || l.finishing {
			l.plugged = false
			return nil
		}
		l.wake.Wait()
	}
	out := l.queue
	l.queue, l.queued = spare[:0], 0
	return out
}

// deliver writes queued packets to w until unplug, finish or an error.
func (l *link) deliver(w io.Writer) error {
	frames := guestproto.NewPacketWriter(w)
	var packets []*stack.PacketBuffer
	for {
		clear(packets)
		if packets = l.take(packets); packets == nil {
			return nil
		}
		var err error
		for _, p := range packets {
			if err == nil {
				room, n := frames.Room(), 0
				for _, part := range p.AsSlices() {
					n += copy(room[n:], part)
				}
				err = frames.Commit(n)
			}
			p.DecRef()
		}
		if err == nil {
			err = frames.Flush()
		}
		if err != nil {
			return err
		}
	}
}

// inject gives the stack one packet of the guest's, if it may have it.
func (l *link) inject(packet []byte, guest, gateway []netip.Addr) {
	protocol, ok := admit(packet, guest, gateway)
	l.mu.Lock()
	d := l.dispatcher
	l.mu.Unlock()
	if !ok || d == nil {
		l.counts.discarded.Add(1)
		return
	}
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
	d.DeliverNetworkPacket(protocol, p)
	p.DecRef()
}

// admit looks at a packet's header. Only whole packets of TCP and UDP and echo
// requests to the gateway pass, from an address that the guest was given: the
// stack then has nothing to put together, and nobody else to answer. A guest
// whose device has our MTU needs no fragments for anything.
func admit(b []byte, guest, gateway []netip.Addr) (tcpip.NetworkProtocolNumber, bool) {
	if len(b) < header.IPv4MinimumSize {
		return 0, false
	}
	var (
		protocol  tcpip.NetworkProtocolNumber
		transport byte
		from, to  netip.Addr
	)
	switch b[0] >> 4 {
	case 4:
		const moreFragments, offset = 0x2000, 0x1fff // RFC 791 section 3.1
		if binary.BigEndian.Uint16(b[6:])&(moreFragments|offset) != 0 {
			return 0, false
		}
		protocol, transport = header.IPv4ProtocolNumber, b[9]
		from, to = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	case 6:
		if len(b) < header.IPv6MinimumSize {
			return 0, false
		}
		// Extension headers are next headers of their own and so do not pass.
		protocol, transport = header.IPv6ProtocolNumber, b[6]
		from, to = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	default:
		return 0, false
	}
	if !slices.Contains(guest, from) {
		return 0, false
	}
	switch tcpip.TransportProtocolNumber(transport) {
	case header.TCPProtocolNumber, header.UDPProtocolNumber:
		return protocol, true
	case header.ICMPv4ProtocolNumber:
		start := int(b[0]&0xf) * 4
		return protocol, b[0]>>4 == 4 && start < len(b) && b[start] == byte(header.ICMPv4Echo) && slices.Contains(gateway, to)
	case header.ICMPv6ProtocolNumber:
		const start = header.IPv6MinimumSize
		return protocol, b[0]>>4 == 6 && start < len(b) && b[start] == byte(header.ICMPv6EchoRequest) && slices.Contains(gateway, to)
	}
	return 0, false
}
