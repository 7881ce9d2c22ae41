package guestagent

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestagent/ring"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// services are the agent's services by their names.
type services struct {
	budget *ring.Budget

	mu     sync.Mutex
	all    map[string]*service
	closed bool
}

// The bounds of the pause between two readiness checks.
const (
	minReadyInterval = 10 * time.Millisecond
	maxReadyInterval = time.Minute
)

// build turns a request into a service that is not running yet.
func (s *Server) buildService(req *guestproto.StartService) (*service, error) {
	if err := guestproto.CheckWorkloadName(req.ServiceName); err != nil {
		return nil, err
	}
	exec := &guestproto.ExecRequest{Command: req.Command, Env: req.Env, Cwd: req.Cwd, User: req.User}
	if len(req.Argv) > 0 {
		exec.Command, exec.Argv = "", req.Argv
	}
	if err := checkExec(exec); err != nil {
		return nil, err
	}
	timeout, err := req.ReadyTimeout()
	if err != nil {
		return nil, err
	}
	interval := milliseconds(req.ReadyIntervalMS)
	if interval == 0 {
		interval = guestproto.DefaultReadyInterval
	}
	switch {
	case interval < minReadyInterval || interval > maxReadyInterval:
		return nil, api.Errorf(api.ErrInvalid, "ready_interval_ms is %d, not between %d and %d", req.ReadyIntervalMS,
			minReadyInterval.Milliseconds(), maxReadyInterval.Milliseconds())
	case req.Restart != "" && req.Restart != guestproto.RestartOnFailure:
		return nil, api.Errorf(api.ErrInvalid, "restart is %q, which is neither empty nor %q", req.Restart, guestproto.RestartOnFailure)
	}
	if req.Readiness != nil {
		if err := req.Readiness.Check(); err != nil {
			return nil, err
		}
	}
	spec, err := s.spec(exec)
	if err != nil {
		return nil, err
	}
	sv := &service{
		name: req.ServiceName, command: req.Command, cwd: s.guestPath(spec.Dir),
		runner: s.Runner, spec: spec, restart: req.Restart != "",
		settled: make(chan struct{}), stopped: make(chan struct{}), done: make(chan struct{}),
		state: serviceStarting, started: time.Now(),
	}
	sv.settle = sync.OnceFunc(func() { close(sv.settled) })
	if sv.command == "" {
		sv.command = strings.Join(req.Argv, " ")
	}
	if req.Readiness != nil {
		sv.probe = &probe{runner: s.Runner, check: *req.Readiness, spec: spec, root: s.Root, timeout: timeout, interval: interval}
	}
	for i := range sv.out {
		if sv.out[i], err = ring.New(s.services.budget); err != nil {
			sv.free()
			return nil, api.Errorf(api.ErrExhausted, "%w", err)
		}
	}
	return sv, nil
}

// free gives up what a service that is over has kept.
func (sv *service) free() {
	for _, r := range sv.out {
		if r != nil {
			_ = r.Close()
		}
	}
}

// begin adds a service and starts it. It takes the place of one of its name that
// is over, and the oldest that is over makes room.
func (ss *services) begin(sv *service) error {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.closed {
		return api.Errorf(api.ErrState, "the guest is shutting down")
	}
	old := ss.all[sv.name]
	if old != nil && !old.isOver() {
		return api.WithHint(api.Errorf(api.ErrExists, "service %q runs already", sv.name), "stop it first, or choose another name")
	}
	if old == nil && len(ss.all) >= guestproto.MaxServices {
		for _, other := range ss.all {
			if other.isOver() && (old == nil || other.ended.Before(*old.ended)) {
				old = other
			}
		}
		if old == nil {
			return api.WithHint(api.Errorf(api.ErrExhausted, "%d services run, and there may be no more", len(ss.all)), "stop one")
		}
	}
	if old != nil {
		delete(ss.all, old.name)
		old.free()
	}
	if ss.all == nil {
		ss.all = map[string]*service{}
	}
	ss.all[sv.name] = sv
	go sv.run()
	return nil
}

func (ss *services) find(name string) (*service, error) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if sv := ss.all[name]; sv != nil {
		return sv, nil
	}
	return nil, api.Errorf(api.ErrNotFound, "there is no service %q", name)
}

func (ss *services) list() []*service {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	var out []*service
	for _, sv := range ss.all {
		out = append(out, sv)
	}
	slices.SortFunc(out, func(a, b *service) int { return strings.Compare(a.name, b.name) })
	return out
}

// end stops all services and lets none begin. It returns when they have ended.
func (ss *services) end(grace time.Duration) {
	ss.mu.Lock()
	ss.closed = true
	ss.mu.Unlock()
	all := ss.list()
	for _, sv := range all {
		sv.stop("the guest is shutting down", grace)
	}
	for _, sv := range all {
		<-sv.done
	}
}

// startService starts a service and answers when it is ready, or has failed to
// become so. A caller that hangs up before does not leave it behind.
func (q *request) startService(ctx context.Context, line []byte) error {
	var req guestproto.StartService
	if err := decodeRequest(line, &req, "service_name"); err != nil {
		return err
	}
	sv, err := q.server.buildService(&req)
	if err != nil {
		return err
	}
	if err := q.server.services.begin(sv); err != nil {
		sv.free()
		return err
	}
	ctx, unheed := q.heed(ctx)
	hungUp := false
	select {
	case <-sv.settled:
		// Its state is told once it is final, not just about to be.
		if sv.neverReady() {
			<-sv.done
		}
	case <-ctx.Done():
		hungUp = true
		sv.stop("its caller hung up before it was ready", killGrace)
		<-sv.done
	}
	unheed()
	if hungUp {
		return q.sent(errGone)
	}
	return q.reply(sv.message())
}

func (q *request) statusService(line []byte) error {
	var req guestproto.NamedService
	if err := decodeRequest(line, &req, "service_name"); err != nil {
		return err
	}
	sv, err := q.server.services.find(req.ServiceName)
	if err != nil {
		return err
	}
	return q.reply(sv.message())
}

func (q *request) listServices() error {
	reply := guestproto.ListServices{Services: []guestproto.Service{}}
	for _, sv := range q.server.services.list() {
		reply.Services = append(reply.Services, sv.message())
	}
	return q.reply(reply)
}

// stopService ends a service and answers when all of it is gone. One that is
// over already is answered with how it ended.
func (q *request) stopService(line []byte) error {
	var req guestproto.StopService
	if err := decodeRequest(line, &req, "service_name"); err != nil {
		return err
	}
	grace, err := req.Grace()
	if err != nil {
		return err
	}
	sv, err := q.server.services.find(req.ServiceName)
	if err != nil {
		return err
	}
	sv.stop("it was stopped", grace)
	<-sv.done // the grace and the limits of killing bound this
	return q.reply(sv.message())
}

// logsService answers with a service's output.
func (q *request) logsService(ctx context.Context, line []byte) error {
	var req guestproto.LogsService
	if err := decodeRequest(line, &req, "service_name"); err != nil {
		return err
	}
	switch {
	case req.TailLines != nil && *req.TailLines < 0:
		return api.Errorf(api.ErrInvalid, "tail_lines is %d, which is below 0", *req.TailLines)
	case req.Follow && !q.stream:
		return api.Errorf(api.ErrInvalid, "follow needs the streaming form")
	}
	sv, err := q.server.services.find(req.ServiceName)
	if err != nil {
		return err
	}
	var tails [2]tail
	for i, r := range sv.out {
		tails[i] = findTail(r, req.TailLines)
	}
	if q.stream {
		return q.streamLogs(ctx, sv, tails, req.Follow)
	}
	reply := guestproto.ServiceLogs{Service: sv.message(), TailLines: req.TailLines}
	for i, text := range []*string{&reply.Stdout, &reply.Stderr} {
		var cut bool
		*text, cut = tails[i].text(sv.out[i])
		reply.Truncated = reply.Truncated || cut || tails[i].missed
	}
	return q.reply(reply)
}

// streamLogs sends what is kept from the tails on, and with follow what comes
// until the service is over.
func (q *request) streamLogs(ctx context.Context, sv *service, tails [2]tail, follow bool) error {
	ctx, unheed := q.heedHangUp(ctx)
	err := func() error {
		types := [2]guestproto.FrameType{guestproto.FrameStdout, guestproto.FrameStderr}
		buf := chunks.Get().(*[outputChunk]byte)
		defer chunks.Put(buf)
		pos := [2]int64{tails[0].from, tails[1].from}
		for {
			var changed [2]<-chan struct{}
			over, sent := true, false
			for i, r := range sv.out {
				changed[i] = r.Changed()
				_, end, ended := r.Bounds()
				if !follow {
					end, ended = tails[i].end, true
				}
				at, n := r.ReadAt(buf[:max(0, min(int64(len(buf)), end-pos[i]))], pos[i])
				if n > 0 {
					if err := q.frame(types[i], buf[:n]); err != nil {
						return errGone
					}
					sent = true
				}
				pos[i] = at + int64(n)
				over = over && ended && (pos[i] >= end || n == 0)
			}
			switch {
			case ctx.Err() != nil:
				return errGone
			case over:
				return nil
			case sent:
				continue
			}
			// A channel of an output that has ended is closed already.
			for i, r := range sv.out {
				if _, _, ended := r.Bounds(); ended && changed[1-i] != nil {
					changed[i] = nil
				}
			}
			select {
			case <-changed[0]:
			case <-changed[1]:
			case <-ctx.Done():
			}
		}
	}()
	unheed()
	if errors.Is(err, errGone) {
		return q.sent(err)
	}
	if follow {
		<-sv.done
	}
	return q.reply(sv.message())
}
