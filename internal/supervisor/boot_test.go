package supervisor

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/host"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/test/build"
)

// A flaky engine hangs as KVM does on a hollow host, until BootFailed switches
// it to another way, which is engine host with its real agent.
type flaky struct {
	host.Engine
	switched bool
	retry    bool // what BootFailed answers
	started  int
	stopped  int
}

func (f *flaky) Name() string { return "flaky" }

func (f *flaky) Probe(ctx context.Context) engine.Capabilities {
	c := f.Engine.Probe(ctx)
	c.Isolation = api.IsolationVMKVM
	if f.switched {
		c.Isolation = api.IsolationVMEmulated
	}
	return c
}

func (f *flaky) Start(ctx context.Context, spec engine.MachineSpec) (engine.Machine, error) {
	f.started++
	if f.switched {
		return f.Engine.Start(ctx, spec)
	}
	return &hung{f: f, done: make(chan struct{})}, nil
}

func (f *flaky) BootFailed(engine.Machine) (bool, string) {
	f.switched = f.retry
	return f.retry, "going on in another way"
}

// A hung machine never answers.
type hung struct {
	f    *flaky
	done chan struct{}
}

func (h *hung) DialGuest(ctx context.Context) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
func (h *hung) PIDs() []int                                     { return nil }
func (h *hung) Stop(context.Context, time.Duration) error       { h.f.stopped++; return nil }
func (h *hung) Wait(ctx context.Context) (engine.Exit, error) {
	<-ctx.Done()
	return engine.Exit{}, ctx.Err()
}

func newTestSupervisor(t *testing.T) *supervisor {
	t.Helper()
	programs := t.TempDir()
	if err := build.Programs(programs, false); err != nil {
		t.Fatal(err)
	}
	state, err := statedir.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	dir := state.Machine("m1")
	if err := os.Mkdir(dir.Path(), 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := newSupervisor(Config{
		Protocol: protocol, Dir: dir.Path(), Engine: "flaky",
		Spec: engine.MachineSpec{ID: "m1", Dir: dir.EngineDir(), VCPUCount: 1, MemMiB: 64, AgentPath: filepath.Join(programs, "pyro-agent")},
	})
	if err != nil {
		t.Fatal(err)
	}
	s.bootLimit = 200 * time.Millisecond
	t.Cleanup(func() {
		s.mu.Lock()
		m := s.machine
		s.mu.Unlock()
		if m != nil {
			_ = m.Stop(context.Background(), 0)
		}
		s.console.Close()
	})
	return s
}

func TestHungAcceleratorFallsBackAndSaysSo(t *testing.T) {
	s, f := newTestSupervisor(t), &flaky{retry: true}
	ctx, cancel := context.WithCancelCause(t.Context())
	s.cancel = cancel
	// The second boot is a real process and gets real time.
	s.bootLimit = 2 * time.Second
	if err := s.start(ctx, []engine.Engine{f}); err != nil {
		t.Fatal(err)
	}
	if f.started != 2 || f.stopped != 1 {
		t.Errorf("started %d machines, stopped %d; want 2 and 1", f.started, f.stopped)
	}
	if s.status.Isolation != api.IsolationVMEmulated || len(s.status.Notes) != 1 || s.status.Notes[0] != "going on in another way" {
		t.Errorf("status %+v does not say what happened", s.status)
	}
}

func TestFallbackKeepsTheFloor(t *testing.T) {
	s, f := newTestSupervisor(t), &flaky{retry: true}
	s.cfg.Require = "vm-with-kvm-only" // a floor that emulation does not reach
	if err := s.start(t.Context(), []engine.Engine{f}); err == nil {
		t.Error("it went on below the floor")
	}
	if f.started != 1 {
		t.Errorf("started %d machines", f.started)
	}
}

func TestHungGuestIsAnErrorWithItsConsole(t *testing.T) {
	s, f := newTestSupervisor(t), &flaky{}
	_, _ = s.console.Write([]byte("[ 0.1] some kernel line\nVFS: Unable to mount root fs\n"))
	err := s.start(t.Context(), []engine.Engine{f})
	if !errors.Is(err, api.ErrUnavailable) || api.Hint(err) == "" {
		t.Fatalf("got %v (hint %q), want ErrUnavailable with a hint", err, api.Hint(err))
	}
	for _, want := range []string{"did not come up in time", "VFS: Unable to mount root fs"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
	if f.stopped != 1 {
		t.Errorf("the hung machine was stopped %d times", f.stopped)
	}
}
