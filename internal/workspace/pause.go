package workspace

import (
	"context"
	"fmt"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// Pause takes the processor away from a running workspace. Its memory stays. A
// paused workspace is a success.
func (m *Manager) Pause(ctx context.Context, ref string) (*api.Workspace, error) {
	return m.setPaused(ctx, ref, true)
}

// Resume lets a paused workspace go on. One that runs is a success.
func (m *Manager) Resume(ctx context.Context, ref string) (*api.Workspace, error) {
	return m.setPaused(ctx, ref, false)
}

func (m *Manager) setPaused(ctx context.Context, ref string, paused bool) (*api.Workspace, error) {
	h, err := m.hold(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer h.release()
	to, kind, doing := api.StateStarted, eventResumed, "resuming"
	if paused {
		to, kind, doing = api.StatePaused, eventPaused, "pausing"
	}
	if h.State == to {
		return &h.Workspace.Workspace, nil
	}
	if !hasMachine(h.Workspace) {
		return nil, mustRun(h.Workspace)
	}
	if err := supervisor.NewClient(h.machine()).SetPaused(ctx, paused); err != nil {
		return nil, fmt.Errorf("%s workspace %s: %w", doing, label(h.Workspace), err)
	}
	err = h.update(ctx, func(ws *store.Workspace) error { return enter(ws, to) }, store.Event{Kind: kind})
	return &h.Workspace.Workspace, err
}
