package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// serveControl answers as the supervisor of a machine and returns a client of it.
func serveControl(t *testing.T, handler http.HandlerFunc) *Client {
	t.Helper()
	state, err := statedir.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	dir := state.Machine("m1")
	if err := os.Mkdir(dir.Path(), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := guestconn.ListenUnix(dir.ControlSocket())
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { server.Close() })
	return NewClient(dir)
}

// The only HTTP that pyro speaks goes to a supervisor's socket and nowhere else
// (RELIABILITY P10): no redirect, no proxy, no unbounded answer.
func TestClientTrustsNoAnswer(t *testing.T) {
	var dialled atomic.Int32
	elsewhere, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	go func() {
		for {
			c, err := elsewhere.Accept()
			if err != nil {
				return
			}
			dialled.Add(1)
			c.Close()
		}
	}()
	t.Setenv("HTTP_PROXY", "http://"+elsewhere.Addr().String())
	t.Setenv("http_proxy", "http://"+elsewhere.Addr().String())
	for _, test := range []struct {
		name    string
		handler http.HandlerFunc
	}{
		{"Redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://"+elsewhere.Addr().String()+"/", http.StatusFound)
		}},
		{"HugeHeader", func(w http.ResponseWriter, _ *http.Request) {
			for i := range 100 {
				w.Header().Set(fmt.Sprintf("X-%d", i), strings.Repeat("x", 1<<10))
			}
			fmt.Fprint(w, `{"id":"m1"}`)
		}},
		{"EndlessBody", func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, `{"id":"`)
			for r.Context().Err() == nil {
				if _, err := fmt.Fprint(w, strings.Repeat("x", 64<<10)); err != nil {
					return
				}
			}
		}},
		{"NotJSON", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }},
		{"Failure", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			began := time.Now()
			if s, err := serveControl(t, test.handler).Status(t.Context()); err == nil {
				t.Errorf("taken for an answer: %+v", s)
			}
			if d := time.Since(began); d > 30*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
	if n := dialled.Load(); n != 0 {
		t.Errorf("%d connections went elsewhere", n)
	}
}

func TestClientOfADeadSupervisor(t *testing.T) {
	state, err := statedir.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewClient(state.Machine("gone")).Status(t.Context()); !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
}

// Machines are made while others look for abandoned ones: a directory that is
// locked stays.
func TestReapBesideSpawn(t *testing.T) {
	state, err := statedir.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var reapers sync.WaitGroup
	defer reapers.Wait()
	defer cancel()
	for range 4 {
		reapers.Go(func() {
			for ctx.Err() == nil {
				if _, err := Reap(context.Background(), state); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 500 {
		dir := state.Machine(fmt.Sprint("m", i))
		lock, err := makeDirectory(t.Context(), dir, true)
		if err != nil {
			t.Fatal(err)
		}
		rec := record{ID: dir.ID(), Ephemeral: true}
		if err := rec.write(dir); err != nil {
			t.Fatalf("the directory of machine %d is gone: %v", i, err)
		}
		lock.Close()
	}
}

// Reap spares what is locked, what is being made, and what is kept on purpose.
func TestReap(t *testing.T) {
	state, err := statedir.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	machine := func(id string, ephemeral bool) statedir.Machine {
		dir := state.Machine(id)
		if err := os.Mkdir(dir.Path(), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir.LockFile(), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := statedir.WriteJSON(dir.RecordFile(), record{ID: id, Ephemeral: ephemeral}); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	machine("abandoned", true)
	machine("kept", false)
	lock := lockOf(t, machine("running", true))
	defer lock.Close()
	if err := os.Mkdir(state.Machine("beingmade").Path(), 0o700); err != nil {
		t.Fatal(err)
	}
	old := state.Machine("halfmade").Path()
	if err := os.Mkdir(old, 0o700); err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(old, past, past); err != nil {
		t.Fatal(err)
	}
	removed, err := Reap(t.Context(), state)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(removed, " "); got != "abandoned halfmade" {
		t.Errorf("removed %q", got)
	}
	for id, there := range map[string]bool{"abandoned": false, "halfmade": false, "kept": true, "running": true, "beingmade": true} {
		if _, err := os.Stat(state.Machine(id).Path()); (err == nil) != there {
			t.Errorf("machine %s: there %v, want %v", id, err == nil, there)
		}
	}
}

func lockOf(t *testing.T, dir statedir.Machine) *hostproc.Lock {
	t.Helper()
	lock, err := hostproc.TryLock(dir.LockFile())
	if err != nil {
		t.Fatal(err)
	}
	return lock
}
