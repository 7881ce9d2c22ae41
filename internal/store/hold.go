package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// lockSuffix is appended to the database's path for the file that tells whether
// anybody has it open. The database itself cannot serve: closing any descriptor
// of it would drop SQLite's own locks in this process (fcntl_locking(2)).
const lockSuffix = ".lock"

// retryEvery is how often a lock is tried for that somebody else holds.
const retryEvery = 5 * time.Millisecond

// hold is this store's flock: shared by all who have the database open, and
// exclusive while one of them makes, checks, migrates or replaces it.
type hold struct {
	f     *os.File
	limit time.Duration
}

// takeHold opens the lock of a database without taking it yet. create is false
// where nothing may be written; without a lock file the hold is then nil.
func takeHold(path string, limit time.Duration, create bool) (*hold, error) {
	flags := os.O_RDWR | os.O_CREATE
	if !create {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(path+lockSuffix, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		if !create && errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	return &hold{f, limit}, nil
}

// share takes the lock together with others, or turns an exclusive one into a
// shared one.
func (h *hold) share(ctx context.Context) error { return h.wait(ctx, unix.LOCK_SH) }

// alone takes the lock for this store only.
func (h *hold) alone(ctx context.Context) error { return h.wait(ctx, unix.LOCK_EX) }

// tryAlone reports whether nobody else has the database open. If so the lock is
// exclusive now; if not it may be lost, and share takes it back.
func (h *hold) tryAlone() (bool, error) {
	err := h.flock(unix.LOCK_EX)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}

func (h *hold) wait(ctx context.Context, how int) error {
	if h == nil {
		return nil
	}
	deadline := time.Now().Add(h.limit)
	for {
		err := h.flock(how)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("locking %s: %w", h.f.Name(), err)
		}
		if time.Now().After(deadline) {
			return api.WithHint(api.Errorf(api.ErrBusy, "locking %s: another pyro has held it for %s", h.f.Name(), h.limit),
				"let other pyro commands and servers end, then try again")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(retryEvery):
		}
	}
}

func (h *hold) flock(how int) error {
	for {
		err := unix.Flock(int(h.f.Fd()), how|unix.LOCK_NB)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// release gives the lock up. Safe to call twice and on nil.
func (h *hold) release() error {
	if h == nil || h.f == nil {
		return nil
	}
	err := h.f.Close()
	h.f = nil
	return err
}
