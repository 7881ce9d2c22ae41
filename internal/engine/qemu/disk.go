package qemu

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/qcow2"
)

// diskPath is where the machine's writable layer is.
func diskPath(spec engine.MachineSpec) string {
	return cmp.Or(spec.Disk, filepath.Join(spec.Dir, "disk.qcow2"))
}

// A chain is what makes up a machine's disk, as open files. What lies below
// what is decided by their order here. The name of a backing file that each
// qcow2 header holds is for people and their tools only: QEMU and everything
// else of ours is told, because a QEMU that was taken over could have written
// any name there.
type chain struct {
	base   *os.File   // raw
	layers []*os.File // qcow2, the lowest first, open for reading
	disk   *os.File   // qcow2, open for reading and writing
	size   int64      // of the virtual disk, in bytes
}

// openDisk opens the machine's disk and everything below it, and makes the disk
// first where nothing is. The files are files' to close.
func (e *Engine) openDisk(ctx context.Context, files *opener, spec engine.MachineSpec) (chain, error) {
	c, err := openLayers(files, spec.RootImage, spec.Layers)
	if err != nil {
		return chain{}, err
	}
	size, err := wantedSize(spec, c)
	if err != nil {
		return chain{}, err
	}
	path := diskPath(spec)
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		below, format := spec.RootImage, "raw"
		if n := len(spec.Layers); n > 0 {
			below, format = spec.Layers[n-1], "qcow2"
		}
		if err := e.createOverlay(ctx, path, below, format, size, spec.Ephemeral); err != nil {
			return chain{}, fmt.Errorf("creating the machine's disk: %w", err)
		}
	}
	err = c.openTop(files, path)
	return c, err
}

// openLayers opens the image and the layers on it. The chain's size is that of
// the highest.
func openLayers(files *opener, rootImage string, layers []string) (chain, error) {
	c := chain{base: files.open(rootImage, os.O_RDONLY)}
	if files.err != nil {
		return chain{}, fmt.Errorf("opening the environment's image: %w", files.err)
	}
	st, err := c.base.Stat()
	if err != nil {
		return chain{}, fmt.Errorf("opening the environment's image: %w", err)
	}
	c.size = st.Size()
	for _, path := range layers {
		f, err := c.openOn(files, path, os.O_RDONLY)
		if err != nil {
			return chain{}, err
		}
		c.layers = append(c.layers, f)
	}
	return c, nil
}

func (c *chain) openTop(files *opener, path string) (err error) {
	c.disk, err = c.openOn(files, path, os.O_RDWR)
	return err
}

// openOn opens a qcow2 file that is to stand on what c holds so far. Its format
// is checked by our own reader before QEMU sees it.
func (c *chain) openOn(files *opener, path string, flags int) (*os.File, error) {
	f := files.open(path, flags|unix.O_NONBLOCK)
	if errors.Is(files.err, os.ErrNotExist) {
		return nil, api.Errorf(api.ErrDamaged, "layer %s of the machine's disk is missing", path)
	}
	if files.err != nil {
		return nil, fmt.Errorf("opening the machine's disk: %w", files.err)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("opening the machine's disk: %w", err)
	}
	if !st.Mode().IsRegular() {
		return nil, api.Errorf(api.ErrDamaged, "layer %s of the machine's disk is not a regular file", path)
	}
	image, err := qcow2.Open(f, st.Size(), nil)
	if err != nil {
		return nil, api.Errorf(api.ErrDamaged, "layer %s of the machine's disk is no usable qcow2 image: %v", path, err)
	}
	if image.Size() < c.size {
		return nil, api.Errorf(api.ErrDamaged, "layer %s of the machine's disk has %d bytes and stands on %d", path, image.Size(), c.size)
	}
	c.size = image.Size()
	return f, nil
}

// wantedSize is how large a new disk on c is to be.
func wantedSize(spec engine.MachineSpec, c chain) (int64, error) {
	st, err := c.base.Stat()
	if err != nil {
		return 0, fmt.Errorf("creating the machine's disk: %w", err)
	}
	want := int64(spec.DiskMiB) << 20
	if want != 0 && want < st.Size() {
		return 0, api.WithHint(api.Errorf(api.ErrInvalid, "%d MiB of disk asked for, and the environment's own image has %d", spec.DiskMiB, st.Size()>>20),
			"raise --disk-mib or leave it out")
	}
	return max(want, c.size), nil
}

// createOverlay makes an empty qcow2 file at path, where nothing may be, on top
// of below. It appears whole. Unless ephemeral, a crash of the host does not
// lose it afterwards.
func (e *Engine) createOverlay(ctx context.Context, path, below, belowFormat string, size int64, ephemeral bool) (err error) {
	if _, err := os.Lstat(path); err == nil {
		return api.Errorf(api.ErrExists, "there is something at %s already", path)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	tmp := path + engine.UnfinishedSuffix
	defer func() {
		if err != nil {
			os.Remove(tmp)
		}
	}()
	// -u: what lies below is not opened. Its size is known, a running machine
	// may hold its lock, and qemu-img would follow the names in its header.
	cmd := exec.CommandContext(ctx, e.imgTool, "create", "-q", "-u", "-f", "qcow2", "-F", belowFormat, "-b", below,
		tmp, strconv.FormatInt(size, 10))
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if hostDiskFull(string(out)) {
		return errHostDiskFull
	}
	if err != nil {
		return fmt.Errorf("running %s: %w: %s", filepath.Base(e.imgTool), err, bytes.TrimSpace(out))
	}
	if err := os.Chmod(tmp, 0o600); err != nil {
		return err
	}
	if !ephemeral {
		err := syncFile(tmp)
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return errHostDiskFull
		}
		if err != nil {
			return err
		}
	}
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE); err != nil {
		return &os.LinkError{Op: "rename", Old: tmp, New: path, Err: err}
	}
	if ephemeral {
		return nil
	}
	return dir.Sync()
}

var errHostDiskFull = api.WithHint(api.Errorf(api.ErrExhausted, "%s", engine.ReasonHostDiskFull),
	"free space there, or remove workspaces and snapshots")

// hostDiskFull reports whether a QEMU tool says so, in strerror's words for
// ENOSPC and EDQUOT.
func hostDiskFull(said string) bool {
	return strings.Contains(said, "No space left on device") || strings.Contains(said, "Disk quota exceeded")
}

func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
