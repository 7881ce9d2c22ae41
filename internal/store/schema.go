package store

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// applicationID marks the file as ours (SQLite file format, section 1.3.16): it
// is set together with the first table, so a file without it was never ours or
// never finished.
const applicationID = 0x7079726f // "pyro"

// migrations bring the database from one version (PRAGMA user_version) to the
// next; an entry, once released, never changes. Records are JSON, so that a new
// field of a workspace needs no migration; columns are what queries need.
var migrations = []string{
	`
CREATE TABLE workspaces (
	id               TEXT PRIMARY KEY,
	name             TEXT UNIQUE,
	state            TEXT NOT NULL,
	created_at       INTEGER NOT NULL, -- all times: nanoseconds since 1970
	last_activity_at INTEGER NOT NULL,
	expires_at       INTEGER,
	command_count    INTEGER NOT NULL,
	last_command     INTEGER NOT NULL, -- the last sequence number given out
	last_event       INTEGER NOT NULL,
	generation       INTEGER NOT NULL, -- counts changes of record and snapshots
	record           TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE commands (
	workspace TEXT NOT NULL REFERENCES workspaces ON DELETE CASCADE,
	sequence  INTEGER NOT NULL,
	state     TEXT NOT NULL,
	owner     TEXT NOT NULL,
	record    TEXT NOT NULL,
	PRIMARY KEY (workspace, sequence)
) STRICT, WITHOUT ROWID;
CREATE INDEX running_commands ON commands (workspace) WHERE state = 'running';

CREATE TABLE snapshots (
	workspace  TEXT NOT NULL REFERENCES workspaces ON DELETE CASCADE,
	name       TEXT NOT NULL,
	created_at INTEGER NOT NULL,
	record     TEXT NOT NULL,
	PRIMARY KEY (workspace, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE events (
	workspace TEXT NOT NULL REFERENCES workspaces ON DELETE CASCADE,
	sequence  INTEGER NOT NULL,
	at        INTEGER NOT NULL,
	kind      TEXT NOT NULL,
	detail    TEXT NOT NULL,
	PRIMARY KEY (workspace, sequence)
) STRICT, WITHOUT ROWID;
`,
}

// version reads what the file says it is. Both numbers are 0 in a database
// without any content.
func (s *Store) version(ctx context.Context, db *sql.DB) (id, version int, err error) {
	err = db.QueryRowContext(ctx, "SELECT application_id, user_version FROM pragma_application_id, pragma_user_version").Scan(&id, &version)
	return id, version, s.translate(err)
}

// judge says whether this program may use a database with these numbers.
func (s *Store) judge(id, version int) error {
	switch {
	case id != applicationID:
		return api.WithHint(api.Errorf(api.ErrDamaged, "state database %s: it is not one of pyro's (application id %#x)", s.path, id), repairHint)
	case version > len(migrations):
		return api.WithHint(api.Errorf(api.ErrUnsupported, "state database %s: it has form %d, and this pyro knows forms up to %d", s.path, version, len(migrations)),
			"a newer pyro has used it: use that one")
	case version < 1:
		return api.WithHint(api.Errorf(api.ErrDamaged, "state database %s: it has the impossible form %d", s.path, version), repairHint)
	}
	return nil
}

// migrate brings the database to the present form, from version 0 (no content)
// on, in one transaction. The caller holds the database alone.
func (s *Store) migrate(ctx context.Context, from int) error {
	if from > 0 {
		if err := s.backup(ctx, from); err != nil {
			return fmt.Errorf("saving the state database before changing its form: %w", err)
		}
	}
	// The mode stays in the file. It cannot change within a transaction.
	if _, err := s.writer.ExecContext(ctx, "PRAGMA journal_mode=WAL"); err != nil {
		return s.translate(err)
	}
	err := s.write(ctx, durable, func(tx *sql.Tx) error {
		for _, m := range migrations[from:] {
			if _, err := tx.ExecContext(ctx, m); err != nil {
				return err
			}
		}
		_, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA application_id=%d; PRAGMA user_version=%d", applicationID, len(migrations)))
		return err
	})
	if err != nil {
		return fmt.Errorf("changing the state database from form %d to %d: %w", from, len(migrations), err)
	}
	return nil
}

// backup writes a copy of the database beside it.
func (s *Store) backup(ctx context.Context, version int) (err error) {
	path := fmt.Sprintf("%s.v%d-%s.backup", s.path, version, stamp())
	// SQLite fills an existing empty file, and would give a new one wider
	// permissions.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	defer func() {
		if err != nil {
			os.Remove(path)
		}
	}()
	if _, err := s.writer.ExecContext(ctx, "VACUUM INTO ?", path); err != nil {
		return s.translate(err)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	s.log.Info("saved the state database before changing its form", "path", path)
	return nil
}

// stamp is the present time for file names.
func stamp() string { return time.Now().UTC().Format("20060102T150405.000000000Z") }
