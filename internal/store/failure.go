package store

import (
	"errors"
	"fmt"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/pyro-mcp/pyro/api"
)

// repairHint is the way out of a damaged database.
const repairHint = "pyro doctor --repair makes it again from the copies that lie with the workspaces"

// translate gives SQLite's own errors a class, the name of the file, and the
// way out. Every other error stays as it is.
func (s *Store) translate(err error) error {
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return err
	}
	wrap := func(class error, what string) error {
		return &failure{class, fmt.Errorf("state database %s: %s: %w", s.path, what, err)}
	}
	switch e.Code() & 0xff { // the low byte is the primary code: sqlite.org/rescode.html
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL:
		return api.WithHint(wrap(api.ErrBusy, fmt.Sprintf("another process has kept it locked for %s", s.busyTimeout)),
			"try again; a pyro that hangs in the middle of a change shows in ps")
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return api.WithHint(wrap(api.ErrDamaged, "it is damaged"), repairHint)
	case sqlite3.SQLITE_FULL:
		return api.WithHint(wrap(api.ErrExhausted, "the disk is full"), "free space where it lies")
	case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH:
		return wrap(api.ErrDenied, "it cannot be written")
	case sqlite3.SQLITE_CANTOPEN:
		return wrap(api.ErrUnavailable, "it cannot be opened")
	case sqlite3.SQLITE_IOERR:
		if e.Code() == sqlite3.SQLITE_IOERR_SHMSIZE {
			return api.WithHint(wrap(api.ErrExhausted, "the disk is full"), "free space where it lies")
		}
		return wrap(api.ErrUnavailable, "its disk fails")
	}
	return wrap(api.ErrInternal, "a statement failed")
}

// failure is a classified error that still matches what lies below it.
type failure struct {
	class error
	err   error
}

func (f *failure) Error() string   { return f.err.Error() }
func (f *failure) Unwrap() []error { return []error{f.class, f.err} }

// isSQLite reports whether err is the database's own.
func isSQLite(err error) bool {
	var e *sqlite.Error
	return errors.As(err, &e)
}
