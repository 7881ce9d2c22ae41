package patch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

// Apply returns what the patch makes of the tree, or why it cannot be applied:
// ErrInvalid with the file, the hunk, its line in the patch, and what was found
// in the place of what was expected. A path behind a symbolic link is ErrDenied.
// An error of the tree is returned as it is.
//
// Files that a patch names several times are changed one patch after the other.
// Renames and copies take a file as it was before, so that two can be swapped.
func (p *Patch) Apply(ctx context.Context, tree Tree) (Result, error) {
	a := &applier{ctx: ctx, tree: tree, now: map[string]*state{}, leaving: map[string]bool{}}
	for _, f := range p.files {
		if f.remove || f.rename {
			a.leaving[f.old] = true
		}
	}
	for _, f := range p.files {
		if err := ctx.Err(); err != nil {
			return Result{}, context.Cause(ctx)
		}
		if err := a.file(f); err != nil {
			return Result{}, fmt.Errorf("applying the patch to %.200q: %w", f.path(), err)
		}
	}
	return a.result(), nil
}

// Paths returns the files that the patch is about, sorted.
func (p *Patch) Paths() []string {
	var out []string
	for _, f := range p.files {
		for _, name := range []string{f.old, f.cur} {
			if name != "" {
				out = append(out, name)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// A state is what lies at a path, before the patch and so far.
type state struct {
	before *File // nil for nothing
	after  *File
	// touched says that after is the patch's work.
	touched bool
}

type applier struct {
	ctx     context.Context
	tree    Tree
	now     map[string]*state
	leaving map[string]bool // what some file of the patch removes
	entries []api.PatchedFile
	total   int64
	work    int64
}

// look returns the state of a path, reading it the first time.
func (a *applier) look(name string) (*state, error) {
	if s := a.now[name]; s != nil {
		return s, nil
	}
	f, err := a.tree.Read(a.ctx, name)
	s := &state{}
	switch {
	case errors.Is(err, api.ErrNotFound):
	case err != nil:
		return nil, err
	default:
		if err := a.count(len(f.Content)); err != nil {
			return nil, err
		}
		f.Path = name
		s.before, s.after = &f, &f
	}
	a.now[name] = s
	return s, nil
}

func (a *applier) count(n int) error {
	if n > MaxFileBytes {
		return api.Errorf(api.ErrExhausted, "the file has %d bytes, the limit for a patched one is %d", n, MaxFileBytes)
	}
	if a.total += int64(n); a.total > MaxTotalBytes {
		return api.Errorf(api.ErrExhausted, "the files have more than %d bytes together", MaxTotalBytes)
	}
	return nil
}

func (a *applier) file(f *filePatch) error {
	at := func(err error) error { return fmt.Errorf("line %d of the patch: %w", f.line, err) }
	var old *File
	if f.old != "" {
		s, err := a.look(f.old)
		if err != nil {
			return err
		}
		if err := a.reachable(f.old, !s.touched || f.rename || f.copy); err != nil {
			return err
		}
		old = s.after
		if (f.rename || f.copy) && s.before != nil {
			old = s.before
		}
		if old == nil {
			return at(api.Errorf(api.ErrInvalid, "there is no file %.200q", f.old))
		}
		if err := sameType(f, old); err != nil {
			return at(err)
		}
	}
	cur, err := a.change(f, old)
	if err != nil {
		return err
	}
	if cur == nil {
		return a.removed(f.old)
	}
	if err := a.place(f, cur); err != nil {
		return at(err)
	}
	return nil
}

// sameType refuses a patch of a file for a link or a directory.
func sameType(f *filePatch, old *File) error {
	if old.Type == manifest.Directory {
		return api.Errorf(api.ErrInvalid, "%.200q is a directory", f.old)
	}
	mode := f.oldMode
	if mode == 0 {
		mode = f.newMode
	}
	isLink := old.Type == manifest.Symlink
	if mode != 0 && isLink != (mode&modeType == modeSymlink) || mode == 0 && isLink && len(f.hunks) > 0 {
		return api.Errorf(api.ErrInvalid, "%.200q is a %s", f.old, old.Type)
	}
	if !f.remove && f.newMode != 0 && isLink != (f.newMode&modeType == modeSymlink) {
		return api.Errorf(api.ErrInvalid, "%.200q would change its type: git writes that as two changes", f.old)
	}
	return nil
}

// change returns the file as the patch makes it, nil for none.
func (a *applier) change(f *filePatch, old *File) (*File, error) {
	cur := &File{Path: f.cur, Type: manifest.File, Mode: 0o644}
	var content []byte
	if old != nil {
		cur.Type, cur.Mode, content = old.Type, old.Mode, old.Content
	}
	if f.newMode&modeType == modeSymlink {
		cur.Type, cur.Mode = manifest.Symlink, 0o777
	}
	if f.newMode&modeType == modeFile {
		cur.Mode &^= 0o111
		if f.newMode&0o100 != 0 { // for whoever may read it
			cur.Mode |= cur.Mode & 0o444 >> 2
		}
	}
	var err error
	switch {
	case f.binary != nil:
		if content, err = f.binary.apply(content); err != nil {
			return nil, fmt.Errorf("line %d of the patch: %w", f.binary.line, err)
		}
	case len(f.hunks) > 0:
		if content, err = a.text(f, content); err != nil {
			return nil, err
		}
	}
	if f.remove {
		if len(content) > 0 {
			return nil, api.Errorf(api.ErrInvalid, "line %d of the patch: the file would be deleted, and has more in it than the patch removes", f.line)
		}
		return nil, nil
	}
	if err := a.count(len(content)); err != nil {
		return nil, err
	}
	if cur.Type == manifest.Symlink && (len(content) == 0 || len(content) >= manifest.MaxTarget || bytes.IndexByte(content, 0) >= 0) {
		return nil, api.Errorf(api.ErrInvalid, "line %d of the patch: the link's target is empty, too long or has a NUL in it", f.line)
	}
	cur.Content = content
	return cur, nil
}

// removed records that a path is gone.
func (a *applier) removed(name string) error {
	s := a.now[name]
	s.after, s.touched = nil, true
	a.entries = append(a.entries, api.PatchedFile{Path: name, Status: api.ChangeDeleted})
	return nil
}

// place puts a file where the patch wants it.
func (a *applier) place(f *filePatch, cur *File) error {
	if err := a.reachable(f.cur, false); err != nil {
		return err
	}
	s, err := a.look(f.cur)
	if err != nil {
		return err
	}
	if f.old != f.cur && s.after != nil {
		switch {
		case s.after.Type == manifest.Directory:
			if err := a.emptied(f.cur, 0); err != nil {
				return err
			}
		case s.touched || !a.leaving[f.cur]:
			return api.Errorf(api.ErrInvalid, "%.200q is there already", f.cur)
		}
	}
	s.after, s.touched = cur, true
	entry := api.PatchedFile{Path: f.cur, Status: api.ChangeModified}
	switch {
	case f.rename:
		entry.Status, entry.From = "renamed", &f.old
		if from := a.now[f.old]; f.old != f.cur && (!from.touched || from.after == from.before) {
			from.after, from.touched = nil, true
		}
	case f.copy:
		entry.Status, entry.From = api.ChangeAdded, &f.old
	case f.create:
		entry.Status = api.ChangeAdded
	}
	a.entries = append(a.entries, entry)
	return nil
}

// reachable makes sure that everything on the way to name is a directory, or
// becomes one; or, asked about before, was one.
func (a *applier) reachable(name string, before bool) error {
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		s, err := a.look(dir)
		if err != nil {
			return err
		}
		there := s.after
		if before {
			there = s.before
		}
		switch {
		case there == nil || there.Type == manifest.Directory:
		case !before && !s.touched && a.leaving[dir]: // removed by a later part
		case there.Type == manifest.Symlink:
			return api.Errorf(api.ErrDenied, "%.200q lies behind the symbolic link %.200q", name, dir)
		default:
			return api.Errorf(api.ErrInvalid, "%.200q lies below %.200q, which is a %s", name, dir, there.Type)
		}
	}
	return nil
}

// emptied makes sure that the patch removes everything in a directory.
func (a *applier) emptied(dir string, depth int) error {
	full := api.Errorf(api.ErrInvalid, "%.200q is a directory", dir)
	if depth > manifest.MaxDepth {
		return full
	}
	names, err := a.tree.List(a.ctx, dir)
	if err != nil {
		return err
	}
	if len(names) == 0 && depth > 0 {
		return full // nothing removes it
	}
	for _, name := range names {
		name = dir + "/" + name
		if a.leaving[name] {
			continue
		}
		s, err := a.look(name)
		if err != nil {
			return err
		}
		if s.after == nil || s.after.Type != manifest.Directory {
			return full
		}
		if err := a.emptied(name, depth+1); err != nil {
			return full
		}
	}
	return nil
}

func (a *applier) result() Result {
	r := Result{Entries: a.entries}
	for name, s := range a.now {
		switch {
		case !s.touched:
		case s.after != nil:
			r.Write = append(r.Write, *s.after)
		case s.before != nil:
			r.Remove = append(r.Remove, name)
		}
	}
	slices.SortFunc(r.Write, func(x, y File) int { return manifest.ComparePaths(x.Path, y.Path) })
	slices.SortFunc(r.Remove, manifest.ComparePaths)
	r.mergeTypeChanges()
	for _, e := range r.Entries {
		r.Summary.Total++
		switch e.Status {
		case api.ChangeAdded:
			r.Summary.Added++
		case api.ChangeDeleted:
			r.Summary.Deleted++
		case "renamed":
			r.Summary.Renamed++
		default:
			r.Summary.Modified++
		}
	}
	return r
}

// mergeTypeChanges makes one entry of a file that is deleted and added again,
// which is how Git writes that it becomes a link.
func (r *Result) mergeTypeChanges() {
	deleted := map[string]int{}
	out := []api.PatchedFile{}
	for _, e := range r.Entries {
		if i, ok := deleted[e.Path]; ok && e.Status == api.ChangeAdded && e.From == nil {
			out[i].Status = api.ChangeModified
			delete(deleted, e.Path)
			continue
		}
		if e.Status == api.ChangeDeleted {
			deleted[e.Path] = len(out)
		}
		out = append(out, e)
	}
	r.Entries = out
}
