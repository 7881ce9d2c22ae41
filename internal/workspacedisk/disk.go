package workspacedisk

import (
	"context"
	"fmt"
	"path"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// runtimeDir and runtimeNames are where a guest keeps what lives as long as
// its boot: /run/pyro-secrets and so on. They normally lie on a tmpfs.
const runtimeDir = "run"

var runtimeNames = []string{"pyro-secrets", "pyro-services", "pyro-shells"} // sorted

// Limits bounds what one call may take. Zero fields mean the default.
type Limits struct {
	MaxEntries     int   // of one listing; default 1,000,000
	MaxPathBytes   int64 // of all paths and targets of a listing; default 128 MiB
	MaxDirBytes    int64 // of the directories scanned in one call; default 1 GiB
	MaxExportBytes int64 // of data that an export writes, holes not counted; default 64 GiB
}

func (l Limits) withDefaults() Limits {
	if l.MaxEntries == 0 {
		l.MaxEntries = 1_000_000
	}
	if l.MaxPathBytes == 0 {
		l.MaxPathBytes = 128 << 20
	}
	if l.MaxDirBytes == 0 {
		l.MaxDirBytes = 1 << 30
	}
	if l.MaxExportBytes == 0 {
		l.MaxExportBytes = 64 << 30
	}
	return l
}

// Options says how to look at a disk.
type Options struct {
	// HideRuntime leaves the runtime paths out of listings and reads, as if
	// they had been scrubbed. Use it for workspaces.
	HideRuntime bool
	Limits      Limits
}

// A Disk is one open disk. Its methods may be called concurrently.
type Disk struct {
	chain  *chain
	fs     *ext4.FS
	src    Source
	opts   Options
	hideIn uint32 // inode of the directory in which runtimeNames are hidden, 0 for none
}

// Open opens a disk for reading and holds QEMU's image locks on its files until
// Close, so no machine starts on it meanwhile. A disk that a machine has open
// is ErrBusy ("must be stopped"). A journal that needs recovery is recovered
// in memory. What is not ext4 is ErrUnsupported, a damaged image ErrDamaged.
func Open(ctx context.Context, src Source, opts Options) (*Disk, error) {
	opts.Limits = opts.Limits.withDefaults()
	c, err := openChain(src)
	if err != nil {
		return nil, err
	}
	d := &Disk{chain: c, src: src, opts: opts}
	if d.fs, err = ext4.Open(ctx, c.top, c.top.Size()); err != nil {
		_ = c.Close()
		return nil, fmt.Errorf("opening disk image %s: %w", src.Path, err)
	}
	if opts.HideRuntime {
		if err := d.findRuntimeDir(ctx); err != nil {
			_ = c.Close()
			return nil, fmt.Errorf("opening disk image %s: %w", src.Path, err)
		}
	}
	return d, nil
}

// Close releases the files and their locks.
func (d *Disk) Close() error { return d.chain.Close() }

// Replayed reports whether the journal needed recovery.
func (d *Disk) Replayed() bool { return d.fs.Replayed() }

func (d *Disk) budget() *ext4.Budget { return &ext4.Budget{DirBytes: d.opts.Limits.MaxDirBytes} }

func (d *Disk) findRuntimeDir(ctx context.Context) error {
	root, err := d.fs.Inode(ext4.RootInode)
	if err != nil {
		return err
	}
	n, ok, err := d.lookup(ctx, root, d.budget(), runtimeDir)
	if err != nil || !ok {
		return err
	}
	d.hideIn = n
	return nil
}

// hidden reports whether an entry is left out. It goes by the directory's
// inode, so no way around through a symlink shows what is hidden.
func (d *Disk) hidden(dir *ext4.Inode, name string) bool {
	if d.hideIn == 0 || dir.Number != d.hideIn {
		return false
	}
	for _, n := range runtimeNames {
		if n == name {
			return true
		}
	}
	return false
}

func (d *Disk) lookup(ctx context.Context, dir *ext4.Inode, budget *ext4.Budget, name string) (uint32, bool, error) {
	if d.hidden(dir, name) {
		return 0, false, nil
	}
	return d.fs.Lookup(ctx, dir, budget, name)
}

const (
	maxPathLen = 4096 // PATH_MAX of the guest
	maxLinks   = 40   // MAXSYMLINKS of the guest
)

// cleanPath checks a guest path and returns it absolute and without dots.
func cleanPath(p string) (string, error) {
	switch {
	case !strings.HasPrefix(p, "/"):
		return "", api.Errorf(api.ErrInvalid, "workspace disk path must be absolute: %q", p)
	case len(p) > maxPathLen:
		return "", api.Errorf(api.ErrInvalid, "workspace disk path is longer than %d bytes", maxPathLen)
	case strings.IndexByte(p, 0) >= 0:
		return "", api.Errorf(api.ErrInvalid, "workspace disk path has a NUL byte: %q", p)
	}
	return path.Clean(p), nil
}

// resolve finds the inode at a clean path. Symlinks on the way are followed
// inside the disk, the last component is not. What is not there is ErrNotFound.
func (d *Disk) resolve(ctx context.Context, guestPath string, budget *ext4.Budget) (*ext4.Inode, error) {
	ino, err := d.walk(ctx, guestPath, budget)
	if err != nil {
		return nil, fmt.Errorf("failed to inspect workspace disk path %q: %w", guestPath, err)
	}
	if ino == nil {
		return nil, api.Errorf(api.ErrNotFound, "workspace disk path does not exist: %s", guestPath)
	}
	return ino, nil
}

// walk is resolve with a nil inode for what does not exist.
func (d *Disk) walk(ctx context.Context, guestPath string, budget *ext4.Budget) (*ext4.Inode, error) {
	root, err := d.fs.Inode(ext4.RootInode)
	if err != nil {
		return nil, err
	}
	stack := []*ext4.Inode{root} // from the root to where we are
	rest := components(guestPath)
	for links := 0; len(rest) > 0; {
		here := stack[len(stack)-1]
		name := rest[0]
		rest = rest[1:]
		if !here.IsDir() {
			return nil, nil
		}
		if name == ".." {
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		n, ok, err := d.lookup(ctx, here, budget, name)
		if err != nil || !ok {
			return nil, err
		}
		ino, err := d.fs.Inode(n)
		if err != nil {
			return nil, err
		}
		if !ino.IsSymlink() || len(rest) == 0 {
			stack = append(stack, ino)
			continue
		}
		if links++; links > maxLinks {
			return nil, api.Errorf(api.ErrInvalid, "it leads through more than %d symlinks", maxLinks)
		}
		target, err := d.fs.ReadLink(ino)
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(target, "/") {
			stack = stack[:1]
		}
		rest = append(components(target), rest...)
		if len(rest) > maxPathLen {
			return nil, api.Errorf(api.ErrInvalid, "its symlinks make it longer than %d components", maxPathLen)
		}
	}
	return stack[len(stack)-1], nil
}

// components splits a path and drops empty components and single dots.
func components(p string) []string {
	var out []string
	for name := range strings.SplitSeq(p, "/") {
		if name != "" && name != "." {
			out = append(out, name)
		}
	}
	return out
}
