package workspace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// transitions is every change of state that there is. A workspace begins in
// starting, and in any state it can be deleted.
var transitions = map[api.WorkspaceState][]api.WorkspaceState{
	api.StateStarting: {api.StateStarted, api.StateStopped, api.StateFailed, api.StatePaused},
	api.StateStarted:  {api.StateStopped, api.StatePaused, api.StateStarting},
	api.StatePaused:   {api.StateStarted, api.StateStopped, api.StateStarting},
	api.StateStopped:  {api.StateStarting},
	api.StateFailed:   {},
}

// The intents: what a process was doing to a workspace when it was last heard
// of. Whoever finds one without its process finishes or undoes it.
const (
	intentCreate   = "create"
	intentStart    = "start"
	intentReset    = "reset"
	intentSnapshot = "snapshot"
	intentFork     = "fork"
	intentPause    = "pause" // to disk
	intentWake     = "wake"
	intentCompact  = "compact"
	intentDelete   = "delete"
)

// enter moves ws into a state. A transition that is not in the table is a fault
// of pyro.
func enter(ws *store.Workspace, to api.WorkspaceState) error {
	if ws.State != to && !slices.Contains(transitions[ws.State], to) {
		return api.Errorf(api.ErrInternal, "workspace %s cannot go from %s to %s", ws.WorkspaceID, ws.State, to)
	}
	if ws.State = to; to == api.StateStopped {
		// They live in the guest's memory.
		ws.ServiceCount, ws.RunningServiceCount, ws.Published = 0, 0, nil
	}
	if to == api.StateStarted || to == api.StateStopped {
		ws.Memory, ws.MemoryDigest = "", ""
	}
	ws.PausedToDisk = to == api.StatePaused && ws.Memory != ""
	return nil
}

// enterStarted moves ws into the state of a workspace whose machine has just come
// up.
func enterStarted(ws *store.Workspace, machine supervisor.Status) error {
	ws.Intent, ws.LastError, ws.LastActivityAt = "", nil, time.Now().UTC()
	ws.Isolation, ws.ExecutionMode, ws.TimeScale = machine.Isolation, executionMode(machine.Isolation), machine.TimeScale
	return enter(ws, api.StateStarted)
}

// lockPatience is how long a change waits for another change of the same
// workspace. Whoever waits longer had better know that somebody else is at it.
const lockPatience = 4 * time.Second

// held is a workspace that this process alone may change.
type held struct {
	*store.Workspace
	m    *Manager
	dir  statedir.Workspace
	lock *hostproc.Lock
}

func (h *held) release() { h.lock.Close() }

// hold finds a workspace, takes its lock and settles what a killed process may
// have left half done.
func (m *Manager) hold(ctx context.Context, ref string) (*held, error) {
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	ws, err := st.Find(ctx, ref)
	if err != nil {
		return nil, err
	}
	return m.holdRow(ctx, ws, lockPatience)
}

func (m *Manager) holdRow(ctx context.Context, ws *store.Workspace, patience time.Duration) (*held, error) {
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	dir := m.state.Workspace(ws.WorkspaceID)
	lock, err := hostproc.LockWithin(ctx, dir.LockFile(), patience)
	switch {
	case errors.Is(err, os.ErrNotExist):
		if _, err := st.Get(ctx, ws.WorkspaceID); err != nil {
			return nil, err // deleted while this waited
		}
		// The row outlived its directory: somebody removed that by hand.
		if err := statedir.MakePrivate(dir.Path()); err != nil {
			return nil, err
		}
		lock, err = hostproc.LockWithin(ctx, dir.LockFile(), patience)
		if err != nil {
			return nil, err
		}
	case errors.Is(err, api.ErrBusy):
		return nil, api.WithHint(api.Errorf(api.ErrBusy, "workspace %s is being changed by another command", label(ws)),
			"try again when that has ended")
	case err != nil:
		return nil, err
	}
	h := &held{m: m, dir: dir, lock: lock}
	if h.Workspace, err = st.Get(ctx, ws.WorkspaceID); err == nil {
		err = h.settleWithin(ctx, patience)
	}
	if err != nil {
		if errors.Is(err, api.ErrNotFound) && h.Workspace == nil {
			// Deleted while this waited, and the lock's file made anew by that.
			err = errors.Join(err, os.RemoveAll(dir.Path()))
		}
		lock.Close()
		return nil, err
	}
	return h, nil
}

// update changes the record, with events, in one step.
func (h *held) update(ctx context.Context, change func(*store.Workspace) error, events ...store.Event) error {
	st, err := h.m.store(ctx)
	if err != nil {
		return err
	}
	ws, err := st.Update(ctx, h.WorkspaceID, change, events...)
	if err == nil {
		h.Workspace = ws
	}
	return err
}

// machine names the directory of the workspace's machine.
func (h *held) machine() statedir.Machine { return h.m.state.Machine(h.WorkspaceID) }

// label names a workspace in messages, as its user does.
func label(ws *store.Workspace) string {
	if ws.Name != nil {
		return fmt.Sprintf("%q", *ws.Name)
	}
	return ws.WorkspaceID
}

// hasMachine reports whether a machine belongs to the workspace's state.
func hasMachine(ws *store.Workspace) bool {
	return ws.State == api.StateStarted || ws.State == api.StatePaused && !ws.PausedToDisk
}

// settled reports whether the record says nothing that a killed process may have
// left half done, given whether its machine is alive.
func settled(ws *store.Workspace, alive bool) bool {
	return ws.Intent == "" && ws.PendingLayer == "" && ws.State != api.StateStarting && (alive || !hasMachine(ws))
}

// settle is settleWithin for who waits as long as for a lock.
func (h *held) settle(ctx context.Context) error { return h.settleWithin(ctx, lockPatience) }

// settleWithin brings the record and the truth together. Nobody else is changing
// this workspace: what is half done was left by a process that is gone. Only what a
// machine that is just ending leaves has to be waited for; if that takes longer than
// patience it is api.ErrBusy.
func (h *held) settleWithin(ctx context.Context, patience time.Duration) error {
	alive := supervisor.Alive(h.machine())
	if settled(h.Workspace, alive) {
		return nil
	}
	// The caller's patience must not leave this half done again.
	ctx = context.WithoutCancel(ctx)
	if h.Intent == intentPause {
		if done, err := h.finishPause(ctx); done || err != nil {
			return err
		}
		alive = supervisor.Alive(h.machine())
	}
	if h.Intent == intentDelete {
		if err := h.destroy(ctx); err != nil {
			return fmt.Errorf("finishing the deletion of workspace %s: %w", h.WorkspaceID, err)
		}
		return api.Errorf(api.ErrNotFound, "workspace %s has been deleted", h.WorkspaceID)
	}
	if h.State == api.StateStarting || !alive {
		if err := supervisor.Kill(ctx, h.machine()); err != nil {
			return fmt.Errorf("clearing up after workspace %s: %w", label(h.Workspace), err)
		}
		alive = false
	}
	if h.State == api.StateStarting && h.Intent == intentWake {
		return h.sleepOn(ctx)
	}
	adopted, err := h.settleLayer(ctx, alive)
	if errors.Is(err, guestconn.ErrNobody) {
		// Its supervisor has closed its socket and is ending with the machine.
		if err := h.awaitGone(ctx, patience); err != nil {
			return err
		}
		return h.settleWithin(ctx, patience)
	}
	if err != nil {
		return err
	}
	if err := h.m.interruptCommands(ctx, h.WorkspaceID); err != nil {
		return err
	}
	leftover := h.PendingLayer != "" || h.PendingMemory != "" || h.Intent == intentFork
	if h.Intent == intentFork {
		if err := h.forgetTemporary(ctx); err != nil {
			return err
		}
	}
	kind, why := eventMachineEnded, ""
	err = h.update(ctx, func(ws *store.Workspace) error {
		if adopted {
			ws.Layers, ws.ActiveLayer = append(ws.Layers, ws.ActiveLayer), ws.PendingLayer
		}
		ws.PendingLayer, ws.PendingMemory = "", ""
		intent := ws.Intent
		ws.Intent = ""
		switch {
		case ws.State == api.StateStarting && intent == intentCreate:
			kind, why = eventInterrupted, "its creation was interrupted"
			if ws.Name != nil {
				why = fmt.Sprintf("its creation as %q was interrupted", *ws.Name)
				ws.Name = nil // free for the next attempt
			}
			ws.LastError = &why
			return enter(ws, api.StateFailed)
		case ws.State == api.StateStarting:
			kind, why = eventInterrupted, "the command that was starting it was killed"
			ws.LastError = &why
			return enter(ws, api.StateStopped)
		case !alive && hasMachine(ws):
			why = howEnded(h.machine())
			if why == "" {
				kind = eventStopped
			} else {
				ws.LastError = &why
			}
			return enter(ws, api.StateStopped)
		}
		kind = ""
		return nil
	})
	if err != nil {
		return err
	}
	if leftover {
		// A snapshot may have been recorded that needs them.
		if _, err := h.m.collect(ctx); err != nil {
			h.m.log.Warn("removing disk layers", "error", err)
		}
	}
	if kind == "" {
		return nil
	}
	st, err := h.m.store(ctx)
	if err != nil {
		return err
	}
	return st.AppendEvent(ctx, h.WorkspaceID, kind, map[string]any{"reason": why})
}

// awaitGone returns when nothing of a machine that is ending is left.
func (h *held) awaitGone(ctx context.Context, patience time.Duration) error {
	ending, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := supervisor.WaitGone(ending, h.machine())
	if errors.Is(err, api.ErrBusy) {
		return api.WithHint(api.Errorf(api.ErrBusy, "the machine of workspace %s is just ending", label(h.Workspace)), "try again in a moment")
	}
	if err != nil {
		return err
	}
	// Nothing holds its files any more, and so nobody is hurt.
	return supervisor.Kill(ctx, h.machine())
}

// howEnded says why the machine does not run; "" if somebody asked for that.
func howEnded(machine statedir.Machine) string {
	e, err := supervisor.ReadEnding(machine)
	switch {
	case err != nil:
		return "its supervisor was killed"
	case e.Requested:
		return ""
	case len(e.Console) > 0:
		return e.Reason + "; its console ends:\n  " + strings.Join(e.Console, "\n  ")
	}
	return e.Reason
}

// settleLayer finds out about the disk layer that a snapshot cut off in the middle
// may have made, by the contract of engine.DiskSnapshotter, whether the machine's
// disk is that one now.
func (h *held) settleLayer(ctx context.Context, alive bool) (adopted bool, err error) {
	if h.PendingLayer == "" {
		return false, nil
	}
	spare := h.m.state.Layer(h.PendingLayer)
	switch {
	case h.Intent == intentReset, h.Intent == intentCompact:
		// A reset's new disk, or layers merged: the old ones are still the
		// workspace's.
	case alive:
		// The supervisor may still be at it, and knows best when it is done.
		disk, err := supervisor.NewClient(h.machine()).Disk(ctx)
		if err != nil {
			return false, err
		}
		adopted = disk == spare
	default:
		_, err := os.Lstat(spare)
		adopted = err == nil && h.DiskFormat == string(engine.DiskQcow2)
	}
	return adopted, nil
}

// interruptCommands closes the journal's entries whose pyro is gone.
func (m *Manager) interruptCommands(ctx context.Context, id string) error {
	st, err := m.store(ctx)
	if err != nil {
		return err
	}
	open, err := st.RunningCommands(ctx, id)
	if err != nil {
		return err
	}
	for _, c := range open {
		if c.Owner.Alive() {
			continue // it will hear from its connection
		}
		err := st.FinishCommand(ctx, id, c.Sequence, store.CommandResult{State: api.CommandInterrupted, EndedAt: time.Now().UTC()})
		if err != nil && !errors.Is(err, api.ErrNotFound) {
			return err
		}
	}
	return nil
}

// look returns a workspace as it is, settling first what needs it. Nobody is
// waited for: what another command is changing is shown as it stands.
func (m *Manager) look(ctx context.Context, ws *store.Workspace) (*store.Workspace, error) {
	// Whether one that has no machine is alive is not worth a look.
	if settled(ws, !hasMachine(ws) || supervisor.Alive(m.state.Machine(ws.WorkspaceID))) {
		return ws, nil
	}
	h, err := m.holdRow(ctx, ws, 0)
	if errors.Is(err, api.ErrBusy) {
		return ws, nil
	}
	if err != nil {
		return nil, err
	}
	h.release()
	return h.Workspace, nil
}

// find is look for a name that the user gave.
func (m *Manager) find(ctx context.Context, ref string) (*store.Workspace, error) {
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	ws, err := st.Find(ctx, ref)
	if err != nil {
		return nil, err
	}
	return m.look(ctx, ws)
}

// running is find for what needs a machine that runs. One that is paused to disk
// it wakes.
func (m *Manager) running(ctx context.Context, ref string) (*store.Workspace, error) {
	ws, err := m.find(ctx, ref)
	if err == nil && ws.Memory != "" {
		ws, err = m.wake(ctx, ws, nil)
	}
	if err != nil {
		return nil, err
	}
	return ws, mustRun(ws)
}

func mustRun(ws *store.Workspace) error {
	switch ws.State {
	case api.StateStarted:
		return nil
	case api.StateStarting:
		return api.WithHint(api.Errorf(api.ErrState, "workspace %s is just being started", label(ws)), "wait for the command that starts it")
	case api.StatePaused:
		return api.WithHint(api.Errorf(api.ErrState, "workspace %s is paused", label(ws)), "pyro workspace resume %s", refOf(ws))
	case api.StateFailed:
		return api.WithHint(api.Errorf(api.ErrState, "workspace %s never came to be: %s", label(ws), *ws.LastError),
			"pyro workspace delete %s, and create it again", refOf(ws))
	}
	text := fmt.Sprintf("workspace %s is stopped", label(ws))
	if ws.LastError != nil {
		text += ": " + *ws.LastError
	}
	return api.WithHint(api.Errorf(api.ErrState, "%s", text), "pyro workspace start %s", refOf(ws))
}

// refOf is how a user names the workspace in a command.
func refOf(ws *store.Workspace) string {
	if ws.Name != nil {
		return quote(*ws.Name)
	}
	return ws.WorkspaceID
}
