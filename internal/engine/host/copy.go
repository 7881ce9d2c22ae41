package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
)

// stagePrefix is how the names of directories begin in which the guest agent
// collects, directly below the root, what it will move into place.
const stagePrefix = ".pyro-stage-"

// maxDepth bounds how deep a tree may nest: every level costs open descriptors.
const maxDepth = 255

// A copier copies the tree of a machine that may be running: what changes
// meanwhile is taken as it is found, and what is gone or may not be read is
// left out.
type copier struct {
	to      *os.Root
	device  uint64               // what is mounted below it is left out
	linked  map[[2]uint64]string // device and inode of a file with several names: its first
	skipped int
}

// copyTree makes a copy of the directory from at to, which must not exist and
// which appears whole. Kinds, permission bits, times, links and holes are kept,
// owners where this process may, extended attributes not. Nothing is flushed:
// after a crash of the host it is as good as what cp makes. It returns how many
// files it left out.
func copyTree(ctx context.Context, from, to string) (skipped int, err error) {
	if _, err := os.Lstat(to); err == nil {
		return 0, api.Errorf(api.ErrExists, "there is something at %s already", to)
	}
	source, err := os.OpenRoot(from)
	if err != nil {
		return 0, err
	}
	defer source.Close()
	st, err := source.Stat(".")
	if err != nil {
		return 0, err
	}
	tmp := to + engine.UnfinishedSuffix
	if err := discard(tmp); err != nil { // of somebody who was killed
		return 0, err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return 0, err
	}
	defer func() {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			err = api.WithHint(api.Errorf(api.ErrExhausted, "%s", engine.ReasonHostDiskFull), "free space there, or remove workspaces and snapshots")
		}
		if err != nil {
			err = errors.Join(err, discard(tmp))
		}
	}()
	target, err := os.OpenRoot(tmp)
	if err != nil {
		return 0, err
	}
	defer target.Close()
	c := &copier{to: target, device: deviceOf(st), linked: map[[2]uint64]string{}}
	if err := c.dir(ctx, source, target, ".", 0); err != nil {
		return 0, err
	}
	if err := c.finish(target, ".", st); err != nil {
		return 0, err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE); err != nil {
		return 0, &os.LinkError{Op: "rename", Old: tmp, New: to, Err: err}
	}
	return c.skipped, nil
}

// dir copies what is in source into target, both the same directory rel.
func (c *copier) dir(ctx context.Context, source, target *os.Root, rel string, depth int) error {
	if depth > maxDepth {
		return api.Errorf(api.ErrExhausted, "a directory lies more than %d levels deep", maxDepth)
	}
	names, err := namesIn(source)
	if err != nil {
		return c.leaveOut(err)
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("copying a directory: %w", err)
		}
		if rel == "." && strings.HasPrefix(name, stagePrefix) {
			continue
		}
		err := c.entry(ctx, source, target, name, path.Join(rel, name), depth)
		// A directory that changes while it is read may show a name twice.
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

func namesIn(dir *os.Root) ([]string, error) {
	f, err := dir.Open(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

func (c *copier) entry(ctx context.Context, source, target *os.Root, name, rel string, depth int) error {
	st, err := source.Lstat(name)
	if err != nil {
		return c.leaveOut(err)
	}
	switch st.Mode().Type() {
	case fs.ModeDir:
		if deviceOf(st) != c.device {
			return nil
		}
		below, err := source.OpenRoot(name)
		if err != nil {
			return c.leaveOut(err)
		}
		defer below.Close()
		if err := target.Mkdir(name, 0o700); err != nil {
			return err
		}
		made, err := target.OpenRoot(name)
		if err != nil {
			return err
		}
		defer made.Close()
		if err := c.dir(ctx, below, made, rel, depth+1); err != nil {
			return err
		}
		return c.finish(target, name, st)
	case fs.ModeSymlink:
		to, err := source.Readlink(name)
		if err != nil {
			return c.leaveOut(err)
		}
		if err := target.Symlink(to, name); err != nil {
			return err
		}
		return c.own(target, name, st)
	case 0:
		return c.file(source, target, name, rel)
	}
	return nil // sockets, pipes and devices hold nothing
}

func (c *copier) file(source, target *os.Root, name, rel string) error {
	// O_NONBLOCK: a pipe may have taken the file's place.
	in, err := source.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return c.leaveOut(err)
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return err
	}
	sys := st.Sys().(*syscall.Stat_t)
	id := [2]uint64{deviceOf(st), sys.Ino}
	if sys.Nlink > 1 {
		if first, ok := c.linked[id]; ok && c.to.Link(first, rel) == nil {
			return nil
		}
		c.linked[id] = rel
	}
	out, err := target.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(content(out, in, st.Size()), out.Close()); err != nil {
		return err
	}
	return c.finish(target, name, st)
}

// content copies size bytes of in: what is appended meanwhile is not run after.
// Where the file system can, the two share their blocks.
func content(out, in *os.File, size int64) error {
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		return nil
	}
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // a hole up to the end
			break
		}
		end := size
		if err != nil {
			data = at // no such call on this file system
		} else if hole, err := unix.Seek(int(in.Fd()), data, unix.SEEK_HOLE); err == nil {
			end = min(hole, size)
		}
		if data >= size {
			break
		}
		for _, f := range []*os.File{in, out} {
			if _, err := f.Seek(data, io.SeekStart); err != nil {
				return err
			}
		}
		if _, err := io.CopyN(out, in, end-data); err != nil && !errors.Is(err, io.EOF) { // it was cut meanwhile
			return err
		}
		at = end
	}
	return out.Truncate(size)
}

// finish gives a file or directory its owner, mode and time.
func (c *copier) finish(target *os.Root, name string, st fs.FileInfo) error {
	if err := c.own(target, name, st); err != nil {
		return err
	}
	const kept = fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
	if err := target.Chmod(name, st.Mode()&kept); err != nil {
		return err
	}
	return target.Chtimes(name, st.ModTime(), st.ModTime())
}

func (c *copier) own(target *os.Root, name string, st fs.FileInfo) error {
	if os.Geteuid() != 0 {
		return nil
	}
	sys := st.Sys().(*syscall.Stat_t)
	return target.Lchown(name, int(sys.Uid), int(sys.Gid))
}

// leaveOut counts a file that cannot be had. Only what the host lacks as a whole
// is an error.
func (c *copier) leaveOut(err error) error {
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EIO) {
		return err
	}
	c.skipped++
	return nil
}

func deviceOf(st fs.FileInfo) uint64 { return uint64(st.Sys().(*syscall.Stat_t).Dev) }

// discard removes a tree, whatever the modes of its directories.
func discard(dir string) error {
	if err := os.RemoveAll(dir); err == nil {
		return nil
	}
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			_ = os.Chmod(p, 0o700)
		}
		return nil
	})
	return os.RemoveAll(dir)
}
