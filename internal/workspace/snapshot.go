package workspace

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/seed"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// maxSnapshots bounds the snapshots of one workspace: each may be a layer that
// the next ones stand on, and every file access passes through all of them.
const maxSnapshots = 100

// CreateSnapshot saves the workspace's whole disk under a name, and what runs in
// it if the request wants that. A running machine goes on meanwhile.
func (m *Manager) CreateSnapshot(ctx context.Context, ref string, req api.SnapshotRequest) (*api.Snapshot, error) {
	name := req.Name
	if err := checkName(name); err != nil {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "a snapshot cannot be called %q", name), "%s", api.Hint(err))
	}
	h, err := m.hold(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer h.release()
	snap, err := h.snapshot(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("making snapshot %q of workspace %s: %w", name, label(h.Workspace), err)
	}
	return snap, nil
}

func (h *held) snapshot(ctx context.Context, req api.SnapshotRequest) (*api.Snapshot, error) {
	name := req.Name
	st, err := h.m.store(ctx)
	if err != nil {
		return nil, err
	}
	have, err := st.Snapshots(ctx, h.WorkspaceID)
	if err != nil {
		return nil, err
	}
	if len(have) >= maxSnapshots {
		return nil, api.WithHint(api.Errorf(api.ErrExhausted, "there are %d snapshots, and %d is the limit", len(have), maxSnapshots),
			"delete some: pyro workspace snapshot list %s", refOf(h.Workspace))
	}
	for _, s := range have {
		if s.SnapshotName == name {
			return nil, api.WithHint(api.Errorf(api.ErrExists, "there is a snapshot of that name"), "choose another name, or delete it first")
		}
	}
	if err := h.m.checkSpace(freeFloor); err != nil {
		return nil, err
	}
	snap := store.Snapshot{Snapshot: api.Snapshot{
		WorkspaceID: h.WorkspaceID, SnapshotName: name, Kind: api.SnapshotDisk, CreatedAt: time.Now().UTC(), Deletable: true,
	}, SeedDigest: h.SeedDigest, Temporary: h.Intent == intentFork}
	keep := func(f frozen) (err error) {
		snap.Chain, snap.Layer, snap.Memory = f.chain, f.layer, f.memory
		snap.SizeBytes = h.m.layerSize(snap.Layer) + h.m.layerSize(snap.Memory)
		if f.memory != "" {
			snap.Kind = api.SnapshotFull
		}
		if snap.MemoryDigest = f.digest; f.memory != "" && f.digest == "" && !snap.Temporary {
			if snap.MemoryDigest, err = h.m.memoryDigest(ctx, f.memory); err != nil {
				return err
			}
		}
		return st.PutSnapshot(ctx, h.WorkspaceID, snap)
	}
	if h.PausedToDisk && engine.DiskFormat(h.DiskFormat) == engine.DiskDirectory {
		// Only its machine can look into it.
		if err := h.wake(ctx, orSilent(nil)); err != nil {
			return nil, err
		}
	}
	if !h.PausedToDisk { // whose snapshot is the layer that it stands on
		if err := h.checkLayers(); err != nil {
			return nil, err
		}
	}
	switch h.State {
	case api.StateStarted:
		_, client := h.m.guest(h.Workspace)
		if engine.DiskFormat(h.DiskFormat) == engine.DiskDirectory {
			// A directory cannot be looked into later: keep what a diff needs.
			sd, err := h.m.seedFromGuest(ctx, client)
			if err != nil {
				return nil, err
			}
			defer sd.Close() // when the record that names it is written
			snap.SeedDigest = sd.Digest
		}
		memory := ""
		if req.Memory {
			if err := h.checkMemorySaved("leave --memory out: the snapshot then holds the disk"); err != nil {
				return nil, err
			}
			memory = newMemory()
		}
		sup := supervisor.NewClient(h.machine())
		err = h.m.whyBroken(ctx, h.Workspace, sup, h.freeze(ctx, memory, sup.Snapshot, keep))
	case api.StateStopped:
		if req.Memory {
			return nil, api.WithHint(api.Errorf(api.ErrState, "the workspace is stopped: it has no memory to save"), "pyro workspace start %s, or leave --memory out", refOf(h.Workspace))
		}
		if engine.DiskFormat(h.DiskFormat) == engine.DiskDirectory {
			return nil, api.WithHint(api.Errorf(api.ErrState, "the workspace is stopped, and its disk, a directory, can only be saved by its machine"),
				"pyro workspace start %s", refOf(h.Workspace))
		}
		err = h.freezeStopped(ctx, keep)
	case api.StatePaused:
		if !h.PausedToDisk {
			return nil, mustRun(h.Workspace)
		}
		// It is frozen, with its memory.
		top := len(h.Layers) - 1
		f := frozen{chain: h.Layers[:top:top], layer: h.Layers[top]}
		if req.Memory {
			f.memory, f.digest = h.Memory, h.MemoryDigest
		}
		err = keep(f)
	default:
		err = mustRun(h.Workspace)
	}
	if err != nil {
		return nil, err
	}
	failpoint.Hit("snapshot/listed")
	return &snap.Snapshot, st.AppendEvent(ctx, h.WorkspaceID, eventSnapshot, map[string]any{"name": name})
}

// seedFromGuest makes a seed of what lies in the workspace now. The caller
// closes it.
func (m *Manager) seedFromGuest(ctx context.Context, client *guestclient.Client) (*seed.Seed, error) {
	seeds, err := m.seeds()
	if err != nil {
		return nil, err
	}
	f, err := m.namelessFile()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := client.ExportArchive(ctx, api.WorkspacePath, f); err != nil {
		return nil, err
	}
	failpoint.Hit("snapshot/spooled")
	sd, err := seeds.Build(ctx, seed.Source{Path: fmt.Sprintf("/proc/self/fd/%d", f.Fd())}, nil)
	if err != nil {
		return nil, fmt.Errorf("keeping the workspace's files: %w", err)
	}
	return sd, nil
}

// freezeStopped makes the stopped workspace's own layer a frozen one, and gives
// it a new one on top.
func (h *held) freezeStopped(ctx context.Context, keep func(frozen) error) error {
	f := frozen{chain: h.Layers, layer: h.ActiveLayer}
	if _, err := os.Lstat(h.m.state.Layer(f.layer)); err != nil {
		return keep(frozen{chain: f.chain}) // nothing was ever written: the layers below are all
	}
	if r, ok := engineAs[engine.DiskRecoverer](h); ok {
		if err := r.RecoverDisk(ctx, h.m.state.Layer(f.layer)); err != nil {
			return err
		}
	}
	err := h.update(ctx, func(ws *store.Workspace) error {
		ws.Layers = append(ws.Layers, ws.ActiveLayer)
		ws.ActiveLayer = newLayer(engine.DiskFormat(ws.DiskFormat))
		return nil
	})
	failpoint.Hit("snapshot-stopped/switched")
	if err != nil {
		return err
	}
	return keep(f)
}

// Snapshots lists a workspace's snapshots, oldest first.
func (m *Manager) Snapshots(ctx context.Context, ref string) ([]api.Snapshot, error) {
	ws, err := m.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	rows, err := st.Snapshots(ctx, ws.WorkspaceID)
	if err != nil {
		return nil, err
	}
	out := []api.Snapshot{}
	for _, r := range rows {
		if r.Temporary {
			continue
		}
		r.SizeBytes = m.layerSize(r.Layer) + m.layerSize(r.Memory)
		out = append(out, r.Snapshot)
	}
	return out, nil
}

// DeleteSnapshot forgets a snapshot and gives back the room that nothing else
// needs.
func (m *Manager) DeleteSnapshot(ctx context.Context, ref, name string) error {
	h, err := m.hold(ctx, ref)
	if err != nil {
		return err
	}
	defer h.release()
	if name == api.BaselineSnapshot {
		return api.WithHint(api.Errorf(api.ErrDenied, "the baseline of workspace %s cannot be deleted", label(h.Workspace)),
			"it goes with the workspace: pyro workspace delete %s", refOf(h.Workspace))
	}
	st, err := m.store(ctx)
	if err != nil {
		return err
	}
	if err := st.DeleteSnapshot(ctx, h.WorkspaceID, name); err != nil {
		return fmt.Errorf("deleting snapshot %q of workspace %s: %w", name, label(h.Workspace), err)
	}
	if err := st.AppendEvent(ctx, h.WorkspaceID, eventSnapshotDeleted, map[string]any{"name": name}); err != nil {
		return err
	}
	failpoint.Hit("snapshot-delete/forgotten")
	if err := h.compact(ctx); err != nil {
		return fmt.Errorf("giving back the room of snapshot %q: %w", name, err)
	}
	return nil
}

// Reset rebuilds the workspace from a snapshot: everything of later is gone,
// but its identity, labels, snapshots and the base of its diff stay. If it
// fails the workspace is stopped, with its files as they were.
func (m *Manager) Reset(ctx context.Context, ref, name string, progress func(api.Progress)) (*api.Workspace, error) {
	if name == "" {
		name = api.BaselineSnapshot
	}
	h, err := m.hold(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer h.release()
	if h.State == api.StateFailed {
		return nil, mustRun(h.Workspace)
	}
	if err := h.reset(ctx, name, orSilent(progress)); err != nil {
		return nil, fmt.Errorf("resetting workspace %s to %q: %w", label(h.Workspace), name, err)
	}
	return &h.Workspace.Workspace, nil
}

// drop ends the machine at once. All that is wanted of it is a disk that could
// be started again if the reset fails: flushing that takes milliseconds, where
// ending every process politely takes seconds.
func (h *held) drop(ctx context.Context) error {
	if h.State == api.StateStarted {
		_, client := h.m.guest(h.Workspace)
		flush, cancel := context.WithTimeout(ctx, stopLimit/3)
		err := client.Flush(flush)
		cancel()
		if err != nil {
			h.m.log.Warn("flushing a workspace that is reset", "workspace", h.WorkspaceID, "error", err)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if err := supervisor.Kill(ctx, h.machine()); err != nil {
		return err
	}
	return h.update(ctx, func(ws *store.Workspace) error { return enter(ws, api.StateStopped) })
}

func (h *held) reset(ctx context.Context, name string, progress func(api.Progress)) error {
	st, err := h.m.store(ctx)
	if err != nil {
		return err
	}
	snap, err := st.Snapshot(ctx, h.WorkspaceID, name)
	if err != nil {
		return api.WithHint(err, "pyro workspace snapshot list %s shows them", refOf(h.Workspace))
	}
	c, err := h.m.candidate(ctx, h.Workspace)
	if err != nil {
		return err
	}
	// While the machine still runs:
	if err := h.m.checkSpace(freeFloor); err != nil {
		return err
	}
	if err := h.m.checkMemory(ctx, snap.Memory, snap.MemoryDigest); err != nil {
		return api.WithHint(err, "the workspace is as it was; delete that snapshot")
	}
	if h.State != api.StateStopped {
		if err := h.drop(ctx); err != nil {
			return err
		}
	}
	failpoint.Hit("reset/dropped")
	fresh := disk{chain: snap.Chain, active: newLayer(engine.DiskFormat(h.DiskFormat)), memory: snap.Memory}
	if snap.Layer != "" {
		fresh.chain = append(fresh.chain[:len(fresh.chain):len(fresh.chain)], snap.Layer)
	}
	err = h.update(ctx, func(ws *store.Workspace) error {
		ws.Intent, ws.PendingLayer = intentReset, fresh.active
		return enter(ws, api.StateStarting)
	})
	if err != nil {
		return err
	}
	failpoint.Hit("reset/recorded")
	p, err := h.startMachine(ctx, c, fresh, progress)
	if err != nil {
		pending := fresh.active
		if upErr := h.giveUp(ctx, err); upErr != nil {
			return fmt.Errorf("%w; %w", err, upErr)
		}
		if rmErr := h.m.removeLayer(context.WithoutCancel(ctx), pending); rmErr != nil {
			h.m.log.Warn("removing the disk of a failed reset", "error", rmErr)
		}
		return err
	}
	defer p.Release()
	failpoint.Hit("reset/booted")
	now := time.Now().UTC()
	err = h.update(ctx, func(ws *store.Workspace) error {
		ws.Layers, ws.ActiveLayer, ws.PendingLayer = fresh.chain, fresh.active, ""
		ws.ResetCount++
		ws.LastResetAt, ws.CommandCount, ws.HistoryStart = &now, 0, ws.LastEvent
		return enterStarted(ws, p.Status)
	}, store.Event{Kind: eventReset, Detail: map[string]any{"snapshot": name}})
	if err != nil {
		return err
	}
	failpoint.Hit("reset/switched")
	if err := h.keep(ctx, p); err != nil {
		return err
	}
	failpoint.Hit("reset/kept")
	// The new machine is the workspace's; what follows only tidies up.
	if err := st.ClearCommands(ctx, h.WorkspaceID); err != nil {
		return err
	}
	failpoint.Hit("reset/forgotten")
	if err := os.RemoveAll(h.dir.CommandsDir()); err != nil {
		return err
	}
	failpoint.Hit("reset/cleared")
	if err := os.Mkdir(h.dir.CommandsDir(), 0o700); err != nil {
		return err
	}
	if _, err := h.m.collect(ctx); err != nil {
		h.m.log.Warn("removing disk layers", "error", err)
	}
	return nil
}
