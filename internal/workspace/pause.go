package workspace

import (
	"context"
	"fmt"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// Pause takes the processor away from a running workspace, and its memory too if
// the request wants that. A paused workspace is a success.
func (m *Manager) Pause(ctx context.Context, ref string, req api.PauseRequest) (*api.Workspace, error) {
	h, err := m.hold(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer h.release()
	if h.State == api.StatePaused && (h.PausedToDisk || !req.ToDisk) {
		return &h.Workspace.Workspace, nil
	}
	if !hasMachine(h.Workspace) {
		return nil, mustRun(h.Workspace)
	}
	if req.ToDisk {
		err = h.pauseToDisk(ctx)
	} else {
		err = h.setPaused(ctx, true)
	}
	if err != nil {
		return nil, fmt.Errorf("pausing workspace %s: %w", label(h.Workspace), err)
	}
	return &h.Workspace.Workspace, nil
}

// Resume lets a paused workspace go on. One that runs is a success.
func (m *Manager) Resume(ctx context.Context, ref string, progress func(api.Progress)) (*api.Workspace, error) {
	ws, err := m.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	if ws.Memory != "" {
		if ws, err = m.wake(ctx, ws, progress); err != nil {
			return nil, err
		}
		return &ws.Workspace, nil
	}
	h, err := m.holdRow(ctx, ws, lockPatience)
	if err != nil {
		return nil, err
	}
	defer h.release()
	if h.State == api.StateStarted {
		return &h.Workspace.Workspace, nil
	}
	if !hasMachine(h.Workspace) {
		return nil, mustRun(h.Workspace)
	}
	if err := h.setPaused(ctx, false); err != nil {
		return nil, fmt.Errorf("resuming workspace %s: %w", label(h.Workspace), err)
	}
	return &h.Workspace.Workspace, nil
}

// setPaused takes the processor away or gives it back.
func (h *held) setPaused(ctx context.Context, paused bool) error {
	to, kind := api.StateStarted, eventResumed
	if paused {
		to, kind = api.StatePaused, eventPaused
	}
	if err := supervisor.NewClient(h.machine()).SetPaused(ctx, paused); err != nil {
		return err
	}
	return h.update(ctx, func(ws *store.Workspace) error { return enter(ws, to) }, store.Event{Kind: kind})
}
