package qemu_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// shape returns a spec whose files are there but are no kernel and no agent.
func shape(t *testing.T) engine.MachineSpec {
	t.Helper()
	_, err := exec.LookPath("qemu-system-x86_64")
	testenv.Require(t, "qemu", err == nil, "QEMU is not installed")
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return engine.MachineSpec{
		ID: "a", Hostname: "a", VCPUCount: 1, MemMiB: 512, AgentPath: file("agent"), Templates: filepath.Join(dir, "templates"),
		Kernel: engine.Kernel{Image: file("vmlinux"), Modules: []string{file("virtio.ko")}},
	}
}

func recipe(t *testing.T, s engine.MachineSpec) string {
	t.Helper()
	name, recipe, err := qemu.New(qemu.Options{}).Recipe(s)
	if err != nil {
		t.Fatal(err)
	}
	return name + " " + recipe
}

func rewrite(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestRecipe(t *testing.T) {
	for name, test := range map[string]struct {
		change func(t *testing.T, s *engine.MachineSpec)
		same   bool
	}{
		"Nothing": {func(*testing.T, *engine.MachineSpec) {}, true},
		"OwnThings": {func(_ *testing.T, s *engine.MachineSpec) {
			s.ID, s.Hostname, s.DiskMiB, s.Ephemeral = "b", "b", 9999, true
		}, true},
		"Disk":       {func(_ *testing.T, s *engine.MachineSpec) { s.RootImage, s.Disk, s.Layers = "/r", "/d", []string{"/l"} }, true},
		"AgentMoved": {func(t *testing.T, s *engine.MachineSpec) { move(t, &s.AgentPath) }, true},
		"Agent":      {func(t *testing.T, s *engine.MachineSpec) { rewrite(t, s.AgentPath) }, false},
		"Kernel":     {func(t *testing.T, s *engine.MachineSpec) { rewrite(t, s.Kernel.Image) }, false},
		"Module":     {func(t *testing.T, s *engine.MachineSpec) { rewrite(t, s.Kernel.Modules[0]) }, false},
		"NoModule":   {func(_ *testing.T, s *engine.MachineSpec) { s.Kernel.Modules = nil }, false},
		"Memory":     {func(_ *testing.T, s *engine.MachineSpec) { s.MemMiB++ }, false},
		"Processors": {func(_ *testing.T, s *engine.MachineSpec) { s.VCPUCount++ }, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := shape(t)
			before := recipe(t, s)
			test.change(t, &s)
			if after := recipe(t, s); (before == after) != test.same {
				t.Errorf("%s, then %s; want the same: %v", before, after, test.same)
			}
		})
	}
}

func move(t *testing.T, path *string) {
	t.Helper()
	to := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.Rename(*path, to); err != nil {
		t.Fatal(err)
	}
	*path = to
}

// install puts something into a template's place.
func install(t *testing.T, dir, name, recipe string, size int) {
	t.Helper()
	store, err := artifact.Open(artifact.Options{Dir: dir, Noun: "template"})
	if err != nil {
		t.Fatal(err)
	}
	h, err := store.Do(t.Context(), artifact.Install{Name: name, Recipe: recipe, Build: func(_ context.Context, b *artifact.Build) error {
		for _, file := range qemu.TemplateFiles {
			if err := os.WriteFile(filepath.Join(b.Out, file), []byte(strings.Repeat(name[:1]+file[:1], size/4)), 0o600); err != nil {
				return err
			}
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	h.Close()
}

func TestWarmth(t *testing.T) {
	e := qemu.New(qemu.Options{Accel: "tcg"})
	s := shape(t)
	check := func(want engine.Warmth) {
		t.Helper()
		if got := e.Warmth(t.Context(), s); got != want {
			t.Errorf("Warmth = %s, want %s", got, want)
		}
	}
	check(engine.WarmthCold)
	if _, err := os.Stat(s.Templates); !errors.Is(err, os.ErrNotExist) {
		t.Error("asking has made a directory")
	}
	name, recipe, err := e.Recipe(s)
	if err != nil {
		t.Fatal(err)
	}
	install(t, s.Templates, name, recipe, 100)
	check(engine.WarmthWarm)
	rewrite(t, s.AgentPath)
	check(engine.WarmthStale)
	s.MemMiB = 1024
	check(engine.WarmthCold)
	s.Templates = ""
	check(engine.WarmthCold)
}

func TestPruneTemplates(t *testing.T) {
	e := qemu.New(qemu.Options{})
	dir := filepath.Join(t.TempDir(), "templates")
	names := func() []string {
		t.Helper()
		store, err := artifact.Open(artifact.Options{Dir: dir, Noun: "template"})
		if err != nil {
			t.Fatal(err)
		}
		refs, err := store.Refs()
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, r := range refs {
			out = append(out, r.Name)
		}
		slices.Sort(out)
		return out
	}
	for i, name := range []string{"a", "b", "c"} {
		install(t, dir, name, "r", 1<<20)
		used := time.Now().Add(time.Duration(i) * time.Hour)
		if name == "a" {
			used = time.Now().Add(24 * time.Hour) // the oldest was used last
		}
		if err := os.Chtimes(qemu.UsedFile(dir, name), used, used); err != nil {
			t.Fatal(err)
		}
	}
	if freed, err := e.PruneTemplates(t.Context(), dir, false); err != nil || freed != 0 {
		t.Errorf("pruning few templates: %d bytes freed, %v", freed, err)
	}
	freed, err := qemu.PruneToSize(e, t.Context(), dir, 5<<19)
	if diff := cmp.Diff([]string{"a", "c"}, names()); err != nil || diff != "" || freed < 1<<19 {
		t.Errorf("pruning to a size: %d bytes freed, %v, names (-want +got):\n%s", freed, err, diff)
	}
	if _, err := e.PruneTemplates(t.Context(), dir, true); err != nil || len(names()) != 0 {
		t.Errorf("pruning all: %v, left: %v", err, names())
	}
	if _, err := e.PruneTemplates(t.Context(), filepath.Join(dir, "absent"), true); err != nil {
		t.Errorf("pruning where there is nothing: %v", err)
	}
}
