package workspace

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/engine/host"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/test/build"
)

// shallowHost and shallowGVisor are engines whose machines stand on one layer.
type (
	shallowHost   struct{ host.Engine }
	shallowGVisor struct{ *gvisor.Engine }
)

func (shallowHost) MaxLayers() int   { return 1 }
func (shallowGVisor) MaxLayers() int { return 1 }

// newShallow returns a Manager with one of them, and a workspace w.
func newShallow(t *testing.T, e engine.Engine) *Manager {
	t.Helper()
	programs, state := t.TempDir(), t.TempDir()
	if err := build.Programs(programs, false); err != nil {
		t.Fatal(err)
	}
	cache := filepath.Join(t.TempDir(), "cache")
	if e.Name() != engine.HostName {
		var err error
		if cache, err = statedir.DefaultCache(os.Getenv); err != nil {
			t.Fatal(err)
		}
	}
	m, err := New(t.Context(), Options{
		StateDir: state, CacheDir: cache, Engine: e.Name(),
		Binary: filepath.Join(programs, "pyro"), Agent: filepath.Join(programs, "pyro-agent"),
	})
	if err != nil {
		t.Fatal(err)
	}
	m.engines = []engine.Engine{e}
	t.Cleanup(func() {
		if _, err := m.DeleteWorkspace(context.Background(), "w"); err != nil {
			t.Error(err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	_, err = m.CreateWorkspace(t.Context(), api.CreateRequest{Environment: "debian:12", Name: "w", AllowHostCompat: e.Name() == engine.HostName})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// tooDeep wants err to say that the disk can have no more layers, and how to go
// on, with the workspace in use.
func (m *Manager) tooDeep(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, api.ErrExhausted) || !strings.Contains(err.Error(), "stands on 1 layers") || !strings.Contains(api.Hint(err), "pyro workspace stop w") {
		t.Errorf("beyond the limit: %v (hint %q)", err, api.Hint(err))
	}
	ws, err := m.Workspace(t.Context(), "w")
	if err != nil || ws.State != api.StateStarted {
		t.Errorf("after the refusal the workspace is %+v, %v", ws, err)
	}
	res, err := m.Exec(t.Context(), "w", api.ExecRequest{Argv: []string{"cat", "kept"}})
	if err != nil || res.ExitCode != 0 {
		t.Errorf("after the refusal a command ends with %+v, %v", res, err)
	}
}

func (m *Manager) must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v (hint %q)", what, err, api.Hint(err))
	}
}

// A disk that can have no more layers is said so before anything is done, and the
// way out that is told is one.
func TestSnapshotAtTheLimit(t *testing.T) {
	m := newShallow(t, shallowHost{host.New()})
	snapshot := func(name string) error {
		_, err := m.CreateSnapshot(t.Context(), "w", api.SnapshotRequest{Name: name})
		return err
	}
	_, err := m.Exec(t.Context(), "w", api.ExecRequest{Argv: []string{"sh", "-c", "echo 1 > kept"}})
	m.must(t, "exec", err)
	m.must(t, "the first snapshot", snapshot("one"))
	_, err = m.Reset(t.Context(), "w", "one", nil)
	m.must(t, "reset", err)
	m.tooDeep(t, snapshot("two"))
	_, err = m.Fork(t.Context(), "w", api.ForkRequest{})
	m.tooDeep(t, err)
	m.must(t, "deleting the snapshot", m.DeleteSnapshot(t.Context(), "w", "one"))
	m.tooDeep(t, snapshot("two"))
	_, err = m.StopWorkspace(t.Context(), "w")
	m.must(t, "stop", err)
	_, err = m.StartWorkspace(t.Context(), "w", nil)
	m.must(t, "start", err)
	m.must(t, "a snapshot after the stop", snapshot("two"))
}

func TestPauseAtTheLimit(t *testing.T) {
	if os.Getenv("PYRO_TEST_ENGINE") != gvisor.Name {
		t.Skip("runs with PYRO_TEST_ENGINE=gvisor")
	}
	e := shallowGVisor{gvisor.New(gvisor.Options{})}
	c := e.Probe(t.Context())
	testenv.Require(t, "gvisor", c.Available, c.Detail)
	m := newShallow(t, e)
	pause := func() error {
		_, err := m.Pause(t.Context(), "w", api.PauseRequest{ToDisk: true})
		return err
	}
	touch := func() {
		_, err := m.Exec(t.Context(), "w", api.ExecRequest{Argv: []string{"sh", "-c", "echo 1 >> kept; sync"}})
		m.must(t, "exec", err)
	}
	touch()
	m.must(t, "the first pause", pause())
	touch()
	m.tooDeep(t, pause())
	_, err := m.StopWorkspace(t.Context(), "w")
	m.must(t, "stop", err)
	_, err = m.StartWorkspace(t.Context(), "w", nil)
	m.must(t, "start", err)
	m.must(t, "a pause after the stop", pause())
	res, err := m.Exec(t.Context(), "w", api.ExecRequest{Argv: []string{"cat", "kept"}})
	if err != nil || res.Stdout != "1\n1\n" {
		t.Errorf("in the end there is %+v, %v", res, err)
	}
}
