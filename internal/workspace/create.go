package workspace

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/seed"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// CreateWorkspace makes a workspace, seeds it, starts it, and returns when it
// is ready. On an error, and if ctx ends first, nothing of it is left.
func (m *Manager) CreateWorkspace(ctx context.Context, req api.CreateRequest) (_ *api.Workspace, err error) {
	if err := m.fillCreate(&req); err != nil {
		return nil, err
	}
	candidate, err := engine.Pick(ctx, m.engines, engine.Choice{
		Engine: req.Engine, Require: req.Require, AllowHostCompat: req.AllowHostCompat,
	})
	if err != nil {
		return nil, err
	}
	if err := refuseUser(candidate.Isolation, req.User); err != nil {
		return nil, err
	}
	if _, err := m.environments.Inspect(ctx, req.Environment); err != nil {
		return nil, err
	}
	source, err := sourceAt(req.SeedPath, req.IncludeIgnored)
	if err != nil {
		return nil, err
	}
	h, err := m.claim(ctx, candidate, req)
	if err != nil {
		return nil, fmt.Errorf("creating workspace: %w", err)
	}
	defer h.release()
	defer func() {
		if err == nil {
			return
		}
		// Bounded by what ending a machine by force takes.
		if undoErr := h.destroy(context.WithoutCancel(ctx)); undoErr != nil {
			err = errors.Join(err, fmt.Errorf("removing what was made of the workspace: %w", undoErr))
		}
	}()
	if err := h.create(ctx, candidate, source, req); err != nil {
		return nil, fmt.Errorf("creating workspace %s: %w", label(h.Workspace), err)
	}
	ws := h.Workspace.Workspace
	return &ws, nil
}

// validName is a name that no shell and no path needs quotes for, if it has no
// more than maxName bytes.
var validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*$`)

const maxName = 63

func checkName(name string) error {
	if len(name) > maxName || !validName.MatchString(name) {
		return api.WithHint(api.Errorf(api.ErrInvalid, "a workspace cannot be called %q", name),
			"use up to 63 letters, digits, dots, dashes and underscores, beginning with a letter or digit")
	}
	return nil
}

// maxLabels bounds how many labels a workspace has, maxLabel the bytes of one
// key or value.
const (
	maxLabels = 64
	maxLabel  = 256
)

func checkLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return api.WithHint(api.Errorf(api.ErrInvalid, "%d labels are more than the limit of %d", len(labels), maxLabels), "give fewer --label")
	}
	for k, v := range labels {
		if k == "" || len(k) > maxLabel || len(v) > maxLabel || strings.ContainsAny(k, "=\n") {
			return api.WithHint(api.Errorf(api.ErrInvalid, "the label %q is empty, holds = or a line break, or is longer than %d bytes", k, maxLabel),
				"write --label KEY=VALUE")
		}
	}
	return nil
}

// fillCreate checks a request and puts the defaults in.
func (m *Manager) fillCreate(r *api.CreateRequest) error {
	if r.Environment == "" {
		r.Environment = environment.Default
	}
	size := machineSize{&r.VCPUCount, &r.MemMiB, &r.DiskMiB}
	if err := size.fill(); err != nil {
		return err
	}
	if r.Name != "" {
		if err := checkName(r.Name); err != nil {
			return err
		}
	}
	if err := checkLabels(r.Labels); err != nil {
		return err
	}
	if err := checkSecrets(r.Secrets); err != nil {
		return err
	}
	if r.User != "" {
		if err := api.CheckUser(r.User); err != nil {
			return err
		}
	}
	switch r.NetworkPolicy {
	case "":
		r.NetworkPolicy = api.NetworkOff
	case api.NetworkOff, api.NetworkEgress, api.NetworkEgressPublishing:
	default:
		return api.WithHint(api.Errorf(api.ErrInvalid, "unknown network policy %q", r.NetworkPolicy),
			"use off, egress or egress+published-ports")
	}
	if r.TTL == 0 {
		r.TTL = api.DefaultTTL
	}
	r.TTL = max(r.TTL, 0)
	if r.Engine == "" {
		r.Engine = m.engine
	}
	if r.Progress == nil {
		r.Progress = func(api.Progress) {}
	}
	r.Progress = serialized(r.Progress)
	return nil
}

// claim writes the record of a workspace that is yet to be made, and holds it.
func (m *Manager) claim(ctx context.Context, c engine.Candidate, req api.CreateRequest) (_ *held, err error) {
	now := time.Now().UTC()
	ws := &store.Workspace{
		Workspace: api.Workspace{
			WorkspaceID: newID(), Labels: map[string]string{}, Environment: req.Environment, State: api.StateStarting,
			Engine: c.Name(), Isolation: c.Isolation, ExecutionMode: executionMode(c.Isolation),
			VCPUCount: req.VCPUCount, MemMiB: req.MemMiB, DiskMiB: req.DiskMiB, NetworkPolicy: req.NetworkPolicy,
			CreatedAt: now, LastActivityAt: now, WorkspacePath: api.WorkspacePath,
			WorkspaceSeed: api.WorkspaceSeed{Mode: api.SeedEmpty, Destination: api.WorkspacePath, Skipped: []api.SkippedEntry{}},
			Secrets:       secretInfos(req.Secrets),
		},
		DiskFormat: string(c.Disk), Require: req.Require, Intent: intentCreate, ActiveLayer: newLayer(c.Disk),
	}
	maps.Copy(ws.Labels, req.Labels)
	if req.Name != "" {
		ws.Name = &req.Name
	}
	setExpiry(ws, req.TTL)
	return m.claimRecord(ctx, ws, req.Secrets)
}

// claimRecord makes the directory of a new workspace, takes its lock, and
// writes its record.
func (m *Manager) claimRecord(ctx context.Context, ws *store.Workspace, secrets []api.Secret) (_ *held, err error) {
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	dir := m.state.Workspace(ws.WorkspaceID)
	// The lock is held before anybody can find the record: a record that says
	// "starting" and whose lock is free counts as abandoned.
	lock, err := newDirectory(ctx, dir)
	failpoint.Hit("create/locked")
	if err == nil {
		err = m.sealSecrets(dir, secrets)
	}
	if err == nil {
		err = st.Create(ctx, ws)
		failpoint.Hit("create/recorded")
	}
	if err != nil {
		lock.Close()
		return nil, errors.Join(err, os.RemoveAll(dir.Path()))
	}
	return &held{Workspace: ws, m: m, dir: dir, lock: lock}, nil
}

// newDirectory makes the directory of a new workspace and takes its lock. A prune
// that finds the directory without either record or lock removes it: then it is
// made again.
func newDirectory(ctx context.Context, dir statedir.Workspace) (lock *hostproc.Lock, err error) {
	for range 10 {
		if err := statedir.MakePrivate(dir.Path()); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if lock, err = hostproc.LockWithin(ctx, dir.LockFile(), time.Second); err == nil {
			if err = os.Mkdir(dir.CommandsDir(), 0o700); err == nil {
				return lock, nil
			}
			lock.Close()
		}
		if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, api.ErrBusy) {
			break
		}
	}
	return nil, errors.Join(err, os.RemoveAll(dir.Path()))
}

// create does everything between the record and a workspace that is ready.
func (h *held) create(ctx context.Context, c engine.Candidate, source seed.Source, req api.CreateRequest) error {
	image, sd, err := h.m.ingredients(ctx, c, source, req)
	if err != nil {
		return err
	}
	defer image.Close()
	defer sd.Close()
	failpoint.Hit("create/gathered")
	seedIsLayer := sd != nil && c.SeedLayer
	err = h.update(ctx, func(ws *store.Workspace) error {
		if image != nil {
			ws.EnvironmentDigest, ws.Image = image.Digest, image.Config
			ws.User = runsAs(req, image)
			if ws.DiskMiB == 0 {
				ws.DiskMiB = image.DiskMiB
			}
		}
		if sd != nil {
			ws.WorkspaceSeed, ws.SeedDigest = sd.Info, sd.Digest
		}
		if seedIsLayer {
			ws.Layers = []string{seedLayer(sd.Digest)}
		}
		return nil
	})
	if err != nil {
		return err
	}
	failpoint.Hit("create/described")
	d := h.diskOf(h.Workspace)
	if !seedIsLayer && !api.IsRoot(h.User) {
		d.owner = h.User
	}
	p, err := h.startMachine(ctx, c, d, req.Progress)
	if err != nil {
		return err
	}
	defer p.Release()
	failpoint.Hit("create/booted")
	if sd != nil && !seedIsLayer {
		if err := upload(ctx, p, sd, req.Progress); err != nil {
			return explain(ctx, p, err)
		}
	}
	failpoint.Hit("create/seeded")
	if err := h.baseline(ctx, p, sd != nil && !seedIsLayer || d.owner != ""); err != nil {
		return err
	}
	failpoint.Hit("create/baseline")
	err = h.started(ctx, p, store.Event{Kind: eventCreated, Detail: map[string]any{
		"environment": h.Environment, "engine": h.Engine, "seed": h.WorkspaceSeed.Mode,
	}})
	failpoint.Hit("create/kept")
	return err
}

// started records that the machine is the workspace's, and lets it outlive this
// process.
func (h *held) started(ctx context.Context, p *supervisor.Process, event store.Event) error {
	err := h.update(ctx, func(ws *store.Workspace) error {
		return enterStarted(ws, p.Status)
	}, event)
	if err != nil {
		return err
	}
	failpoint.Hit("create/started")
	return p.Keep(ctx)
}

// baseline makes the snapshot that a reset goes back to. Unless something was
// written since the machine came up, what lies below the workspace's own layer
// is that.
func (h *held) baseline(ctx context.Context, p *supervisor.Process, written bool) error {
	st, err := h.m.store(ctx)
	if err != nil {
		return err
	}
	snap := store.Snapshot{
		Snapshot:   api.Snapshot{WorkspaceID: h.WorkspaceID, SnapshotName: api.BaselineSnapshot, Kind: api.SnapshotBaseline, CreatedAt: time.Now().UTC()},
		SeedDigest: h.SeedDigest,
	}
	keep := func(f frozen) error {
		snap.Chain, snap.Layer = f.chain, f.layer
		return st.PutSnapshot(ctx, h.WorkspaceID, snap)
	}
	if !written {
		return keep(frozen{chain: h.Layers})
	}
	err = h.freeze(ctx, "", func(ctx context.Context, spare, _ string) (string, error) { return p.SnapshotDisk(ctx, spare) }, keep)
	if err != nil {
		return fmt.Errorf("making the baseline snapshot: %w", err)
	}
	return nil
}
