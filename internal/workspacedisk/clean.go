package workspacedisk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// cleanImage recovers the journal of the raw image f and scrubs its runtime
// paths, and returns those that existed. f is a private copy: after an error
// it is in no particular state. Each step is proven by reading the image
// again, never by a tool's exit code alone.
func cleanImage(ctx context.Context, f *os.File, limits Limits) (removed []string, err error) {
	img, err := openCopy(ctx, f, limits)
	if err != nil {
		return nil, err
	}
	recover := img.fs.Replayed()
	tree, err := img.runtimeTree(ctx)
	if err != nil {
		return nil, err
	}
	if !recover && len(tree.paths) == 0 {
		return nil, nil
	}
	if err := needTools(); err != nil {
		return nil, err
	}
	if recover {
		if img, err = recoverJournal(ctx, f, limits); err != nil {
			return nil, err
		}
		if tree, err = img.runtimeTree(ctx); err != nil {
			return nil, err
		}
	}
	if len(tree.paths) == 0 {
		return nil, nil
	}
	if err := scrubImage(ctx, f, limits); err != nil {
		return nil, fmt.Errorf("scrubbing runtime paths: %w", err)
	}
	return tree.paths, nil
}

// openCopy opens a raw image that nobody else has.
func openCopy(ctx context.Context, f *os.File, limits Limits) (*Disk, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	raw := &rawLayer{file: f, size: info.Size()}
	d := &Disk{chain: &chain{top: raw}, opts: Options{Limits: limits}}
	if d.fs, err = ext4.Open(ctx, raw, raw.size); err != nil {
		return nil, fmt.Errorf("reading the copy: %w", err)
	}
	d.replayed = d.fs.Replayed()
	if d.tree, err = treeOf(d.fs, limits); err != nil {
		return nil, fmt.Errorf("reading the copy: %w", err)
	}
	return d, nil
}

// recoverJournal lets e2fsck write the journal's blocks home.
func recoverJournal(ctx context.Context, f *os.File, limits Limits) (*Disk, error) {
	replay := e2fsTool{name: progE2fsck, args: []string{"-p", "-E", "journal_only"}, ok: e2fsckFixed}
	if _, err := replay.run(ctx, f); err != nil {
		return nil, fmt.Errorf("recovering the journal: %w", err)
	}
	img, err := openCopy(ctx, f, limits)
	if err == nil && img.fs.Replayed() {
		err = api.Errorf(api.ErrDamaged, "recovering the journal: it still needs recovery after e2fsck")
	}
	return img, err
}

// scrubImage takes the runtime paths off a recovered image, with their inodes,
// data blocks and traces in the journal.
//
// debugfs removes the directory entries by their fixed paths, so nothing that
// the image says reaches it; the inodes and their blocks are zeroed by number
// (debugfs clri leaves the part of an inode past 128 bytes, where inline data
// lies). What that leaves inconsistent (counts and bitmaps) e2fsck mends, and
// since the image was consistent before, mending touches nothing else. Its
// discard option then punches all free blocks out of the file; e2fsck 1.47.0
// ignores it in a run that mends bitmaps, so it takes a second one.
func scrubImage(ctx context.Context, f *os.File, limits Limits) error {
	check := e2fsTool{name: progE2fsck, args: []string{"-fp"}, ok: e2fsckFixed}
	if _, err := check.run(ctx, f); err != nil {
		return api.WithHint(err, "repair a copy of the raw image with e2fsck -fy and use that")
	}
	img, err := openCopy(ctx, f, limits)
	if err != nil {
		return err
	}
	tree, err := img.runtimeTree(ctx)
	if err != nil {
		return err
	}
	var script strings.Builder
	for _, p := range tree.paths {
		fmt.Fprintf(&script, "unlink %s\n", p)
	}
	remove := e2fsTool{name: progDebugfs, args: []string{"-w"}, script: script.String()}
	if _, err := remove.run(ctx, f); err != nil {
		return err
	}
	if err := img.wipe(ctx, f, tree.inodes); err != nil {
		return err
	}
	for _, step := range []e2fsTool{
		{name: progE2fsck, args: []string{"-fy"}, ok: e2fsckFixed},
		{name: progE2fsck, args: []string{"-fy", "-E", "discard"}, ok: e2fsckFixed},
		{name: progE2fsck, args: []string{"-fn"}},
	} {
		if _, err := step.run(ctx, f); err != nil {
			return err
		}
	}
	return provenClean(ctx, f, limits, tree)
}

// provenClean reads the scrubbed image again.
func provenClean(ctx context.Context, f *os.File, limits Limits, before runtimeTree) error {
	img, err := openCopy(ctx, f, limits)
	if err != nil {
		return err
	}
	after, err := img.runtimeTree(ctx)
	if err != nil {
		return err
	}
	if len(after.paths) > 0 {
		return api.Errorf(api.ErrInternal, "%s is still there after debugfs removed it", after.paths[0])
	}
	for _, n := range before.inodes {
		if _, err := img.fs.Inode(n); !errors.Is(err, api.ErrDamaged) {
			return api.Errorf(api.ErrInternal, "inode %d is still in use after debugfs cleared it", n)
		}
	}
	return nil
}

// runtimeTree is what lies at the runtime paths of a disk.
type runtimeTree struct {
	paths  []string // that exist, sorted
	inodes []uint32 // of which no link exists elsewhere, sorted
}

// runtimeTree finds the runtime paths. A guest can link a file of them to
// another place; that inode is not cleared, only its names here go.
func (d *Disk) runtimeTree(ctx context.Context) (runtimeTree, error) {
	var tree runtimeTree
	budget := d.budget()
	root, err := d.fs.Inode(ext4.RootInode)
	if err != nil {
		return tree, err
	}
	n, ok, err := d.fs.Lookup(ctx, root, budget, runtimeDir)
	if err != nil || !ok {
		return tree, err
	}
	run, err := d.fs.Inode(n)
	// A link in the place of /run leads to another directory, whose content
	// is not special.
	if err != nil || !run.IsDir() {
		return tree, err
	}
	links := map[uint32]int{}
	var pending []*ext4.Inode
	visit := func(e ext4.Dirent) error {
		ino, err := d.fs.Inode(e.Inode)
		if err != nil {
			return err
		}
		links[ino.Number]++
		switch {
		case ino.IsDir() && links[ino.Number] > 1:
			return api.Errorf(api.ErrDamaged, "directory inode %d appears twice in the tree", ino.Number)
		case ino.IsDir():
			pending = append(pending, ino)
		case links[ino.Number] == int(ino.Links):
			tree.inodes = append(tree.inodes, ino.Number)
		}
		if len(links) > d.opts.Limits.MaxEntries {
			return api.Errorf(api.ErrExhausted, "the runtime paths hold more than %d files", d.opts.Limits.MaxEntries)
		}
		return nil
	}
	err = d.fs.ReadDir(ctx, run, budget, func(e ext4.Dirent) error {
		if !slices.Contains(runtimeNames, e.Name) {
			return nil
		}
		tree.paths = append(tree.paths, "/"+runtimeDir+"/"+e.Name)
		return visit(e)
	})
	for err == nil && len(pending) > 0 {
		dir := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		tree.inodes = append(tree.inodes, dir.Number)
		err = d.fs.ReadDir(ctx, dir, budget, visit)
	}
	slices.Sort(tree.paths)
	slices.Sort(tree.inodes)
	return tree, err
}

// wipe zeros the content and the records of inodes, and the journal's log,
// where copies of them may lie. The image is recovered, so nothing in the log
// is needed, and checked, so the places belong to nobody else.
func (d *Disk) wipe(ctx context.Context, f *os.File, inodes []uint32) error {
	zero := func(off, length int64) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return zeroRange(f, off, length)
	}
	for _, n := range inodes {
		ino, err := d.fs.Inode(n)
		if err != nil {
			return err
		}
		if err := d.fs.DataPlaces(ino, 0, zero); err != nil {
			return fmt.Errorf("wiping the content of inode %d: %w", n, err)
		}
	}
	for _, n := range inodes {
		off, length, err := d.fs.InodePlace(n)
		if err == nil {
			err = zero(off, length)
		}
		if err != nil {
			return fmt.Errorf("wiping inode %d: %w", n, err)
		}
	}
	journal, err := d.fs.JournalInode()
	if err == nil && journal != nil {
		err = d.fs.DataPlaces(journal, d.fs.BlockSize(), zero) // all but its superblock
	}
	if err != nil {
		return fmt.Errorf("wiping the journal: %w", err)
	}
	return nil
}

// zeroRange makes a stretch of f read as zeros, as a hole where that works.
func zeroRange(f *os.File, off, length int64) error {
	if err := punchHole(f, off, length); err == nil {
		return nil
	}
	for length > 0 {
		n := min(length, sparseUnit)
		if _, err := f.WriteAt(zeroUnit[:n], off); err != nil {
			return diskFull(err)
		}
		off, length = off+n, length-n
	}
	return nil
}

// diskFull gives a write error of a full disk its class.
func diskFull(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return api.WithHint(api.Errorf(api.ErrExhausted, "%w", err), "free space on the disk that holds the output")
	}
	return err
}
