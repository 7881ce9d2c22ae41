package gitdiff

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/rogpeppe/go-internal/diff"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

const (
	defaultMaxText         = 16 << 20
	defaultMaxEntryPatch   = 64 << 10
	defaultMaxEntryPatches = 1 << 20
)

func (o Options) withDefaults() Options {
	if o.MaxText == 0 {
		o.MaxText = defaultMaxText
	}
	if o.MaxEntryPatch == 0 {
		o.MaxEntryPatch = defaultMaxEntryPatch
	}
	if o.MaxEntryPatches == 0 {
		o.MaxEntryPatches = defaultMaxEntryPatches
	}
	return o
}

// Write writes the patch of changes, which are in manifest.Compare's order, to
// w: applied with git apply to the old tree it gives the new one, but for what
// Result.Unpatched lists. The binary parts cannot be applied in reverse: they
// hold the new content only.
//
// Files of Git's own (.git and all below) are neither entries nor patched: git
// apply refuses them. For each .git of which something changed there is one
// element in Unpatched.
func Write(ctx context.Context, w io.Writer, changes []manifest.Change, opts Options) (Result, error) {
	p := &printer{ctx: ctx, w: bufio.NewWriterSize(w, 64<<10), opts: opts.withDefaults()}
	p.result = Result{Entries: []api.DiffEntry{}, Unpatched: []api.SkippedEntry{}}
	for i, c := range changes {
		p.blocked = blocked(c, changes[i+1:])
		if err := ctx.Err(); err != nil {
			return p.result, context.Cause(ctx)
		}
		if err := p.change(c); err != nil {
			return p.result, fmt.Errorf("comparing %.200q: %w", c.Path, err)
		}
	}
	return p.result, p.w.Flush()
}

// blocked reports whether c puts a file where a directory was that has empty
// directories in it: git apply removes only directories that become empty.
func blocked(c manifest.Change, next []manifest.Change) bool {
	if c.Old == nil || c.Old.Type != manifest.Directory || modeOf(c.New) == "" {
		return false
	}
	for _, n := range next {
		if !strings.HasPrefix(n.Path, c.Path+"/") {
			break
		}
		if n.OldEmpty {
			return true
		}
	}
	return false
}

type printer struct {
	ctx     context.Context
	w       *bufio.Writer
	opts    Options
	result  Result
	lastGit string
	// part is the patch of the current entry, as long as all of it is text.
	part     bytes.Buffer
	binary   bool
	blocked  bool
	stat     Stat
	repeated int64 // bytes of the text patches in entries
}

func (p *printer) unpatched(path, reason string) {
	p.result.Unpatched = append(p.result.Unpatched, api.SkippedEntry{Path: path, Reason: reason})
}

func (p *printer) change(c manifest.Change) error {
	if own, ok := gitOwn(c.Path); ok {
		if own != p.lastGit {
			p.lastGit = own
			p.unpatched(own, "Git's own files are not part of a patch")
		}
		return nil
	}
	p.part.Reset()
	p.binary = false
	p.stat = Stat{Path: c.Path}
	switch {
	case refused(c.Old) || refused(c.New):
		p.unpatched(c.Path, "Git refuses this name")
	case p.blocked:
		p.unpatched(c.Path, "no patch can remove the empty directories in its place")
	case c.Old != nil && c.New != nil && modeOf(c.Old) != "" && modeOf(c.New) != "" && c.Status == api.ChangeTypeChanged:
		// Git knows no change of type: it removes the one and adds the other.
		if err := p.section(c.Path, c.Old, nil); err != nil {
			return err
		}
		if err := p.section(c.Path, nil, c.New); err != nil {
			return err
		}
	case modeOf(c.Old) != "" || modeOf(c.New) != "":
		if err := p.section(c.Path, c.Old, c.New); err != nil {
			return err
		}
	}
	if c.NewEmpty {
		p.unpatched(c.Path, "no patch can hold an empty directory")
	} else if c.New == nil && c.OldEmpty {
		p.unpatched(c.Path, "no patch can remove an empty directory")
	}
	p.entry(c)
	_, err := p.w.Write(p.part.Bytes())
	return err
}

func (p *printer) entry(c manifest.Change) {
	e := c.New
	if e == nil {
		e = c.Old
	}
	entry := api.DiffEntry{Path: c.Path, Status: c.Status, ArtifactType: e.Type, SizeBytes: e.Size}
	s := &p.result.Summary
	if n := int64(p.part.Len()); n > 0 && !p.binary {
		s.TextPatched++
		if n <= p.opts.MaxEntryPatch && n <= p.opts.MaxEntryPatches-p.repeated {
			text := p.part.String()
			entry.TextPatch = &text
			p.repeated += n
		}
	} else {
		s.NonText++
	}
	s.Total++
	switch c.Status {
	case api.ChangeAdded:
		s.Added++
	case api.ChangeDeleted:
		s.Deleted++
	case api.ChangeTypeChanged:
		s.TypeChanged++
	default:
		s.Modified++
	}
	p.result.Entries = append(p.result.Entries, entry)
	p.result.Stats = append(p.result.Stats, p.stat)
}

// section writes one "diff --git" of a patch. A directory is nothing to Git.
func (p *printer) section(path string, old, cur *manifest.Entry) error {
	from, to := modeOf(old), modeOf(cur)
	fmt.Fprintf(&p.part, "diff --git %s %s\n", Quote("a/"+path), Quote("b/"+path))
	if from != "" && to != "" && old.Size == cur.Size && old.SHA256 == cur.SHA256 && old.Target == cur.Target {
		fmt.Fprintf(&p.part, "old mode %s\nnew mode %s\n", from, to)
		return nil
	}
	a, err := load(p.ctx, p.opts.Old, old, p.opts.MaxText)
	if err != nil {
		return err
	}
	b, err := load(p.ctx, p.opts.New, cur, p.opts.MaxText)
	if err != nil {
		return err
	}
	index := fmt.Sprintf("index %s..%s", a.id, b.id)
	switch {
	case from == "":
		fmt.Fprintf(&p.part, "new file mode %s\n%s\n", to, index)
	case to == "":
		fmt.Fprintf(&p.part, "deleted file mode %s\n%s\n", from, index)
	case from != to:
		fmt.Fprintf(&p.part, "old mode %s\nnew mode %s\n%s\n", from, to, index)
	default:
		fmt.Fprintf(&p.part, "%s %s\n", index, from)
	}
	if a.binary || b.binary {
		return p.literal(cur, a, b)
	}
	if len(a.text)+len(b.text) > 0 {
		p.lines(path, a, b)
	}
	return nil
}

// literal writes the new content in binary form, past the part.
func (p *printer) literal(cur *manifest.Entry, a, b blob) error {
	p.binary = true
	p.stat.Binary = true
	p.stat.OldSize = max(p.stat.OldSize, a.size)
	p.stat.NewSize = max(p.stat.NewSize, b.size)
	if _, err := p.w.Write(p.part.Bytes()); err != nil {
		return err
	}
	p.part.Reset()
	if b.mode == "" {
		return writeLiteral(p.w, bytes.NewReader(nil), 0)
	}
	r, err := reader(p.ctx, p.opts.New, cur)
	if err != nil {
		return err
	}
	defer r.Close()
	return writeLiteral(p.w, r, cur.Size)
}

// lines writes the hunks.
func (p *printer) lines(path string, a, b blob) {
	oldName, newName := "/dev/null", "/dev/null"
	if a.mode != "" {
		oldName = lineName("a/" + path)
	}
	if b.mode != "" {
		newName = lineName("b/" + path)
	}
	hunks := diff.Diff("old", a.text, "new", b.text)
	for range 3 { // its own header
		_, hunks, _ = bytes.Cut(hunks, []byte("\n"))
	}
	fmt.Fprintf(&p.part, "--- %s\n+++ %s\n", oldName, newName)
	for line := range bytes.Lines(hunks) {
		switch line[0] {
		case '+':
			p.stat.Added++
		case '-':
			p.stat.Deleted++
		}
	}
	p.part.Write(hunks)
}
