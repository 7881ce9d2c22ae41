package network

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// A Verdict is what became of a connection.
type Verdict string

// The verdicts.
const (
	Allowed Verdict = "allowed" // it was made, and has ended
	Denied  Verdict = "denied"  // the policy refused it
	Failed  Verdict = "failed"  // the other side could not be reached
	Limited Verdict = "limited" // too many others were open
)

// An Event is the end of one connection, or of the attempt to make one.
type Event struct {
	Protocol    string // tcp, udp, dns
	Destination netip.AddrPort
	// Name is the last name that the guest has looked up and got the
	// destination's address for, "" if none; for dns the name asked for.
	Name    string
	Verdict Verdict
	// Reason says why it was not made, or how it broke.
	Reason string
	// Sent and Received count the payload's bytes as the guest sees them.
	Sent, Received int64
	Duration       time.Duration
}

// Stats are a gateway's counts since it was made.
type Stats struct {
	TCPOpen   int64 `json:"tcp_open"`
	UDPOpen   int64 `json:"udp_open"`
	TCP       int64 `json:"tcp"` // made, like UDP
	UDP       int64 `json:"udp"`
	Lookups   int64 `json:"lookups"`
	Denied    int64 `json:"denied"`
	Failed    int64 `json:"failed"`
	Limited   int64 `json:"limited"`
	Sent      int64 `json:"sent_bytes"` // by the guest, of finished connections
	Received  int64 `json:"received_bytes"`
	Discarded int64 `json:"discarded_packets"` // malformed, or no business of the guest's
	Overflows int64 `json:"overflown_packets"` // to a guest that does not read
}

type counters struct {
	tcpOpen, udpOpen, tcp, udp, lookups, denied, failed, limited, sent, received, discarded, overflows atomic.Int64
}

func (c *counters) stats() Stats {
	return Stats{
		TCPOpen: c.tcpOpen.Load(), UDPOpen: c.udpOpen.Load(), TCP: c.tcp.Load(), UDP: c.udp.Load(),
		Lookups: c.lookups.Load(), Denied: c.denied.Load(), Failed: c.failed.Load(), Limited: c.limited.Load(),
		Sent: c.sent.Load(), Received: c.received.Load(),
		Discarded: c.discarded.Load(), Overflows: c.overflows.Load(),
	}
}

// tell counts an event and passes it on.
func (g *Gateway) tell(e Event) {
	switch e.Verdict {
	case Denied:
		g.counts.denied.Add(1)
	case Failed:
		g.counts.failed.Add(1)
	case Limited:
		g.counts.limited.Add(1)
	}
	g.counts.sent.Add(e.Sent)
	g.counts.received.Add(e.Received)
	if g.config.Events != nil {
		if e.Name == "" {
			e.Name = g.names.of(e.Destination.Addr())
		}
		g.config.Events(e)
	}
}

// maxNames bounds how many addresses names remembers.
const maxNames = 1024

// names remembers by which name the guest knows an address, for events only.
type names struct {
	mu        sync.Mutex
	byAddress map[netip.Addr]string
	order     []netip.Addr // a ring, the oldest at next
	next      int
}

func (n *names) of(a netip.Addr) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.byAddress[a]
}

func (n *names) remember(a netip.Addr, name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.byAddress == nil {
		n.byAddress = make(map[netip.Addr]string)
	}
	_, known := n.byAddress[a]
	n.byAddress[a] = name
	switch {
	case known:
	case len(n.order) < maxNames:
		n.order = append(n.order, a)
	default:
		delete(n.byAddress, n.order[n.next])
		n.order[n.next] = a
		n.next = (n.next + 1) % maxNames
	}
}
