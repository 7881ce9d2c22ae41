// Package manifest describes a tree of files without their content: what lies
// where, with which mode, size and SHA-256. Two manifests say what differs
// between two trees that never were in one place, such as the seed of a
// workspace on the host and the workspace's files in its guest.
//
// A manifest is a sequence of entries in one fixed order, so that any number
// of them is compared and stored in little memory. Sequences may come from a
// guest: [Checked] and [Read] let nothing through that breaks the rules.
package manifest

import (
	"iter"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// The types of entries, as the product's JSON names them.
const (
	File      = "file"
	Directory = "directory"
	Symlink   = "symlink"
)

// The bounds of one manifest.
const (
	MaxEntries = 1_000_000
	MaxPath    = 4096 // PATH_MAX, limits.h
	MaxName    = 255  // NAME_MAX
	MaxDepth   = 255
	MaxTarget  = 4096
)

// An Entry is one file, directory or symbolic link. The top of the tree itself
// has none.
type Entry struct {
	// Path is relative to the top, slash-separated, without "." and "..". It
	// may hold any bytes but NUL.
	Path string
	Type string // File, Directory or Symlink
	// Mode are the permission bits, at most 0777. Those of a link mean nothing
	// and are 0777.
	Mode uint32
	// Size is the length of a file's content or of a link's target, 0 for a
	// directory.
	Size int64
	// SHA256 is of a file's content, zero for others.
	SHA256 [32]byte
	// Target is where a link points.
	Target string
}

// Executable reports whether the owner may run the file, which is all that Git
// knows of a mode.
func (e Entry) Executable() bool { return e.Type == File && e.Mode&0o100 != 0 }

// ComparePaths orders entries: each directory's names by their bytes, a
// directory before what is in it, and all of that before the next name. That
// is the order of whole paths with the slash below all other bytes.
func ComparePaths(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] == b[i] {
			continue
		}
		switch {
		case a[i] == '/':
			return -1
		case b[i] == '/':
			return 1
		}
		return int(a[i]) - int(b[i])
	}
	return len(a) - len(b)
}

// below reports whether path lies in the directory dir.
func below(path, dir string) bool {
	return len(path) > len(dir) && path[len(dir)] == '/' && path[:len(dir)] == dir
}

// Check returns what is wrong with an entry by itself: ErrInvalid, or nil.
func (e Entry) Check() error {
	if err := CheckPath(e.Path); err != nil {
		return err
	}
	if e.Mode > 0o777 {
		return api.Errorf(api.ErrInvalid, "%.200q has the mode %#o", e.Path, e.Mode)
	}
	isLink := e.Type == Symlink
	switch {
	case e.Type != File && e.Type != Directory && !isLink:
		return api.Errorf(api.ErrInvalid, "%.200q is of the unknown type %.40q", e.Path, e.Type)
	case e.Size < 0 || e.Type == Directory && e.Size != 0 || isLink && e.Size != int64(len(e.Target)):
		return api.Errorf(api.ErrInvalid, "%.200q is a %s of %d bytes", e.Path, e.Type, e.Size)
	case e.Type != File && e.SHA256 != [32]byte{}:
		return api.Errorf(api.ErrInvalid, "%.200q is a %s with a hash", e.Path, e.Type)
	case isLink && (e.Target == "" || len(e.Target) > MaxTarget || strings.IndexByte(e.Target, 0) >= 0):
		return api.Errorf(api.ErrInvalid, "%.200q has a target that is empty, too long or has a NUL in it", e.Path)
	case !isLink && e.Target != "":
		return api.Errorf(api.ErrInvalid, "%.200q is a %s with a target", e.Path, e.Type)
	}
	return nil
}

// CheckPath returns what is wrong with an entry's path: ErrInvalid, or nil.
func CheckPath(path string) error {
	if path == "" || len(path) > MaxPath || strings.IndexByte(path, 0) >= 0 {
		return api.Errorf(api.ErrInvalid, "the path %.200q is empty, too long or has a NUL in it", path)
	}
	depth := 0
	for name := range strings.SplitSeq(path, "/") {
		if name == "" || name == "." || name == ".." || len(name) > MaxName {
			return api.Errorf(api.ErrInvalid, "the path %.200q has a part that is empty, a dot or too long", path)
		}
		depth++
	}
	if depth > MaxDepth {
		return api.Errorf(api.ErrInvalid, "the path %.200q is more than %d directories deep", path, MaxDepth)
	}
	return nil
}

// Checked passes a sequence on as long as it is a manifest: every entry right
// by itself, in order, none twice, each in a directory that came before it, at
// most [MaxEntries]. The first that is not ends it with ErrInvalid.
func Checked(seq iter.Seq2[Entry, error]) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		var o order
		for e, err := range seq {
			if err == nil {
				err = o.next(e)
			}
			if err != nil {
				yield(Entry{}, err)
				return
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// order holds what the entries before say about the next one.
type order struct {
	last  string
	dirs  []string // the directories that the last entry lies in or is
	count int64
}

func (o *order) next(e Entry) error {
	if err := e.Check(); err != nil {
		return err
	}
	if o.count++; o.count > MaxEntries {
		return api.Errorf(api.ErrExhausted, "there are more than %d entries", MaxEntries)
	}
	if o.last != "" && ComparePaths(o.last, e.Path) >= 0 {
		return api.Errorf(api.ErrInvalid, "%.200q comes after %.200q", e.Path, o.last)
	}
	o.last = e.Path
	for len(o.dirs) > 0 && !below(e.Path, o.dirs[len(o.dirs)-1]) {
		o.dirs = o.dirs[:len(o.dirs)-1]
	}
	parent := 0
	if len(o.dirs) > 0 {
		parent = len(o.dirs[len(o.dirs)-1]) + 1
	}
	if strings.IndexByte(e.Path[parent:], '/') >= 0 {
		return api.Errorf(api.ErrInvalid, "%.200q lies in no directory", e.Path)
	}
	if e.Type == Directory {
		o.dirs = append(o.dirs, e.Path)
	}
	return nil
}
