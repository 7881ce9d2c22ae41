package workspace

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/store"
)

// setExpiry lets a workspace end ttl from now; 0 means never.
func setExpiry(ws *store.Workspace, ttl time.Duration) {
	ws.TTL, ws.ExpiresAt, ws.ExpiresBoot, ws.BootID = ttl, nil, 0, ""
	if ttl <= 0 {
		return
	}
	at := time.Now().Add(ttl).UTC()
	ws.ExpiresAt = &at
	// The wall clock may be set; the time since boot only goes on.
	ws.BootID, ws.ExpiresBoot = hostproc.BootID(), int64(sinceBoot()+ttl)
}

// timeLeft returns how long a workspace may still exist, 0 for ever. One whose
// time is over has a moment.
func timeLeft(ws *store.Workspace) time.Duration {
	if ws.ExpiresAt == nil {
		return 0
	}
	left := time.Until(*ws.ExpiresAt)
	if ws.BootID == hostproc.BootID() {
		left = time.Duration(ws.ExpiresBoot) - sinceBoot()
	}
	return max(left, time.Millisecond)
}

func expired(ws *store.Workspace) bool {
	return ws.ExpiresAt != nil && timeLeft(ws) <= time.Millisecond
}

// Expire deletes the workspaces whose time is over, also if the wall clock was
// set back. What somebody is changing for longer than a moment is left to the
// next call.
func (m *Manager) Expire(ctx context.Context) error {
	_, err := m.expireAll(ctx, lockPatience)
	return err
}

// expireAll is expire that looks at every workspace.
func (m *Manager) expireAll(ctx context.Context, patience time.Duration) (deleted []string, err error) {
	all, err := m.records(ctx)
	if err != nil {
		return nil, err
	}
	return m.expireThese(ctx, all, patience)
}

func (m *Manager) expire(ctx context.Context) (deleted []string, err error) {
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	// Those that the wall clock says: quickly found. A clock that was set back
	// hides others: their supervisors, which count for themselves, and a prune find these.
	due, err := st.Due(ctx, time.Now())
	if err != nil {
		return nil, err
	}
	return m.expireThese(ctx, due, 0)
}

func (m *Manager) expireThese(ctx context.Context, due []*store.Workspace, patience time.Duration) (deleted []string, err error) {
	var errs []error
	for _, ws := range due {
		if !expired(ws) {
			continue
		}
		h, err := m.holdRow(ctx, ws, patience)
		if errors.Is(err, api.ErrBusy) || errors.Is(err, api.ErrNotFound) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		failpoint.Hit("expire/held")
		// It may have been given more time since it was listed.
		if expired(h.Workspace) {
			if err := h.destroy(context.WithoutCancel(ctx)); err != nil {
				errs = append(errs, fmt.Errorf("deleting workspace %s, whose time is over: %w", label(h.Workspace), err))
			} else {
				deleted = append(deleted, h.WorkspaceID)
			}
		}
		h.release()
	}
	return deleted, errors.Join(errs...)
}
