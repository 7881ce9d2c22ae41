package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// Repaired is what Repair did.
type Repaired struct {
	// Healthy is true where there was nothing to do.
	Healthy bool
	// Damage is what was wrong.
	Damage error
	// MovedTo is where the damaged database lies now, "" where there was none.
	MovedTo string
	// Workspaces, Commands and Events are how many are in the new database, and
	// Workspaces those in the old one where that is healthy. The journal and
	// the history come from what can be read of the old one.
	Workspaces, Commands, Events int
	// Skipped are directories of workspaces that could not be taken in. A copy
	// of a record in them that is of no use is moved aside too.
	Skipped []api.SkippedEntry
}

// files are the suffixes of all that makes up a database.
var files = []string{"", "-wal", "-shm"}

// Repair makes the database at path again from the copies of the records in
// opts.WorkspacesDir, if it is missing beside them or damaged. The damaged one
// is moved aside. It is api.ErrBusy while other processes have it open, and
// refuses a database of a newer pyro. Killed at any point, it can be run again.
func Repair(ctx context.Context, path string, opts Options) (*Repaired, error) {
	s := newStore(path, opts)
	r, err := s.repair(ctx)
	if err := errors.Join(err, s.Close()); err != nil {
		return nil, fmt.Errorf("repairing the state database: %w", err)
	}
	return r, nil
}

func (s *Store) repair(ctx context.Context) (_ *Repaired, err error) {
	if err := refuseNetwork(filepath.Dir(s.path)); err != nil {
		return nil, err
	}
	if err := s.writable(); err != nil {
		return nil, err
	}
	if s.hold, err = takeHold(s.path, s.busyTimeout, true); err != nil {
		return nil, err
	}
	if err := s.hold.alone(ctx); err != nil {
		return nil, err
	}
	r := &Repaired{}
	switch r.Workspaces, r.Damage = s.examine(ctx); {
	case r.Damage == nil:
		r.Healthy = true
		return r, nil
	case !errors.Is(r.Damage, api.ErrDamaged):
		return nil, r.Damage
	}
	made := s.path + ".repair"
	for _, suffix := range files {
		if err := os.RemoveAll(made + suffix); err != nil {
			return nil, err
		}
	}
	if err := s.rebuild(ctx, made, r); err != nil {
		return nil, err
	}
	// Between the two renames there is no database, which Open refuses and the
	// next Repair mends.
	if r.MovedTo, err = moveAside(s.path); err != nil {
		return nil, err
	}
	if err := os.Rename(made, s.path); err != nil {
		return nil, err
	}
	// A copy without a record would be found again by every Open.
	for _, skipped := range r.Skipped {
		if _, err := moveAside(statedir.Workspace(skipped.Path).RecordFile()); err != nil {
			return nil, err
		}
	}
	return r, statedir.SyncDir(filepath.Dir(s.path))
}

// examine says what is wrong with the database or, if nothing is, how many
// workspaces are in it.
func (s *Store) examine(ctx context.Context) (workspaces int, err error) {
	empty, err := isEmpty(s.path)
	if err != nil {
		return 0, err
	}
	if empty {
		return 0, s.refuseOrphans()
	}
	s.reader = s.connect("mode=rw&_query_only=1", 1)
	defer func() { s.reader = nil }()
	defer s.reader.Close()
	id, version, err := s.version(ctx, s.reader)
	if err != nil {
		return 0, err
	}
	if id == 0 && version == 0 {
		return 0, s.refuseOrphans()
	}
	if err := s.judge(id, version); err != nil {
		return 0, err
	}
	if err := s.check(ctx, s.reader); err != nil {
		return 0, err
	}
	// The structure may be sound around records that are not.
	if _, err := s.References(ctx); err != nil {
		return 0, err
	}
	if err := s.refuseForgotten(ctx); err != nil {
		return 0, err
	}
	all, err := s.List(ctx)
	return len(all), err
}

// moveAside renames a database or another file, if it is there, and returns its
// new path.
func moveAside(path string) (string, error) {
	to := path + ".damaged-" + stamp()
	moved := ""
	// The journal first: a database without it is worse than none.
	for _, suffix := range []string{"-wal", "-shm", ""} {
		err := os.Rename(path+suffix, to+suffix)
		switch {
		case err == nil:
			moved = to
		case !errors.Is(err, os.ErrNotExist):
			return "", err
		}
	}
	return moved, nil
}

// rebuild makes a database at path. It is complete, on the disk and closed when
// rebuild returns.
func (s *Store) rebuild(ctx context.Context, path string, r *Repaired) (err error) {
	n := newStore(path, Options{BusyTimeout: s.busyTimeout, Logger: s.log})
	n.reader, n.writer = n.connect("mode=rw&_query_only=1", 1), n.connect("mode=rw&_txlock=immediate&_pragma=foreign_keys(1)", 1)
	defer func() { err = errors.Join(err, n.Close()) }()
	if err := n.createFile(); err != nil {
		return err
	}
	if err := n.migrate(ctx, 0); err != nil {
		return err
	}
	return n.write(ctx, durable, func(tx *sql.Tx) error {
		entries, err := os.ReadDir(s.workspacesDir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			if !e.IsDir() {
				continue
			}
			dir := s.workspaceDir(e.Name())
			if err := takeIn(ctx, tx, dir); err != nil {
				if isSQLite(err) || ctx.Err() != nil {
					return err
				}
				s.log.Warn("leaving a workspace out of the repaired state database", "workspace", e.Name(), "err", err)
				r.Skipped = append(r.Skipped, api.SkippedEntry{Path: dir.Path(), Reason: err.Error()})
				continue
			}
			r.Workspaces++
		}
		return s.salvage(ctx, tx, r)
	})
}

// takeIn adds the workspace whose files lie in dir.
func takeIn(ctx context.Context, tx *sql.Tx, dir statedir.Workspace) error {
	var c recordCopy
	if err := statedir.ReadJSON(dir.RecordFile(), &c); err != nil {
		return err
	}
	if c.Workspace == nil || c.Workspace.WorkspaceID != dir.ID() {
		return api.Errorf(api.ErrDamaged, "%s is not the record of workspace %s", dir.RecordFile(), dir.ID())
	}
	w := c.Workspace
	// The copy does not know of commands and events that came after it was
	// written, and their numbers must not be used again.
	w.LastCommand = max(w.LastCommand, lastOutput(dir))
	w.LastEvent = max(w.LastEvent, w.HistoryStart)
	if _, err := tx.ExecContext(ctx, "SAVEPOINT workspace"); err != nil {
		return err
	}
	err := insertWorkspace(ctx, tx, w)
	if errors.Is(err, api.ErrExists) && w.Name != nil {
		// A copy may be older than a change of names.
		w.Name = nil
		err = insertWorkspace(ctx, tx, w)
	}
	for _, sn := range c.Snapshots {
		if err != nil {
			break
		}
		sn.WorkspaceID = w.WorkspaceID
		err = insertSnapshot(ctx, tx, *sn)
	}
	end := "RELEASE workspace"
	if err != nil {
		end = "ROLLBACK TO workspace; RELEASE workspace"
	}
	if _, endErr := tx.ExecContext(ctx, end); endErr != nil {
		return endErr
	}
	return err
}

// lastOutput is the highest sequence number among the files of output.
func lastOutput(dir statedir.Workspace) int64 {
	entries, err := os.ReadDir(dir.CommandsDir())
	if err != nil {
		return 0
	}
	last := int64(0)
	for _, e := range entries {
		number, _, _ := strings.Cut(e.Name(), ".")
		if n, err := strconv.ParseInt(number, 10, 64); err == nil {
			last = max(last, n)
		}
	}
	return last
}

// salvage copies what can be read of the journal and the history out of the
// damaged database.
func (s *Store) salvage(ctx context.Context, tx *sql.Tx, r *Repaired) error {
	if empty, err := isEmpty(s.path); err != nil || empty {
		return nil
	}
	old := s.connect("mode=rw&_query_only=1", 1)
	defer old.Close()
	rows := func(query string, each func(*sql.Rows) error) error {
		rs, err := old.QueryContext(ctx, query)
		if err != nil {
			s.log.Warn("reading the damaged state database", "err", err)
			return nil
		}
		defer rs.Close()
		for rs.Next() {
			if err := each(rs); err != nil {
				return err
			}
		}
		if err := rs.Err(); err != nil {
			s.log.Warn("reading the damaged state database", "err", err)
		}
		return nil
	}
	err := rows("SELECT workspace, sequence, state, owner, record FROM commands", func(rs *sql.Rows) error {
		var workspace, state, owner, record string
		var sequence int64
		if rs.Scan(&workspace, &sequence, &state, &owner, &record) != nil {
			return nil
		}
		if _, err := decodeCommand(record); err != nil {
			return nil
		}
		n, err := adopt(ctx, tx, "last_command", workspace, sequence,
			"INSERT OR IGNORE INTO commands (workspace, sequence, state, owner, record) SELECT ?1, ?2, ?3, ?4, ?5 WHERE EXISTS (SELECT 1 FROM workspaces WHERE id = ?1) AND json_valid(?4)",
			workspace, sequence, state, owner, record)
		r.Commands += n
		return err
	})
	if err != nil {
		return err
	}
	return rows("SELECT workspace, sequence, at, kind, detail FROM events", func(rs *sql.Rows) error {
		var workspace, kind, detail string
		var sequence, at int64
		if rs.Scan(&workspace, &sequence, &at, &kind, &detail) != nil {
			return nil
		}
		n, err := adopt(ctx, tx, "last_event", workspace, sequence,
			"INSERT OR IGNORE INTO events (workspace, sequence, at, kind, detail) SELECT ?1, ?2, ?3, ?4, ?5 WHERE EXISTS (SELECT 1 FROM workspaces WHERE id = ?1) AND json_valid(?5)",
			workspace, sequence, at, kind, detail)
		r.Events += n
		return err
	})
}

// adopt runs an insert and, if it took the row, counts its number as given out
// in the workspace's column.
func adopt(ctx context.Context, tx *sql.Tx, column, workspace string, sequence int64, insert string, args ...any) (int, error) {
	result, err := tx.ExecContext(ctx, insert, args...)
	if err != nil {
		return 0, err
	}
	n, err := result.RowsAffected()
	if err != nil || n == 0 {
		return 0, err
	}
	_, err = tx.ExecContext(ctx, "UPDATE workspaces SET "+column+" = max("+column+", ?) WHERE id = ?", sequence, workspace)
	return 1, err
}
