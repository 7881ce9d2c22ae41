package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// saveMemoryTimeout bounds how long a machine's whole memory takes to be written
// or read: 64 GiB at 200 MB/s.
const saveMemoryTimeout = 6 * time.Minute

// migrationBandwidth, in bytes a second, is more than any disk takes: QEMU's own
// bound is meant for networks that others use as well.
const migrationBandwidth = 1 << 40

// SnapshotFull implements [engine.FullSnapshotter].
func (m *machine) SnapshotFull(ctx context.Context, spare, memory string) (frozen string, err error) {
	if _, err := os.Lstat(memory); err == nil {
		return "", api.Errorf(api.ErrExists, "there is something at %s already", memory)
	}
	// Commands must not run in a copy before it has a random generator of its own.
	if err := guestclient.New(m.DialGuest, guestclient.Options{}).Suspend(ctx); err != nil {
		return "", fmt.Errorf("saving the machine: %w", err)
	}
	defer func() {
		// Whatever happened: this machine goes on.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		err = errors.Join(err, m.goOn(ctx, false, ""))
	}()
	if err := m.qmp.execute(ctx, "stop", nil, nil); err != nil {
		return "", fmt.Errorf("saving the machine: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		err = errors.Join(err, m.qmp.execute(ctx, "cont", nil, nil))
	}()
	if frozen, err = m.SnapshotDisk(ctx, spare); err != nil {
		return frozen, err
	}
	failpoint.Hit("supervise-save/still")
	if err := m.saveAll(ctx, memory); err != nil {
		return frozen, fmt.Errorf("saving the machine's memory: %w", err)
	}
	return frozen, nil
}

// saveAll writes the stopped machine's memory and devices to a file at path,
// which appears whole and lasts.
func (m *machine) saveAll(ctx context.Context, path string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, saveMemoryTimeout)
	defer cancel()
	tmp := path + engine.UnfinishedSuffix
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(tmp)
		}
	}()
	if err := m.prepareMigration(ctx, false); err != nil {
		return err
	}
	if err := m.qmp.execute(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": int64(migrationBandwidth)}, nil); err != nil {
		return err
	}
	if err := m.qmp.executeWith(ctx, f, "getfd", map[string]any{"fdname": "state"}, nil); err != nil {
		return err
	}
	if err := m.qmp.execute(ctx, "migrate", map[string]any{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	if err := m.awaitMigration(ctx); err != nil {
		return err
	}
	failpoint.Hit("supervise-save/written")
	if err := errors.Join(f.Sync(), os.Rename(tmp, path)); err != nil {
		return err
	}
	return statedir.SyncDir(filepath.Dir(path))
}

// goOn tells the guest agent that time has passed, or that it is a copy.
func (m *machine) goOn(ctx context.Context, isCopy bool, hostname string) error {
	req, err := guestclient.NewResume(hostname)
	if err != nil {
		return err
	}
	req.NewIdentity = isCopy
	return guestclient.New(m.DialGuest, guestclient.Options{}).Resume(ctx, req)
}

// startSaved starts a machine from a full snapshot. It returns when the guest
// knows who it is. On an error nothing is left running.
func (e *Engine) startSaved(ctx context.Context, spec engine.MachineSpec, accel string) (_ *machine, err error) {
	ctx, cancel := context.WithTimeout(ctx, saveMemoryTimeout)
	defer cancel()
	f, err := os.Open(spec.Memory)
	if err != nil {
		return nil, fmt.Errorf("opening the saved memory: %w", err)
	}
	defer f.Close()
	m, channel, err := e.launch(ctx, spec, accel, start{incoming: true})
	if err != nil {
		return nil, err
	}
	m.warm = true
	defer func() {
		if err != nil {
			if stopErr := m.Stop(context.WithoutCancel(ctx), 0); stopErr != nil {
				m.log.Error("stopping a machine that did not start", "error", stopErr)
			}
		}
	}()
	if err := m.load(ctx, f, false); err != nil {
		channel.Close()
		return nil, api.WithHint(fmt.Errorf("loading the saved memory: %w", err),
			"a full snapshot belongs to the QEMU, kernel and processor that it was taken with; its disk can be used with any")
	}
	go m.connect(channel, nil)
	if err := m.goOn(ctx, !spec.Continues, spec.Hostname); err != nil {
		return nil, err
	}
	return m, nil
}

var _ engine.FullSnapshotter = (*machine)(nil)
