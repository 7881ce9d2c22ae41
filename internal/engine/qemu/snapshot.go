package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
)

// snapshotTimeout bounds the one step that cannot be given up half-way: QEMU
// lets requests under way end, flushes the old disk to the host's, and switches.
// Measured 2 ms; the rest is for a host's disk with a queue.
const snapshotTimeout = 2 * time.Minute

// undoTimeout bounds each step that takes back a failed snapshot.
const undoTimeout = 10 * time.Second

// A liveDisk is what QEMU writes to. It changes with every snapshot.
type liveDisk struct {
	engine    *Engine
	path      string
	node      string // QEMU's name of it
	fdset     int    // by which QEMU has it
	size      int64  // of the virtual disk, in bytes
	ephemeral bool
	attempts  int // names the nodes, each of them once
}

// SnapshotDisk implements [engine.DiskSnapshotter]: a new, empty qcow2 file is
// put on top of the disk. QEMU cannot open it itself, so it gets it as an open
// file.
//
// The descriptor by which QEMU could write the frozen file is taken from it, so
// that a guest which breaks out into QEMU later cannot change what others may
// stand on.
func (m *machine) SnapshotDisk(ctx context.Context, spare string) (frozen string, err error) {
	m.diskMu.Lock()
	defer m.diskMu.Unlock()
	select {
	case <-m.done:
		return "", api.Errorf(api.ErrUnavailable, "the machine is gone: %s", m.exit.Reason)
	default:
	}
	d := &m.disk
	if err := d.engine.createOverlay(ctx, spare, d.path, "qcow2", d.size, d.ephemeral); err != nil {
		return "", fmt.Errorf("creating the machine's next disk: %w", err)
	}
	node, set, drop, err := m.addDisk(ctx, spare)
	if err != nil {
		os.Remove(spare)
		return "", fmt.Errorf("handing the machine its next disk: %w", err)
	}
	switchCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), snapshotTimeout)
	defer cancel()
	err = m.qmp.execute(switchCtx, "blockdev-snapshot", map[string]any{"node": d.node, "overlay": node}, nil)
	if errors.Is(err, errRefused) {
		drop()
		os.Remove(spare)
		return "", fmt.Errorf("freezing the machine's disk: %w", err)
	}
	old := *d
	d.path, d.node, d.fdset = spare, node, set
	if err != nil {
		// Nobody knows whether it has switched. Both is right for a machine that
		// does not run any more: the new disk is empty or in use.
		m.log.Warn("the machine ends because its disk cannot be frozen", "error", err)
		if err := m.Stop(context.WithoutCancel(ctx), 0); err != nil {
			return "", err
		}
		return old.path, nil
	}
	if err := m.disarm(ctx, old); err != nil {
		m.log.Warn("a frozen disk stays open for writing", "error", err)
	}
	return old.path, nil
}

// disarm makes QEMU open a disk that it does not write any more for reading, and
// close the descriptor that could do more.
func (m *machine) disarm(ctx context.Context, old liveDisk) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	var sets []struct {
		ID    int `json:"fdset-id"`
		Files []struct {
			FD int `json:"fd"`
		} `json:"fds"`
	}
	if err := m.qmp.execute(ctx, "query-fdsets", nil, &sets); err != nil {
		return err
	}
	f, err := os.Open(old.path)
	if err != nil {
		return err
	}
	defer f.Close()
	// Into the same set: a node's file name cannot change, and QEMU takes the
	// file of the set that suits.
	if _, err := m.addFile(ctx, f, map[string]any{"fdset-id": old.fdset}); err != nil {
		return err
	}
	options := readOnlyFile(old.node+"-file", fdsetPath(old.fdset))
	if err := m.qmp.execute(ctx, "blockdev-reopen", map[string]any{"options": []any{options}}, nil); err != nil {
		return err
	}
	for _, set := range sets {
		for _, file := range set.Files {
			if set.ID != old.fdset {
				continue
			}
			if err := m.qmp.execute(ctx, "remove-fd", map[string]any{"fdset-id": set.ID, "fd": file.FD}, nil); err != nil {
				return err
			}
		}
	}
	return nil
}

// addFile hands QEMU an open file and returns the number of its fdset.
func (m *machine) addFile(ctx context.Context, f *os.File, args any) (set int, err error) {
	var added struct {
		ID int `json:"fdset-id"`
	}
	err = m.qmp.executeWith(ctx, f, "add-fd", args, &added)
	return added.ID, err
}

// addDisk makes the qcow2 file at path a node of QEMU's, with nothing below it
// yet, and says by which fdset QEMU has it. drop takes it away again.
func (m *machine) addDisk(ctx context.Context, path string) (node string, fdset int, drop func(), err error) {
	var undo []func(context.Context) error
	takeBack := func() {
		for i := len(undo) - 1; i >= 0; i-- {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
			if err := undo[i](ctx); err != nil {
				m.log.Debug("taking back a snapshot", "error", err)
			}
			cancel()
		}
	}
	defer func() {
		if err != nil {
			takeBack()
		}
	}()

	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return "", 0, nil, err
	}
	defer f.Close()
	set, err := m.addFile(ctx, f, nil)
	if err != nil {
		return "", 0, nil, err
	}
	undo = append(undo, func(ctx context.Context) error {
		return m.qmp.execute(ctx, "remove-fd", map[string]any{"fdset-id": set}, nil)
	})
	m.disk.attempts++
	node = fmt.Sprintf("disk-%d", m.disk.attempts)
	for _, options := range []map[string]any{
		fileNode(node+"-file", fdsetPath(set), m.disk.ephemeral),
		diskNode(node, nil, m.disk.ephemeral),
	} {
		// Before the command: its answer may get lost.
		undo = append(undo, func(ctx context.Context) error {
			return m.qmp.execute(ctx, "blockdev-del", map[string]any{"node-name": options["node-name"]}, nil)
		})
		if err := m.qmp.execute(ctx, "blockdev-add", options, nil); err != nil {
			return "", 0, nil, err
		}
	}
	return node, set, takeBack, nil
}

var _ engine.DiskSnapshotter = (*machine)(nil)
