package workspace

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/store"
)

// maxForks bounds how many workspaces one fork makes, forkAtOnce how many of
// them start at the same time.
const (
	maxForks   = 100
	forkAtOnce = 4
)

// Fork makes workspaces that begin with what another one's disk holds, now or in
// a snapshot. They share it until they write. What runs in the other one goes
// on, and does not run in them. On an error none of them is left.
func (m *Manager) Fork(ctx context.Context, ref string, req api.ForkRequest) (*api.ForkResult, error) {
	if req.Count == 0 {
		req.Count = 1
	}
	if req.Count < 1 || req.Count > maxForks {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "%d forks asked for", req.Count), "give --count a number between 1 and %d", maxForks)
	}
	if req.Name != "" {
		if err := checkName(req.Name); err != nil {
			return nil, err
		}
	}
	h, err := m.hold(ctx, ref)
	if err != nil {
		return nil, err
	}
	children, err := h.fork(ctx, req)
	h.release()
	if err != nil {
		return nil, fmt.Errorf("forking workspace %s: %w", label(h.Workspace), err)
	}
	res := &api.ForkResult{WorkspaceID: h.WorkspaceID, Count: len(children), Workspaces: []api.Workspace{}}
	for _, c := range children {
		res.Workspaces = append(res.Workspaces, c.Workspace.Workspace)
		c.release()
	}
	return res, nil
}

// fork makes and starts the children, and holds them.
func (h *held) fork(ctx context.Context, req api.ForkRequest) (_ []*held, err error) {
	st, err := h.m.store(ctx)
	if err != nil {
		return nil, err
	}
	name := req.Snapshot
	if name == "" {
		// A snapshot for as long as nothing else refers to its layer.
		name = "fork-" + newID()
		if err := h.update(ctx, func(ws *store.Workspace) error { ws.Intent = intentFork; return nil }); err != nil {
			return nil, err
		}
		failpoint.Hit("fork/recorded")
		defer func() { err = errors.Join(err, h.settle(ctx)) }()
		if _, err := h.snapshot(ctx, api.SnapshotRequest{Name: name, Memory: req.Memory}); err != nil {
			return nil, err
		}
	}
	failpoint.Hit("fork/saved")
	from, err := st.Snapshot(ctx, h.WorkspaceID, name)
	if err != nil {
		return nil, api.WithHint(err, "pyro workspace snapshot list %s shows them", refOf(h.Workspace))
	}
	// That of a machine which runs was saved just now, and nobody has its digest.
	if req.Snapshot != "" || from.MemoryDigest != "" {
		if err := h.m.checkMemory(ctx, from.Memory, from.MemoryDigest); err != nil {
			hint := "delete that snapshot; fork from another one or from what runs now"
			if req.Snapshot == "" {
				hint = "leave --memory out: the forks then have the disk"
			}
			return nil, api.WithHint(err, "%s", hint)
		}
	}
	base, err := st.Snapshot(ctx, h.WorkspaceID, api.BaselineSnapshot)
	if err != nil {
		return nil, err
	}
	values, err := h.m.secretsOf(h.Workspace)
	if err != nil {
		return nil, err
	}
	var secrets []api.Secret
	for _, s := range h.Secrets {
		secrets = append(secrets, api.Secret{Name: s.Name, Value: values[s.Name], FromFile: s.SourceKind == "file"})
	}
	var children []*held
	defer func() {
		if err != nil {
			err = errors.Join(err, destroyAll(ctx, children))
		}
	}()
	for i := range req.Count {
		c, err := h.m.claimRecord(ctx, h.child(from, req, i), secrets)
		if err != nil {
			return nil, err
		}
		children = append(children, c)
		failpoint.Hit("fork/claimed")
		// A reset goes back to where the first one began: so does the diff.
		if err := st.PutSnapshot(ctx, c.WorkspaceID, *base); err != nil {
			return nil, err
		}
	}
	// Before the snapshot goes: they may need its memory to begin.
	if err := startForks(ctx, children, from.Memory, orSilent(req.Progress)); err != nil {
		return nil, err
	}
	failpoint.Hit("fork/started")
	return children, st.AppendEvent(ctx, h.WorkspaceID, eventForked, map[string]any{"snapshot": req.Snapshot, "count": req.Count})
}

// forgetTemporary deletes the snapshots of forks that are not under way any more.
func (h *held) forgetTemporary(ctx context.Context) error {
	st, err := h.m.store(ctx)
	if err != nil {
		return err
	}
	have, err := st.Snapshots(ctx, h.WorkspaceID)
	if err != nil {
		return err
	}
	for _, s := range have {
		if s.Temporary {
			err = errors.Join(err, st.DeleteSnapshot(ctx, h.WorkspaceID, s.SnapshotName))
		}
	}
	return err
}

// child is the record of one fork.
func (h *held) child(from *store.Snapshot, req api.ForkRequest, i int) *store.Workspace {
	now := time.Now().UTC()
	ws := *h.Workspace
	ws.WorkspaceID, ws.State, ws.Intent = newID(), api.StateStarting, intentCreate
	ws.CreatedAt, ws.LastActivityAt, ws.LastResetAt, ws.LastError = now, now, nil, nil
	ws.CommandCount, ws.ResetCount, ws.ServiceCount, ws.RunningServiceCount = 0, 0, 0, 0
	ws.HistoryStart, ws.LastCommand, ws.LastEvent, ws.Published = 0, 0, 0, nil
	ws.PendingLayer, ws.PendingMemory, ws.Memory, ws.MemoryDigest, ws.PausedToDisk = "", "", "", "", false
	ws.Labels = maps.Clone(h.Labels)
	ws.Layers = slices.Clone(from.Chain)
	if from.Layer != "" {
		ws.Layers = append(ws.Layers, from.Layer)
	}
	ws.ActiveLayer = newLayer(engine.DiskFormat(h.DiskFormat))
	ws.Name = nil
	if req.Name != "" {
		name := req.Name
		if req.Count > 1 {
			name = fmt.Sprintf("%s-%d", name, i+1)
		}
		ws.Name = &name
	}
	setExpiry(&ws, cmp.Or(req.TTL, h.TTL))
	return &ws
}

// startForks starts the children, some at a time: from a file with the memory
// of a machine, unless that is "".
func startForks(ctx context.Context, children []*held, memory string, progress func(api.Progress)) error {
	g, starting := errgroup.WithContext(ctx)
	g.SetLimit(forkAtOnce)
	for _, c := range children {
		g.Go(func() error {
			candidate, err := c.m.candidate(starting, c.Workspace)
			if err != nil {
				return err
			}
			d := c.diskOf(c.Workspace)
			d.memory = memory
			p, err := c.startMachine(starting, candidate, d, progress)
			if err != nil {
				return err
			}
			defer p.Release()
			return c.started(starting, p, store.Event{Kind: eventCreated, Detail: map[string]any{"environment": c.Environment, "engine": c.Engine, "fork": true}})
		})
	}
	return g.Wait()
}

func destroyAll(ctx context.Context, children []*held) error {
	var errs []error
	for _, c := range children {
		errs = append(errs, c.destroy(context.WithoutCancel(ctx)))
		c.release()
	}
	return errors.Join(errs...)
}
