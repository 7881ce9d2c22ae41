package workspace

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// PruneWorkspaces deletes expired and failed workspaces and removes what killed
// processes have left.
func (m *Manager) PruneWorkspaces(ctx context.Context) (*api.PruneResult, error) {
	before := diskUsage(m.state.Path())
	deleted, err := m.expireAll(ctx, 0)
	errs := []error{err}
	all, err := m.records(ctx)
	if err != nil {
		return nil, err
	}
	known := map[string]bool{}
	for _, ws := range all {
		known[ws.WorkspaceID] = true
		if ws, err = m.look(ctx, ws); err != nil || ws.State != api.StateFailed {
			continue
		}
		if _, err := m.DeleteWorkspace(ctx, ws.WorkspaceID); err != nil {
			errs = append(errs, err)
			continue
		}
		deleted = append(deleted, ws.WorkspaceID)
	}
	failpoint.Hit("prune/expired")
	orphans, err := m.removeOrphans(ctx, known)
	failpoint.Hit("prune/orphans")
	errs = append(errs, err)
	layers, err := m.collect(ctx)
	errs = append(errs, err)
	return &api.PruneResult{
		Removed:    append(append(deleted, orphans...), layers...),
		FreedBytes: max(0, before-diskUsage(m.state.Path())),
	}, errors.Join(errs...)
}

// removeOrphans removes directories of workspaces that are in no record.
func (m *Manager) removeOrphans(ctx context.Context, known map[string]bool) (removed []string, err error) {
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, dir := range []string{m.state.WorkspacesDir(), m.state.MachinesDir()} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return removed, err
		}
		for _, e := range entries {
			id := e.Name()
			if known[id] {
				continue
			}
			ws := m.state.Workspace(id)
			lock, err := hostproc.TryLock(ws.LockFile())
			if errors.Is(err, api.ErrBusy) {
				continue // just being made
			}
			if _, getErr := st.Get(ctx, id); !errors.Is(getErr, api.ErrNotFound) {
				lock.Close()
				continue // made since the list
			}
			if dir == m.state.MachinesDir() {
				// Machines of runs are Reap's: their lock says whether they live.
				if supervisor.Ephemeral(m.state.Machine(id)) {
					lock.Close()
					continue
				}
				err = supervisor.Remove(ctx, m.state.Machine(id))
			} else {
				err = gvisor.RemoveDir(ctx, ws.Path())
			}
			lock.Close()
			if errors.Is(err, unix.ENOTEMPTY) {
				continue // made just now
			}
			if err != nil {
				errs = append(errs, err)
				continue
			}
			removed = append(removed, id)
		}
	}
	return removed, errors.Join(errs...)
}
