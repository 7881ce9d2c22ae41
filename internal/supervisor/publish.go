package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/network"
)

const (
	// maxPublished is how many ports a machine may have published.
	maxPublished = 64
	// maxPublishedConns is how many connections there may be to all of them. The
	// guest agent takes 1024 requests of all kinds. One more waits to be
	// accepted.
	maxPublishedConns = 512
	// publishDial is how long the guest may take to connect to its own port,
	// at full speed.
	publishDial = 20 * time.Second
	// defaultPublishHost is where ports are published unless somebody asks for
	// more.
	defaultPublishHost = "127.0.0.1"
)

// A PublishedPort is a port of this host that leads to one of the guest.
type PublishedPort struct {
	Host      string `json:"host"`
	HostPort  int    `json:"host_port"`
	GuestPort int    `json:"guest_port"`
	// Service is the guest's service that it leads to, "" for none.
	Service string `json:"service,omitempty"`
}

// publishReply answers a publish or unpublish.
type publishReply struct {
	HostPort int            `json:"host_port"`
	Error    *api.WireError `json:"error,omitempty"`
}

// publishing are the ports that a machine has published.
type publishing struct {
	mu    sync.Mutex
	ports []*publishedPort
	slots chan struct{} // holds a value for each connection
	// ended says that no port may be published any more.
	ended bool
}

type publishedPort struct {
	PublishedPort
	listener net.Listener
	cancel   context.CancelFunc
}

func newPublishing() *publishing {
	return &publishing{slots: make(chan struct{}, maxPublishedConns)}
}

// publish listens on a port of this host. Whether it is free is known by binding
// it and in no other way.
func (s *supervisor) publish(req PublishedPort) (PublishedPort, error) {
	if req.Host == "" {
		req.Host = defaultPublishHost
	}
	if err := s.checkPublish(req); err != nil {
		return PublishedPort{}, err
	}
	p := s.published
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return PublishedPort{}, api.Errorf(api.ErrState, "the machine is ending")
	}
	if len(p.ports) >= maxPublished {
		return PublishedPort{}, api.WithHint(api.Errorf(api.ErrExhausted, "%d ports are published, the limit is %d", len(p.ports), maxPublished),
			"stop a service that publishes some")
	}
	l, err := net.Listen("tcp", net.JoinHostPort(req.Host, strconv.Itoa(req.HostPort)))
	if err != nil {
		return PublishedPort{}, listenError(req, err)
	}
	req.HostPort = l.Addr().(*net.TCPAddr).Port
	ctx, cancel := context.WithCancel(context.Background())
	p.ports = append(p.ports, &publishedPort{PublishedPort: req, listener: l, cancel: cancel})
	go s.acceptPublished(ctx, l, req.GuestPort)
	return req, nil
}

func (s *supervisor) checkPublish(req PublishedPort) error {
	if s.cfg.Network != api.NetworkEgressPublishing {
		policy := s.cfg.Network
		if policy == "" {
			policy = api.NetworkOff
		}
		return api.WithHint(api.Errorf(api.ErrDenied, "the network policy %s publishes no ports", policy),
			"create the workspace with --network-policy %s", api.NetworkEgressPublishing)
	}
	host, err := netip.ParseAddr(req.Host)
	if err != nil || host.IsMulticast() {
		return api.WithHint(api.Errorf(api.ErrInvalid, "%q is no address to publish a port on", req.Host), "leave it out for %s", defaultPublishHost)
	}
	if req.GuestPort < 1 || req.GuestPort > 65535 {
		return api.Errorf(api.ErrInvalid, "the guest's port %d is not between 1 and 65535", req.GuestPort)
	}
	if req.HostPort < 0 || req.HostPort > 65535 {
		return api.Errorf(api.ErrInvalid, "the host's port %d is not between 0 and 65535", req.HostPort)
	}
	s.mu.Lock()
	isolation := s.status.Isolation
	s.mu.Unlock()
	if isolation == api.IsolationNone && req.HostPort == req.GuestPort {
		// They would be the same port, and lead to itself.
		return api.Errorf(api.ErrInvalid, "without isolation port %d is this host's own already", req.HostPort)
	}
	return nil
}

func listenError(req PublishedPort, err error) error {
	doing := fmt.Sprintf("publishing port %d of the guest on %s:%d", req.GuestPort, req.Host, req.HostPort)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return api.WithHint(api.Errorf(api.ErrBusy, "%s: the port is in use", doing), "choose another, or none to have one picked")
	case errors.Is(err, fs.ErrPermission):
		return api.WithHint(api.Errorf(api.ErrDenied, "%s: %w", doing, err), "choose a port from 1024 on")
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return api.Errorf(api.ErrInvalid, "%s: this host has no such address", doing)
	}
	return api.Errorf(api.ErrUnavailable, "%s: %w", doing, err)
}

// acceptPublished serves the connections to one published port until its
// listener is closed; ctx ends them.
func (s *supervisor) acceptPublished(ctx context.Context, l net.Listener, port int) {
	for {
		c, err := l.Accept()
		if err != nil {
			var temporary interface{ Temporary() bool }
			if errors.As(err, &temporary) && temporary.Temporary() {
				select {
				case <-time.After(50 * time.Millisecond): // out of descriptors
					continue
				case <-ctx.Done():
				}
			}
			return
		}
		select {
		case s.published.slots <- struct{}{}:
		case <-ctx.Done():
			c.Close()
			return
		}
		go func() {
			defer func() { <-s.published.slots }()
			s.joinPublished(ctx, c.(*net.TCPConn), port)
		}()
	}
}

// joinPublished connects a client to the guest's port. The client of a port on
// which nobody listens is reset, as near as one can come to a refusal.
func (s *supervisor) joinPublished(ctx context.Context, c *net.TCPConn, port int) {
	guest, err := s.dialPort(ctx, port)
	if err != nil {
		network.Reset(c)
		s.log.Debug("connecting a client to a published port", "error", err)
		return
	}
	abort := func() {
		network.Reset(c)
		guest.Close()
	}
	defer context.AfterFunc(ctx, abort)()
	_, _, _ = network.Relay(c, guest, abort, len(s.published.slots) <= network.LargeBuffers)
}

// dialPort connects to a port of the guest, which is woken if it stands by.
func (s *supervisor) dialPort(ctx context.Context, port int) (*guestclient.Stream, error) {
	if err := s.awaken(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	m, scale := s.machine, max(1, s.status.TimeScale)
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, publishDial*time.Duration(scale))
	defer cancel()
	return guestclient.New(m.DialGuest, guestclient.Options{}).DialTCP(ctx, port)
}

// unpublish closes a published port and the connections to it.
func (s *supervisor) unpublish(req PublishedPort) error {
	if req.Host == "" {
		req.Host = defaultPublishHost
	}
	p := s.published
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.IndexFunc(p.ports, func(x *publishedPort) bool { return x.Host == req.Host && x.HostPort == req.HostPort })
	if i < 0 {
		return api.Errorf(api.ErrNotFound, "nothing is published on %s:%d", req.Host, req.HostPort)
	}
	p.ports[i].close()
	p.ports = slices.Delete(p.ports, i, i+1)
	return nil
}

func (p *publishedPort) close() {
	p.listener.Close()
	p.cancel()
}

// list returns the published ports in the order of their publishing.
func (p *publishing) list() []PublishedPort {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]PublishedPort, len(p.ports))
	for i, x := range p.ports {
		out[i] = x.PublishedPort
	}
	return out
}

// end closes all ports for good.
func (p *publishing) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, x := range p.ports {
		x.close()
	}
	p.ports, p.ended = nil, true
}

// handlePublish adds the control API's part about ports.
func (s *supervisor) handlePublish(mux *http.ServeMux) {
	mux.HandleFunc("POST "+pathPublish, func(w http.ResponseWriter, r *http.Request) {
		var req PublishedPort
		if !readJSON(w, r, &req) {
			return
		}
		p, err := s.publish(req)
		writeJSON(w, http.StatusOK, publishReply{HostPort: p.HostPort, Error: api.ToWire(err)})
	})
	mux.HandleFunc("DELETE "+pathPublish, func(w http.ResponseWriter, r *http.Request) {
		var req PublishedPort
		if !readJSON(w, r, &req) {
			return
		}
		writeJSON(w, http.StatusOK, publishReply{Error: api.ToWire(s.unpublish(req))})
	})
}

// Publish makes a port of this host lead to one of the guest, and returns the
// host's port: HostPort, or a free one if that is 0. Host "" is 127.0.0.1. A port
// that is taken is ErrBusy, a policy that does not allow it ErrDenied. It ends
// with Unpublish or the machine.
func (c *Client) Publish(ctx context.Context, p PublishedPort) (hostPort int, err error) {
	var reply publishReply
	if err := c.call(ctx, http.MethodPost, pathPublish, p, &reply); err != nil {
		return 0, err
	}
	return reply.HostPort, reply.Error.Err()
}

// Unpublish closes a published port, by its Host and HostPort, and the
// connections to it. One that is not published is ErrNotFound.
func (c *Client) Unpublish(ctx context.Context, p PublishedPort) error {
	var reply publishReply
	if err := c.call(ctx, http.MethodDelete, pathPublish, p, &reply); err != nil {
		return err
	}
	return reply.Error.Err()
}
