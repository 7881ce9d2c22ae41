package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// busyTimeout is how long a writer waits for another process's transaction.
// They all take milliseconds: five seconds mean that something hangs.
const busyTimeout = 5 * time.Second

// readConns bounds the connections for reading, and with them the memory for
// their page caches.
const readConns = 4

// Options says how to open a store.
type Options struct {
	// WorkspacesDir holds the workspaces' directories and in them the copies
	// of their records. "" keeps no copies and makes [Repair] impossible.
	WorkspacesDir string
	// BusyTimeout is how long to wait for other processes, 5 s if zero.
	BusyTimeout time.Duration
	Logger      *slog.Logger
}

// A Store is an open database. Its methods may be called concurrently.
type Store struct {
	path          string
	workspacesDir string
	busyTimeout   time.Duration
	log           *slog.Logger

	hold *hold
	// reader and writer are separate so that a writer that waits for another
	// process does not keep readers waiting.
	reader, writer *sql.DB
	// readOnly says why nothing can be written; nil where it can.
	readOnly error

	copies copies
}

// Close gives the database back. The last process to close it also folds its
// journal (-wal) into it, so that only an unclean end leaves one.
func (s *Store) Close() error {
	var errs []error
	for _, db := range []*sql.DB{s.reader, s.writer} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	errs = append(errs, s.hold.release())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("closing the state database: %w", s.translate(err))
	}
	return nil
}

// How much a transaction has to survive.
const (
	// durable transactions survive a loss of power: SQLite waits for the disk.
	durable = "FULL"
	// quick ones survive the death of every process but may be lost, in
	// order, with the host's power. That is enough for the journal of commands
	// and for activity: the guest whose deeds they record dies with the power
	// too, and waiting for the disk twice would dominate a short command.
	quick = "NORMAL"
)

// write runs f in a transaction that has taken the write lock already, so that
// what f reads cannot change before it writes. f's error rolls back and is
// returned as it is.
func (s *Store) write(ctx context.Context, synchronous string, f func(*sql.Tx) error) error {
	if s.readOnly != nil {
		return s.readOnly
	}
	conn, err := s.writer.Conn(ctx)
	if err != nil {
		return s.translate(err)
	}
	defer conn.Close()
	if _, err := conn.ExecContext(ctx, "PRAGMA synchronous="+synchronous); err != nil {
		return s.translate(err)
	}
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return s.translate(err)
	}
	defer func() { _ = tx.Rollback() }() // after a commit there is nothing to roll back
	if err := f(tx); err != nil {
		return s.translate(err)
	}
	return s.translate(tx.Commit())
}

// read runs f in a transaction that sees one state of the database.
func (s *Store) read(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := s.reader.BeginTx(ctx, nil)
	if err != nil {
		return s.translate(err)
	}
	defer func() { _ = tx.Rollback() }() // it only read
	return s.translate(f(tx))
}

// collect calls scan for every row of a query.
func collect(ctx context.Context, tx *sql.Tx, scan func(*sql.Rows) error, query string, args ...any) error {
	rows, err := tx.QueryContext(ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := scan(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}

// exec1 runs a statement that must change exactly one row; none is missing.
func exec1(ctx context.Context, tx *sql.Tx, missing error, query string, args ...any) error {
	r, err := tx.ExecContext(ctx, query, args...)
	if err != nil {
		return err
	}
	if n, err := r.RowsAffected(); err != nil || n == 1 {
		return err
	}
	return missing
}

func notFound(ref string) error {
	return api.WithHint(api.Errorf(api.ErrNotFound, "no workspace %q", ref), "pyro workspace list shows them")
}

// copies remembers how new the written copies of records are.
type copies struct {
	mu sync.Mutex
	of map[string]*copyState
}

type copyState struct {
	sync.Mutex
	generation int64
}

func (c *copies) get(id string) *copyState {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.of == nil {
		c.of = map[string]*copyState{}
	}
	st := c.of[id]
	if st == nil {
		st = &copyState{}
		c.of[id] = st
	}
	return st
}

func (c *copies) forget(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.of, id)
}
