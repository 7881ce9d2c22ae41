package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// Workspace is all that is kept of a workspace: what users see of it and what
// pyro needs to run it.
type Workspace struct {
	api.Workspace

	// EnvironmentDigest is the environment's image.
	EnvironmentDigest string `json:"environment_digest"`
	// Image is how its environment's image says to run things.
	Image api.ImageConfig `json:"image,omitzero"`
	// SeedDigest names the seed; "" for none.
	SeedDigest string `json:"seed_digest"`
	// DiskFormat is the format of the layers.
	DiskFormat string `json:"disk_format"`
	// ActiveLayer is the layer that the machine writes to. PendingLayer is one
	// that was being made when the record was written, "" mostly. Layers are
	// those below the active one, the lowest first. PendingMemory is a memory
	// that is being saved. All are file names.
	ActiveLayer   string   `json:"active_layer"`
	PendingLayer  string   `json:"pending_layer"`
	PendingMemory string   `json:"pending_memory,omitempty"`
	Layers        []string `json:"layers"`
	// Memory is what a workspace that is paused to disk goes on from, with the
	// highest of Layers as its disk and nothing at ActiveLayer yet, and
	// MemoryDigest its digest; "" for all others. It is a file name.
	Memory       string `json:"memory,omitempty"`
	MemoryDigest string `json:"memory_digest,omitempty"`
	// TTL is the time to live that was asked for, negative for none.
	TTL time.Duration `json:"ttl_ns"`
	// ExpiresBoot is the expiry by CLOCK_BOOTTIME, in nanoseconds, which no
	// change of the wall clock moves. It holds in the boot BootID only.
	ExpiresBoot int64  `json:"expires_boot_ns"`
	BootID      string `json:"boot_id"`
	// HistoryStart is the last event before the history that counts: what is
	// older was before the last reset.
	HistoryStart int64 `json:"history_start"`
	// Require is the floor under the isolation that was asked for.
	Require api.Require `json:"require"`
	// TimeScale is by how much the machine is slower than the host.
	TimeScale int `json:"time_scale"`
	// Published are the ports that were published for each service.
	Published map[string][]api.PublishedPort `json:"published,omitempty"`
	// Intent says what is being done to the workspace, for whoever finds it
	// half done; "" for nothing.
	Intent string `json:"intent"`

	// LastCommand and LastEvent are the last sequence numbers given out. They
	// are read with the record and never written by a change.
	LastCommand int64 `json:"last_command"`
	LastEvent   int64 `json:"last_event"`
}

// Event is an entry for a workspace's history.
type Event struct {
	Kind   string
	Detail map[string]any
}

const workspaceColumns = "record, last_activity_at, command_count, last_command, last_event, generation"

// workspaceRow is a workspace as the database has it.
type workspaceRow struct {
	Workspace
	generation int64
}

func scanWorkspace(scan func(...any) error) (*workspaceRow, error) {
	var record string
	var activity, count, command, event, generation int64
	if err := scan(&record, &activity, &count, &command, &event, &generation); err != nil {
		return nil, err
	}
	w := &workspaceRow{generation: generation}
	if err := json.Unmarshal([]byte(record), &w.Workspace); err != nil {
		return nil, api.WithHint(api.Errorf(api.ErrDamaged, "reading the record of a workspace: %v", err), repairHint)
	}
	// The columns are newer than the record: they also change without it.
	w.LastActivityAt = fromNanos(activity)
	w.CommandCount, w.LastCommand, w.LastEvent = count, command, event
	return w, nil
}

func getWorkspace(ctx context.Context, tx *sql.Tx, id string) (*workspaceRow, error) {
	w, err := scanWorkspace(tx.QueryRowContext(ctx, "SELECT "+workspaceColumns+" FROM workspaces WHERE id = ?", id).Scan)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, notFound(id)
	}
	return w, err
}

// Create adds a workspace. A name or id that is taken is api.ErrExists.
func (s *Store) Create(ctx context.Context, w *Workspace) error {
	if w.WorkspaceID == "" || strings.ContainsAny(w.WorkspaceID, "/\x00") || strings.HasPrefix(w.WorkspaceID, ".") {
		return api.Errorf(api.ErrInvalid, "%q cannot be the id of a workspace", w.WorkspaceID)
	}
	err := s.write(ctx, durable, func(tx *sql.Tx) error { return insertWorkspace(ctx, tx, w) })
	if err != nil {
		return err
	}
	s.writeCopy(ctx, w.WorkspaceID, true)
	return nil
}

func insertWorkspace(ctx context.Context, tx *sql.Tx, w *Workspace) error {
	var n int
	if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM workspaces WHERE id = ?", w.WorkspaceID).Scan(&n); err != nil {
		return err
	}
	if n > 0 {
		return api.Errorf(api.ErrExists, "there is a workspace %q already", w.WorkspaceID)
	}
	if err := claimName(ctx, tx, w); err != nil {
		return err
	}
	record, err := json.Marshal(w)
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `INSERT INTO workspaces
		(id, name, state, created_at, last_activity_at, expires_at, command_count, last_command, last_event, generation, record)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1, ?)`,
		w.WorkspaceID, nameColumn(w), string(w.State), nanos(w.CreatedAt), nanos(w.LastActivityAt), expiryColumn(w),
		w.CommandCount, w.LastCommand, w.LastEvent, string(record))
	return err
}

// claimName is an error if another workspace has w's name.
func claimName(ctx context.Context, tx *sql.Tx, w *Workspace) error {
	name := nameColumn(w)
	if !name.Valid {
		return nil
	}
	var other string
	err := tx.QueryRowContext(ctx, "SELECT id FROM workspaces WHERE name = ? AND id <> ?", name, w.WorkspaceID).Scan(&other)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	return api.WithHint(api.Errorf(api.ErrExists, "the name %q belongs to workspace %s", name.String, other),
		"choose another name, or delete that workspace")
}

func nameColumn(w *Workspace) sql.NullString {
	if w.Name == nil || *w.Name == "" {
		return sql.NullString{}
	}
	return sql.NullString{String: *w.Name, Valid: true}
}

func expiryColumn(w *Workspace) sql.NullInt64 {
	if w.ExpiresAt == nil {
		return sql.NullInt64{}
	}
	return sql.NullInt64{Int64: nanos(*w.ExpiresAt), Valid: true}
}

// nanos is t as the database keeps it. Times that do not fit are those of a
// broken clock; they stay in order.
func nanos(t time.Time) int64 {
	if t.Year() < 1679 || t.Year() > 2261 {
		return 0
	}
	return t.UnixNano()
}

func fromNanos(n int64) time.Time { return time.Unix(0, n).UTC() }

// Get returns the workspace with exactly that id, or api.ErrNotFound.
func (s *Store) Get(ctx context.Context, id string) (*Workspace, error) {
	var w *workspaceRow
	err := s.read(ctx, func(tx *sql.Tx) (err error) {
		w, err = getWorkspace(ctx, tx, id)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &w.Workspace, nil
}

// maxCandidates is how many workspaces an ambiguous prefix is answered with.
const maxCandidates = 10

// Find returns the workspace that ref means: by its id, by its name, or by the
// beginning of its id, in this order. A beginning that several have is
// api.ErrInvalid and lists them; a ref that none has is api.ErrNotFound.
func (s *Store) Find(ctx context.Context, ref string) (*Workspace, error) {
	if ref == "" {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "no workspace is named"), "pyro workspace list shows them")
	}
	var found []*Workspace
	err := s.read(ctx, func(tx *sql.Tx) error {
		for _, where := range []string{"id = ?1", "name = ?1", "substr(id, 1, length(?1)) = ?1"} {
			err := collect(ctx, tx, func(rows *sql.Rows) error {
				w, err := scanWorkspace(rows.Scan)
				if err == nil {
					found = append(found, &w.Workspace)
				}
				return err
			}, "SELECT "+workspaceColumns+" FROM workspaces WHERE "+where+" ORDER BY id LIMIT ?2", ref, maxCandidates+1)
			if err != nil || len(found) > 0 {
				return err
			}
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case len(found) == 0:
		return nil, notFound(ref)
	case len(found) > 1:
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "%q may mean any of the workspaces %s", ref, candidates(found)), "use more of the id")
	}
	return found[0], nil
}

func candidates(found []*Workspace) string {
	var words []string
	for i, w := range found {
		if i == maxCandidates {
			words = append(words, "…")
			break
		}
		word := w.WorkspaceID
		if w.Name != nil {
			word += fmt.Sprintf(" (%s)", *w.Name)
		}
		words = append(words, word)
	}
	return strings.Join(words, ", ")
}

// List returns all workspaces, the one with the newest activity first.
func (s *Store) List(ctx context.Context) ([]*Workspace, error) {
	var all []*Workspace
	err := s.read(ctx, func(tx *sql.Tx) error {
		return collect(ctx, tx, func(rows *sql.Rows) error {
			w, err := scanWorkspace(rows.Scan)
			if err == nil {
				all = append(all, &w.Workspace)
			}
			return err
		}, "SELECT "+workspaceColumns+" FROM workspaces ORDER BY last_activity_at DESC, id")
	})
	return all, err
}

// Due returns the workspaces whose expiry is not after now by the wall clock.
func (s *Store) Due(ctx context.Context, now time.Time) ([]*Workspace, error) {
	var due []*Workspace
	err := s.read(ctx, func(tx *sql.Tx) error {
		return collect(ctx, tx, func(rows *sql.Rows) error {
			w, err := scanWorkspace(rows.Scan)
			if err == nil {
				due = append(due, &w.Workspace)
			}
			return err
		}, "SELECT "+workspaceColumns+" FROM workspaces WHERE expires_at <= ?", now.UnixNano())
	})
	return due, err
}

// Update changes the workspace with that id by change and adds events to its
// history, both or neither. Nobody else changes it between what change sees and
// what it leaves. change must not itself change the store, which would wait for
// Update. Its error is returned as it is, and nothing is changed. Update returns
// the new record.
func (s *Store) Update(ctx context.Context, id string, change func(*Workspace) error, events ...Event) (*Workspace, error) {
	var w *workspaceRow
	err := s.write(ctx, durable, func(tx *sql.Tx) (err error) {
		if w, err = getWorkspace(ctx, tx, id); err != nil {
			return err
		}
		command, event := w.LastCommand, w.LastEvent
		if err := change(&w.Workspace); err != nil {
			return err
		}
		if w.WorkspaceID != id {
			return api.Errorf(api.ErrInternal, "changing workspace %s: its id cannot change", id)
		}
		w.LastCommand, w.LastEvent = command, event
		if err := claimName(ctx, tx, &w.Workspace); err != nil {
			return err
		}
		if err := addEvents(ctx, tx, &w.Workspace, events); err != nil {
			return err
		}
		return updateRow(ctx, tx, &w.Workspace)
	})
	if err != nil {
		return nil, err
	}
	s.writeCopy(ctx, id, false)
	return &w.Workspace, nil
}

// updateRow writes a record in the place of the old one.
func updateRow(ctx context.Context, tx *sql.Tx, w *Workspace) error {
	record, err := json.Marshal(w)
	if err != nil {
		return err
	}
	return exec1(ctx, tx, notFound(w.WorkspaceID), `UPDATE workspaces SET
		name = ?, state = ?, created_at = ?, last_activity_at = ?, expires_at = ?, command_count = ?, last_event = ?,
		generation = generation + 1, record = ? WHERE id = ?`,
		nameColumn(w), string(w.State), nanos(w.CreatedAt), nanos(w.LastActivityAt), expiryColumn(w),
		w.CommandCount, w.LastEvent, string(record), w.WorkspaceID)
}

// Touch moves the time of the last activity forward to at. An earlier time
// changes nothing.
func (s *Store) Touch(ctx context.Context, id string, at time.Time) error {
	return s.write(ctx, quick, func(tx *sql.Tx) error { return touch(ctx, tx, id, at) })
}

func touch(ctx context.Context, tx *sql.Tx, id string, at time.Time) error {
	return exec1(ctx, tx, notFound(id), "UPDATE workspaces SET last_activity_at = max(last_activity_at, ?) WHERE id = ?", nanos(at), id)
}

// Delete forgets the workspace with that id and all that belongs to it, the
// copy of its record included. Its other files are the caller's to remove.
func (s *Store) Delete(ctx context.Context, id string) error {
	gone := false
	err := s.write(ctx, durable, func(tx *sql.Tx) error {
		if err := exec1(ctx, tx, notFound(id), "DELETE FROM workspaces WHERE id = ?", id); err != nil {
			return err
		}
		// Before the commit, so that there is never a copy without a record:
		// that means a damaged database.
		gone = true
		return s.removeCopy(id)
	})
	if err != nil && gone {
		s.writeCopy(ctx, id, false)
	}
	return err
}
