package workspacedisk

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
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
	// DiskBytes is how large Export makes the image of a disk with layers, at
	// least; 0 means as large as the highest. Other disks keep their size.
	DiskBytes int64
	Limits    Limits
}

// A Disk is one open disk. Its methods may be called concurrently.
type Disk struct {
	chain       *chain
	layerChains []*chain // of src.Layers
	layerBytes  int64    // size of the highest of them
	fs          *ext4.FS // of the image itself
	replayed    bool
	tree        tree
	src         Source
	opts        Options
	hideIn      *fileID // directory in which runtimeNames are hidden, nil for none
}

// Open opens a disk for reading and holds QEMU's image locks on its files until
// Close, so no machine starts on it meanwhile; on layers, gVisor's. A disk that
// a machine has open is ErrBusy ("must be stopped"). A journal that needs
// recovery is recovered in memory. What is not ext4, or a layer that is a
// directory, is ErrUnsupported, a damaged image ErrDamaged.
func Open(ctx context.Context, src Source, opts Options) (*Disk, error) {
	opts.Limits = opts.Limits.withDefaults()
	c, err := openChain(src)
	if err != nil {
		return nil, err
	}
	d := &Disk{chain: c, src: src, opts: opts}
	if err := d.open(ctx); err != nil {
		_ = d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Disk) open(ctx context.Context) (err error) {
	if d.fs, err = ext4.Open(ctx, d.chain.top, d.chain.top.Size()); err != nil {
		return wrapOpen(d.src.Path, err)
	}
	d.replayed = d.fs.Replayed()
	if d.tree, err = treeOf(d.fs, d.opts.Limits); err != nil {
		return wrapOpen(d.src.Path, err)
	}
	if err := d.openLayers(ctx); err != nil {
		return err
	}
	if d.opts.HideRuntime {
		return wrapOpen(d.src.Path, d.hideRuntime(ctx))
	}
	return nil
}

// Close releases the files and their locks.
func (d *Disk) Close() error {
	err := d.chain.Close()
	for _, c := range d.layerChains {
		err = errors.Join(err, c.Close())
	}
	return err
}

// Replayed reports whether a journal needed recovery.
func (d *Disk) Replayed() bool { return d.replayed }

func (d *Disk) budget() *ext4.Budget { return &ext4.Budget{DirBytes: d.opts.Limits.MaxDirBytes} }

// hideRuntime finds the directory whose runtime names are hidden from then on.
func (d *Disk) hideRuntime(ctx context.Context) error {
	run, ok, err := d.tree.lookup(ctx, d.tree.root(), d.budget(), runtimeDir)
	if err != nil || !ok {
		return err
	}
	id := run.id()
	d.hideIn = &id
	return nil
}

// hidden reports whether an entry is left out. It goes by the directory's
// inode, so no way around through a symlink shows what is hidden.
func (d *Disk) hidden(dir file, name string) bool {
	return d.hideIn != nil && dir.id() == *d.hideIn && slices.Contains(runtimeNames, name)
}

func (d *Disk) lookup(ctx context.Context, dir file, budget *ext4.Budget, name string) (file, bool, error) {
	if d.hidden(dir, name) {
		return file{}, false, nil
	}
	return d.tree.lookup(ctx, dir, budget, name)
}

func (d *Disk) readDir(ctx context.Context, dir file, budget *ext4.Budget, fn func(name string, f file) error) error {
	return d.tree.readDir(ctx, dir, budget, func(name string) bool { return d.hidden(dir, name) }, fn)
}

const (
	maxPathLen = 4096 // PATH_MAX of the guest
	maxNameLen = 255  // NAME_MAX of the guest
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

// resolve finds the file at a clean path. Symlinks on the way are followed
// inside the disk, the last component only if follow says so. What is not there
// is ErrNotFound.
func (d *Disk) resolve(ctx context.Context, guestPath string, budget *ext4.Budget, follow bool) (file, error) {
	f, ok, err := d.walk(ctx, guestPath, budget, follow)
	if err != nil {
		return file{}, fmt.Errorf("failed to inspect workspace disk path %q: %w", guestPath, err)
	}
	if !ok {
		return file{}, api.Errorf(api.ErrNotFound, "workspace disk path does not exist: %s", guestPath)
	}
	return f, nil
}

// walk is resolve with ok false for what does not exist.
func (d *Disk) walk(ctx context.Context, guestPath string, budget *ext4.Budget, follow bool) (f file, ok bool, err error) {
	stack := []file{d.tree.root()} // from the root to where we are
	rest := components(guestPath)
	for links := 0; len(rest) > 0; {
		here := stack[len(stack)-1]
		name := rest[0]
		rest = rest[1:]
		if !here.IsDir() {
			return file{}, false, nil
		}
		if name == ".." {
			stack = stack[:max(1, len(stack)-1)]
			continue
		}
		next, ok, err := d.lookup(ctx, here, budget, name)
		if err != nil || !ok {
			return file{}, false, err
		}
		if !next.IsSymlink() || len(rest) == 0 && !follow {
			stack = append(stack, next)
			continue
		}
		if links++; links > maxLinks {
			return file{}, false, api.Errorf(api.ErrInvalid, "it leads through more than %d symlinks", maxLinks)
		}
		target, err := next.fs.ReadLink(next.Inode)
		if err != nil {
			return file{}, false, err
		}
		if strings.HasPrefix(target, "/") {
			stack = stack[:1]
		}
		rest = append(components(target), rest...)
		if len(rest) > maxPathLen {
			return file{}, false, api.Errorf(api.ErrInvalid, "its symlinks make it longer than %d components", maxPathLen)
		}
	}
	return stack[len(stack)-1], true, nil
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
