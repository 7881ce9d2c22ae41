package supervisor

import (
	"context"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/network"
)

// A guest that loses its network, or closes it, gets it back after a pause that
// grows with every failure.
const (
	reattachFirst = 200 * time.Millisecond
	reattachMost  = 30 * time.Second
)

// The guest decides how many connections there are to tell of, so the log takes
// that many a second and after a quiet while.
const (
	eventsPerSecond = 5
	eventsAtOnce    = 50
)

// networkMemory is what the heap of a supervisor with a network should stay below.
const networkMemory = 192 << 20

// NetworkStatus is the guest's network as its supervisor sees it.
type NetworkStatus struct {
	Policy string `json:"policy"`
	// Attached is false while the guest has none, though the policy gives it
	// one; Error then says why.
	Attached bool   `json:"attached"`
	Error    string `json:"error,omitempty"`
	network.Stats
}

// egress is the network of a machine whose policy is not off.
type egress struct {
	gateway  *network.Gateway
	attached atomic.Bool
	mu       sync.Mutex
	err      error // why it is not attached
	// stop takes the network away; done is closed when it is gone.
	stop context.CancelFunc
	done chan struct{}
	// away is closed when the network may come back; nil unless it was taken away.
	away chan struct{}
}

func (e *egress) status(policy string) *NetworkStatus {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := &NetworkStatus{Policy: policy, Attached: e.attached.Load(), Stats: e.gateway.Stats()}
	if e.err != nil {
		n.Error = e.err.Error()
	}
	return n
}

func (e *egress) set(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.err = err
	e.attached.Store(err == nil)
}

// checkNetwork refuses a policy that is none. What is not understood must not
// mean more than off.
func checkNetwork(policy string) error {
	switch policy {
	case "", api.NetworkOff, api.NetworkEgress, api.NetworkEgressPublishing:
		return nil
	}
	return api.WithHint(api.Errorf(api.ErrInvalid, "unknown network policy %q", policy),
		"use %s, %s or %s", api.NetworkOff, api.NetworkEgress, api.NetworkEgressPublishing)
}

// startNetwork gives the guest the network that its policy wants and holds it
// until ctx ends. It returns when the guest has it.
func (s *supervisor) startNetwork(ctx context.Context) error {
	if s.cfg.Network == "" || s.cfg.Network == api.NetworkOff {
		return nil
	}
	s.mu.Lock()
	m, isolation, scale := s.machine, s.status.Isolation, max(1, s.status.TimeScale)
	s.mu.Unlock()
	if isolation == api.IsolationNone {
		return nil // its commands use this host's network anyway
	}
	gateway, err := network.New(network.Config{Events: s.networkEvents(), Logger: s.log, Allow: s.cfg.NetworkAllow})
	if err != nil {
		return err
	}
	// The buffers of the guest's connections come on top of what this process
	// holds otherwise.
	debug.SetMemoryLimit(networkMemory)
	ctx, cancel := context.WithCancel(ctx)
	e := &egress{gateway: gateway, stop: cancel, done: make(chan struct{})}
	attach := func() (*guestclient.Stream, error) {
		ctx, cancel := context.WithTimeout(ctx, bootTimeout*time.Duration(scale))
		defer cancel()
		stream, err := guestclient.New(m.DialGuest, guestclient.Options{}).AttachNetwork(ctx, gateway.Request())
		e.set(err)
		return stream, err
	}
	stream, err := attach()
	if err != nil {
		defer cancel()
		gateway.Close()
		return causeOf(ctx, err)
	}
	s.mu.Lock()
	s.egress = e
	s.mu.Unlock()
	go func() {
		defer cancel()
		defer close(e.done)
		defer gateway.Close()
		s.holdNetwork(ctx, e, stream, attach)
	}()
	return nil
}

// stopNetwork takes the guest's network away, if it has one. It returns when
// nothing passes any more.
func (s *supervisor) stopNetwork(ctx context.Context) {
	if s.dropsNetwork {
		// The device must be gone from the guest, too, as far as that is honest.
		giveBack, err := s.takeNetworkAway(ctx)
		defer giveBack()
		if err != nil {
			s.log.Warn("taking the guest's network away", "error", err)
		}
	}
	s.mu.Lock()
	e := s.egress
	s.egress = nil
	s.mu.Unlock()
	if e != nil {
		e.stop()
		<-e.done
	}
}

// networkAway is how long a guest may take to let go of its network.
const networkAway = 10 * time.Second

// takeNetworkAway takes the guest's network device away in good order, if it has
// one, until the returned function is called, which must be in any case.
func (s *supervisor) takeNetworkAway(ctx context.Context) (giveBack func(), err error) {
	s.mu.Lock()
	e := s.egress
	s.mu.Unlock()
	if e == nil {
		return func() {}, nil
	}
	away := make(chan struct{})
	e.mu.Lock()
	e.away = away
	e.mu.Unlock()
	giveBack = func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.away = nil
		close(away)
	}
	ctx, cancel := context.WithTimeout(ctx, networkAway)
	defer cancel()
	return giveBack, e.gateway.Detach(ctx)
}

// awaitBack waits until the network may be attached, if it was taken away, and
// reports whether it was.
func (e *egress) awaitBack(ctx context.Context) bool {
	e.mu.Lock()
	away := e.away
	e.mu.Unlock()
	if away == nil {
		return false
	}
	select {
	case <-away:
	case <-ctx.Done():
	}
	return true
}

// holdNetwork serves the guest's network and attaches it again whenever it
// breaks, until ctx ends.
func (s *supervisor) holdNetwork(ctx context.Context, e *egress, stream *guestclient.Stream, attach func() (*guestclient.Stream, error)) {
	wait := reattachFirst
	for {
		if stream != nil {
			began := time.Now()
			err := e.gateway.Serve(ctx, stream)
			if ctx.Err() != nil {
				return
			}
			e.set(err)
			if e.awaitBack(ctx) {
				if ctx.Err() != nil {
					return
				}
				if stream, err = attach(); err == nil {
					continue
				}
			}
			s.log.Warn("the guest's network broke", "error", err)
			if time.Since(began) > reattachMost {
				wait = reattachFirst
			}
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		wait = min(2*wait, reattachMost)
		if e.awaitBack(ctx); ctx.Err() != nil {
			return
		}
		var err error
		if stream, err = attach(); err != nil {
			s.log.Warn("attaching the guest's network", "error", err)
		}
	}
}

// networkEvents returns what writes the events of the network to the log, as far
// as it has room.
func (s *supervisor) networkEvents() func(network.Event) {
	limit := rate.NewLimiter(eventsPerSecond, eventsAtOnce)
	var dropped atomic.Int64
	return func(e network.Event) {
		if !limit.Allow() {
			dropped.Add(1)
			return
		}
		args := []any{"protocol", e.Protocol, "verdict", string(e.Verdict)}
		if e.Destination.IsValid() {
			args = append(args, "to", e.Destination)
		}
		for name, text := range map[string]string{"name": e.Name, "reason": e.Reason} {
			if text != "" {
				args = append(args, name, text)
			}
		}
		if e.Sent+e.Received > 0 {
			args = append(args, "sent", e.Sent, "received", e.Received)
		}
		args = append(args, "ms", e.Duration.Milliseconds())
		if n := dropped.Swap(0); n > 0 {
			args = append(args, "untold", n)
		}
		s.log.Info("network", args...)
	}
}
