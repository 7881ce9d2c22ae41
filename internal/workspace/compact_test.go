package workspace

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/test/build"
)

// Layers are merged by a process of its own where the engine has a launcher, and
// what comes of it is as if this one had done it.
func TestMergeBehind(t *testing.T) {
	env, err := exec.LookPath("env") // it becomes the command given after it
	if err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	if err := build.Programs(dir, false); err != nil {
		t.Fatal(err)
	}
	m := &Manager{binary: filepath.Join(dir, "pyro")}
	req := mergeRequest{Engine: engine.HostName, Chain: []string{"/a", "/b"}, Spare: "/c"}
	if merged, err := m.mergeBehind(t.Context(), []string{env}, req); err != nil || merged != "/b" {
		t.Errorf("merged to %q, %v; want the upper layer", merged, err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.mergeBehind(canceled, []string{env}, req); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	req.Index = 1
	if _, err := m.mergeBehind(t.Context(), []string{env}, req); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("merging the highest layer: %v, want ErrInvalid", err)
	}
	req.Engine = "none"
	if _, err := m.mergeBehind(t.Context(), []string{env}, req); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("merging with an engine that there is not: %v, want ErrInvalid", err)
	}
	if _, err := m.mergeBehind(t.Context(), []string{"false"}, req); !errors.Is(err, api.ErrInternal) {
		t.Errorf("with a launcher that fails: %v, want ErrInternal", err)
	}
}
