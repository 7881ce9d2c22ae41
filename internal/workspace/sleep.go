package workspace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// A workspace that is paused to disk is a memory and the layers that its disk
// was at the same instant, which nobody writes any more. So nothing is lost by
// whatever goes wrong on the way back: the next attempt finds the same.

// compactAt is how many layers a disk may have before a pause merges those that
// earlier pauses have left, and before those are merged that others have, too.
// Each costs a copy of what it holds.
const compactAt = 16

// pauseToDisk saves the running machine with its memory and ends it.
func (h *held) pauseToDisk(ctx context.Context) error {
	if err := h.checkMemorySaved("pause it without --to-disk, or stop it: its files are kept"); err != nil {
		return err
	}
	if err := h.checkLayers(); err != nil {
		return err
	}
	if err := h.m.interruptCommands(ctx, h.WorkspaceID); err != nil {
		return err
	}
	st, err := h.m.store(ctx)
	if err != nil {
		return err
	}
	running, err := st.RunningCommands(ctx, h.WorkspaceID)
	if err != nil {
		return err
	}
	if len(running) > 0 {
		return api.WithHint(api.Errorf(api.ErrBusy, "command %d is running, and its caller would lose it", running[0].Sequence),
			"wait for it, or pause without --to-disk; what is to outlast a pause can be a service")
	}
	if err := h.m.checkSpace(freeFloor); err != nil {
		return err
	}
	if h.State == api.StatePaused {
		if err := h.setPaused(ctx, false); err != nil { // its agent has work to do
			return err
		}
	}
	spare, memory := newLayer(engine.DiskFormat(h.DiskFormat)), newMemory()
	err = h.update(ctx, func(ws *store.Workspace) error {
		ws.Intent, ws.PendingLayer, ws.PendingMemory = intentPause, spare, memory
		return nil
	})
	if err != nil {
		return err
	}
	failpoint.Hit("pause/recorded")
	err = supervisor.NewClient(h.machine()).Sleep(ctx, h.m.state.Layer(spare), h.m.memoryPath(memory))
	failpoint.Hit("pause/saved")
	// What has become of it is seen, as by whoever finds this half done.
	if settleErr := h.settle(ctx); settleErr != nil || h.PausedToDisk {
		return settleErr
	}
	if err == nil {
		err = errors.New("the machine has ended and was not saved")
	}
	return err
}

// finishPause records that the machine was saved and has ended, and reports
// whether that is so. It waits for a supervisor that is still at it.
func (h *held) finishPause(ctx context.Context) (bool, error) {
	if supervisor.Alive(h.machine()) {
		client := supervisor.NewClient(h.machine())
		_, err := client.Disk(ctx) // after the snapshot, if it is taken
		if err == nil {
			var status *supervisor.Status
			if status, err = client.Status(ctx); err == nil && status.Exited == "" {
				return false, nil // it goes on
			}
		}
		end, cancel := context.WithTimeout(ctx, stopLimit)
		defer cancel()
		if err := supervisor.WaitGone(end, h.machine()); err != nil {
			return false, err
		}
	}
	failpoint.Hit("pause/gone")
	ending, err := supervisor.ReadEnding(h.machine())
	if err != nil || ending.Frozen == "" {
		return false, nil
	}
	layer := filepath.Base(ending.Frozen)
	if layer != h.ActiveLayer && layer != h.PendingLayer {
		return false, nil
	}
	digest, err := h.m.memoryDigest(ctx, h.PendingMemory)
	if err != nil {
		h.m.log.Warn("a machine that was paused to disk cannot go on", "workspace", h.WorkspaceID, "error", err)
		return false, nil
	}
	err = h.update(ctx, func(ws *store.Workspace) error {
		ws.Layers, ws.ActiveLayer = append(ws.Layers, layer), newLayer(engine.DiskFormat(ws.DiskFormat))
		ws.Memory, ws.MemoryDigest = ws.PendingMemory, digest
		ws.Intent, ws.PendingLayer, ws.PendingMemory, ws.LastError = "", "", "", nil
		return enter(ws, api.StatePaused)
	}, store.Event{Kind: eventPaused, Detail: map[string]any{"to_disk": true}})
	if err != nil {
		return false, err
	}
	failpoint.Hit("pause/asleep")
	if err := h.standBy(ctx); err != nil {
		h.m.log.Warn("keeping the published ports open; they come back when the workspace wakes", "workspace", h.WorkspaceID, "error", err)
	}
	failpoint.Hit("pause/standing-by")
	if len(h.Layers) > compactAt {
		err = h.compact(ctx)
	} else {
		_, err = h.m.collect(ctx)
	}
	if err != nil {
		h.m.log.Warn("removing disk layers", "workspace", h.WorkspaceID, "error", err)
	}
	return true, nil
}

// standBy lets a supervisor keep the published ports open, if there are any, and
// wake the workspace when somebody connects to one.
func (h *held) standBy(ctx context.Context) error {
	var ports []supervisor.PublishedPort
	for service, published := range h.Published {
		for _, p := range published {
			ports = append(ports, supervisor.PublishedPort{Host: p.Host, HostPort: p.HostPort, GuestPort: p.GuestPort, Service: service})
		}
	}
	if len(ports) == 0 {
		return nil
	}
	c, err := h.m.candidate(ctx, h.Workspace)
	if err != nil {
		return err
	}
	if l, ok := c.Engine.(engine.Launcher); ok {
		// The command that wakes would run in the supervisor's surroundings.
		if words, err := l.Launcher(); err != nil || len(words) > 0 {
			return err
		}
	}
	binary, err := h.m.findBinary()
	if err != nil {
		return err
	}
	agent, err := h.m.findAgent()
	if err != nil {
		return err
	}
	p, err := h.spawn(ctx, c, h.asleep(), &supervisor.Standby{
		Ports:   ports,
		Command: []string{binary, "workspace", "resume", h.WorkspaceID, "--quiet"},
		Env:     []string{"PYRO_STATE_DIR=" + h.m.state.Path(), "PYRO_CACHE_DIR=" + h.m.cacheDir, "PYRO_BINARY=" + binary, "PYRO_AGENT=" + agent},
	}, orSilent(nil))
	if err != nil {
		return err
	}
	defer p.Release()
	return p.Keep(ctx)
}

// asleep is the disk of a workspace that is paused to disk, with its memory.
func (h *held) asleep() disk {
	d := h.diskOf(h.Workspace)
	d.memory, d.continues = h.Memory, true
	return d
}

// wakePatience is how long a command waits for another one that wakes the
// workspace: as long as a machine may take to come up.
const wakePatience = 4 * time.Minute

// wake wakes a workspace that is paused to disk, unless another command is at it,
// which this then waits for. It returns the workspace as it is afterwards.
func (m *Manager) wake(ctx context.Context, ws *store.Workspace, progress func(api.Progress)) (*store.Workspace, error) {
	h, err := m.holdRow(ctx, ws, wakePatience)
	if err != nil {
		return nil, err
	}
	defer h.release()
	if h.PausedToDisk {
		if err := h.wake(ctx, orSilent(progress)); err != nil {
			return nil, fmt.Errorf("waking workspace %s: %w", label(h.Workspace), err)
		}
	}
	return h.Workspace, nil
}

func (h *held) wake(ctx context.Context, progress func(api.Progress)) (err error) {
	c, err := h.m.candidate(ctx, h.Workspace)
	if err != nil {
		return err
	}
	err = h.update(ctx, func(ws *store.Workspace) error {
		ws.Intent = intentWake
		return enter(ws, api.StateStarting)
	})
	if err != nil {
		return err
	}
	failpoint.Hit("wake/recorded")
	defer func() {
		if err != nil && h.Intent == intentWake {
			err = errors.Join(err, h.settle(context.WithoutCancel(ctx)))
		}
	}()
	p, lost, err := h.startAsleep(ctx, c, progress)
	if err != nil {
		return err
	}
	defer p.Release()
	failpoint.Hit("wake/booted")
	ports := map[string][]api.PublishedPort{}
	if lost == "" {
		ports = h.publishAgain(ctx, p, progress)
	}
	failpoint.Hit("wake/published")
	// Before the record gives the memory up.
	if err := p.Keep(ctx); err != nil {
		return err
	}
	failpoint.Hit("wake/kept")
	event := store.Event{Kind: eventResumed, Detail: map[string]any{"from_disk": true}}
	if lost != "" {
		event.Detail["lost"] = lost
	}
	err = h.update(ctx, func(ws *store.Workspace) error {
		if err := enterStarted(ws, p.Status); err != nil {
			return err
		}
		ws.Published = ports
		if lost != "" {
			ws.LastError, ws.ServiceCount, ws.RunningServiceCount = &lost, 0, 0
		}
		return nil
	}, event)
	if err != nil {
		return err
	}
	failpoint.Hit("wake/started")
	if _, err := h.m.collect(ctx); err != nil {
		h.m.log.Warn("removing the memory of a workspace that is awake", "error", err)
	}
	return nil
}

// wakeAttempts is how often a memory is tried: what ends a machine that is just
// going on may have nothing to do with it.
const wakeAttempts = 2

// startAsleep lets the machine of a workspace that is paused to disk go on. If
// its memory is of no use the machine boots; lost then tells the user so.
func (h *held) startAsleep(ctx context.Context, c engine.Candidate, progress func(api.Progress)) (_ *supervisor.Process, lost string, err error) {
	d := h.diskOf(h.Workspace)
	if err = h.m.checkMemory(ctx, h.Memory, h.MemoryDigest); err == nil {
		for range wakeAttempts {
			var p *supervisor.Process
			if p, err = h.goOn(ctx, c, progress); err == nil {
				return p, "", nil
			}
			if !uselessMemory(err) || ctx.Err() != nil {
				return nil, "", err
			}
			h.m.log.Warn("waking a workspace", "workspace", h.WorkspaceID, "error", err)
			if err := h.m.removeLayer(ctx, d.active); err != nil {
				return nil, "", err
			}
		}
	}
	if !uselessMemory(err) {
		return nil, "", err
	}
	if err := supervisor.Kill(ctx, h.machine()); err != nil { // it may stand by
		return nil, "", err
	}
	p, bootErr := h.startMachine(ctx, c, d, progress)
	if bootErr != nil {
		return nil, "", fmt.Errorf("%w; nor does it boot: %w", err, bootErr)
	}
	lost = "what ran in it is lost, because it could not go on from its memory and was started from its disk: " + firstLine(err.Error())
	h.m.log.Warn(lost, "workspace", h.WorkspaceID)
	progress(api.Progress{Phase: "note", Message: lost})
	return p, lost, nil
}

// goOn starts a machine from the memory, in the supervisor that stands by if one
// does. On an error none is left.
func (h *held) goOn(ctx context.Context, c engine.Candidate, progress func(api.Progress)) (*supervisor.Process, error) {
	if !supervisor.Alive(h.machine()) {
		return h.startMachine(ctx, c, h.asleep(), progress)
	}
	paths, seeds, err := h.m.layerPaths(ctx, h.Layers)
	for _, sd := range seeds {
		defer sd.Close() // the supervisor has locks of its own
	}
	if err != nil {
		return nil, err
	}
	p, err := supervisor.NewClient(h.machine()).Wake(ctx, paths)
	if err != nil {
		err = errors.Join(err, supervisor.Kill(context.WithoutCancel(ctx), h.machine()))
	}
	return p, err
}

// uselessMemory says that err may come of the memory, and not of what passes,
// such as a host without room.
func uselessMemory(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, api.ErrDamaged) || errors.Is(err, api.ErrUnsupported) || errors.Is(err, api.ErrUnavailable)
}

// sleepOn goes back to the workspace that is paused to disk from one that was to
// be woken, and whose machine is gone.
func (h *held) sleepOn(ctx context.Context) error {
	if err := h.m.removeLayer(ctx, h.ActiveLayer); err != nil {
		return err
	}
	return h.update(ctx, func(ws *store.Workspace) error {
		ws.Intent = ""
		return enter(ws, api.StatePaused)
	})
}

// publishAgain opens the ports of the services that go on, unless they have been
// kept open. One that cannot be had any more is left out, with a word to the
// user.
func (h *held) publishAgain(ctx context.Context, p *supervisor.Process, progress func(api.Progress)) map[string][]api.PublishedPort {
	open := map[string][]api.PublishedPort{}
	status, err := p.Client.Status(ctx)
	kept := err == nil && len(status.Published) > 0
	for service, ports := range h.Published {
		if len(ports) == 0 {
			continue
		}
		var err error
		if !kept {
			ports, err = publish(ctx, p.Client, service, slices.Clone(ports))
		}
		if err == nil {
			// It closes them at once if the service has ended.
			err = p.WatchService(ctx, service)
		}
		if err != nil {
			h.m.log.Warn("publishing a port again", "workspace", h.WorkspaceID, "error", err)
			progress(api.Progress{Phase: "note", Message: err.Error()})
			continue
		}
		open[service] = ports
	}
	return open
}
