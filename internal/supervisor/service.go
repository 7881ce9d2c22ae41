package supervisor

import (
	"context"
	"io"
	"net/http"

	"github.com/pyro-mcp/pyro/internal/guestclient"
)

// pathWatchService takes a POST of a watchRequest.
const pathWatchService = "/v1/watch-service"

type watchRequest struct {
	Service string `json:"service"`
}

// handleWatch closes the ports of services that end: a port of this host must
// not outlive what it leads to.
func (s *supervisor) handleWatch(mux *http.ServeMux) {
	mux.HandleFunc("POST "+pathWatchService, func(w http.ResponseWriter, r *http.Request) {
		var req watchRequest
		if !readJSON(w, r, &req) {
			return
		}
		go s.watchService(req.Service)
		writeJSON(w, http.StatusAccepted, struct{}{})
	})
}

func (s *supervisor) watchService(name string) {
	m := s.current()
	none := int64(0)
	client := guestclient.New(m.DialGuest, guestclient.Options{})
	// Its log ends when the service has ended for good.
	_, err := client.StreamLogs(context.Background(), name, &none, true, io.Discard, io.Discard)
	s.log.Info("service ended", "service", name, "error", err)
	for _, p := range s.published.list() {
		if p.Service == name {
			if err := s.unpublish(p); err != nil {
				s.log.Warn("closing the port of a service", "service", name, "error", err)
			}
		}
	}
}

// WatchService lets the supervisor close the ports that were published for a
// service when it ends.
func (c *Client) WatchService(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodPost, pathWatchService, watchRequest{name}, nil)
}
