package guestproto

import (
	"encoding/binary"
	"io"
	"net/netip"

	"github.com/pyro-mcp/pyro/api"
)

// The actions of the network.
const (
	ActionAttachNetwork = "attach_network"
	ActionDialTCP       = "dial_tcp"
)

// The capabilities of the network, for hello. An agent that is no guest of its
// own cannot attach one.
const (
	CapNetwork = "network"
	CapDialTCP = "dial-tcp"
)

// FramePackets carries IP packets, in either direction: each is preceded by its
// length as a big-endian uint16.
const FramePackets FrameType = 34

const (
	packetPrefix = 2
	// MaxPacket bounds one IP packet, so that it fits a frame alone.
	MaxPacket = MaxFrame - packetPrefix
	// minMTU is IPv6's, RFC 8200 section 5.
	minMTU = 1280
	// maxNetworkAddresses bounds each list of an AttachNetwork.
	maxNetworkAddresses = 8
)

// AttachNetwork asks the guest for a network device whose packets travel on this
// connection, in FramePackets both ways after the FrameHeader with
// AttachedNetwork. The device lives as long as the connection. Streaming form
// only.
type AttachNetwork struct {
	Envelope
	MTU int `json:"mtu"`
	// Addresses are the device's own, each with the size of its network.
	Addresses []netip.Prefix `json:"addresses"`
	// Gateways are the default routes' next hops, at most one of a family.
	Gateways []netip.Addr `json:"gateways"`
	// Resolvers are the guest's name servers.
	Resolvers []netip.Addr `json:"resolvers"`
}

// Check refuses what no device can be made of.
func (a *AttachNetwork) Check() error {
	if a.MTU < minMTU || a.MTU > MaxPacket {
		return api.Errorf(api.ErrInvalid, "an MTU of %d is not between %d and %d", a.MTU, minMTU, MaxPacket)
	}
	if len(a.Addresses) == 0 {
		return api.Errorf(api.ErrInvalid, "the network has no address")
	}
	if n := max(len(a.Addresses), len(a.Gateways), len(a.Resolvers)); n > maxNetworkAddresses {
		return api.Errorf(api.ErrInvalid, "the network has %d addresses of one kind, the limit is %d", n, maxNetworkAddresses)
	}
	for _, p := range a.Addresses {
		if !p.IsValid() || p.Addr().Zone() != "" {
			return api.Errorf(api.ErrInvalid, "an address of the network is none")
		}
	}
	for _, list := range [][]netip.Addr{a.Gateways, a.Resolvers} {
		for _, addr := range list {
			if !addr.IsValid() || addr.Zone() != "" {
				return api.Errorf(api.ErrInvalid, "an address of the network is none")
			}
		}
	}
	return nil
}

// AttachedNetwork says what the guest has made.
type AttachedNetwork struct {
	Device string `json:"device"`
}

// DialTCP asks the guest agent to connect to a port of the guest's own loopback.
// The answer is one line with DialTCPReply or ErrorReply. After the former both
// sides send raw bytes, each until it closes its sending direction.
type DialTCP struct {
	Envelope
	Port int `json:"port"`
}

// DialTCPReply answers DialTCP.
type DialTCPReply struct {
	// Address is what the agent has connected to.
	Address string `json:"address"`
}

// A PacketWriter writes IP packets as frames, several in one where they fit.
// Room, then Commit; and Flush before a wait for the next packet. It is not safe
// for concurrent use.
type PacketWriter struct {
	w io.Writer
	// buf holds one frame and behind it the packet that may not fit any more.
	buf []byte
	end int
}

// NewPacketWriter returns a writer to w with buffers of twice MaxFrame.
func NewPacketWriter(w io.Writer) *PacketWriter {
	return &PacketWriter{w: w, buf: make([]byte, frameHeaderLen+MaxFrame+packetPrefix+MaxPacket), end: frameHeaderLen}
}

// Room returns MaxPacket bytes for the next packet, valid until the next call.
func (p *PacketWriter) Room() []byte { return p.buf[p.end+packetPrefix:][:MaxPacket] }

// Commit takes the first n bytes of what Room has returned as a packet. It
// writes what was there before if both do not fit one frame.
func (p *PacketWriter) Commit(n int) error {
	if n < 1 || n > MaxPacket {
		return api.Errorf(api.ErrInvalid, "a packet has %d bytes, not between 1 and %d", n, MaxPacket)
	}
	if p.end+packetPrefix+n > frameHeaderLen+MaxFrame {
		packet := p.Room()[:n]
		if err := p.Flush(); err != nil {
			return err
		}
		copy(p.Room(), packet)
	}
	binary.BigEndian.PutUint16(p.buf[p.end:], uint16(n))
	p.end += packetPrefix + n
	return nil
}

// Flush writes the packets that were committed, in one Write call.
func (p *PacketWriter) Flush() error {
	if p.end == frameHeaderLen {
		return nil
	}
	p.buf[0] = byte(FramePackets)
	binary.BigEndian.PutUint32(p.buf[1:], uint32(p.end-frameHeaderLen))
	_, err := p.w.Write(p.buf[:p.end])
	p.end = frameHeaderLen
	return err
}

// Packets calls f with each packet of a FramePackets' payload, until f fails. A
// length of zero or past the payload's end is ErrDamaged; the packets before it
// have been delivered then.
func Packets(payload []byte, f func(packet []byte) error) error {
	for len(payload) > 0 {
		if len(payload) < packetPrefix {
			return api.Errorf(api.ErrDamaged, "a frame of packets ends in the middle of a length")
		}
		n := int(binary.BigEndian.Uint16(payload))
		payload = payload[packetPrefix:]
		if n == 0 || n > len(payload) {
			return api.Errorf(api.ErrDamaged, "a packet announces %d bytes, its frame has %d left", n, len(payload))
		}
		if err := f(payload[:n:n]); err != nil {
			return err
		}
		payload = payload[n:]
	}
	return nil
}
