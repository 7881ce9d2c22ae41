package store

import "golang.org/x/sys/unix"

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
