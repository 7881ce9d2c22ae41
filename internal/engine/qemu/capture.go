package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
)

// A savedMachine is what a machine was at one moment.
type savedMachine struct {
	state  []byte
	memory string // the path of a file in saveMemory's form
	size   int64  // of both, in bytes
}

// saveTimeout bounds how long a machine stands still to be saved. Measured 0.2 s
// for its memory and 20 ms for its devices.
const saveTimeout = 30 * time.Second

// save stops the machine, whose memory is a shared mapping of memory, saves it
// with the memory in a file at path, and lets it go on.
func (m *machine) save(ctx context.Context, memory *os.File, path string) (_ *savedMachine, err error) {
	ctx, cancel := context.WithTimeout(ctx, saveTimeout)
	defer cancel()
	if err := m.qmp.execute(ctx, "stop", nil, nil); err != nil {
		return nil, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		err = errors.Join(err, m.qmp.execute(ctx, "cont", nil, nil))
	}()
	s := &savedMachine{memory: path}
	if s.state, err = m.saveDevices(ctx); err != nil {
		return nil, fmt.Errorf("saving the machine's devices: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	err = errors.Join(saveMemory(f, memory, nil), f.Close())
	if err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("saving the machine's memory: %w", err)
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	s.size = st.Size() + int64(len(s.state))
	return s, nil
}

// prepareMigration sets up a migration that announces its progress, of all but
// the memory that is mapped from a file if ignoreShared is set.
func (m *machine) prepareMigration(ctx context.Context, ignoreShared bool) error {
	type capability struct {
		Capability string `json:"capability"`
		State      bool   `json:"state"`
	}
	return m.qmp.execute(ctx, "migrate-set-capabilities", map[string]any{
		"capabilities": []capability{{"x-ignore-shared", ignoreShared}, {"events", true}},
	}, nil)
}

// saveDevices returns the state of a stopped machine's devices.
func (m *machine) saveDevices(ctx context.Context) ([]byte, error) {
	if err := m.prepareMigration(ctx, true); err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	err = m.qmp.executeWith(ctx, w, "getfd", map[string]any{"fdname": "state"}, nil)
	w.Close() // QEMU has it
	if err != nil {
		return nil, err
	}
	var state bytes.Buffer
	read := make(chan error, 1)
	go func() {
		n, err := io.Copy(&state, io.LimitReader(r, maxDeviceState+1))
		if err == nil && n > maxDeviceState {
			err = api.Errorf(api.ErrExhausted, "the state has more than %d bytes", maxDeviceState)
			r.Close() // QEMU must not wait for a reader
		}
		read <- err
	}()
	if err := m.qmp.execute(ctx, "migrate", map[string]any{"uri": "fd:state"}, nil); err != nil {
		return nil, err
	}
	if err := m.awaitMigration(ctx); err != nil {
		return nil, err
	}
	select {
	case err = <-read:
		return state.Bytes(), err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// awaitMigration returns when the migration under way has ended well.
func (m *machine) awaitMigration(ctx context.Context) error {
	for {
		select {
		case status := <-m.migrated:
			// MigrationStatus in qapi/migration.json.
			switch status {
			case "completed":
				return nil
			case "failed", "cancelled":
				return api.Errorf(api.ErrUnavailable, "QEMU says that the migration has %s", status)
			}
		case <-m.done:
			return api.Errorf(api.ErrUnavailable, "the machine is gone: %s", m.exit.Reason)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// leaveTemplate makes a template of a machine whose guest waits for its host. The
// machine goes on; what fails is logged and costs only the next start's time.
// The files are put in place in the background, which installed tells.
func (m *machine) leaveTemplate(ctx context.Context, t *template, spec engine.MachineSpec, memory *os.File) (installed <-chan struct{}) {
	done := make(chan struct{})
	saved, err := m.save(ctx, memory, filepath.Join(spec.Dir, "template-memory"))
	failpoint.Hit("template/saved")
	if err != nil {
		close(done)
		m.log.Warn("the machine leaves no template for the next", "error", err)
		return done
	}
	go func() {
		defer close(done)
		if err := t.install(ctx, saved); err != nil {
			m.log.Warn("the machine leaves no template for the next", "error", err)
			os.Remove(saved.memory)
			return
		}
		if _, err := m.disk.engine.pruneTemplates(ctx, t.store.Dir(), maxTemplates); err != nil {
			m.log.Warn("making room for templates", "error", err)
		}
	}()
	return done
}
