package workspace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// spawn starts the supervisor of a machine for the workspace on a disk, and the
// machine, unless the supervisor is to stand by. It ends with this process until
// it is told to keep going.
func (h *held) spawn(ctx context.Context, c engine.Candidate, d disk, standby *supervisor.Standby, progress func(api.Progress)) (*supervisor.Process, error) {
	paths, seeds, err := h.m.layerPaths(ctx, d.chain)
	var hold []*os.File
	for _, sd := range seeds {
		defer sd.Close()
		hold = append(hold, sd.Lock)
	}
	if err != nil {
		return nil, err
	}
	p, _, err := h.m.startMachine(ctx, c, machineRequest{
		ID: h.WorkspaceID, Environment: h.Environment, Digest: h.EnvironmentDigest,
		VCPUCount: h.VCPUCount, MemMiB: h.MemMiB, DiskMiB: h.DiskMiB,
		Disk: h.m.state.Layer(d.active), Layers: paths, Require: h.Require, TTL: timeLeft(h.Workspace), Network: h.NetworkPolicy,
		Memory: h.m.memoryPath(d.memory), Continues: d.continues, Standby: standby, Hold: hold, Progress: progress,
	})
	return p, err
}

// startMachine spawns a machine and gives it what is the workspace's own.
func (h *held) startMachine(ctx context.Context, c engine.Candidate, d disk, progress func(api.Progress)) (*supervisor.Process, error) {
	p, err := h.spawn(ctx, c, d, nil, progress)
	if err != nil {
		return nil, err
	}
	// Before anything of the user's runs.
	client := guestclient.New(p.DialGuest, guestclient.Options{Patience: patience(p.Status.TimeScale)})
	if d.owner != "" {
		err = client.OwnWorkspace(ctx, d.owner)
	}
	if err == nil {
		err = h.m.deliverSecrets(ctx, h.Workspace, client)
	}
	if err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
		defer cancel()
		return nil, errors.Join(err, p.Shutdown(end))
	}
	for _, note := range p.Status.Notes {
		progress(api.Progress{Phase: "note", Message: note})
	}
	progress(api.Progress{Phase: "ready", Message: fmt.Sprintf("guest ready in %.1f s", float64(p.Status.BootMS)/1000)})
	return p, nil
}

// candidate returns the engine that a workspace was made with, if it still
// works here and isolates as was asked for.
func (m *Manager) candidate(ctx context.Context, ws *store.Workspace) (engine.Candidate, error) {
	c, err := engine.Pick(ctx, m.engines, engine.Choice{
		Engine: ws.Engine, Require: ws.Require, AllowHostCompat: ws.ExecutionMode == api.ModeHostCompat,
	})
	if err == nil {
		err = checkDiskFormat(ws, c)
	}
	return c, err
}

// StartWorkspace boots a stopped workspace from its disk, and wakes one that is
// paused to disk. A workspace that runs is a success.
func (m *Manager) StartWorkspace(ctx context.Context, ref string, progress func(api.Progress)) (*api.Workspace, error) {
	h, err := m.hold(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer h.release()
	if h.State == api.StateStarted {
		if err := h.awaitEnd(ctx); err != nil {
			return nil, fmt.Errorf("starting workspace %s: %w", label(h.Workspace), err)
		}
	}
	if h.State == api.StateStarted {
		return &h.Workspace.Workspace, nil
	}
	if h.PausedToDisk {
		if err := h.wake(ctx, orSilent(progress)); err != nil {
			return nil, fmt.Errorf("waking workspace %s: %w", label(h.Workspace), err)
		}
		return &h.Workspace.Workspace, nil
	}
	if h.State != api.StateStopped {
		return nil, mustRun(h.Workspace)
	}
	if err := h.start(ctx, orSilent(progress)); err != nil {
		return nil, fmt.Errorf("starting workspace %s: %w", label(h.Workspace), err)
	}
	return &h.Workspace.Workspace, nil
}

// awaitEnd lets a machine that is just ending end, as after a stop whose caller
// did not wait. One that goes on running is left alone.
func (h *held) awaitEnd(ctx context.Context) error {
	status, err := supervisor.NewClient(h.machine()).Status(ctx)
	if err == nil && status.Exited == "" {
		return nil
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return api.WithHint(fmt.Errorf("it runs, but %w", err), "pyro workspace stop %s", refOf(h.Workspace))
	}
	end, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	if err := supervisor.WaitGone(end, h.machine()); err != nil {
		return err
	}
	return h.settle(ctx)
}

func (h *held) start(ctx context.Context, progress func(api.Progress)) (err error) {
	c, err := h.m.candidate(ctx, h.Workspace)
	if err != nil {
		return err
	}
	err = h.update(ctx, func(ws *store.Workspace) error {
		ws.Intent = intentStart
		return enter(ws, api.StateStarting)
	})
	if err != nil {
		return err
	}
	failpoint.Hit("start/recorded")
	p, err := h.startMachine(ctx, c, h.diskOf(h.Workspace), progress)
	if err != nil {
		return errors.Join(err, h.giveUp(ctx, err))
	}
	defer p.Release()
	failpoint.Hit("start/booted")
	err = h.update(ctx, func(ws *store.Workspace) error {
		return enterStarted(ws, p.Status)
	}, store.Event{Kind: eventStarted, Detail: map[string]any{"engine": h.Engine, "isolation": p.Status.Isolation}})
	if err != nil {
		return err
	}
	failpoint.Hit("start/started")
	err = h.keep(ctx, p)
	failpoint.Hit("start/kept")
	return err
}

// keep lets the machine outlive this process, or says why it has ended already.
func (h *held) keep(ctx context.Context, p *supervisor.Process) error {
	if err := p.Keep(ctx); err != nil {
		return h.m.whyBroken(ctx, h.Workspace, p.Client, err)
	}
	return nil
}

// giveUp records that the workspace could not be started.
func (h *held) giveUp(ctx context.Context, cause error) error {
	return h.update(context.WithoutCancel(ctx), func(ws *store.Workspace) error {
		why := firstLine(cause.Error())
		if errors.Is(cause, context.Canceled) {
			why = "the command that was starting it was interrupted"
		}
		ws.Intent, ws.PendingLayer, ws.LastError = "", "", &why
		return enter(ws, api.StateStopped)
	})
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

func orSilent(progress func(api.Progress)) func(api.Progress) {
	if progress == nil {
		return func(api.Progress) {}
	}
	return serialized(progress)
}

// StopWorkspace ends the workspace's machine and keeps its disk, flushed. A
// stopped workspace is a success.
func (m *Manager) StopWorkspace(ctx context.Context, ref string) (*api.Workspace, error) {
	h, err := m.hold(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer h.release()
	if hasMachine(h.Workspace) || h.PausedToDisk {
		if err := h.stop(ctx); err != nil {
			return nil, fmt.Errorf("stopping workspace %s: %w", label(h.Workspace), err)
		}
	}
	return &h.Workspace.Workspace, nil
}

// stopLimit is how long a supervisor has to end its machine politely before it
// is killed together with it: the guest's own grace under emulation, and the
// flush of its disk.
const stopLimit = 90 * time.Second

// stop ends the machine, politely and then by force, and records it.
func (h *held) stop(ctx context.Context) (err error) {
	forced := false
	if hasMachine(h.Workspace) {
		end, cancel := context.WithTimeout(ctx, stopLimit)
		defer cancel()
		err = supervisor.NewClient(h.machine()).Stop(end)
		failpoint.Hit("stop/asked")
		if err == nil {
			err = supervisor.WaitGone(end, h.machine())
		}
		if ctx.Err() != nil {
			return ctx.Err() // it goes on stopping; the next command will see how it ended
		}
		forced = err != nil
	}
	if forced {
		h.m.log.Warn("killing a supervisor that does not end", "workspace", h.WorkspaceID, "error", err)
	}
	if err := supervisor.Kill(context.WithoutCancel(ctx), h.machine()); err != nil {
		return err
	}
	failpoint.Hit("stop/gone")
	err = h.update(ctx, func(ws *store.Workspace) error {
		ws.LastError = nil
		if forced {
			why := "its machine did not stop by itself and was killed"
			ws.LastError = &why
		}
		return enter(ws, api.StateStopped)
	}, store.Event{Kind: eventStopped, Detail: map[string]any{"forced": forced}})
	if err != nil {
		return err
	}
	failpoint.Hit("stop/recorded")
	// Layers of snapshots that were deleted while the machine stood on them.
	if err := h.compact(ctx); err != nil {
		h.m.log.Warn("giving back the room of deleted snapshots", "workspace", h.WorkspaceID, "error", err)
	}
	return nil
}

// DeleteWorkspace removes a workspace with everything that is its own.
func (m *Manager) DeleteWorkspace(ctx context.Context, ref string) (*api.DeleteResult, error) {
	h, err := m.hold(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer h.release()
	// A deletion that has begun is not taken back.
	if err := h.destroy(context.WithoutCancel(ctx)); err != nil {
		return nil, fmt.Errorf("deleting workspace %s: %w", label(h.Workspace), err)
	}
	return &api.DeleteResult{WorkspaceID: h.WorkspaceID, Deleted: true}, nil
}

// destroy removes everything of the workspace, its record last but one: if this
// is killed in between, the next command finishes it.
func (h *held) destroy(ctx context.Context) error {
	st, err := h.m.store(ctx)
	if err != nil {
		return err
	}
	if h.Intent != intentDelete {
		if err := h.update(ctx, func(ws *store.Workspace) error { ws.Intent = intentDelete; return nil }); err != nil {
			return err
		}
	}
	failpoint.Hit("delete/recorded")
	if err := supervisor.Remove(ctx, h.machine()); err != nil {
		return err
	}
	failpoint.Hit("delete/gone")
	if err := st.Delete(ctx, h.WorkspaceID); err != nil {
		return err
	}
	failpoint.Hit("delete/forgotten")
	if _, err := h.m.collect(ctx); err != nil {
		h.m.log.Warn("removing disk layers", "error", err) // garbage now: prune meets it again
	}
	failpoint.Hit("delete/collected")
	// Whoever waits for the lock may make its file once more while this goes on.
	for range 10 {
		if err = os.RemoveAll(h.dir.Path()); !errors.Is(err, unix.ENOTEMPTY) {
			break
		}
	}
	return err
}

// UpdateWorkspace changes a workspace's name, labels or expiry.
func (m *Manager) UpdateWorkspace(ctx context.Context, ref string, u api.WorkspaceUpdate) (*api.Workspace, error) {
	if u.Name != nil && *u.Name != "" {
		if err := checkName(*u.Name); err != nil {
			return nil, err
		}
	}
	h, err := m.hold(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer h.release()
	err = h.update(ctx, func(ws *store.Workspace) error {
		if u.Name != nil {
			ws.Name = u.Name
			if *u.Name == "" {
				ws.Name = nil
			}
		}
		for k, v := range u.SetLabels {
			ws.Labels[k] = v
		}
		for _, k := range u.ClearLabels {
			delete(ws.Labels, k)
		}
		if u.TTL != nil {
			setExpiry(ws, *u.TTL)
		}
		return checkLabels(ws.Labels)
	}, store.Event{Kind: eventUpdated})
	if err != nil {
		return nil, fmt.Errorf("updating workspace %s: %w", label(h.Workspace), err)
	}
	if u.TTL != nil && (hasMachine(h.Workspace) || h.PausedToDisk && supervisor.Alive(h.machine())) {
		if err := supervisor.NewClient(h.machine()).SetExpiry(ctx, timeLeft(h.Workspace)); err != nil {
			return nil, fmt.Errorf("telling the supervisor of workspace %s: %w", label(h.Workspace), err)
		}
	}
	return &h.Workspace.Workspace, nil
}

// records returns every workspace as it is on record.
func (m *Manager) records(ctx context.Context) ([]*store.Workspace, error) {
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	return st.List(ctx)
}

// Workspaces lists workspaces, the latest activity first.
func (m *Manager) Workspaces(ctx context.Context, filter api.WorkspaceFilter) ([]api.Workspace, error) {
	all, err := m.records(ctx)
	if err != nil {
		return nil, err
	}
	out := []api.Workspace{}
	for _, ws := range all {
		ws, err := m.look(ctx, ws)
		if errors.Is(err, api.ErrNotFound) {
			continue // deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		if matches(ws.Labels, filter.Labels) {
			out = append(out, ws.Workspace)
		}
	}
	return out, nil
}

func matches(labels, wanted map[string]string) bool {
	for k, v := range wanted {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// Workspace returns one workspace as it is.
func (m *Manager) Workspace(ctx context.Context, ref string) (*api.Workspace, error) {
	ws, err := m.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	if ws.ServiceCount > 0 && ws.State == api.StateStarted {
		// Services end by themselves, too.
		_, client := m.guest(ws)
		ws.ServiceCount, ws.RunningServiceCount = countServices(ctx, client)
	}
	return &ws.Workspace, nil
}
