package store_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/store"
)

// BenchmarkOpenAndList is what "pyro workspace list" costs here with 500
// workspaces.
func BenchmarkOpenAndList(b *testing.B) {
	p := newPlace(b)
	s := p.open(b)
	for i := range 500 {
		w := workspace(fmt.Sprintf("ws-%08x", i*7919), fmt.Sprint("name", i))
		for j := range 5 {
			w.Layers = append(w.Layers, fmt.Sprintf("%064x.qcow2", j))
		}
		mustCreate(b, s, w)
		for range 10 {
			journal(b, s, w.WorkspaceID)
		}
	}
	if err := s.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		s, err := store.Open(b.Context(), p.path, p.opts)
		if err != nil {
			b.Fatal(err)
		}
		all, err := s.List(b.Context())
		if err != nil || len(all) != 500 {
			b.Fatal(len(all), err)
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCommand is what the journal adds to a command.
func BenchmarkCommand(b *testing.B) {
	s := newPlace(b).open(b)
	mustCreate(b, s, workspace("a", ""))
	for b.Loop() {
		journal(b, s, "a")
	}
}

func journal(t testing.TB, s *store.Store, id string) {
	t.Helper()
	n, err := s.BeginCommand(t.Context(), id, api.CommandRecord{Command: "make test", StartedAt: time.Now()}, hostproc.Identity{PID: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.FinishCommand(t.Context(), id, n, store.CommandResult{State: "exited", EndedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
}

// BenchmarkUpdate waits for the disk.
func BenchmarkUpdate(b *testing.B) {
	s := newPlace(b).open(b)
	mustCreate(b, s, workspace("a", ""))
	for b.Loop() {
		if _, err := s.Update(b.Context(), "a", func(*store.Workspace) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}
