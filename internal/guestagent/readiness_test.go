package guestagent

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// At a time limit the reason is what the last whole attempt met, however close
// to the limit another one begins.
func TestProbeTimeLimit(t *testing.T) {
	var asked atomic.Int32
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.WriteHeader(http.StatusNotFound)
	}))
	defer web.Close()
	for range 50 {
		asked.Store(0)
		p := probe{check: guestproto.Readiness{Type: "http", URL: web.URL}, timeout: 20 * time.Millisecond, interval: 100 * time.Microsecond}
		err := p.wait(t.Context())
		if !errors.Is(err, api.ErrDeadline) {
			t.Fatal(err)
		}
		// Whoever asks a second time has read the first answer.
		if asked.Load() > 1 && !strings.Contains(err.Error(), "status 404") {
			t.Fatal(err)
		}
	}
}
