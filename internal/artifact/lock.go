package artifact

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// lockPoll is how often a waiting process tries for a lock. A blocking flock
// cannot be given up when the caller cancels.
const lockPoll = 100 * time.Millisecond

// lock opens path and takes a flock on it, shared or exclusive, waiting until
// ctx ends. onWait, if not nil, is called once if it has to wait. The returned
// file holds the lock until it and every inherited copy are closed.
func lock(ctx context.Context, path string, how int, onWait func()) (*os.File, error) {
	for {
		f, err := tryLock(path, how)
		if err == nil || !errors.Is(err, api.ErrBusy) {
			return f, err
		}
		if onWait != nil {
			onWait()
			onWait = nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for %s: %w", path, context.Cause(ctx))
		case <-time.After(lockPoll):
		}
	}
}

// tryLock is lock without waiting: a lock that somebody holds is api.ErrBusy.
func tryLock(path string, how int) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("locking %s: %w", path, api.ErrBusy)
			}
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		// Prune unlinks lock files: between open and flock this one may have
		// become a file that nobody else will ever see.
		same, err := isStill(f, path)
		if err != nil {
			f.Close()
			return nil, err
		}
		if same {
			return f, nil
		}
		f.Close()
	}
}

func isStill(f *os.File, path string) (bool, error) {
	held, err := f.Stat()
	if err != nil {
		return false, err
	}
	named, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return os.SameFile(held, named), nil
}

// killHolders ends every process that has the file open, this one excepted,
// and returns when they have ended. It is how the orphans of a builder that was
// killed are found: they all inherited the leash, wherever they are in the
// process tree and whatever namespaces they have made.
func killHolders(ctx context.Context, leash *os.File) (killed int, err error) {
	own, err := leash.Stat()
	if err != nil {
		return 0, err
	}
	// A killed process keeps its files for a moment; ten seconds are far more
	// than a process needs that is not stuck in the kernel.
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second,
		api.Errorf(api.ErrBusy, "a process left over from an earlier build cannot be ended"))
	defer cancel()
	ended := map[int]*os.File{}
	defer func() {
		for _, p := range ended {
			p.Close()
		}
	}()
	for {
		pids, err := holders(own)
		if err != nil {
			return len(ended), err
		}
		if len(pids) == 0 {
			break
		}
		for _, pid := range pids {
			if p := killHolder(pid, own); p != nil && ended[pid] == nil {
				ended[pid] = p
			}
		}
		select {
		case <-ctx.Done():
			return len(ended), context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
	// The first process of a namespace closes its files before it has ended
	// the others in there, which may have none of ours open and still write.
	for _, p := range ended {
		if err := waitEnded(ctx, p); err != nil {
			return len(ended), err
		}
	}
	return len(ended), nil
}

// killHolder kills pid if it has the file open, and returns its pidfd. The
// pidfd makes sure that the process that was looked at is the one that is
// killed.
func killHolder(pid int, file os.FileInfo) *os.File {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil
	}
	p := os.NewFile(uintptr(fd), "pidfd")
	if !hasOpen(pid, file) || unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) != nil {
		p.Close()
		return nil
	}
	return p
}

// waitEnded returns when the process has ended, reaped or not.
func waitEnded(ctx context.Context, pidfd *os.File) error {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}, 50)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("waiting for a killed process: %w", err)
		}
		if n == 1 {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}

func holders(file os.FileInfo) ([]int, error) {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if hasOpen(pid, file) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func hasOpen(pid int, file os.FileInfo) bool {
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	fds, err := os.ReadDir(dir)
	if err != nil {
		return false // gone, or somebody else's
	}
	for _, fd := range fds {
		if fi, err := os.Stat(filepath.Join(dir, fd.Name())); err == nil && os.SameFile(fi, file) {
			return true
		}
	}
	return false
}

// Hold takes a shared lock on path, making the file where it is not, and waits
// for it until ctx ends. Closing the file, and every copy that a child has
// inherited, gives the hold up. It is for other stores of this form.
func Hold(ctx context.Context, path string) (*os.File, error) {
	return lock(ctx, path, unix.LOCK_SH, nil)
}

// TryOwn takes the lock on path alone, or is api.ErrBusy at once. While it is
// held the file may be removed: a later [Hold] notices.
func TryOwn(path string) (*os.File, error) {
	return tryLock(path, unix.LOCK_EX)
}
