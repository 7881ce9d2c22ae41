package supervisor

import (
	"context"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// A supervisor that stands by has the ports of a machine that is paused to disk,
// counts its time to live, and waits. Who connects to a port is kept waiting
// while a command, which knows the workspace, wakes the machine; from then on the
// supervisor is like any other.

// pathWake takes a POST of a wakeRequest.
const pathWake = "/v1/wake"

// wakeRequest is what may have changed of the machine's disk meanwhile.
type wakeRequest struct {
	Layers []string `json:"layers"`
}

// wakeLimit bounds how long a connection waits for its machine.
const wakeLimit = 4 * time.Minute

// callPause is how long a command that could not wake the machine is not run
// again.
const callPause = time.Second

// standby is the part of a supervisor that waits.
type standby struct {
	wakes chan wake

	mu   sync.Mutex
	call *wakeCall // the last one
}

// wake is a wake request on its way; answer takes one result.
type wake struct {
	wakeRequest
	answer chan result
}

// wakeCall is one run of Standby.Command.
type wakeCall struct {
	ended chan struct{} // closed at its end; then at is set
	at    time.Time
}

// standBy waits for a request to wake the machine. It returns what answers that.
func (s *supervisor) standBy(ctx context.Context, resultPipe *os.File) (answer func(result), err error) {
	answer = func(r result) { report(resultPipe, r) }
	for _, p := range s.cfg.Standby.Ports {
		if _, err := s.publish(p); err != nil {
			return answer, err
		}
	}
	s.writeRecord(nil)
	s.serveControl(ctx)
	answer(result{Status: &Status{ID: s.dir.ID(), Engine: s.cfg.Engine}})
	select {
	case w := <-s.standby.wakes:
		s.cfg.Spec.Layers = w.Layers
		return func(r result) { w.answer <- r }, nil
	case <-ctx.Done():
		return func(result) {}, context.Cause(ctx)
	}
}

func (s *supervisor) handleWake(mux *http.ServeMux) {
	mux.HandleFunc("POST "+pathWake, func(w http.ResponseWriter, r *http.Request) {
		var req wakeRequest
		if !readJSON(w, r, &req) {
			return
		}
		if s.standby == nil {
			writeJSON(w, http.StatusOK, result{Error: api.ToWire(api.Errorf(api.ErrState, "the machine does not sleep"))})
			return
		}
		on := wake{req, make(chan result, 1)}
		select {
		case s.standby.wakes <- on:
		case <-r.Context().Done():
			return
		}
		select {
		case res := <-on.answer:
			writeJSON(w, http.StatusOK, res)
		case <-r.Context().Done():
		}
	})
}

// awaken returns when the machine is up. One that sleeps is woken.
func (s *supervisor) awaken(ctx context.Context) error {
	select {
	case <-s.up:
		return nil
	default:
	}
	if s.standby == nil {
		return api.Errorf(api.ErrUnavailable, "the machine is not up yet")
	}
	ctx, cancel := context.WithTimeout(ctx, wakeLimit)
	defer cancel()
	select {
	case <-s.up:
		return nil
	case <-s.callForWake():
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-s.up:
		return nil
	default:
		return api.Errorf(api.ErrUnavailable, "the machine could not be woken")
	}
}

// callForWake runs Standby.Command, once for all who call at the same time, and
// returns what is closed at its end.
func (s *supervisor) callForWake() <-chan struct{} {
	b := s.standby
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.call != nil {
		select {
		case <-b.call.ended:
			if time.Since(b.call.at) < callPause {
				return b.call.ended
			}
		default:
			return b.call.ended
		}
	}
	call := &wakeCall{ended: make(chan struct{})}
	b.call = call
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), wakeLimit)
		defer cancel()
		cmd := exec.CommandContext(ctx, s.cfg.Standby.Command[0], s.cfg.Standby.Command[1:]...)
		cmd.Env = append(os.Environ(), s.cfg.Standby.Env...)
		cmd.Dir = "/"
		// This process may end before the command does.
		said := &tail{}
		cmd.Stderr = said
		err := cmd.Run()
		if err != nil {
			s.log.Error("waking the machine for a connection", "error", err, "said", said.String())
		}
		call.at = time.Now()
		close(call.ended)
	}()
	return call.ended
}

// tail keeps the last bytes that are written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-500):]
	return len(p), nil
}

func (t *tail) String() string { return string(t.b) }

// Wake lets the machine of a supervisor that stands by go on, on a disk of those
// layers. It returns when the guest answers. The supervisor ends if it does not,
// and is then not to be woken once more. A supervisor that does not stand by is
// api.ErrState.
func (c *Client) Wake(ctx context.Context, layers []string) (*Process, error) {
	var res result
	if err := c.call(ctx, http.MethodPost, pathWake, wakeRequest{layers}, &res); err != nil {
		return nil, err
	}
	if err := res.Error.Err(); err != nil {
		return nil, err
	}
	if res.Status == nil {
		return nil, errors.New("the supervisor said nothing of its machine")
	}
	return &Process{Client: c, Status: *res.Status}, nil
}
