package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// resumeTimeout bounds a warm start, from the launch of QEMU to a guest with its
// root disk mounted, at full speed. Measured 0.7 s under TCG.
const resumeTimeout = 5 * time.Second

// startTemplated starts a machine from its template. If there is none or it is
// of no use, the machine boots and leaves one.
func (e *Engine) startTemplated(ctx context.Context, spec engine.MachineSpec, accel string) (engine.Machine, error) {
	t, err := e.template(spec, accel)
	if err != nil {
		spec.Logger.Warn("templates cannot be used", "error", err)
		return started(e.boot(ctx, spec, accel, nil, fmt.Sprintf("templates cannot be used, so the machine booted: %v", err)))
	}
	if t.failures() >= maxFailures {
		return started(e.boot(ctx, spec, accel, nil, "warm starts of such machines have failed since the host booted, so it booted"))
	}
	held, err := t.acquire(ctx)
	if err != nil { // damaged on the disk, which says nothing against the next
		err = errors.Join(err, t.store.Forget(t.name))
	}
	if held != nil {
		var m *machine
		if m, err = e.startWarm(ctx, spec, accel, held); err == nil {
			return m, nil
		}
		var blameless *blamelessError
		if ctx.Err() == nil && !errors.As(err, &blameless) {
			err = errors.Join(err, t.reject())
		}
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("starting qemu: %w", ctx.Err())
	}
	note := ""
	if err != nil {
		spec.Logger.Warn("a warm start has failed", "error", err)
		note = fmt.Sprintf("the template of such machines was of no use, so it booted: %v", err)
	}
	return started(e.boot(ctx, spec, accel, t, note))
}

func started(m *machine, err error) (engine.Machine, error) {
	if err != nil {
		return nil, err
	}
	return m, nil
}

// maxFailures is how many templates of one recipe may fail in one boot of the
// host before no more are made: a failure can cost the whole of resumeTimeout.
const maxFailures = 2

// failedTemplate is the content of a file that remembers such failures.
type failedTemplate struct {
	BootID string `json:"boot_id"`
	Recipe string `json:"recipe"`
	Count  int    `json:"count"`
}

func (t *template) failureFile() string {
	return filepath.Join(t.store.Dir(), failuresDir, t.name+".json")
}

// failuresDir is below the templates' directory.
const failuresDir = "failed"

// failures is how often templates of this recipe have failed in this boot.
func (t *template) failures() int {
	var f failedTemplate
	if statedir.ReadJSON(t.failureFile(), &f) != nil || f.BootID != hostproc.BootID() || f.Recipe != t.recipe {
		return 0
	}
	return f.Count
}

// reject removes the template and remembers that it has failed.
func (t *template) reject() error {
	f := failedTemplate{BootID: hostproc.BootID(), Recipe: t.recipe, Count: t.failures() + 1}
	err := os.MkdirAll(filepath.Dir(t.failureFile()), 0o700)
	if err == nil {
		err = statedir.WriteJSON(t.failureFile(), f)
	}
	return errors.Join(err, t.store.Forget(t.name))
}

// startWarm starts a machine from the template, which it gives up. It returns
// when the guest's root disk is mounted. On an error nothing is left running.
func (e *Engine) startWarm(ctx context.Context, spec engine.MachineSpec, accel string, held *artifact.Held) (_ *machine, err error) {
	defer held.Close()
	scale := time.Duration(1)
	if accel == accelTCG {
		scale = tcgTimeScale
	}
	ctx, cancel := context.WithTimeout(ctx, resumeTimeout*scale)
	defer cancel()
	state, err := os.ReadFile(held.Path(templateState))
	if err != nil {
		return nil, err
	}
	saved, err := os.Open(held.Path(templateMemory))
	if err != nil {
		return nil, err
	}
	memory, filled, err := sharedMemory(ctx, spec.Logger, spec.Templates, held.Digest, int64(spec.MemMiB)<<20, saved)
	if err != nil {
		return nil, err
	}
	m, channel, err := e.launch(ctx, spec, accel, start{memory: memory, private: true, incoming: true})
	if err != nil {
		if fillErr := <-filled; fillErr != nil {
			spec.Logger.Debug("filling a template's memory", "err", fillErr)
		}
		memory.Close()
		return nil, &blamelessError{err} // a boot will meet it as well
	}
	m.warm = true
	defer func() {
		if err != nil {
			channel.Close()
			if stopErr := m.Stop(context.WithoutCancel(ctx), 0); stopErr != nil {
				m.log.Error("stopping a machine that did not start", "error", stopErr)
			}
		}
	}()
	if err := <-filled; err != nil {
		return nil, err
	}
	if err := m.loadDevices(ctx, state); err != nil {
		return nil, fmt.Errorf("loading the machine's devices: %w", err)
	}
	if err := resumeGuest(ctx, channel, spec.Hostname); err != nil {
		return nil, err
	}
	go m.connect(channel, nil)
	return m, nil
}

// loadDevices gives a QEMU that was started for it the state of its devices.
// When it returns, the guest runs.
func (m *machine) loadDevices(ctx context.Context, state []byte) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	go func() {
		defer w.Close()
		_, _ = w.Write(state) // QEMU tells what it lacks
	}()
	return m.load(ctx, r, true)
}

// load gives a QEMU that was started for it the state in r. When it returns, the
// guest runs.
func (m *machine) load(ctx context.Context, r *os.File, ignoreShared bool) error {
	if err := m.prepareMigration(ctx, ignoreShared); err != nil {
		return err
	}
	if err := m.qmp.executeWith(ctx, r, "getfd", map[string]any{"fdname": "state"}, nil); err != nil {
		return err
	}
	if err := m.qmp.execute(ctx, "migrate-incoming", map[string]any{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	if err := m.awaitMigration(ctx); err != nil {
		return err
	}
	// It was saved standing still, which is part of the state.
	return m.qmp.execute(ctx, "cont", nil, nil)
}

// beginWaiting is what a machine that boots with a guest that waits does first:
// it leaves a template and lets the guest go on.
func (m *machine) beginWaiting(ctx context.Context, channel net.Conn, t *template, spec engine.MachineSpec, memory *os.File) error {
	if err := awaitGuest(channel); err != nil {
		return err
	}
	// Another may have been quicker.
	if ref, _, err := t.store.Lookup(t.name); err != nil || ref.Recipe != t.recipe {
		installed := m.leaveTemplate(ctx, t, spec, memory)
		m.mu.Lock()
		m.installed = installed
		m.mu.Unlock()
	}
	return resumeGuest(ctx, channel, spec.Hostname)
}

// Prepare implements [engine.Warmer].
func (e *Engine) Prepare(ctx context.Context, spec engine.MachineSpec) error {
	if spec.Templates == "" {
		return api.Errorf(api.ErrInvalid, "preparing a template: no directory for it given")
	}
	if err := check(spec); err != nil {
		return err
	}
	accel, _, err := e.accelerator()
	if err != nil {
		return err
	}
	t, err := e.template(spec, accel)
	if err != nil {
		return fmt.Errorf("preparing a template: %w", err)
	}
	if held, err := t.acquire(ctx); err == nil && held != nil {
		return held.Close()
	}
	memory, err := newMemory("pyro-"+spec.ID, int64(spec.MemMiB)<<20)
	if err != nil {
		return fmt.Errorf("preparing a template: %w", err)
	}
	spec.Hostname, spec.RootImage = "", "" // nothing of one machine
	m, channel, err := e.launch(ctx, spec, accel, start{memory: memory, waits: true})
	if err != nil {
		memory.Close()
		return fmt.Errorf("preparing a template: %w", err)
	}
	defer channel.Close()
	defer func() { _ = m.Stop(context.WithoutCancel(ctx), 0) }()
	stop := context.AfterFunc(ctx, func() { _ = channel.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := awaitGuest(channel); err != nil {
		return fmt.Errorf("preparing a template: %w", orCause(ctx, err))
	}
	saved, err := m.save(ctx, memory, filepath.Join(spec.Dir, "template-memory"))
	if err == nil {
		err = t.install(ctx, saved)
	}
	if err != nil {
		return fmt.Errorf("preparing a template: %w", err)
	}
	_, err = e.pruneTemplates(ctx, spec.Templates, maxTemplates)
	return err
}

// Began implements [engine.Beginner].
func (m *machine) Began() (warm bool, note string) { return m.warm, m.note }

var (
	_ engine.Warmer   = (*Engine)(nil)
	_ engine.Beginner = (*machine)(nil)
)
