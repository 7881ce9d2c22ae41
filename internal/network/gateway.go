package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/rtnetlink"
)

// The addresses inside. They are seen by nobody but the guest, and every guest
// has the same. The networks are private ones, so no policy leads there.
var (
	guest4   = netip.MustParsePrefix("10.213.0.2/24")
	gateway4 = netip.MustParseAddr("10.213.0.1")
	guest6   = netip.MustParsePrefix("fd70:7972:6f00::2/64")
	gateway6 = netip.MustParseAddr("fd70:7972:6f00::1")
)

// deviceMTU is the largest packet. The connection to the guest costs time per
// packet more than per byte, and this one still fits a frame: measured over
// gVisor, 1,500 gives a quarter of the throughput.
const deviceMTU = 65520

// nic is the number of the stack's one device.
const nic = 1

// The sizes of a connection's buffers in the stack, see [Gateway.bufferSize].
const (
	minBuffer   = 16 << 10
	usualBuffer = 128 << 10
	maxBuffer   = 512 << 10
	// allBuffers is shared by all connections, as far as minBuffer allows.
	allBuffers = 8 << 20
)

// Resolver is what the gateway's name server needs of a net.Resolver.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Config says how a Gateway works; the zero value serves.
type Config struct {
	// Resolver answers the guest's questions; nil means this host's.
	Resolver Resolver
	// Events is told of every connection that ended or was not made. It is
	// called concurrently and must be quick.
	Events func(Event)
	Logger *slog.Logger
	// Allow opens ranges of addresses that are closed to guests. It is for
	// tests, whose outside world is a namespace with such an address. It opens
	// no address of this host.
	Allow []netip.Prefix
	// Clock is what the stack measures time by; nil means this host's clock.
	Clock tcpip.Clock
}

// A Gateway is the network of one guest. It exists without the guest's
// connection, and outlives one that breaks.
type Gateway struct {
	config Config
	stack  *stack.Stack
	link   *link
	log    *slog.Logger
	counts counters
	names  names
	cache  cache
	dialer net.Dialer
	guests []netip.Addr // the guest's addresses
	own    []netip.Addr // the gateway's
	ipv6   bool
	// maxTCP and maxUDP are maxTCPFlows and maxUDPFlows, or what this process's
	// open files allow.
	maxTCP, maxUDP int64

	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu     sync.Mutex // guards closed, and flows against an Add after Close
	closed bool
	flows  sync.WaitGroup

	serving sync.Mutex // held while a connection is served
	once    sync.Once

	epochMu sync.Mutex
	epoch   *epoch
}

// An epoch is the time of one device of the guest's.
type epoch struct {
	ctx    context.Context // ends with Detach
	cancel context.CancelFunc
	conn   io.Closer
	served chan struct{} // closed when Serve has ended

	mu sync.Mutex
	// making counts the connections that are neither made nor refused yet; made
	// is closed when there are none after ctx's end.
	making int
	made   chan struct{}
}

// begin counts a connection that is being made, unless Detach has begun.
func (e *epoch) begin() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.ctx.Err() != nil {
		return false
	}
	e.making++
	return true
}

func (e *epoch) done() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.making--
	e.settle()
}

// end lets none begin any more.
func (e *epoch) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.cancel()
	e.settle()
}

func (e *epoch) settle() {
	if e.making == 0 && e.ctx.Err() != nil {
		select {
		case <-e.made:
		default:
			close(e.made)
		}
	}
}

// currentEpoch returns the epoch of what is served, or was last; nil before.
func (g *Gateway) currentEpoch() *epoch {
	g.epochMu.Lock()
	defer g.epochMu.Unlock()
	return g.epoch
}

// New makes a gateway. Its stack costs about a megabyte until it is used.
func New(c Config) (*Gateway, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Resolver == nil {
		c.Resolver = &net.Resolver{PreferGo: true}
	}
	g := &Gateway{
		config: c, log: c.Logger,
		dialer: net.Dialer{Timeout: dialTimeout},
		guests: []netip.Addr{guest4.Addr()}, own: []netip.Addr{gateway4},
	}
	g.maxTCP, g.maxUDP = maxTCPFlows, maxUDPFlows
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil && files.Cur < 1<<20 {
		g.maxTCP, g.maxUDP = min(maxTCPFlows, int64(files.Cur/4)), min(maxUDPFlows, int64(files.Cur/8))
	}
	// A guest with an IPv6 address that leads nowhere would wait for nothing.
	if _, err := rtnetlink.RouteType(netip.MustParseAddr("2000::1")); err == nil {
		g.ipv6 = true
		g.guests, g.own = append(g.guests, guest6.Addr()), append(g.own, gateway6)
	}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	if err := g.start(); err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}

func (g *Gateway) start() error {
	g.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
		Clock:              g.config.Clock,
	})
	g.link = newLink(deviceMTU, &g.counts)
	// Any address is this stack's, and it may answer as any: that is what makes
	// it everybody at once to the guest.
	if err := g.stack.CreateNIC(nic, g.link); err != nil {
		return stackError("making the device", err)
	}
	if err := g.stack.SetPromiscuousMode(nic, true); err != nil {
		return stackError("accepting every address", err)
	}
	if err := g.stack.SetSpoofing(nic, true); err != nil {
		return stackError("answering as every address", err)
	}
	for _, a := range g.own {
		address := tcpip.ProtocolAddress{Protocol: protocolOf(a), AddressWithPrefix: tcpip.AddrFromSlice(a.AsSlice()).WithPrefix()}
		if err := g.stack.AddProtocolAddress(nic, address, stack.AddressProperties{}); err != nil {
			return stackError("adding the gateway's address", err)
		}
	}
	g.stack.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nic}, {Destination: header.IPv6EmptySubnet, NIC: nic}})
	if err := g.tuneTCP(); err != nil {
		return err
	}
	g.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(g.stack, usualBuffer, int(g.maxTCP), g.forwardTCP).HandlePacket)
	g.stack.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(g.stack, g.forwardUDP).HandlePacket)
	return g.serveNames()
}

// tuneTCP bounds what connections hold, also after their end: the guest is one
// short hop away, so nothing needs to be waited for long, and for what arrives
// late (TIME-WAIT, RFC 9293 section 3.3.2) not at all, because the connection to
// the guest keeps packets in their order. A stack that waits loses the SYN of a
// port that is used again meanwhile, and gVisor as the guest's kernel takes any
// port for the next connection: a few in a thousand took seconds then.
func (g *Gateway) tuneTCP() error {
	moderate, sack := tcpip.TCPModerateReceiveBufferOption(true), tcpip.TCPSACKEnabled(true)
	timeWait, linger := tcpip.TCPTimeWaitTimeoutOption(0), tcpip.TCPLingerTimeoutOption(30*time.Second)
	for _, option := range []tcpip.SettableTransportProtocolOption{
		&tcpip.TCPSendBufferSizeRangeOption{Min: minBuffer, Default: usualBuffer, Max: maxBuffer},
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: usualBuffer, Max: maxBuffer},
		&moderate, &sack, &timeWait, &linger,
	} {
		if err := g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return stackError(fmt.Sprintf("setting %T", option), err)
		}
	}
	return nil
}

func stackError(doing string, err tcpip.Error) error {
	return api.Errorf(api.ErrInternal, "starting the guest's network: %s: %s", doing, err)
}

func protocolOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}

// Request is what to ask the guest agent for.
func (g *Gateway) Request() guestproto.AttachNetwork {
	req := guestproto.AttachNetwork{
		MTU:       deviceMTU,
		Addresses: []netip.Prefix{guest4},
		Gateways:  []netip.Addr{gateway4},
		Resolvers: []netip.Addr{gateway4},
	}
	if g.ipv6 {
		req.Addresses, req.Gateways = append(req.Addresses, guest6), append(req.Gateways, gateway6)
	}
	return req
}

// Serve carries packets over conn, which speaks guestproto.FramePackets, until
// it ends, breaks, holds what does not belong there, or ctx or the gateway ends.
// It closes conn and returns why, never nil. Connections that the guest has open
// wait for the next Serve as long as TCP does. One conn is served at a time; the
// others wait.
func (g *Gateway) Serve(ctx context.Context, conn io.ReadWriteCloser) error {
	g.serving.Lock()
	defer g.serving.Unlock()
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	defer context.AfterFunc(g.ctx, func() { conn.Close() })()
	e := &epoch{conn: conn, served: make(chan struct{}), made: make(chan struct{})}
	e.ctx, e.cancel = context.WithCancel(g.ctx)
	defer e.cancel()
	defer close(e.served)
	g.epochMu.Lock()
	g.epoch = e
	g.epochMu.Unlock()
	g.link.plug()
	written := make(chan error, 1)
	go func() {
		err := g.link.deliver(conn)
		half, ok := conn.(interface{ CloseWrite() error })
		if err != nil || !ok || !g.link.isFinishing() || half.CloseWrite() != nil {
			conn.Close() // which ends the reading
		}
		written <- err
	}()
	err := g.receive(conn)
	conn.Close()
	g.link.unplug()
	if werr := <-written; err == nil || errors.Is(err, net.ErrClosed) && werr != nil {
		err = werr
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case g.ctx.Err() != nil:
		return api.Errorf(api.ErrCanceled, "the guest's network was closed")
	case errors.Is(err, io.EOF):
		return api.Errorf(api.ErrUnavailable, "the guest has closed its network")
	}
	return err
}

// Detach takes the guest's device away in good order, while Serve serves it: every
// TCP connection is reset, new ones are refused, and then Serve's connection is
// half-closed. When Detach returns without an error, the guest has had all of that
// and has closed its end; when ctx has ended before, the connection is closed all the
// same. The next Serve begins anew. It is for guests whose device
// cannot be kept: a connection that nobody resets hangs there.
func (g *Gateway) Detach(ctx context.Context) error {
	e := g.currentEpoch()
	if e == nil {
		return nil
	}
	e.end()
	select {
	case <-e.made:
	case <-ctx.Done():
	}
	for _, endpoint := range g.stack.RegisteredEndpoints() {
		if t, ok := endpoint.(*tcp.Endpoint); ok && t.EndpointState() != tcp.StateListen {
			t.Abort()
		}
	}
	g.link.finish()
	select {
	case <-e.served:
		return nil
	case <-ctx.Done():
		e.conn.Close()
		return fmt.Errorf("taking the guest's network away: %w", ctx.Err())
	}
}

// receive gives the stack what the guest sends, until an error.
func (g *Gateway) receive(r io.Reader) error {
	frames := guestproto.NewFrameReader(r)
	for {
		kind, payload, err := frames.Next()
		if err != nil {
			return fmt.Errorf("reading the guest's packets: %w", err)
		}
		if kind != guestproto.FramePackets {
			return api.Errorf(api.ErrDamaged, "reading the guest's packets: a frame of type %d came", kind)
		}
		if err := guestproto.Packets(payload, func(p []byte) error {
			g.link.inject(p, g.guests, g.own)
			return nil
		}); err != nil {
			return fmt.Errorf("reading the guest's packets: %w", err)
		}
	}
}

// Stats returns the counts.
func (g *Gateway) Stats() Stats { return g.counts.stats() }

// bufferSize is what each of the next connection's two buffers may hold. They
// shrink with the number of connections, so that a guest that fills them all has
// some 50 MB in each direction.
func (g *Gateway) bufferSize() int64 {
	return min(max(allBuffers/(g.counts.tcpOpen.Load()+1), minBuffer), maxBuffer)
}

// begin counts a goroutine of the gateway's, to be ended by flows.Done, unless
// the gateway is closed.
func (g *Gateway) begin() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.flows.Add(1)
	return true
}

// Close ends every connection and returns when nothing of the gateway is left.
// Safe to call twice.
func (g *Gateway) Close() {
	g.once.Do(func() {
		g.mu.Lock()
		g.closed = true
		g.mu.Unlock()
		g.cancel()
		if g.stack == nil {
			return
		}
		// Those that are still shaking hands have nobody else to end them.
		for _, e := range g.stack.RegisteredEndpoints() {
			e.Abort()
		}
		g.flows.Wait()
		g.stack.Destroy()
	})
}
