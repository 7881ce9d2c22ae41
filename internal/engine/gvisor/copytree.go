package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
)

// maxLayerDepth bounds how deep a layer's directory may nest: every level costs
// open files. A guest's longest path has fewer levels than twice this.
const maxLayerDepth = 1024

// snapshotTree copies the layer's directory.
func (m *machine) snapshotTree(ctx context.Context, spare string, hold holder) (err error) {
	begin := time.Now()
	tmp := spare + engine.UnfinishedSuffix
	if err := os.RemoveAll(tmp); err != nil { // of somebody who was killed
		return err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	to, err := os.OpenRoot(tmp)
	if err != nil {
		return err
	}
	defer to.Close()
	from, err := os.OpenRoot(m.parts.layer.Name())
	if err != nil {
		return err
	}
	defer from.Close()
	c := &treeCopier{to: to, linked: map[uint64]string{}}
	paused, err := hold(ctx, func() error { return c.entry(ctx, from, to, UpperDir, UpperDir, 0) })
	if err != nil {
		return err
	}
	if err := to.Mkdir(workDir, 0o755); err != nil {
		return err
	}
	if err := onDirectory(to, unix.Syncfs); err != nil {
		return err
	}
	if err := publish(tmp, spare); err != nil {
		return err
	}
	m.logger.Info("disk frozen", "paused", paused.Round(time.Millisecond), "took", time.Since(begin).Round(time.Millisecond), "files", c.files)
	return nil
}

// A treeCopier copies an overlay's upper directory with all that overlayfs sees
// in it: owners, modes, times, extended attributes, hard links, whiteouts, holes.
// The names in it are a guest's. They are single path elements, and everything is
// opened below its directory, never through a link.
type treeCopier struct {
	to     *os.Root
	linked map[uint64]string // inode of a file with several names: its first, below to
	files  int
}

// entry copies from's name, whose path below the copy is rel, to the same name of
// to.
func (c *treeCopier) entry(ctx context.Context, from, to *os.Root, name, rel string, depth int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	st, err := from.Lstat(name)
	if err != nil {
		return err
	}
	c.files++
	sys := st.Sys().(*syscall.Stat_t)
	if !st.IsDir() && sys.Nlink > 1 {
		if first, ok := c.linked[sys.Ino]; ok {
			return c.to.Link(first, rel)
		}
		c.linked[sys.Ino] = rel
	}
	switch st.Mode().Type() {
	case fs.ModeDir:
		err = c.dir(ctx, from, to, name, rel, depth)
	case 0:
		err = c.file(ctx, from, to, name)
	case fs.ModeSymlink:
		var target string
		if target, err = from.Readlink(name); err == nil {
			err = to.Symlink(target, name)
		}
	default:
		// Whiteouts, which everybody may make, pipes and sockets; other devices a
		// guest without root cannot have.
		err = mknod(to, name, sys)
	}
	if err != nil {
		return err
	}
	return finish(from, to, name, st)
}

func (c *treeCopier) dir(ctx context.Context, from, to *os.Root, name, rel string, depth int) error {
	if depth > maxLayerDepth {
		return api.Errorf(api.ErrExhausted, "a directory lies more than %d levels deep", maxLayerDepth)
	}
	source, err := from.OpenRoot(name)
	if err != nil {
		return err
	}
	defer source.Close()
	if err := to.Mkdir(name, 0o700); err != nil {
		return err
	}
	target, err := to.OpenRoot(name)
	if err != nil {
		return err
	}
	defer target.Close()
	in, err := names(source)
	if err != nil {
		return err
	}
	for _, n := range in {
		if err := c.entry(ctx, source, target, n, path.Join(rel, n), depth+1); err != nil {
			return err
		}
	}
	return nil
}

// names lists a directory.
func names(dir *os.Root) ([]string, error) {
	f, err := dir.Open(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// onDirectory calls f with a descriptor of dir.
func onDirectory(dir *os.Root, f func(fd int) error) error {
	d, err := dir.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	return f(int(d.Fd()))
}

func (c *treeCopier) file(ctx context.Context, from, to *os.Root, name string) error {
	in, err := from.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := to.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = copyImage(ctx, out, in)
	return errors.Join(err, out.Close())
}

// copyAttributes copies the extended attributes of a file or directory.
func copyAttributes(from, to *os.Root, name string) error {
	in, err := from.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := to.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	// XATTR_LIST_MAX and XATTR_SIZE_MAX, limits.h.
	names := make([]byte, 64<<10)
	n, err := unix.Flistxattr(int(in.Fd()), names)
	if err != nil || n == 0 {
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = nil
		}
		return err
	}
	value := make([]byte, 64<<10)
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		n, err := unix.Fgetxattr(int(in.Fd()), attr, value)
		if err != nil {
			return fmt.Errorf("reading the attribute %s: %w", attr, err)
		}
		err = unix.Fsetxattr(int(out.Fd()), attr, value[:n], 0)
		if errors.Is(err, unix.EPERM) && !strings.HasPrefix(attr, "user.") {
			continue // a label of the host's
		}
		if err != nil {
			return fmt.Errorf("copying the attribute %s: %w", attr, err)
		}
	}
	return nil
}

// mknod makes the file that st describes.
func mknod(to *os.Root, name string, st *syscall.Stat_t) error {
	err := onDirectory(to, func(fd int) error { return unix.Mknodat(fd, name, st.Mode, int(st.Rdev)) })
	if err != nil {
		return &os.PathError{Op: "mknod", Path: name, Err: err}
	}
	return nil
}

// finish gives a file the owner, attributes, mode and time that it has below
// from, in this order: a change of owner takes capabilities and set-user-id bits
// away.
func finish(from, to *os.Root, name string, st fs.FileInfo) error {
	sys := st.Sys().(*syscall.Stat_t)
	if err := to.Lchown(name, int(sys.Uid), int(sys.Gid)); err != nil {
		return err
	}
	if st.IsDir() || st.Mode().IsRegular() {
		if err := copyAttributes(from, to, name); err != nil {
			return err
		}
	}
	if st.Mode().Type() != fs.ModeSymlink {
		if err := to.Chmod(name, st.Mode()); err != nil {
			return err
		}
	}
	return setTimes(to, name, st)
}

// setTimes gives the file called name in dir the times of st.
func setTimes(dir *os.Root, name string, st fs.FileInfo) error {
	sys := st.Sys().(*syscall.Stat_t)
	times := []unix.Timespec{{Sec: sys.Atim.Sec, Nsec: sys.Atim.Nsec}, {Sec: sys.Mtim.Sec, Nsec: sys.Mtim.Nsec}}
	return onDirectory(dir, func(fd int) error { return unix.UtimesNanoAt(fd, name, times, unix.AT_SYMLINK_NOFOLLOW) })
}
