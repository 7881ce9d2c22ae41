package network

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

const (
	dnsPort = 53
	// maxLookups is how many questions are answered at once; one more is lost,
	// and asked again by every resolver.
	maxLookups = 64
	// maxNameConns bounds the TCP connections to the name server.
	maxNameConns = 32
	// lookupTimeout is a little more than resolvers wait for one server.
	lookupTimeout = 10 * time.Second
	// maxQuestion bounds a query: a header, one name and what EDNS adds.
	maxQuestion = 1 << 10
	// maxAnswers bounds the addresses of one answer.
	maxAnswers = 32
	// plainAnswer is what a client without EDNS takes over UDP, RFC 1035
	// section 4.2.1; largestAnswer what we send to one with.
	plainAnswer, largestAnswer = 512, 4096
	// answerTTL is how long the guest may keep an answer. The host's resolver
	// does not tell.
	answerTTL = 30 // seconds
	// nameIdle ends a TCP connection to the name server.
	nameIdle = 30 * time.Second
)

// serveNames starts the name server on the gateway's addresses.
func (g *Gateway) serveNames() error {
	slots := make(chan struct{}, maxLookups)
	conns := make(chan struct{}, maxNameConns)
	for _, a := range g.own {
		at := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(a.AsSlice()), Port: dnsPort}
		packets, err := gonet.DialUDP(g.stack, &at, nil, protocolOf(a))
		if err != nil {
			return err
		}
		listener, err := gonet.ListenTCP(g.stack, at, protocolOf(a))
		if err != nil {
			packets.Close()
			return err
		}
		context.AfterFunc(g.ctx, func() {
			packets.Close()
			listener.Shutdown()
			listener.Close()
		})
		g.flows.Go(func() { g.serveNamePackets(packets, slots) })
		g.flows.Go(func() { g.serveNameConns(listener, slots, conns) })
	}
	return nil
}

func (g *Gateway) serveNamePackets(c *gonet.UDPConn, slots chan struct{}) {
	buf := make([]byte, maxQuestion)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			if g.ctx.Err() != nil {
				return
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			g.counts.limited.Add(1)
			continue
		}
		question := append([]byte(nil), buf[:n]...)
		if !g.begin() {
			return
		}
		go func() {
			defer g.flows.Done()
			defer func() { <-slots }()
			if answer := g.answer(question, false); answer != nil {
				_, _ = c.WriteTo(answer, from)
			}
		}()
	}
}

func (g *Gateway) serveNameConns(l *gonet.TCPListener, slots, conns chan struct{}) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		select {
		case conns <- struct{}{}:
		default:
			g.counts.limited.Add(1)
			c.Close()
			continue
		}
		if !g.begin() {
			c.Close()
			return
		}
		go func() {
			defer g.flows.Done()
			defer func() { <-conns }()
			defer c.Close()
			defer context.AfterFunc(g.ctx, func() { c.Close() })()
			g.serveNameConn(c, slots)
		}()
	}
}

// serveNameConn answers the questions of one connection one by one. Each has its
// length in front of it, RFC 1035 section 4.2.2.
func (g *Gateway) serveNameConn(c net.Conn, slots chan struct{}) {
	for {
		_ = c.SetDeadline(time.Now().Add(nameIdle))
		var size [2]byte
		if _, err := io.ReadFull(c, size[:]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint16(size[:]))
		if n > maxQuestion {
			return
		}
		question := make([]byte, n)
		if _, err := io.ReadFull(c, question); err != nil {
			return
		}
		select {
		case slots <- struct{}{}:
		case <-g.ctx.Done():
			return
		}
		answer := g.answer(question, true)
		<-slots
		if answer == nil {
			return
		}
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
			return
		}
	}
}

// answer returns the answer to a query, nil for what is none.
func (g *Gateway) answer(query []byte, stream bool) []byte {
	var p dnsmessage.Parser
	header, err := p.Start(query)
	if err != nil || header.Response {
		return nil
	}
	reply := dnsmessage.Header{ID: header.ID, Response: true, OpCode: header.OpCode, RecursionDesired: header.RecursionDesired, RecursionAvailable: true}
	questions, err := p.AllQuestions()
	if err != nil || len(questions) != 1 {
		reply.RCode = dnsmessage.RCodeFormatError
		return pack(reply, nil, nil, guestproto.MaxPacket)
	}
	q := questions[0]
	if header.OpCode != 0 || q.Class != dnsmessage.ClassINET {
		reply.RCode = dnsmessage.RCodeNotImplemented
		return pack(reply, &q, nil, guestproto.MaxPacket)
	}
	var addrs []netip.Addr
	addrs, reply.RCode = g.resolve(q)
	limit := plainAnswer
	switch {
	case stream:
		limit = guestproto.MaxPacket
	case p.SkipAllAnswers() == nil && p.SkipAllAuthorities() == nil:
		limit = max(plainAnswer, min(offered(&p), largestAnswer))
	}
	return pack(reply, &q, addrs, limit)
}

// offered is the size of answers that the client takes by EDNS, RFC 6891; 0
// without.
func offered(p *dnsmessage.Parser) int {
	for range 8 {
		h, err := p.AdditionalHeader()
		if err != nil {
			return 0
		}
		if h.Type == dnsmessage.TypeOPT {
			return int(h.Class)
		}
		if p.SkipAdditional() != nil {
			return 0
		}
	}
	return 0
}

// resolve asks the host's resolver. Types other than addresses have no records
// here, which is what clients that ask for both understand best. Addresses that
// the guest could not reach are left out: they would only tell it about the
// host's networks.
func (g *Gateway) resolve(q dnsmessage.Question) ([]netip.Addr, dnsmessage.RCode) {
	name, ok := hostName(q.Name.String())
	if !ok {
		return nil, dnsmessage.RCodeNameError
	}
	var network string
	switch q.Type {
	case dnsmessage.TypeA:
		network = "ip4"
	case dnsmessage.TypeAAAA:
		if !g.ipv6 {
			return nil, dnsmessage.RCodeSuccess
		}
		network = "ip6"
	default:
		return nil, dnsmessage.RCodeSuccess
	}
	key := network + " " + name
	if a, ok := g.cache.get(key); ok {
		return a, dnsmessage.RCodeSuccess
	}
	g.counts.lookups.Add(1)
	began := time.Now()
	ctx, cancel := context.WithTimeout(g.ctx, lookupTimeout)
	defer cancel()
	// With the dot, the host's search list does not apply: the guest has none.
	found, err := g.config.Resolver.LookupNetIP(ctx, network, name+".")
	var addrs []netip.Addr
	var why string
	for _, a := range found[:min(len(found), maxAnswers)] {
		a = a.Unmap()
		if w := refuse(a, g.config.Allow); w != "" {
			why = w
			continue
		}
		addrs = append(addrs, a)
		g.names.remember(a, name)
	}
	e := Event{Protocol: "dns", Name: name, Duration: time.Since(began)}
	var notFound *net.DNSError
	switch {
	case errors.As(err, &notFound) && notFound.IsNotFound:
		// A name without an address of this kind may have one of the other,
		// and to say that it does not exist would hide that.
		other := map[string]string{"ip4": "ip6", "ip6": "ip4"}[network]
		if _, err := g.config.Resolver.LookupNetIP(ctx, other, name+"."); err == nil {
			return nil, dnsmessage.RCodeSuccess
		}
		return nil, dnsmessage.RCodeNameError
	case err != nil:
		e.Verdict, e.Reason = Failed, err.Error()
		g.tell(e)
		return nil, dnsmessage.RCodeServerFailure
	case len(addrs) == 0 && why != "":
		e.Verdict, e.Reason = Denied, why
		g.tell(e)
		return nil, dnsmessage.RCodeSuccess
	}
	g.cache.put(key, addrs)
	return addrs, dnsmessage.RCodeSuccess
}

// hostName returns a name in small letters without the last dot, and whether it
// is one that a host can have: labels of letters, digits, hyphens and
// underscores, RFC 1123 and what is found in the wild.
func hostName(s string) (string, bool) {
	s = strings.ToLower(strings.TrimSuffix(s, "."))
	if s == "" || len(s) > 253 {
		return "", false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 {
			return "", false
		}
		for _, c := range []byte(label) {
			if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
				return "", false
			}
		}
	}
	// An address is no name, in none of the ways in which some resolvers read
	// one (0x7f.1, 2130706433).
	last := s[strings.LastIndexByte(s, '.')+1:]
	if last[0] >= '0' && last[0] <= '9' {
		return "", false
	}
	return s, true
}

// pack writes an answer of at most limit bytes; one that is longer is cut and
// says so, and the client asks again over TCP.
func pack(h dnsmessage.Header, q *dnsmessage.Question, addrs []netip.Addr, limit int) []byte {
	for {
		b := dnsmessage.NewBuilder(nil, h)
		b.EnableCompression()
		_ = b.StartQuestions()
		if q != nil {
			_ = b.Question(*q)
		}
		_ = b.StartAnswers()
		for _, a := range addrs {
			rh := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: answerTTL}
			if a.Is4() {
				_ = b.AResource(rh, dnsmessage.AResource{A: a.As4()})
			} else {
				_ = b.AAAAResource(rh, dnsmessage.AAAAResource{AAAA: a.As16()})
			}
		}
		msg, err := b.Finish()
		if err != nil {
			return nil
		}
		if len(msg) <= limit || len(addrs) == 0 {
			return msg
		}
		h.Truncated, addrs = true, addrs[:len(addrs)-1]
	}
}

const (
	// maxCached bounds how many answers are kept, cacheTime for how long: enough
	// for the questions that belong to one connection.
	maxCached = 256
	cacheTime = 5 * time.Second
)

// A cache keeps answers for a moment.
type cache struct {
	mu      sync.Mutex
	entries map[string]cached
}

type cached struct {
	addrs []netip.Addr
	until time.Time
}

func (c *cache) get(key string) ([]netip.Addr, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.entries[key]
	return e.addrs, ok && time.Now().Before(e.until)
}

func (c *cache) put(key string, addrs []netip.Addr) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries == nil || len(c.entries) >= maxCached {
		c.entries = make(map[string]cached)
	}
	c.entries[key] = cached{addrs, time.Now().Add(cacheTime)}
}
