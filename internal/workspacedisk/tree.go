package workspacedisk

import (
	"context"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// A tree is what a disk shows: one filesystem, or several that are joined as
// the kernel's overlayfs joins them (Documentation/filesystems/overlayfs.rst),
// with redirects followed. Where they disagree with what a kernel writes, the
// tree is refused rather than guessed.
type tree struct {
	// layers are the filesystems, the lowest first: the image, then those of
	// its layers that a machine has been started on.
	layers   []treeLayer
	maxNames int // of a directory of several layers, which are kept in memory
}

// treeOf returns what a single image shows.
func treeOf(fs *ext4.FS, limits Limits) (tree, error) {
	root, err := fs.Inode(ext4.RootInode)
	return tree{layers: []treeLayer{{fs, root}}, maxNames: limits.MaxEntries}, err
}

// A treeLayer is one filesystem of a tree and its directory that is the root.
type treeLayer struct {
	fs   *ext4.FS
	root *ext4.Inode
}

// A part is a directory of one layer: all of a directory of the tree, or what
// one layer adds to it.
type part struct {
	layer int
	dir   *ext4.Inode
}

func (p part) id() fileID { return fileID{p.layer, p.dir.Number} }

// A file is anything in a tree, directories included.
type file struct {
	*ext4.Inode
	fs    *ext4.FS
	layer int
	// below are the directories of lower layers whose entries show through
	// this one, the highest first.
	below []part
}

// A fileID tells the files of a tree apart: two names with equal ones are hard
// links.
type fileID struct {
	layer int
	inode uint32
}

func (f file) id() fileID { return fileID{f.layer, f.Number} }

// parts are all directories whose entries make up the directory f, the highest
// first.
func (f file) parts() []part {
	return append([]part{{f.layer, f.Inode}}, f.below...)
}

// single reports whether the tree is one image, in which overlayfs's marks mean
// nothing.
func (t *tree) single() bool { return len(t.layers) == 1 }

// roots are the parts of the root: all of them, whatever marks they have.
func (t *tree) roots() []part {
	out := make([]part, 0, len(t.layers))
	for i := len(t.layers) - 1; i >= 0; i-- {
		out = append(out, part{i, t.layers[i].root})
	}
	return out
}

func (t *tree) root() file { return t.file(t.roots()) }

// file makes a file of what was found of it in each layer.
func (t *tree) file(found []part) file {
	top := found[0]
	return file{Inode: top.dir, fs: t.layers[top.layer].fs, layer: top.layer, below: found[1:]}
}

// lookup finds the entry name of dir.
func (t *tree) lookup(ctx context.Context, dir file, budget *ext4.Budget, name string) (f file, ok bool, err error) {
	parts := dir.parts()
	s := search{t: t, budget: budget}
	return s.find(ctx, parts, name, func(i int, name string) (uint32, bool, error) {
		return t.layers[parts[i].layer].fs.Lookup(ctx, parts[i].dir, budget, name)
	})
}

// A search looks for one entry in the layers, from above, as the kernel does
// (fs/overlayfs/namei.c, ovl_lookup and what it calls).
type search struct {
	t      *tree
	budget *ext4.Budget
	// name is what the next layer is asked for: a name in the part at hand, or
	// from a redirect on an absolute path of the layer.
	name  string
	isDir bool // a directory was found: what is none hides behind it
	stop  bool // no lower layer shows
}

// find returns the entry name of a directory with these parts. entry finds a
// name in parts[i].
func (s *search) find(ctx context.Context, parts []part, name string, entry func(i int, name string) (uint32, bool, error)) (f file, ok bool, err error) {
	s.name = name
	var found []part
	redirected := false // to the root, whose parts we are in
	for i := 0; i < len(parts) && !s.stop; i++ {
		var ino *ext4.Inode
		if redirected {
			ino, err = s.follow(ctx, parts[i])
		} else {
			ino, err = s.step(parts[i].layer, s.name, 0, "", func(name string) (uint32, bool, error) { return entry(i, name) })
		}
		if err != nil {
			return file{}, false, err
		}
		if ino == nil {
			continue
		}
		at := parts[i].layer
		found = append(found, part{at, ino})
		if !redirected && strings.HasPrefix(s.name, "/") {
			redirected, parts = true, s.t.roots()
			i = len(parts) - 1 - at // the layers below this one are next
		}
	}
	if found == nil {
		return file{}, false, nil
	}
	return s.t.file(found), true, nil
}

// follow looks for s.name, which is absolute, from the root of a layer. Each
// directory on the way may redirect what the layers below are asked for.
func (s *search) follow(ctx context.Context, root part) (*ext4.Inode, error) {
	at := root.dir
	// From the end of the name, because its beginning may change.
	for rest := len(s.name) - 1; ; {
		done := len(s.name) - rest
		name, _, more := strings.Cut(s.name[done:], "/")
		behind := s.name[done+len(name):]
		next, err := s.step(root.layer, name, done, behind, func(name string) (uint32, bool, error) {
			return s.t.layers[root.layer].fs.Lookup(ctx, at, s.budget, name)
		})
		if !more || next == nil || err != nil {
			return next, err
		}
		at, rest = next, rest-len(name)-1
	}
}

// maxRedirect bounds, in bytes, what redirects on the way may make of a name.
// Those that the kernel writes have 256 at most (redirect_max).
const maxRedirect = 4 * maxPathLen

// step looks for one name with entry. s.name is the name and before it done
// bytes, behind it behind. The answer is nil where this layer has nothing to
// show.
func (s *search) step(layer int, name string, done int, behind string, entry func(string) (uint32, bool, error)) (*ext4.Inode, error) {
	number, ok, err := entry(name)
	if !ok || err != nil {
		return nil, err
	}
	fs := s.t.layers[layer].fs
	ino, err := fs.Inode(number)
	if err != nil {
		return nil, err
	}
	if s.t.single() {
		s.stop = true
		return ino, nil
	}
	if isWhiteoutDevice(ino) {
		s.stop = true
		return nil, nil
	}
	if !ino.IsDir() && !ino.IsRegular() {
		return s.leaf(ino, behind), nil
	}
	attrs, err := fs.Xattrs(ino)
	if err != nil {
		return nil, err
	}
	if ino.IsRegular() {
		if isWhiteoutFile(ino, attrs) {
			s.stop = true
			return nil, nil
		}
		return s.leaf(ino, behind), checkWhole(ino, attrs)
	}
	if behind == "" {
		s.isDir = true
	}
	if layer == 0 { // the kernel asks the lowest for no marks
		return ino, nil
	}
	marks, err := decodeMarks(attrs)
	switch {
	case err != nil:
		return nil, err
	case marks.Opaque:
		s.stop = true
	case marks.Absolute:
		// Also out of an opaque directory: what it names lies elsewhere.
		s.stop = false
		s.name = marks.Redirect + behind
	case marks.Redirect != "":
		s.name = s.name[:done] + marks.Redirect + behind
	}
	if len(s.name) > maxRedirect {
		return nil, api.Errorf(api.ErrDamaged, "overlay redirects lead to a path of more than %d bytes", maxRedirect)
	}
	return ino, nil
}

// leaf is what shows of something that is no directory: nothing, where one is
// looked for.
func (s *search) leaf(ino *ext4.Inode, behind string) *ext4.Inode {
	s.stop = true
	if s.isDir || behind != "" {
		return nil
	}
	return ino
}
