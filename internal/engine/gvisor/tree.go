package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// treeSuffix is what the name of an unpacked environment adds to its image's.
// It lies beside the image, so that it goes when the image goes.
const treeSuffix = ".tree"

// The bounds on an environment that is unpacked.
const (
	maxTreeDepth = 256
	maxTreeFiles = 4 << 20
)

// treeOf returns the image's content as a directory, for a host where nobody
// may mount the image: unpacked on the first call, at once afterwards. Two
// processes that call it at once unpack it once. The files have the owners they
// have in the image, or this process's where its user namespace lacks those.
func treeOf(ctx context.Context, image *os.File) (string, error) {
	final := image.Name() + treeSuffix
	if _, err := os.Lstat(final); err == nil {
		return final, nil
	}
	lock, err := os.OpenFile(image.Name()+treeSuffix+".lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return "", fmt.Errorf("unpacking the environment: %w", err)
	}
	defer lock.Close()
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return "", fmt.Errorf("unpacking the environment: %w", err)
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("waiting for another process that unpacks the environment: %w", ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
	if _, err := os.Lstat(final); err == nil {
		return final, nil
	}
	// Whoever died here before us has left a part.
	tmp := final + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return "", fmt.Errorf("unpacking the environment: %w", err)
	}
	if err := unpack(ctx, image, tmp); err != nil {
		return "", errors.Join(fmt.Errorf("unpacking the environment: %w", err), os.RemoveAll(tmp))
	}
	if err := os.Rename(tmp, final); err != nil {
		return "", fmt.Errorf("unpacking the environment: %w", err)
	}
	return final, nil
}

// unpack writes the image's files below dir, which it makes. Names in the image
// are single path elements, which the reader checks; what is made here is only
// entered, never followed: every path goes through an os.Root.
func unpack(ctx context.Context, image *os.File, dir string) error {
	st, err := image.Stat()
	if err != nil {
		return err
	}
	fs, err := ext4.Open(ctx, image, st.Size())
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	const rootInode = 2 // EXT4_ROOT_INO
	u := &unpacker{fs: fs, root: root, links: map[uint32]string{}, budget: ext4.Budget{DirBytes: 4 << 30}}
	top, err := fs.Inode(rootInode)
	if err != nil {
		return err
	}
	return u.dir(ctx, top, ".", 0)
}

type unpacker struct {
	fs     *ext4.FS
	root   *os.Root
	budget ext4.Budget
	links  map[uint32]string // the first name of inodes that have several
	files  int
}

// dir fills the directory name, which exists, and gives it its attributes last:
// they may take the right to write to it away.
func (u *unpacker) dir(ctx context.Context, ino *ext4.Inode, name string, depth int) error {
	if depth > maxTreeDepth {
		return api.Errorf(api.ErrExhausted, "%s is nested more than %d deep", name, maxTreeDepth)
	}
	var entries []ext4.Dirent
	err := u.fs.ReadDir(ctx, ino, &u.budget, func(e ext4.Dirent) error {
		if u.files++; u.files > maxTreeFiles {
			return api.Errorf(api.ErrExhausted, "the environment has more than %d files", maxTreeFiles)
		}
		entries = append(entries, e)
		return nil
	})
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if depth == 0 && e.Name == "lost+found" {
			continue // ext4's own
		}
		if err := u.entry(ctx, e, filepath.Join(name, e.Name), depth); err != nil {
			return fmt.Errorf("%s: %w", filepath.Join(name, e.Name), err)
		}
	}
	return u.attributes(ino, name)
}

func (u *unpacker) entry(ctx context.Context, e ext4.Dirent, name string, depth int) error {
	ino, err := u.fs.Inode(e.Inode)
	if err != nil {
		return err
	}
	switch {
	case ino.IsDir():
		if err := u.root.Mkdir(name, 0o700); err != nil {
			return err
		}
		return u.dir(ctx, ino, name, depth+1)
	case ino.IsSymlink():
		target, err := u.fs.ReadLink(ino)
		if err != nil {
			return err
		}
		if err := u.root.Symlink(target, name); err != nil {
			return err
		}
		return u.owner(ino, name)
	case ino.IsRegular():
		if first, ok := u.links[ino.Number]; ok {
			return u.root.Link(first, name)
		}
		if err := u.file(ino, name); err != nil {
			return err
		}
		if ino.Links > 1 {
			u.links[ino.Number] = name
		}
		return u.attributes(ino, name)
	}
	return nil // device nodes, pipes and sockets: gVisor would show none of them
}

func (u *unpacker) file(ino *ext4.Inode, name string) error {
	in, err := u.fs.OpenFile(ino)
	if err != nil {
		return err
	}
	out, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, io.NewSectionReader(in, 0, in.Size())); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// attributes gives a file or directory its owner, mode and time, in this order:
// a change of owner takes set-user-id bits away.
func (u *unpacker) attributes(ino *ext4.Inode, name string) error {
	if err := u.owner(ino, name); err != nil {
		return err
	}
	mode := os.FileMode(ino.Mode & 0o777)
	for _, bit := range []struct {
		raw  uint16
		mode os.FileMode
	}{{unix.S_ISUID, os.ModeSetuid}, {unix.S_ISGID, os.ModeSetgid}, {unix.S_ISVTX, os.ModeSticky}} {
		if ino.Mode&bit.raw != 0 {
			mode |= bit.mode
		}
	}
	if err := u.root.Chmod(name, mode); err != nil {
		return err
	}
	t := time.Unix(ino.Mtime, 0)
	return u.root.Chtimes(name, t, t)
}

// owner gives the file its owner. In a namespace with one id all belong to it.
func (u *unpacker) owner(ino *ext4.Inode, name string) error {
	err := u.root.Lchown(name, int(ino.UID), int(ino.GID))
	if errors.Is(err, unix.EINVAL) { // not mapped in this namespace
		return nil
	}
	return err
}
