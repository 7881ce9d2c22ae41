package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"slices"

	"github.com/pyro-mcp/pyro/api"
)

// Snapshot is a saved state of a workspace and the layers that hold it.
type Snapshot struct {
	api.Snapshot
	// Layer is the snapshot's own layer and Chain those below it, the lowest
	// first. All are file names.
	Layer string   `json:"layer"`
	Chain []string `json:"chain"`
	// Memory is the file or directory beside the layers that holds the machine's
	// memory at the time, and MemoryDigest its digest (artifact.HashTree); "" for
	// a snapshot of the disk alone.
	Memory       string `json:"memory,omitempty"`
	MemoryDigest string `json:"memory_digest,omitempty"`
	// Temporary says that it is nobody's but the fork's that is under way.
	Temporary bool `json:"temporary,omitempty"`
	// SeedDigest names the seed at the time; "" for none.
	SeedDigest string `json:"seed_digest"`
}

func decodeSnapshot(record string) (*Snapshot, error) {
	sn := &Snapshot{}
	if err := json.Unmarshal([]byte(record), sn); err != nil {
		return nil, api.WithHint(api.Errorf(api.ErrDamaged, "reading the record of a snapshot: %v", err), repairHint)
	}
	return sn, nil
}

// PutSnapshot adds a snapshot to the workspace with that id. A name that is
// taken is api.ErrExists.
func (s *Store) PutSnapshot(ctx context.Context, id string, sn Snapshot) error {
	sn.WorkspaceID = id
	err := s.write(ctx, durable, func(tx *sql.Tx) error {
		if err := bump(ctx, tx, id); err != nil {
			return err
		}
		return insertSnapshot(ctx, tx, sn)
	})
	if err != nil {
		return err
	}
	s.writeCopy(ctx, id, false)
	return nil
}

func insertSnapshot(ctx context.Context, tx *sql.Tx, sn Snapshot) error {
	var n int
	if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM snapshots WHERE workspace = ? AND name = ?", sn.WorkspaceID, sn.SnapshotName).Scan(&n); err != nil {
		return err
	}
	if n > 0 {
		return api.WithHint(api.Errorf(api.ErrExists, "workspace %s has a snapshot %q already", sn.WorkspaceID, sn.SnapshotName),
			"choose another name, or delete that snapshot")
	}
	record, err := json.Marshal(sn)
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, "INSERT INTO snapshots (workspace, name, created_at, record) VALUES (?, ?, ?, ?)",
		sn.WorkspaceID, sn.SnapshotName, nanos(sn.CreatedAt), string(record))
	return err
}

// bump counts a change of what the copy of a workspace's record holds.
func bump(ctx context.Context, tx *sql.Tx, id string) error {
	return exec1(ctx, tx, notFound(id), "UPDATE workspaces SET generation = generation + 1 WHERE id = ?", id)
}

// DeleteSnapshot forgets a snapshot; a name that is not there is
// api.ErrNotFound. Its layers are the caller's to remove.
func (s *Store) DeleteSnapshot(ctx context.Context, id, name string) error {
	err := s.write(ctx, durable, func(tx *sql.Tx) error {
		if err := bump(ctx, tx, id); err != nil {
			return err
		}
		return exec1(ctx, tx, noSnapshot(id, name), "DELETE FROM snapshots WHERE workspace = ? AND name = ?", id, name)
	})
	if err != nil {
		return err
	}
	s.writeCopy(ctx, id, false)
	return nil
}

// MergeLayers puts merged, which may be upper, in the place of the layer lower
// and the layer upper on it in the disks of the workspace with that id and of its
// snapshots.
func (s *Store) MergeLayers(ctx context.Context, id, lower, upper, merged string) error {
	// in replaces them in a chain with its highest layer.
	in := func(chain []string, top string) ([]string, string) {
		whole := append(slices.Clone(chain), top)
		if i := slices.Index(whole, lower); i >= 0 && i+1 < len(whole) && whole[i+1] == upper {
			whole = slices.Replace(whole, i, i+2, merged)
		}
		last := len(whole) - 1
		return whole[:last], whole[last]
	}
	err := s.write(ctx, durable, func(tx *sql.Tx) error {
		w, err := getWorkspace(ctx, tx, id)
		if err != nil {
			return err
		}
		w.Layers, w.ActiveLayer = in(w.Layers, w.ActiveLayer)
		if err := updateRow(ctx, tx, &w.Workspace); err != nil {
			return err
		}
		snapshots, err := listSnapshots(ctx, tx, id)
		if err != nil {
			return err
		}
		for _, sn := range snapshots {
			sn.Chain, sn.Layer = in(sn.Chain, sn.Layer)
			record, err := json.Marshal(sn)
			if err != nil {
				return err
			}
			if err := exec1(ctx, tx, noSnapshot(id, sn.SnapshotName), "UPDATE snapshots SET record = ? WHERE workspace = ? AND name = ?",
				string(record), id, sn.SnapshotName); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.writeCopy(ctx, id, false)
	return nil
}

func noSnapshot(id, name string) error {
	return api.WithHint(api.Errorf(api.ErrNotFound, "workspace %s has no snapshot %q", id, name),
		"pyro workspace snapshot list %s shows them", id)
}

// Snapshots returns a workspace's snapshots, oldest first. A workspace that
// does not exist has none.
func (s *Store) Snapshots(ctx context.Context, id string) ([]*Snapshot, error) {
	var out []*Snapshot
	err := s.read(ctx, func(tx *sql.Tx) (err error) {
		out, err = listSnapshots(ctx, tx, id)
		return err
	})
	return out, err
}

func listSnapshots(ctx context.Context, tx *sql.Tx, id string) ([]*Snapshot, error) {
	var out []*Snapshot
	err := collect(ctx, tx, func(rows *sql.Rows) error {
		var record string
		if err := rows.Scan(&record); err != nil {
			return err
		}
		sn, err := decodeSnapshot(record)
		out = append(out, sn)
		return err
	}, "SELECT record FROM snapshots WHERE workspace = ? ORDER BY created_at, name", id)
	return out, err
}

// Snapshot returns the snapshot of that name, or api.ErrNotFound.
func (s *Store) Snapshot(ctx context.Context, id, name string) (*Snapshot, error) {
	var sn *Snapshot
	err := s.read(ctx, func(tx *sql.Tx) error {
		var record string
		err := tx.QueryRowContext(ctx, "SELECT record FROM snapshots WHERE workspace = ? AND name = ?", id, name).Scan(&record)
		if errors.Is(err, sql.ErrNoRows) {
			return noSnapshot(id, name)
		}
		if err != nil {
			return err
		}
		sn, err = decodeSnapshot(record)
		return err
	})
	return sn, err
}
