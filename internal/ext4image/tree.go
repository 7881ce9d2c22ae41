package ext4image

import (
	"slices"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// A node is one inode, kept in memory until Close.
type node struct {
	inode        uint32
	mode         uint16
	uid, gid     uint32
	mtime        time.Time
	links        int // of anything but a directory
	size         int64
	extents      []extent // content
	tree         []extent // blocks of the extent tree itself
	target       string   // of a symlink
	major, minor uint32
	xattrs       []xattr
	xattrBlock   uint32
	children     map[string]*node // of a directory
	parent       *node            // of a directory
}

func (n *node) isDir() bool { return n.mode&modeType == ModeDir }

// names returns a directory's entries in the order in which they are written.
func (n *node) names() []string {
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (n *node) describe(e Entry) error {
	n.mode = e.Mode
	n.uid, n.gid = e.UID, e.GID
	n.mtime = e.ModTime
	var err error
	n.xattrs, err = newXattrs(e.Xattrs)
	return err
}

// The kernel's bounds: NAME_MAX, PATH_MAX, and MAXSYMLINKS.
const (
	maxName  = 255
	maxPath  = 4096
	maxLinkN = 40
)

// split turns a path into its elements.
func split(path string) ([]string, error) {
	if len(path) > maxPath {
		return nil, api.Errorf(api.ErrInvalid, "a path has %d bytes, the limit is %d", len(path), maxPath)
	}
	var out []string
	for _, elem := range strings.Split(path, "/") {
		switch {
		case elem == "" || elem == ".":
			continue
		case elem == "..":
			return nil, api.Errorf(api.ErrInvalid, "the path %.200q leaves its directory", path)
		case len(elem) > maxName:
			return nil, api.Errorf(api.ErrInvalid, "the name %.60q... has %d bytes, the limit is %d", elem, len(elem), maxName)
		case strings.IndexByte(elem, 0) >= 0:
			return nil, api.Errorf(api.ErrInvalid, "the path %.200q has a NUL in it", path)
		}
		out = append(out, elem)
	}
	return out, nil
}

// locate returns the directory that path is in and its last element, nil and
// "" for the root. It makes missing parents.
func (w *Writer) locate(path string, mtime time.Time) (*node, string, error) {
	elems, err := split(path)
	if err != nil || len(elems) == 0 {
		return nil, "", err
	}
	dir := w.root
	hops := 0
	for _, elem := range elems[:len(elems)-1] {
		dir, err = w.enter(dir, elem, mtime, &hops)
		if err != nil {
			return nil, "", err
		}
	}
	return dir, elems[len(elems)-1], nil
}

// enter goes from dir to its entry elem, through links, making it a directory
// where nothing is there.
func (w *Writer) enter(dir *node, elem string, mtime time.Time, hops *int) (*node, error) {
	switch elem {
	case "", ".":
		return dir, nil
	case "..": // only in link targets; the root is its own parent
		return dir.parent, nil
	}
	next := dir.children[elem]
	if next == nil {
		if len(elem) > maxName {
			return nil, api.Errorf(api.ErrInvalid, "a link leads through a name of %d bytes", len(elem))
		}
		n, err := w.newNode()
		if err != nil {
			return nil, err
		}
		n.mode, n.mtime = ModeDir|0o755, mtime
		n.children, n.parent = map[string]*node{}, dir
		dir.children[elem] = n
		return n, nil
	}
	switch next.mode & modeType {
	case ModeDir:
		return next, nil
	case ModeSymlink:
		if *hops++; *hops > maxLinkN {
			return nil, api.Errorf(api.ErrInvalid, "the path through %.200q has too many links", elem)
		}
		if strings.HasPrefix(next.target, "/") {
			dir = w.root
		}
		var err error
		for _, e := range strings.Split(next.target, "/") {
			if dir, err = w.enter(dir, e, mtime, hops); err != nil {
				return nil, err
			}
		}
		return dir, nil
	}
	return nil, api.Errorf(api.ErrInvalid, "%.200q is used as a directory and is none", elem)
}

// find returns what path names, nil if nothing. It makes nothing.
func (w *Writer) find(path string) *node {
	elems, err := split(path)
	if err != nil {
		return nil
	}
	n := w.root
	hops := 0
	for i, elem := range elems {
		n = w.step(n, elem, i == len(elems)-1, &hops)
		if n == nil {
			return nil
		}
	}
	return n
}

// step is enter for readers: it follows a link unless the element is the last.
func (w *Writer) step(dir *node, elem string, last bool, hops *int) *node {
	switch elem {
	case "", ".":
		return dir
	case "..":
		return dir.parent
	}
	next := dir.children[elem]
	if next == nil || last || next.isDir() {
		return next
	}
	if *hops++; next.mode&modeType != ModeSymlink || *hops > maxLinkN {
		return nil
	}
	if strings.HasPrefix(next.target, "/") {
		dir = w.root
	}
	for _, e := range strings.Split(next.target, "/") {
		if dir = w.step(dir, e, false, hops); dir == nil || !dir.isDir() {
			return nil
		}
	}
	return dir
}

func (w *Writer) newNode() (*node, error) {
	if err := w.countEntry(); err != nil {
		return nil, err
	}
	if w.nextInode > w.layout.inodes() {
		return nil, api.Errorf(api.ErrExhausted, "the content has more than the %d files that the disk has room for", w.layout.inodes())
	}
	n := &node{inode: w.nextInode}
	w.nextInode++
	return n, nil
}

// countEntry bounds the memory that an input of nothing but links can take.
func (w *Writer) countEntry() error {
	w.entries++
	if limit := 2 * int(w.layout.inodes()); w.entries > limit {
		return api.Errorf(api.ErrExhausted, "the content has more than %d entries", limit)
	}
	return nil
}

// remove takes an entry out of dir, with all below it.
func (w *Writer) remove(dir *node, name string) error {
	n := dir.children[name]
	if n == w.lostFound {
		return api.Errorf(api.ErrInvalid, "lost+found cannot be replaced")
	}
	delete(dir.children, name)
	if n.isDir() {
		for _, child := range n.names() {
			if err := w.remove(n, child); err != nil {
				return err
			}
		}
		return nil
	}
	if n.links--; n.links == 0 {
		w.free(n.extents)
	}
	return nil
}

// walk calls f once for every inode, parents first, in a fixed order.
func (w *Writer) walk(f func(*node)) {
	seen := map[uint32]bool{}
	var visit func(n *node)
	visit = func(n *node) {
		if seen[n.inode] {
			return
		}
		seen[n.inode] = true
		f(n)
		for _, name := range n.names() {
			visit(n.children[name])
		}
	}
	visit(w.root)
}
