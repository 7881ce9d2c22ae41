package mcpserver

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/pyro-mcp/pyro/api"
)

const (
	// progressPause is between two progress notifications of one call: a person
	// reads no faster, and a guest that prints without end costs no more.
	progressPause = 250 * time.Millisecond
	// heartbeat is how often a call that has nothing to say says so: clients give
	// up on calls that are silent, the usual limit being a minute.
	heartbeat = 10 * time.Second
)

// A reporter sends a call's progress notifications, from a goroutine of its
// own: a client that reads slowly slows nobody down. Of several messages within
// one pause it sends the last. A call without a progress token has none.
type reporter struct {
	session *mcp.ServerSession
	token   any
	wake    chan struct{}
	stop    context.CancelFunc
	done    chan struct{}

	mu      sync.Mutex
	pending string
	// watch, if set, is asked for a message where nothing is pending.
	watch func() string
	since time.Time
}

// newReporter returns the reporter of req's call, nil if nobody wants to know.
func newReporter(ctx context.Context, req *mcp.CallToolRequest) *reporter {
	token := req.Params.GetProgressToken()
	if token == nil || req.Session == nil {
		return nil
	}
	ctx, stop := context.WithCancel(ctx)
	r := &reporter{session: req.Session, token: token, wake: make(chan struct{}, 1), stop: stop, done: make(chan struct{}), since: time.Now()}
	go r.run(ctx)
	return r
}

// close ends the notifications: none comes after a call's result.
func (r *reporter) close() {
	if r == nil {
		return
	}
	r.stop()
	<-r.done
}

// step is a func(api.Progress) for the SDK.
func (r *reporter) step(p api.Progress) {
	text := p.Message
	if text == "" {
		text = p.Phase
	}
	if p.Total > 0 {
		text = fmt.Sprintf("%s (%d%%)", text, min(100, max(0, p.Done*100/p.Total)))
	}
	r.say(text)
}

func (r *reporter) say(text string) {
	if r == nil {
		return
	}
	r.mu.Lock()
	r.pending = text
	r.mu.Unlock()
	r.poke()
}

func (r *reporter) poke() {
	if r == nil {
		return
	}
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// observe has the reporter ask for messages by itself, after every poke.
func (r *reporter) observe(watch func() string) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.watch = watch
}

func (r *reporter) next(idle bool) string {
	r.mu.Lock()
	text, watch := r.pending, r.watch
	r.pending = ""
	r.mu.Unlock()
	if text == "" && watch != nil {
		text = watch()
	}
	if text == "" && idle {
		text = "under way for " + time.Since(r.since).Round(time.Second).String()
	}
	return clean(text)
}

func (r *reporter) run(ctx context.Context) {
	defer close(r.done)
	idle := time.NewTicker(heartbeat)
	defer idle.Stop()
	pause := time.NewTimer(0)
	defer pause.Stop()
	for n := 1.0; ; {
		beat := false
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		case <-idle.C:
			beat = true
		}
		if text := r.next(beat); text != "" {
			// A client that is gone is noticed by whoever reads from it.
			_ = r.session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: r.token, Message: text, Progress: n})
			n++
			idle.Reset(heartbeat)
		}
		pause.Reset(progressPause)
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
		}
	}
}
