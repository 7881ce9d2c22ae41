package guestagent

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// stagePrefix begins the name of every stage; 32 hexadecimal digits follow.
const stagePrefix = ".pyro-stage-"

func isStageName(name string) bool {
	digits, ok := strings.CutPrefix(name, stagePrefix)
	return ok && len(digits) == 32 && strings.Trim(digits, "0123456789abcdef") == ""
}

// A stage is a private directory in which files are prepared, on the same file
// system as the place that they are meant for, so that a rename puts them there.
type stage struct {
	root   *os.Root
	parent *os.Root // the directory that the stage lies in
	name   string
}

// stageParents are the directories, below the agent's root, that may hold
// stages. Where the workspace is a mount of its own the only place on its file
// system is within; the file tools do not show stages there.
var stageParents = []string{".", strings.TrimPrefix(defaultCwd, "/")}

// newStage makes a stage on the file system of target.
func newStage(root string, target *directory) (*stage, error) {
	var st unix.Stat_t
	if err := unix.Fstat(target.fd, &st); err != nil {
		return nil, api.Errorf(api.ErrUnavailable, "making a stage: %w", err)
	}
	top, err := os.OpenRoot(root)
	if err != nil {
		return nil, api.Errorf(api.ErrUnavailable, "making a stage: %w", err)
	}
	defer top.Close()
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails
	name := stagePrefix + hex.EncodeToString(random[:])
	var why error
	for _, dir := range stageParents {
		parent, err := top.OpenRoot(dir)
		if err != nil {
			why = err
			continue
		}
		if fi, err := parent.Stat("."); err != nil || uint64(fi.Sys().(*syscall.Stat_t).Dev) != uint64(st.Dev) {
			_ = parent.Close()
			continue
		}
		if err := parent.Mkdir(name, 0o700); err != nil {
			_ = parent.Close()
			why = err // a workload's user may not write to /, say
			continue
		}
		r, err := parent.OpenRoot(name)
		if err != nil {
			_ = parent.Remove(name)
			_ = parent.Close()
			why = err
			continue
		}
		return &stage{root: r, parent: parent, name: name}, nil
	}
	if why == nil {
		return nil, api.Errorf(api.ErrUnsupported, "the place lies on a file system of its own, not on that of %s", defaultCwd)
	}
	return nil, fmt.Errorf("making a stage: %w", fileError(defaultCwd, why))
}

// moveTo renames name, which lies in the stage itself, to base in dir.
func (st *stage) moveTo(name string, dir *directory, base string) error {
	f, err := st.root.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	return again(func() error { return unix.Renameat(int(f.Fd()), name, dir.fd, base) })
}

// remove removes the stage with everything in it. What it cannot remove now is
// removed at the agent's next start.
func (st *stage) remove(logger *slog.Logger) {
	_ = st.root.Close()
	err := removeTree(st.parent, st.name)
	_ = st.parent.Close()
	if err != nil {
		logger.Warn("removing a stage", "name", st.name, "err", err)
	}
}

// removeTree is RemoveAll, also of directories that their owner may not write.
func removeTree(root *os.Root, name string) error {
	err := root.RemoveAll(name)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	_ = fs.WalkDir(root.FS(), filepath.ToSlash(name), func(p string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() {
			_ = root.Chmod(p, 0o700)
			if err != nil {
				return nil // WalkDir has read it already; the next round can
			}
		}
		return nil
	})
	return root.RemoveAll(name)
}
