package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"slices"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// AppendEvent adds an entry to the history of the workspace with that id.
// Entries are numbered per workspace from 1 on and never change.
func (s *Store) AppendEvent(ctx context.Context, id, kind string, detail map[string]any) error {
	return s.write(ctx, durable, func(tx *sql.Tx) error {
		w, err := getWorkspace(ctx, tx, id)
		if err != nil {
			return err
		}
		if err := addEvents(ctx, tx, &w.Workspace, []Event{{kind, detail}}); err != nil {
			return err
		}
		return exec1(ctx, tx, notFound(id), "UPDATE workspaces SET last_event = ? WHERE id = ?", w.LastEvent, id)
	})
}

// addEvents writes events and counts them in w.
func addEvents(ctx context.Context, tx *sql.Tx, w *Workspace, events []Event) error {
	now := time.Now()
	for _, e := range events {
		if e.Detail == nil {
			e.Detail = map[string]any{}
		}
		detail, err := json.Marshal(e.Detail)
		if err != nil {
			return err
		}
		w.LastEvent++
		if _, err := tx.ExecContext(ctx, "INSERT INTO events (workspace, sequence, at, kind, detail) VALUES (?, ?, ?, ?, ?)",
			w.WorkspaceID, w.LastEvent, nanos(now), e.Kind, string(detail)); err != nil {
			return err
		}
	}
	return nil
}

// Events returns a workspace's history after the entry with that number, oldest
// first; where kinds are given, only entries of those. A workspace that does
// not exist has none.
func (s *Store) Events(ctx context.Context, id string, after int64, kinds ...string) ([]api.Event, error) {
	var out []api.Event
	err := s.read(ctx, func(tx *sql.Tx) error {
		return collect(ctx, tx, func(rows *sql.Rows) error {
			var e api.Event
			var at int64
			var detail string
			if err := rows.Scan(&e.Sequence, &at, &e.Kind, &detail); err != nil {
				return err
			}
			if len(kinds) > 0 && !slices.Contains(kinds, e.Kind) {
				return nil
			}
			e.At = fromNanos(at)
			if err := json.Unmarshal([]byte(detail), &e.Detail); err != nil {
				return api.WithHint(api.Errorf(api.ErrDamaged, "reading an event: %v", err), repairHint)
			}
			out = append(out, e)
			return nil
		}, "SELECT sequence, at, kind, detail FROM events WHERE workspace = ? AND sequence > ? ORDER BY sequence", id, after)
	})
	return out, err
}
