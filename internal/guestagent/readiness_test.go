package guestagent

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// At a time limit the reason is what the last whole attempt met, however close
// to the limit another one begins.
func TestProbeTimeLimit(t *testing.T) {
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	for range 300 {
		p := probe{check: guestproto.Readiness{Type: "http", URL: web.URL}, timeout: 20 * time.Millisecond, interval: 100 * time.Microsecond}
		if err := p.wait(t.Context()); !errors.Is(err, api.ErrDeadline) || !strings.Contains(err.Error(), "status 404") {
			t.Fatal(err)
		}
	}
}
