// Package ext4image writes an ext4 file system into a file, entry by entry as
// they arrive, for example from a tar stream. It needs no privilege, no mount
// and no unpacked copy, and no name from the stream ever becomes a name on the
// host: the content may come from anybody.
//
// The result is an ordinary read-write file system with a journal, sparse on
// the host, that can be enlarged while mounted. Equal input gives equal bytes.
// e2fsck is the judge of it in the tests.
//
// Why not a library: hcsshim's tar2ext4 makes a compact, read-only file system
// without journal or room, which resize2fs and tune2fs would have to rebuild;
// mke2fs learned to read tar archives only in 1.47.1, from a directory it is
// neither reproducible nor safe from the names in it.
//
// The format is that of the kernel's Documentation/filesystems/ext4; "ext4"
// followed by a chapter's name in a comment means a page there.
package ext4image

import (
	"io"
	"math"
	"os"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// Options says what file system to make.
type Options struct {
	// SizeBytes is rounded up to a whole block group of 128 MiB. The bounds
	// are one block group and 2 TiB.
	SizeBytes int64
	// UUID names the file system; the seed of its directory hash is derived
	// from it.
	UUID [16]byte
	// Label has at most 16 bytes.
	Label string
	// Time is when the file system was made.
	Time time.Time
	// ClampAfter, if set, makes every later modification time the latest one
	// before it: what the build itself has written gets the time of the newest
	// thing that it was built from, whenever it ran. It then replaces Time too.
	ClampAfter time.Time
}

const (
	maxSize = 2 << 40
	// maxLinks is the kernel's EXT4_LINK_MAX.
	maxLinks = 65000
)

// A Writer writes one file system. It is not for concurrent use. After an
// error the file's content is worthless.
type Writer struct {
	f      *os.File
	opts   Options
	layout layout
	blocks *bitmap // what is in use

	nextBlock uint32
	wrapped   bool // blocks are being used again: stale data lies in them
	nextInode uint32
	entries   int

	root, lostFound *node
	journal         extent
	resizeBlock     uint32 // the resize inode's double-indirect block
	buf             []byte
}

// New empties f and prepares to write a file system into it. The caller closes
// f, after Close. A block device is not emptied: it must hold zeros, and SizeBytes
// of them, rounded up to whole block groups of 128 MiB.
func New(f *os.File, opts Options) (*Writer, error) {
	if opts.SizeBytes <= 0 || opts.SizeBytes > maxSize {
		return nil, api.Errorf(api.ErrInvalid, "a file system of %d bytes is not possible, the limit is %d", opts.SizeBytes, int64(maxSize))
	}
	if len(opts.Label) > 16 {
		return nil, api.Errorf(api.ErrInvalid, "the label %q is longer than 16 bytes", opts.Label)
	}
	w := &Writer{
		f:         f,
		opts:      opts,
		layout:    newLayout(opts.SizeBytes),
		nextInode: firstFreeInode,
		buf:       make([]byte, 1<<20),
	}
	if err := clearFile(f, int64(w.layout.blocks())*blockSize); err != nil {
		return nil, err
	}
	w.blocks = newBitmap(w.layout.blocks())
	w.layout.reserve(w.blocks)

	run, err := w.allocate(journalBlocks)
	if err != nil {
		return nil, err
	}
	if len(run) != 1 {
		return nil, api.Errorf(api.ErrInternal, "no contiguous room for the journal")
	}
	w.journal = run[0]
	run, err = w.allocate(1)
	if err != nil {
		return nil, err
	}
	w.resizeBlock = run[0].start

	made := opts.Time
	if !opts.ClampAfter.IsZero() {
		made = opts.ClampAfter.Add(1) // not from the input, so to be clamped
	}
	w.root = &node{inode: rootInode, mode: modeDir | 0o755, mtime: made, children: map[string]*node{}}
	w.root.parent = w.root
	w.lostFound = &node{inode: lostFoundInode, mode: modeDir | 0o700, mtime: made, children: map[string]*node{}, parent: w.root}
	w.root.children["lost+found"] = w.lostFound
	return w, nil
}

// clearFile makes f a file of so many zeros.
func clearFile(f *os.File, size int64) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Mode()&os.ModeDevice != 0 {
		end, err := f.Seek(0, io.SeekEnd)
		if err == nil && end < size {
			err = api.Errorf(api.ErrInvalid, "%s has %d bytes, a file system of %d was asked for", f.Name(), end, size)
		}
		return err
	}
	// Emptied only if there is something in it: a file that has been emptied is
	// flushed when it is closed (ext4, auto_da_alloc).
	if st.Size() > 0 {
		if err := f.Truncate(0); err != nil {
			return err
		}
	}
	return f.Truncate(size)
}

// An Entry is one thing to put into the file system.
type Entry struct {
	// Path is slash-separated; a leading slash means nothing. Its parents are
	// made where missing, as old as the entry. Links in the parents are
	// followed, inside the file system. ".." is refused.
	Path string
	// Mode is a file type and permissions as in stat(2): ModeDir | 0755.
	Mode     uint16
	UID, GID uint32
	ModTime  time.Time
	// Size is the number of content bytes of a regular file.
	Size int64
	// Stored, if not nil, makes a regular file sparse: only these stretches of
	// it take room, and the content that Add reads is theirs, one after the
	// other. They ascend and do not overlap, and begin and end at multiples of
	// 4096 bytes or at the end of the file. An empty list is a file of zeros.
	// About a thousand is the limit; Close fails where there are more.
	Stored []Stretch
	// Target is where a symlink points.
	Target string
	// Major and Minor number a device.
	Major, Minor uint32
	// Xattrs holds extended attributes by full name. Those outside the
	// namespaces user, trusted and security are left out.
	Xattrs map[string][]byte
}

// A Stretch is a part of a file, in bytes.
type Stretch struct{ Off, Len int64 }

// File types of Entry.Mode, as in stat(2).
const (
	ModeFile    = 0o100000
	ModeDir     = 0o040000
	ModeSymlink = 0o120000
	ModeChar    = 0o020000
	ModeBlock   = 0o060000
	ModeFIFO    = 0o010000
	ModeSocket  = 0o140000
	modeType    = 0o170000
	modeDir     = ModeDir
)

// Add puts e into the file system, in the place of what has that path already;
// a directory over a directory only takes the new attributes. The content of a
// regular file is read from r, exactly e.Size bytes or those of e.Stored.
func (w *Writer) Add(e Entry, r io.Reader) error {
	parent, name, err := w.locate(e.Path, e.ModTime)
	if err != nil {
		return err
	}
	isDir := e.Mode&modeType == ModeDir
	if parent == nil { // the root itself
		if !isDir {
			return api.Errorf(api.ErrInvalid, "%q would replace the root directory", e.Path)
		}
		return w.root.describe(e)
	}
	if old := parent.children[name]; old != nil {
		if isDir && old.isDir() {
			return old.describe(e)
		}
		if err := w.remove(parent, name); err != nil {
			return err
		}
	}
	n, err := w.newNode()
	if err != nil {
		return err
	}
	if err := n.describe(e); err != nil {
		return err
	}
	switch e.Mode & modeType {
	case ModeDir:
		n.children = map[string]*node{}
		n.parent = parent
	case ModeFile:
		if err := w.store(n, r, e); err != nil {
			return err
		}
	case ModeSymlink:
		if err := w.storeTarget(n, e.Target); err != nil {
			return err
		}
	case ModeChar, ModeBlock, ModeFIFO, ModeSocket:
		n.major, n.minor = e.Major, e.Minor
	default:
		return api.Errorf(api.ErrInvalid, "%q has the unknown file type %#o", e.Path, e.Mode&modeType)
	}
	n.links = 1
	parent.children[name] = n
	return nil
}

// Link makes path another name of the file at target. Neither may be a
// directory.
func (w *Writer) Link(path, target string) error {
	dir, base, err := w.locate(target, w.opts.Time)
	if err != nil {
		return err
	}
	var n *node
	if dir != nil {
		n = dir.children[base]
	}
	if n == nil || n.isDir() {
		return api.Errorf(api.ErrInvalid, "%.200q links to %.200q, which is no file", path, target)
	}
	if n.links >= maxLinks {
		return api.Errorf(api.ErrExhausted, "%.200q would be link number %d of one file", path, n.links+1)
	}
	parent, name, err := w.locate(path, w.opts.Time)
	if err != nil {
		return err
	}
	if parent == nil {
		return api.Errorf(api.ErrInvalid, "%q would replace the root directory", path)
	}
	old := parent.children[name]
	if old == n {
		return nil
	}
	if err := w.countEntry(); err != nil {
		return err
	}
	// Counted first: the old one may hold the last other link of the same file.
	n.links++
	if old != nil {
		if err := w.remove(parent, name); err != nil {
			return err
		}
	}
	parent.children[name] = n
	return nil
}

// Exists reports whether path is there, without following a last link.
func (w *Writer) Exists(path string) bool {
	return w.find(path) != nil
}

// Remove takes path away with everything below it. A missing one is no error.
func (w *Writer) Remove(path string) error {
	n := w.find(path)
	if n == nil {
		return nil
	}
	parent, name, err := w.locate(path, w.opts.Time)
	if err != nil {
		return err
	}
	if parent == nil || n == w.lostFound {
		return api.Errorf(api.ErrInvalid, "%q cannot be removed", path)
	}
	return w.remove(parent, name)
}

// Close writes everything that was kept in memory. It does not sync or close
// the file.
func (w *Writer) Close() error {
	w.clampTimes()
	return w.finish()
}

// clampTimes carries out Options.ClampAfter.
func (w *Writer) clampTimes() {
	limit := w.opts.ClampAfter
	if limit.IsZero() {
		return
	}
	latest := time.Unix(math.MinInt32, 0)
	w.walk(func(n *node) {
		if !n.mtime.After(limit) && n.mtime.After(latest) {
			latest = n.mtime
		}
	})
	w.walk(func(n *node) {
		if n.mtime.After(limit) {
			n.mtime = latest
		}
	})
	w.opts.Time = latest
}
