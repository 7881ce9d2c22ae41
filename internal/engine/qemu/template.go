package qemu

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
)

// templateFormat is the form of a template's files and of what host and guest
// say when it is used. It grows with every change of either.
const templateFormat = 1

// The files of a template.
const (
	templateState  = "state"  // of QEMU's devices, as it migrates them
	templateMemory = "memory" // see saveMemory
)

// maxTemplates is the room that all templates together may take; one has 60 to
// 100 MB, whatever its machine's memory.
const maxTemplates = 1 << 30

// maxDeviceState bounds the state of a machine's devices. Measured 0.3 MB, with
// BIOS and ACPI tables.
const maxDeviceState = 64 << 20

// A template is one place for a template, full or empty.
type template struct {
	store *artifact.Store
	// name says what shape of machine it is for, recipe what exactly.
	name, recipe string
}

// template returns the place for the template of machines like spec.
func (e *Engine) template(spec engine.MachineSpec, accel string) (*template, error) {
	store, err := openTemplates(spec.Templates, e)
	if err != nil {
		return nil, err
	}
	recipe, err := e.recipe(spec, accel)
	if err != nil {
		return nil, err
	}
	return &template{
		store:  store,
		name:   fmt.Sprintf("qemu-%s-%dMiB-%dcpu", accel, spec.MemMiB, spec.VCPUCount),
		recipe: recipe,
	}, nil
}

func openTemplates(dir string, e *Engine) (*artifact.Store, error) {
	return artifact.Open(artifact.Options{Dir: dir, Noun: "template", Logger: e.log})
}

// recipe identifies all that makes up a template of machines like spec: QEMU
// and its whole command line, kernel, modules and guest agent, and for KVM the
// processor, which the guest sees as it is.
func (e *Engine) recipe(spec engine.MachineSpec, accel string) (string, error) {
	program, err := exec.LookPath(e.binary)
	if err != nil {
		return "", err
	}
	agent, err := os.ReadFile(spec.AgentPath)
	if err != nil {
		return "", err
	}
	agentSum := sha256.Sum256(agent)
	in := inputs{waits: true}
	if f, err := openVhostVsock(); err == nil {
		defer f.Close()
		in.vhostVsock = f
	}
	// A machine of this shape with nothing of its own.
	plain := engine.MachineSpec{VCPUCount: spec.VCPUCount, MemMiB: spec.MemMiB}
	parts := []string{fmt.Sprint("format ", templateFormat), "agent " + hex.EncodeToString(agentSum[:])}
	parts = append(parts, build(plain, accel, in).args...)
	for _, path := range append([]string{program, spec.Kernel.Image}, spec.Kernel.Modules...) {
		s, err := stamp(path)
		if err != nil {
			return "", err
		}
		parts = append(parts, s)
	}
	if accel == accelKVM {
		cpu, err := os.ReadFile("/proc/cpuinfo")
		if err != nil {
			return "", err
		}
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			return "", err
		}
		parts = append(parts, processor(string(cpu)), unix.ByteSliceToString(u.Release[:]))
	}
	list, err := json.Marshal(parts)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(list)
	return hex.EncodeToString(sum[:]), nil
}

// stamp changes whenever the file at path is written, replaced or copied. It is
// what a file of this size is told apart by at every start.
func stamp(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Stat(real, &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: real, Err: err}
	}
	return fmt.Sprint(real, " ", st.Size, " ", st.Ino, " ", st.Mtim.Nano(), " ", st.Ctim.Nano()), nil
}

// processor is what /proc/cpuinfo says of the first one that makes a difference
// to a guest.
func processor(cpuinfo string) string {
	first, _, _ := strings.Cut(cpuinfo, "\n\n")
	var out []string
	for line := range strings.Lines(first) {
		name, _, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(name) {
		case "vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags":
			out = append(out, strings.TrimSpace(line))
		}
	}
	return strings.Join(out, "\n")
}

// acquire returns the template, held, and nil if there is none of this recipe.
func (t *template) acquire(ctx context.Context) (*artifact.Held, error) {
	ref, _, err := t.store.Lookup(t.name)
	if errors.Is(err, api.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if ref.Recipe != t.recipe {
		return nil, nil
	}
	h, err := t.store.AcquireDigest(ctx, ref.Digest)
	if err != nil {
		return nil, err
	}
	t.touch()
	return h, nil
}

// touch notes that the template is used now, for PruneTemplates. The time is
// that of a file of ours, and nothing is lost where it cannot be set.
func (t *template) touch() {
	now := time.Now()
	_ = os.Chtimes(usedFile(t.store.Dir(), t.name), now, now)
}

func usedFile(dir, name string) string { return filepath.Join(dir, "refs", name+".json") }

// install makes what saved holds the template. The files in it are moved or
// copied away.
func (t *template) install(ctx context.Context, saved *savedMachine) error {
	h, err := t.store.Do(ctx, artifact.Install{
		Name: t.name, Recipe: t.recipe, NeedBytes: saved.size,
		Build: func(_ context.Context, b *artifact.Build) error {
			failpoint.Hit("template/begun")
			if err := os.WriteFile(filepath.Join(b.Out, templateState), saved.state, 0o600); err != nil {
				return err
			}
			err := moveFile(saved.memory, filepath.Join(b.Out, templateMemory))
			failpoint.Hit("template/written")
			return err
		},
	})
	failpoint.Hit("template/installed")
	if err != nil {
		return err
	}
	return h.Close()
}

// moveFile renames a file, or copies it where it has to go to another file
// system; the original may stay then.
func moveFile(from, to string) error {
	if err := os.Rename(from, to); err == nil || !errors.Is(err, unix.EXDEV) {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return cmp.Or(err, out.Close())
}

// Warmth implements [engine.Warmer].
func (e *Engine) Warmth(_ context.Context, spec engine.MachineSpec) engine.Warmth {
	if _, err := os.Stat(spec.Templates); spec.Templates == "" || err != nil {
		return engine.WarmthCold
	}
	accel, _, err := e.accelerator()
	if err != nil {
		return engine.WarmthCold
	}
	t, err := e.template(spec, accel)
	if err != nil {
		return engine.WarmthCold
	}
	ref, _, err := t.store.Lookup(t.name)
	switch {
	case errors.Is(err, api.ErrNotFound):
		return engine.WarmthCold
	case err != nil || ref.Recipe != t.recipe:
		return engine.WarmthStale
	}
	return engine.WarmthWarm
}

// PruneTemplates implements [engine.Warmer].
func (e *Engine) PruneTemplates(ctx context.Context, dir string, all bool) (int64, error) {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	limit := int64(maxTemplates)
	if all {
		limit = 0
	}
	return e.pruneTemplates(ctx, dir, limit)
}

// pruneTemplates keeps the templates that were used last and together take no
// more than limit bytes.
func (e *Engine) pruneTemplates(ctx context.Context, dir string, limit int64) (int64, error) {
	store, err := openTemplates(dir, e)
	if err != nil {
		return 0, fmt.Errorf("pruning templates: %w", err)
	}
	refs, err := store.Refs()
	if err != nil {
		return 0, fmt.Errorf("pruning templates: %w", err)
	}
	used := map[string]time.Time{}
	for _, r := range refs {
		if st, err := os.Stat(usedFile(dir, r.Name)); err == nil {
			used[r.Name] = st.ModTime()
		}
	}
	slices.SortFunc(refs, func(a, b artifact.Ref) int { return used[b.Name].Compare(used[a.Name]) })
	var kept int64
	var errs []error
	for _, r := range refs {
		size := artifact.UsedBytes(store.ObjectDir(r.Digest))
		if kept+size <= limit && limit > 0 {
			kept += size
			continue
		}
		errs = append(errs, store.Forget(r.Name))
	}
	pruned, err := store.Prune(ctx, nil, nil)
	if err := errors.Join(append(errs, err, pruneHolders(dir))...); err != nil {
		return pruned.FreedBytes, fmt.Errorf("pruning templates: %w", err)
	}
	return pruned.FreedBytes, nil
}
