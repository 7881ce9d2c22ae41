package workspacedisk

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// NextData asks the host's filesystem for holes. It uses its own file offset,
// which nothing else does.
func (l *rawLayer) NextData(off int64) (end int64, zero bool, err error) {
	fd := int(l.file.Fd())
	data, err := unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no data up to the end
		return l.size, true, nil
	case err != nil: // no such call here: everything counts as data
		return l.size, false, nil
	case data > off:
		return min(data, l.size), true, nil
	}
	hole, err := unix.Seek(fd, off, unix.SEEK_HOLE)
	if err != nil {
		return l.size, false, nil
	}
	return min(hole, l.size), false, nil
}

// QEMU's lock bytes, from block/file-posix.c: at 100 plus a permission's
// number for a permission in use, at 200 plus it for one that is not shared.
// All are open file description locks of the shared kind, so that one holder
// sees the others by probing for an exclusive one. Permission 0 is consistent
// reading, 1 is writing.
const (
	lockUsesRead     = 100
	lockUsesWrite    = 101
	lockUnsharesRead = 200
	lockUnsharesWr   = 201
)

// lockShared takes the locks of a reader that tolerates no writer. They end
// with the file. A file that a machine has open for writing is ErrBusy, and a
// machine that starts later is refused by QEMU for as long as they are held.
func lockShared(f *os.File) error {
	for _, at := range []int64{lockUsesRead, lockUnsharesWr} {
		err := fcntlLock(f, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: at, Len: 1})
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return inUse(f)
		}
		if err != nil {
			return fmt.Errorf("locking disk image %s: %w", f.Name(), err)
		}
	}
	return probe(f, lockUsesWrite, lockUnsharesRead)
}

// probeExclusive reports ErrBusy if anybody else reads or writes f.
func probeExclusive(f *os.File) error {
	return probe(f, lockUsesRead, lockUsesWrite, lockUnsharesRead, lockUnsharesWr)
}

// lockLayer takes the lock that gVisor's supervisor holds on a layer, shared,
// so that several may look. It ends with the file. A machine that starts later
// waits for it. A layer that a machine has mounted is ErrBusy.
func lockLayer(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EWOULDBLOCK):
			return inUse(f)
		case err != nil:
			return fmt.Errorf("locking disk image %s: %w", f.Name(), err)
		}
		return nil
	}
}

func probe(f *os.File, bytes ...int64) error {
	for _, at := range bytes {
		lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: at, Len: 1}
		if err := fcntlLock(f, unix.F_OFD_GETLK, &lock); err != nil {
			return fmt.Errorf("looking for locks on disk image %s: %w", f.Name(), err)
		}
		if lock.Type != unix.F_UNLCK {
			return inUse(f)
		}
	}
	return nil
}

func inUse(f *os.File) error {
	return api.WithHint(api.Errorf(api.ErrBusy, "disk image is in use: the machine that has %s open must be stopped first", f.Name()),
		"stop the workspace or program that uses the image")
}

func fcntlLock(f *os.File, cmd int, lock *unix.Flock_t) error {
	for {
		err := unix.FcntlFlock(f.Fd(), cmd, lock)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// punchHole frees a stretch of f, which then reads as zeros.
func punchHole(f *os.File, off, length int64) error {
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
}
