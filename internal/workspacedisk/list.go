package workspacedisk

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// List returns what lies in the directory at guestPath, one level or all, or
// the one entry of a file or symlink, sorted by path. Devices, pipes and
// sockets are left out of a listing; asked for by path they are ErrInvalid.
// Paths are absolute. A path that does not exist is ErrNotFound, more than
// [Limits] allows is ErrExhausted, and a directory that contains itself or two
// entries of one name is ErrDamaged.
func (d *Disk) List(ctx context.Context, guestPath string, recursive bool) (*api.DiskList, error) {
	guestPath, err := cleanPath(guestPath)
	if err != nil {
		return nil, err
	}
	l := &lister{budget: d.budget(), limits: d.opts.Limits}
	f, err := d.resolve(ctx, guestPath, l.budget, false)
	if err != nil {
		return nil, err
	}
	if f.IsDir() {
		err = d.walkTree(ctx, f, guestPath, recursive, l.budget, func(p string, f file) error {
			_, err := l.add(p, f)
			return err
		})
	} else {
		var listed bool
		if listed, err = l.add(guestPath, f); err == nil && !listed {
			return nil, api.Errorf(api.ErrInvalid, "unsupported workspace disk path type: %s", guestPath)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("listing %s: %w", guestPath, err)
	}
	entries, err := l.finish()
	if err != nil {
		return nil, fmt.Errorf("listing %s: %w", guestPath, err)
	}
	return &api.DiskList{Entries: entries, Path: validText(guestPath), Recursive: recursive}, nil
}

// A lister gathers one listing.
type lister struct {
	budget    *ext4.Budget
	limits    Limits
	pathBytes int64
	found     []found
}

// found is an entry before its text is made fit for JSON.
type found struct {
	path, target string
	kind         string
	size         int64
}

type pendingDir struct {
	file file
	path string
}

// walkTree calls fn for what lies below a directory, one level or all, a
// directory before what is in it, without recursion of its own: the image
// decides the depth.
func (d *Disk) walkTree(ctx context.Context, dir file, dirPath string, recursive bool, budget *ext4.Budget, fn func(p string, f file) error) error {
	visited := map[fileID]bool{} // directories
	visit := func(id fileID) error {
		if visited[id] {
			return api.Errorf(api.ErrDamaged, "directory inode %d appears twice in the tree", id.inode)
		}
		visited[id] = true
		return nil
	}
	pending := []pendingDir{{dir, dirPath}}
	for len(pending) > 0 {
		at := pending[len(pending)-1]
		pending = pending[:len(pending)-1]
		if err := visit(at.file.id()); err != nil {
			return err
		}
		for _, p := range at.file.below {
			// A redirect to what shows elsewhere, which no kernel writes.
			if err := visit(p.id()); err != nil {
				return err
			}
		}
		prefix := at.path
		if prefix != "/" {
			prefix += "/"
		}
		err := d.readDir(ctx, at.file, budget, func(name string, f file) error {
			p := prefix + name
			if len(p) > maxPathLen {
				return api.Errorf(api.ErrExhausted, "a path is longer than %d bytes", maxPathLen)
			}
			if err := fn(p, f); err != nil {
				return err
			}
			if recursive && f.IsDir() {
				pending = append(pending, pendingDir{f, p})
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// add appends one entry; listed is false for a special file.
func (l *lister) add(p string, ino file) (listed bool, err error) {
	f := found{path: p}
	switch {
	case ino.IsDir():
		f.kind = api.ArtifactDirectory
	case ino.IsRegular():
		f.kind, f.size = api.ArtifactFile, ino.Size
	case ino.IsSymlink():
		f.kind, f.size = api.ArtifactSymlink, ino.Size
		if f.target, err = ino.fs.ReadLink(ino.Inode); err != nil {
			return false, err
		}
	default:
		return false, nil
	}
	l.pathBytes += int64(len(p) + len(f.target))
	if len(l.found) >= l.limits.MaxEntries {
		return false, tooMuch("it has more than %d entries", l.limits.MaxEntries)
	}
	if l.pathBytes > l.limits.MaxPathBytes {
		return false, tooMuch("its paths take more than %d bytes", l.limits.MaxPathBytes)
	}
	l.found = append(l.found, f)
	return true, nil
}

func tooMuch(format string, args ...any) error {
	return api.WithHint(api.Errorf(api.ErrExhausted, format, args...), "list a directory further down, or without --recursive")
}

// finish sorts the entries and refuses duplicate names.
func (l *lister) finish() ([]api.DiskEntry, error) {
	slices.SortFunc(l.found, func(a, b found) int { return strings.Compare(a.path, b.path) })
	entries := make([]api.DiskEntry, len(l.found))
	for i, f := range l.found {
		if i > 0 && l.found[i-1].path == f.path {
			return nil, api.Errorf(api.ErrDamaged, "a directory has two entries of the name %q", f.path)
		}
		entries[i] = api.NewDiskEntry(f.path, f.kind, f.size, f.target)
	}
	return entries, nil
}

// validText is s as text.
func validText(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
