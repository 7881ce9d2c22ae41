package hostproc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// A Lock is a held flock. It belongs to the open file, so a child process that
// inherits [Lock.File] holds it too, and it ends when the last holder is gone,
// however that came about.
type Lock struct {
	f *os.File
}

// TryLock takes an exclusive lock on path, creating the file if needed. A lock
// that somebody holds is api.ErrBusy, at once.
func TryLock(path string) (*Lock, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isAt(f, path) {
			return &Lock{f}, nil
		}
		f.Close()
		switch {
		case err == nil:
			// Its last holder has removed the file: this was a lock on nothing.
		case errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("locking %s: %w", path, api.ErrBusy)
		default:
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
	}
}

// isAt reports whether path is still the name of the open file.
func isAt(f *os.File, path string) bool {
	open, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Lstat(path)
	return err == nil && os.SameFile(open, there)
}

// LockWithin is [TryLock] that goes on trying for patience: for locks that are
// held for moments only, such as by somebody who looks whether they are free.
func LockWithin(ctx context.Context, path string, patience time.Duration) (*Lock, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		l, err := TryLock(path)
		if err == nil || !errors.Is(err, api.ErrBusy) {
			return l, err
		}
		// flock can wait, but only with a thread and deaf to a context.
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, err
		}
	}
}

// File returns the locked file, for a child to inherit. It stays the Lock's.
func (l *Lock) File() *os.File { return l.f }

// Close gives this process's hold up. The lock itself ends with its last
// holder. Safe to call twice and on nil.
func (l *Lock) Close() error {
	if l == nil || l.f == nil {
		return nil
	}
	err := l.f.Close()
	l.f = nil
	return err
}
