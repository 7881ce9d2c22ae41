package store

import (
	"context"
	"database/sql"

	"golang.org/x/sys/unix"
)

// SetStatfs replaces the system call until restore is called.
func SetStatfs(f func(string, *unix.Statfs_t) error) (restore func()) {
	old := statfs
	statfs = f
	return func() { statfs = old }
}

// AddMigration gives the database one more form until restore is called.
func AddMigration(sql string) (restore func()) {
	old := migrations
	migrations = append(old[:len(old):len(old)], sql)
	return func() { migrations = old }
}

// Forms is the newest form of the database.
func Forms() int { return len(migrations) }

// Synchronous returns what waits for the disk in a transaction.
func Synchronous(ctx context.Context, s *Store, forPower bool) (n int, err error) {
	how := quick
	if forPower {
		how = durable
	}
	err = s.write(ctx, how, func(tx *sql.Tx) error { return tx.QueryRowContext(ctx, "PRAGMA synchronous").Scan(&n) })
	return n, err
}
