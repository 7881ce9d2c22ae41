package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"syscall"

	_ "modernc.org/sqlite" // the driver

	"github.com/pyro-mcp/pyro/api"
)

// Open opens the database at path and makes it if it is not there. The
// directory of path exists.
//
// It never makes a new list where there was one: an empty or missing database
// beside existing workspaces, a damaged one, or one of a newer pyro is an error
// (api.ErrDamaged, api.ErrUnsupported) that says what to do. In a directory that
// cannot be written the store can be read, and every change is api.ErrDenied.
// A network file system is api.ErrUnsupported: its locks cannot be relied on.
//
// Close gives back what Open took.
func Open(ctx context.Context, path string, opts Options) (*Store, error) {
	s := newStore(path, opts)
	if err := s.open(ctx); err != nil {
		s.Close()
		return nil, fmt.Errorf("opening the state database: %w", err)
	}
	return s, nil
}

func newStore(path string, opts Options) *Store {
	s := &Store{path: path, workspacesDir: opts.WorkspacesDir, busyTimeout: opts.BusyTimeout, log: opts.Logger}
	if s.busyTimeout == 0 {
		s.busyTimeout = busyTimeout
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s
}

func (s *Store) open(ctx context.Context) error {
	if err := refuseNetwork(filepath.Dir(s.path)); err != nil {
		return err
	}
	var err error
	s.hold, err = takeHold(s.path, s.busyTimeout, true)
	if errors.Is(err, os.ErrPermission) || errors.Is(err, syscall.EROFS) {
		return s.openReadOnly(ctx)
	}
	if err != nil {
		return err
	}
	if err := s.hold.share(ctx); err != nil {
		return err
	}
	s.reader = s.connect("mode=rw&_query_only=1", readConns)
	s.writer = s.connect("mode=rw&_txlock=immediate&_pragma=foreign_keys(1)", 1)

	empty, err := isEmpty(s.path)
	if err != nil {
		return err
	}
	if empty {
		return s.create(ctx)
	}
	if err := s.checkAfterCrash(ctx); err != nil {
		return err
	}
	id, version, err := s.version(ctx, s.reader)
	if err != nil {
		return err
	}
	if id == 0 && version == 0 {
		return s.create(ctx)
	}
	if err := s.judge(id, version); err != nil {
		return err
	}
	if version < len(migrations) {
		return s.upgrade(ctx)
	}
	return nil
}

// connect returns a pool of at most n connections, none of which is open yet.
func (s *Store) connect(query string, n int) *sql.DB {
	dsn := "file:" + (&url.URL{Path: s.path}).EscapedPath() +
		fmt.Sprintf("?_busy_timeout=%d&_dqs=0&_error_rc=1&", s.busyTimeout.Milliseconds()) + query
	db, err := sql.Open("sqlite", dsn)
	if err != nil { // only for a driver that is not there
		panic("package store needs modernc.org/sqlite: " + err.Error())
	}
	db.SetMaxOpenConns(n)
	db.SetMaxIdleConns(n)
	return db
}

// isEmpty reports whether there is no database at path yet.
func isEmpty(path string) (bool, error) {
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	if !st.Mode().IsRegular() {
		return false, api.WithHint(api.Errorf(api.ErrDamaged, "state database %s: it is no regular file", path), repairHint)
	}
	return st.Size() == 0, nil
}

// create makes the tables, unless there are workspaces already, which an empty
// list would hide.
func (s *Store) create(ctx context.Context) error {
	if err := s.hold.alone(ctx); err != nil {
		return err
	}
	// Somebody may have made it while we waited.
	empty, err := isEmpty(s.path)
	if err != nil {
		return err
	}
	id, version := 0, 0
	if !empty {
		if id, version, err = s.version(ctx, s.reader); err != nil {
			return err
		}
	}
	if id == 0 && version == 0 {
		if err := s.refuseOrphans(); err != nil {
			return err
		}
		if err := s.createFile(); err != nil {
			return err
		}
		if err := s.migrate(ctx, 0); err != nil {
			return err
		}
	} else if err := s.judge(id, version); err != nil {
		return err
	}
	return s.hold.share(ctx)
}

// createFile makes the file itself, closed to others: SQLite gives the files
// beside it the same permissions.
func (s *Store) createFile() error {
	f, err := os.OpenFile(s.path, os.O_WRONLY|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// refuseOrphans is an error if there are workspaces.
func (s *Store) refuseOrphans() error {
	if s.workspacesDir == "" {
		return nil
	}
	entries, err := os.ReadDir(s.workspacesDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	n := 0
	for _, e := range entries {
		if e.IsDir() {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	return api.WithHint(api.Errorf(api.ErrDamaged, "the state database %s is empty, but there are workspaces (%d in %s)", s.path, n, s.workspacesDir), repairHint)
}

// upgrade migrates a database of an older pyro.
func (s *Store) upgrade(ctx context.Context) error {
	if err := s.hold.alone(ctx); err != nil {
		return fmt.Errorf("changing its form: %w", err)
	}
	_, version, err := s.version(ctx, s.reader)
	if err != nil {
		return err
	}
	if version < len(migrations) {
		if err := s.migrate(ctx, version); err != nil {
			return err
		}
	}
	return s.hold.share(ctx)
}

// checkAfterCrash checks the whole database if the last process that had it
// open did not close it: then its journal is still there, and nobody uses it.
func (s *Store) checkAfterCrash(ctx context.Context) error {
	st, err := os.Stat(s.path + "-wal")
	if err != nil || st.Size() == 0 {
		return nil
	}
	if alone, err := s.hold.tryAlone(); err != nil {
		return err
	} else if alone {
		if err := s.check(ctx, s.reader); err != nil {
			return err
		}
	}
	return s.hold.share(ctx)
}

// check reads the whole database.
func (s *Store) check(ctx context.Context, db *sql.DB) error {
	var verdict string
	if err := db.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&verdict); err != nil {
		return s.translate(err)
	}
	if verdict != "ok" {
		return api.WithHint(api.Errorf(api.ErrDamaged, "state database %s: it is damaged: %s", s.path, verdict), repairHint)
	}
	return nil
}

// openReadOnly opens what is there without writing anything.
func (s *Store) openReadOnly(ctx context.Context) error {
	s.readOnly = api.WithHint(api.Errorf(api.ErrDenied, "state database %s: its directory cannot be written", s.path),
		"make it writable, or point PYRO_STATE_DIR at another directory")
	empty, err := isEmpty(s.path)
	if err != nil {
		return err
	}
	if empty {
		if err := s.refuseOrphans(); err != nil {
			return err
		}
		return s.readOnly
	}
	if s.hold, err = takeHold(s.path, s.busyTimeout, false); err != nil {
		s.log.Debug("reading the state database without a lock", "err", err)
	}
	if err := s.hold.share(ctx); err != nil {
		return err
	}
	s.reader = s.connect("mode=ro", readConns)
	id, version, err := s.version(ctx, s.reader)
	if errors.Is(err, api.ErrDenied) || errors.Is(err, api.ErrUnavailable) {
		// Even a reader has to write the shared memory beside a database in
		// WAL mode, unless it is told that nobody writes (sqlite.org/wal.html,
		// section 5).
		s.reader.Close()
		s.reader = s.connect("mode=ro&immutable=1", readConns)
		id, version, err = s.version(ctx, s.reader)
		if st, statErr := os.Stat(s.path + "-wal"); statErr == nil && st.Size() > 0 {
			s.log.Warn("the state directory cannot be written: the last changes of workspaces cannot be seen", "path", s.path)
		}
	}
	if err != nil {
		return err
	}
	if err := s.judge(id, version); err != nil {
		return err
	}
	if version < len(migrations) {
		return fmt.Errorf("changing its form from %d to %d: %w", version, len(migrations), s.readOnly)
	}
	s.log.Warn("the state directory cannot be written: workspaces can be looked at, not changed", "path", filepath.Dir(s.path))
	return nil
}
