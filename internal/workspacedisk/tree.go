package workspacedisk

import (
	"context"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// A tree is what a disk shows: one filesystem, or two that are joined as the
// kernel's overlayfs joins them (Documentation/filesystems/overlayfs.rst), with
// redirects followed. Where the two disagree with what a kernel writes, the
// tree is refused rather than guessed.
type tree struct {
	lower *ext4.FS // the only one of a single image
	upper *ext4.FS // nil for a single image
	// upperRoot is the directory of upper that lies over the root of lower;
	// nil as long as no machine has been started.
	upperRoot *ext4.Inode
	maxNames  int // of a directory of two filesystems, which are kept in memory
}

// A file is anything in a tree, directories included.
type file struct {
	*ext4.Inode
	fs      *ext4.FS
	inUpper bool
	// below is the directory of the lower filesystem whose entries show
	// through a directory of the upper one; nil for none.
	below *ext4.Inode
}

// A fileID tells the files of a tree apart: two names with equal ones are hard
// links.
type fileID struct {
	inUpper bool
	inode   uint32
}

func (f file) id() fileID { return fileID{f.inUpper, f.Number} }

// A placed file is one that a lookup has found, with its name.
type placed struct {
	name string
	file file
}

func (t *tree) root() (file, error) {
	lower, err := t.lower.Inode(ext4.RootInode)
	if err != nil {
		return file{}, err
	}
	if t.upperRoot == nil {
		return file{Inode: lower, fs: t.lower}, nil
	}
	// Both roots always show, whatever marks they have.
	return file{Inode: t.upperRoot, fs: t.upper, inUpper: true, below: lower}, nil
}

// lookup finds the entry name of dir.
func (t *tree) lookup(ctx context.Context, dir file, budget *ext4.Budget, name string) (f file, ok bool, err error) {
	lower := dir.Inode
	if dir.inUpper {
		ino, found, err := find(ctx, t.upper, dir.Inode, budget, name)
		if err != nil {
			return file{}, false, err
		}
		if found {
			in := func(name string) (*ext4.Inode, error) { return t.lowerEntry(ctx, dir.below, budget, name) }
			return t.upperFile(ctx, ino, name, budget, in)
		}
		lower = dir.below
	}
	ino, err := t.lowerEntry(ctx, lower, budget, name)
	if ino == nil || err != nil {
		return file{}, false, err
	}
	return file{Inode: ino, fs: t.lower}, true, nil
}

// readDir calls fn for every entry of dir but those that skip reports, until fn
// returns an error, which it returns.
func (t *tree) readDir(ctx context.Context, dir file, budget *ext4.Budget, skip func(name string) bool, fn func(name string, f file) error) error {
	if !dir.inUpper {
		return t.lower.ReadDir(ctx, dir.Inode, budget, func(e ext4.Dirent) error {
			if skip(e.Name) {
				return nil
			}
			ino, err := t.lowerInode(e.Inode)
			if ino == nil || err != nil {
				return err
			}
			return fn(e.Name, file{Inode: ino, fs: t.lower})
		})
	}
	entries, err := t.merge(ctx, dir, budget, skip)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := fn(e.name, e.file); err != nil {
			return err
		}
	}
	return nil
}

// merge returns the entries of a directory of the upper filesystem. A lookup
// of each in the directory below would read that again and again, so its names
// are gathered first.
func (t *tree) merge(ctx context.Context, dir file, budget *ext4.Budget, skip func(name string) bool) ([]placed, error) {
	names := map[string]uint32{} // of the directory below
	var order []string
	if dir.below != nil {
		err := t.lower.ReadDir(ctx, dir.below, budget, func(e ext4.Dirent) error {
			if _, twice := names[e.Name]; twice {
				return api.Errorf(api.ErrDamaged, "a directory has two entries of the name %q", e.Name)
			}
			names[e.Name] = e.Inode
			order = append(order, e.Name)
			return t.checkNames(len(names))
		})
		if err != nil {
			return nil, err
		}
	}
	in := func(name string) (*ext4.Inode, error) {
		n, ok := names[name]
		if !ok {
			return nil, nil
		}
		return t.lowerInode(n)
	}
	covered := map[string]bool{}
	var out []placed
	err := t.upper.ReadDir(ctx, dir.Inode, budget, func(e ext4.Dirent) error {
		if covered[e.Name] {
			return api.Errorf(api.ErrDamaged, "a directory has two entries of the name %q", e.Name)
		}
		covered[e.Name] = true
		if err := t.checkNames(len(covered)); err != nil || skip(e.Name) {
			return err
		}
		ino, err := t.upper.Inode(e.Inode)
		if err != nil {
			return err
		}
		f, ok, err := t.upperFile(ctx, ino, e.Name, budget, in)
		if ok {
			out = append(out, placed{e.Name, f})
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, name := range order {
		if covered[name] || skip(name) {
			continue
		}
		ino, err := t.lowerInode(names[name])
		if err != nil {
			return nil, err
		}
		if ino != nil {
			out = append(out, placed{name, file{Inode: ino, fs: t.lower}})
		}
	}
	return out, nil
}

func (t *tree) checkNames(n int) error {
	if n > t.maxNames {
		return api.Errorf(api.ErrExhausted, "a directory has more than %d entries", t.maxNames)
	}
	return nil
}

// upperFile makes a file of the upper filesystem's inode called name; ok is
// false for a whiteout. in finds a name in the directory below its parent.
func (t *tree) upperFile(ctx context.Context, ino *ext4.Inode, name string, budget *ext4.Budget, in func(string) (*ext4.Inode, error)) (f file, ok bool, err error) {
	f = file{Inode: ino, fs: t.upper, inUpper: true}
	if isWhiteoutDevice(ino) {
		return file{}, false, nil
	}
	if !ino.IsDir() && !ino.IsRegular() {
		return f, true, nil
	}
	attrs, err := t.upper.Xattrs(ino)
	if err != nil {
		return file{}, false, err
	}
	if ino.IsRegular() {
		if isWhiteoutFile(ino, attrs) {
			return file{}, false, nil
		}
		return f, true, checkWhole(ino, attrs)
	}
	marks, err := decodeMarks(attrs)
	if err != nil {
		return file{}, false, err
	}
	switch {
	case marks.opaque:
	case marks.absolute:
		f.below, err = t.lowerDir(ctx, marks.redirect, budget)
	case marks.redirect != nil:
		f.below, err = in(marks.redirect[0])
	default:
		f.below, err = in(name)
	}
	if f.below != nil && !f.below.IsDir() {
		f.below = nil
	}
	return f, true, err
}

// lowerDir follows an absolute redirect: directories only, no links.
func (t *tree) lowerDir(ctx context.Context, names []string, budget *ext4.Budget) (*ext4.Inode, error) {
	at, err := t.lower.Inode(ext4.RootInode)
	for _, name := range names {
		if err != nil || at == nil || !at.IsDir() {
			return nil, err
		}
		at, err = t.lowerEntry(ctx, at, budget, name)
	}
	return at, err
}

// lowerEntry finds a name in a directory of the lower filesystem; it is nil
// where nothing is there, as in no directory.
func (t *tree) lowerEntry(ctx context.Context, dir *ext4.Inode, budget *ext4.Budget, name string) (*ext4.Inode, error) {
	if dir == nil {
		return nil, nil
	}
	n, ok, err := t.lower.Lookup(ctx, dir, budget, name)
	if err != nil || !ok {
		return nil, err
	}
	return t.lowerInode(n)
}

// lowerInode reads an inode of the lower filesystem. It is nil for a whiteout,
// which hides itself also where nothing lies below; a single image has none.
func (t *tree) lowerInode(n uint32) (*ext4.Inode, error) {
	ino, err := t.lower.Inode(n)
	if err != nil || t.upper == nil {
		return ino, err
	}
	if isWhiteoutDevice(ino) {
		return nil, nil
	}
	if ino.IsRegular() {
		attrs, err := t.lower.Xattrs(ino)
		if err != nil || isWhiteoutFile(ino, attrs) {
			return nil, err
		}
		return ino, checkWhole(ino, attrs)
	}
	return ino, nil
}

func find(ctx context.Context, fs *ext4.FS, dir *ext4.Inode, budget *ext4.Budget, name string) (*ext4.Inode, bool, error) {
	n, ok, err := fs.Lookup(ctx, dir, budget, name)
	if err != nil || !ok {
		return nil, false, err
	}
	ino, err := fs.Inode(n)
	return ino, err == nil, err
}
