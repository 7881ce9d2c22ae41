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
	"slices"

	"golang.org/x/sys/unix"
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
	err := s.writable()
	if errors.Is(err, api.ErrDenied) {
		s.readOnly = err
		return s.openReadOnly(ctx)
	}
	if err != nil {
		return err
	}
	if s.hold, err = takeHold(s.path, s.busyTimeout, true); err != nil {
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
		if err := s.upgrade(ctx); err != nil {
			return err
		}
	}
	return s.refuseForgotten(ctx)
}

// writable is api.ErrDenied where nothing can be written. The directory decides,
// not the file: the files beside the database come and go.
func (s *Store) writable() error {
	dir := filepath.Dir(s.path)
	err := unix.Faccessat(unix.AT_FDCWD, dir, unix.W_OK|unix.X_OK, unix.AT_EACCESS)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EROFS) {
		return api.WithHint(api.Errorf(api.ErrDenied, "state database %s: its directory cannot be written", s.path),
			"make it writable, or point PYRO_STATE_DIR at another directory")
	}
	if err != nil {
		return fmt.Errorf("looking at %s: %w", dir, err)
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
	f, err := os.OpenFile(s.path, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// refuseOrphans is an error if there are workspaces.
func (s *Store) refuseOrphans() error {
	dirs, err := s.workspaceDirs()
	if err != nil || len(dirs) == 0 {
		return err
	}
	return api.WithHint(api.Errorf(api.ErrDamaged, "the state database %s is empty, but there are workspaces (%d in %s)", s.path, len(dirs), s.workspacesDir), repairHint)
}

// refuseForgotten is an error if there is a copy of a record that the database
// does not have: somebody put an old database in place of the newest, or took
// its journal away. A copy is only ever written after the record and removed
// before it, so one that is there before the records are read and after has one,
// whatever others make and delete meanwhile.
func (s *Store) refuseForgotten(ctx context.Context) error {
	dirs, err := s.workspaceDirs()
	hasCopy := func(id string) bool {
		_, err := os.Lstat(s.workspaceDir(id).RecordFile())
		return err == nil
	}
	dirs = slices.DeleteFunc(dirs, func(id string) bool { return !hasCopy(id) })
	if err != nil || len(dirs) == 0 {
		return err
	}
	known := make(map[string]bool, len(dirs))
	err = s.read(ctx, func(tx *sql.Tx) error {
		return collect(ctx, tx, func(rows *sql.Rows) error {
			var id string
			err := rows.Scan(&id)
			known[id] = true
			return err
		}, "SELECT id FROM workspaces")
	})
	if err != nil {
		return err
	}
	for _, id := range dirs {
		if !known[id] && hasCopy(id) {
			return api.WithHint(api.Errorf(api.ErrDamaged, "the state database %s does not know workspace %s, whose files lie in %s", s.path, id, s.workspaceDir(id).Path()), repairHint)
		}
	}
	return nil
}

// workspaceDirs returns the names of the directories of workspaces.
func (s *Store) workspaceDirs() ([]string, error) {
	if s.workspacesDir == "" {
		return nil, nil
	}
	d, err := os.Open(s.workspacesDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	entries, err := d.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
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
	return s.refuseForgotten(ctx)
}
