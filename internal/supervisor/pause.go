package supervisor

import (
	"context"
	"net/http"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
)

// pathPause takes a POST of a pauseRequest.
const pathPause = "/v1/pause"

type pauseRequest struct {
	Paused bool `json:"paused"`
}

type pauseReply struct {
	Error *api.WireError `json:"error,omitempty"`
}

func (s *supervisor) handlePause(mux *http.ServeMux) {
	mux.HandleFunc("POST "+pathPause, func(w http.ResponseWriter, r *http.Request) {
		var req pauseRequest
		if !readJSON(w, r, &req) {
			return
		}
		writeJSON(w, http.StatusOK, pauseReply{Error: api.ToWire(s.setPaused(r.Context(), req.Paused))})
	})
}

// setPaused halts the machine's processors or lets them go on.
func (s *supervisor) setPaused(ctx context.Context, paused bool) error {
	// Not in the middle of a snapshot, which may pause the machine itself.
	s.snapshotMu.Lock()
	defer s.snapshotMu.Unlock()
	m := s.current()
	pauser, ok := m.(engine.Pauser)
	if !ok {
		return api.WithHint(api.Errorf(api.ErrUnsupported, "engine %s cannot pause a machine", s.cfg.Engine), "stop the workspace: its files are kept")
	}
	ctx = context.WithoutCancel(ctx)
	if paused {
		return pauser.Pause(ctx)
	}
	return pauser.Resume(ctx)
}

// SetPaused halts the machine or lets it go on. An engine that cannot is
// api.ErrUnsupported.
func (c *Client) SetPaused(ctx context.Context, paused bool) error {
	var reply pauseReply
	if err := c.call(ctx, http.MethodPost, pathPause, pauseRequest{paused}, &reply); err != nil {
		return err
	}
	return reply.Error.Err()
}
