package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// SnapshotDisk implements [engine.DiskSnapshotter]: spare becomes a copy of the
// disk, made while the sandbox is paused.
//
// The file system of the layer is not frozen (FIFREEZE), although that would do
// without the pause: a frozen file system holds itself. If this process is
// killed then, its loop device, its lock on the image and every sandbox process
// that was about to write stay for ever. A paused sandbox dies like any other.
// So the copy of an image is what a power cut would leave, with all that was
// flushed in it, and recovered as after one.
func (m *machine) SnapshotDisk(ctx context.Context, spare string) (frozen string, err error) {
	m.snapshotMu.Lock()
	defer m.snapshotMu.Unlock()
	if err := m.snapshot(ctx, spare, m.held); err != nil {
		return "", fmt.Errorf("copying the machine's disk: %w", err)
	}
	return spare, nil
}

// A holder runs f while the sandbox is paused, and returns for how long it was:
// see held.
type holder func(ctx context.Context, f func() error) (time.Duration, error)

// snapshot makes spare a copy of the disk as of while hold holds the sandbox.
func (m *machine) snapshot(ctx context.Context, spare string, hold holder) error {
	if m.ephemeral {
		return api.Errorf(api.ErrUnsupported, "the disk of a machine for one use is nowhere but in its sandbox")
	}
	if err := m.running(); err != nil {
		return err
	}
	if err := nothingAt(spare); err != nil {
		return err
	}
	// Stop does not wait for a copy.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.stopping, cancel)()
	var err error
	if inUserNamespace() {
		err = m.snapshotTree(ctx, spare, hold)
	} else {
		err = m.snapshotImage(ctx, spare, hold)
	}
	if gone := m.running(); err != nil && gone != nil { // which is why
		return gone
	}
	return err
}

func nothingAt(path string) error {
	if _, err := os.Lstat(path); err == nil {
		return api.Errorf(api.ErrExists, "there is something at %s already", path)
	}
	return nil
}

// running returns why the machine has no disk to copy any more, nil if it has.
func (m *machine) running() error {
	select {
	case <-m.ended:
		return api.Errorf(api.ErrUnavailable, "the machine is gone")
	case <-m.stopping.Done():
		return api.Errorf(api.ErrUnavailable, "the machine is being stopped")
	default:
		return nil
	}
}

// held runs f while the sandbox is paused, and returns for how long it was. It
// is as it was before afterwards, whatever happens to f and ctx.
func (m *machine) held(ctx context.Context, f func() error) (time.Duration, error) {
	m.pauseMu.Lock()
	defer m.pauseMu.Unlock()
	was := m.paused
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := m.setPausedLocked(ctx, true); err != nil {
		return 0, err
	}
	begin := time.Now()
	err := f()
	if !was {
		err = errors.Join(err, m.setPausedLocked(context.WithoutCancel(ctx), false))
	}
	if gone := m.running(); gone != nil {
		// Whatever ended it may have written to the disk meanwhile.
		return 0, errors.Join(gone, err)
	}
	return time.Since(begin), err
}

// copyAttempts bounds how often an image is copied that changes meanwhile.
const copyAttempts = 3

// snapshotImage copies the layer's image.
func (m *machine) snapshotImage(ctx context.Context, spare string, hold holder) (err error) {
	begin := time.Now()
	tmp := spare + engine.UnfinishedSuffix
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) { // of somebody who was killed
		return err
	}
	out, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		out.Close()
		if err != nil {
			os.Remove(tmp)
		}
	}()
	in, err := m.parts.layer.hold()
	if err != nil {
		return errors.Join(m.running(), err)
	}
	defer in.Close()
	// Most of it while the guest goes on.
	if err := m.syncLayer(); err != nil {
		return err
	}
	m.trim()
	var copied int64
	paused, err := hold(ctx, func() (err error) {
		for range copyAttempts {
			if err := m.syncLayer(); err != nil {
				return err
			}
			before := m.transactions()
			if copied, err = copyImage(ctx, out, in); err != nil {
				return err
			}
			if m.transactions() == before {
				return nil
			}
		}
		return api.Errorf(api.ErrBusy, "the disk keeps changing although the sandbox is paused")
	})
	if err != nil {
		return err
	}
	if err := m.ns.do(func() error { return m.stage.recoverImage(out) }); err != nil {
		return err
	}
	if err := checkFrozen(out); err != nil {
		return err
	}
	if err := out.Sync(); err != nil {
		return err
	}
	if err := publish(tmp, spare); err != nil {
		return err
	}
	m.logger.Info("disk frozen", "paused", paused.Round(time.Millisecond), "took", time.Since(begin).Round(time.Millisecond), "bytes", copied)
	return nil
}

// syncLayer has the kernel write all of the layer's files to its image, and
// commit its journal.
func (m *machine) syncLayer() error {
	return m.ns.do(func() error { return flush(m.stage.layer()) })
}

// flush has the kernel write the file system at target.
func flush(target string) error {
	dir, err := os.Open(target)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("flushing the disk: %w", err)
	}
	return nil
}

// fiTrim is FITRIM, _IOWR('X', 121, struct fstrim_range), linux/fs.h.
const fiTrim = 0xc0185879

// trim frees the places in the layer's image where deleted files were: what they
// held is gone then, and takes no room on the host. It does what it can.
func (m *machine) trim() {
	err := m.ns.do(func() error { return trim(m.stage.layer()) })
	if err != nil {
		m.logger.Debug("freeing unused blocks of the disk", "err", err)
	}
}

// trim frees what the file system mounted at target has no use for.
func trim(target string) error {
	dir, err := os.Open(target)
	if err != nil {
		return err
	}
	defer dir.Close()
	return ioctlPointer(dir.Fd(), fiTrim, &struct{ start, length, least uint64 }{0, math.MaxUint64, 0})
}

// transactions tells states of the layer's journal apart, "" where the kernel
// does not tell. Between two equal ones nothing was committed, so that what the
// kernel wrote to the image meanwhile is in its journal as well, and a copy that
// has only some of it is made whole by the recovery.
func (m *machine) transactions() string {
	var state string
	_ = m.ns.do(func() error {
		var st unix.Stat_t
		if err := unix.Lstat(m.stage.layer(), &st); err != nil {
			return err
		}
		device, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
		if err != nil {
			return err
		}
		// The journal's inode is number 8 of every ext4.
		b, err := os.ReadFile("/proc/fs/jbd2/" + filepath.Base(device) + "-8/info")
		if err != nil {
			return err
		}
		// "7 transactions (5 requested), each up to 1024 blocks", then averages.
		for i, c := range b {
			if c == '\n' {
				b = b[:i]
				break
			}
		}
		state = string(b)
		return nil
	})
	return state
}

// recoverImage has the kernel replay the image's journal, by mounting it once.
// What the guest had deleted but still open goes, too. It runs in the namespace.
func (s stage) recoverImage(image *os.File) error {
	// Without barriers, each of which would flush all that was copied.
	if err := mountImage(image, s.spare(), false, "noinit_itable,nobarrier"); err != nil {
		return fmt.Errorf("recovering the journal: %w", err)
	}
	if err := unix.Unmount(s.spare(), 0); err != nil {
		return errors.Join(fmt.Errorf("recovering the journal: %w", err), unix.Unmount(s.spare(), unix.MNT_DETACH))
	}
	return nil
}

// copyStep is how much is copied between two looks at the context, in bytes.
const copyStep = 32 << 20

// copyImage makes out a copy of in, and returns how many bytes it copied: none
// where the host's file system lets the two share them, and no holes.
func copyImage(ctx context.Context, out, in *os.File) (copied int64, err error) {
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		return 0, nil
	}
	st, err := in.Stat()
	if err != nil {
		return 0, err
	}
	// What an attempt before this one has left must not show through a hole.
	if err := errors.Join(out.Truncate(0), out.Truncate(st.Size())); err != nil {
		return 0, err
	}
	for at := int64(0); at < st.Size(); {
		data, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // a hole up to the end
			break
		}
		end := st.Size()
		if err != nil {
			data = at // no such call on this file system
		} else if hole, err := unix.Seek(int(in.Fd()), data, unix.SEEK_HOLE); err == nil {
			end = min(hole, end)
		}
		for at = data; at < end; {
			if err := ctx.Err(); err != nil {
				return copied, err
			}
			n, err := copyRange(out, in, at, min(copyStep, end-at))
			if err != nil {
				return copied, err
			}
			at += n
			copied += n
		}
	}
	return copied, nil
}

// copyRange copies n bytes at off of both files, in the kernel where it can. The
// offsets of the two are its own.
func copyRange(out, in *os.File, off, n int64) (int64, error) {
	for _, f := range []*os.File{in, out} {
		if _, err := f.Seek(off, io.SeekStart); err != nil {
			return 0, err
		}
	}
	return io.CopyN(out, in, n)
}

// publish gives what is complete at tmp its name.
func publish(tmp, name string) error {
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, name, unix.RENAME_NOREPLACE); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return api.Errorf(api.ErrExists, "there is something at %s already", name)
		}
		return &os.LinkError{Op: "rename", Old: tmp, New: name, Err: err}
	}
	return statedir.SyncDir(filepath.Dir(name))
}
