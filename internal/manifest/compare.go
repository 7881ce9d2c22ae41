package manifest

import (
	"iter"

	"github.com/pyro-mcp/pyro/api"
)

// A Change is one path at which two trees differ.
type Change struct {
	Path   string
	Status string // api.ChangeAdded and so on
	// Old and New are what was and what is there; nil where that is nothing.
	Old, New *Entry
	// OldEmpty and NewEmpty say of a directory that nothing is in it.
	OldEmpty, NewEmpty bool
}

// Compare returns at which paths current differs from base, in order. Both must
// be manifests (see [Checked]); an error of either is returned.
//
// A directory that both trees have, with something in it, is no change whatever
// else may differ: what lies in it speaks for itself. So does the content of
// one that was added or deleted: such a directory is a change by itself only if
// it is empty. One that has become empty counts as modified. Of modes only the
// owner's right to execute a file counts: Git keeps no other, and the rest
// depends on the umask of whoever has last written the file.
func Compare(base, current iter.Seq2[Entry, error]) ([]Change, error) {
	old, stopOld := newSide(base)
	defer stopOld()
	cur, stopCur := newSide(current)
	defer stopCur()
	var out []Change
	for {
		if err := old.err; err != nil {
			return nil, err
		}
		if err := cur.err; err != nil {
			return nil, err
		}
		order := 0
		switch {
		case !old.ok && !cur.ok:
			return out, nil
		case !old.ok:
			order = 1
		case !cur.ok:
			order = -1
		default:
			order = ComparePaths(old.e.Path, cur.e.Path)
		}
		var c Change
		if order <= 0 {
			e := old.e
			c.Path, c.Old = e.Path, &e
			c.OldEmpty = old.advance()
		}
		if order >= 0 {
			e := cur.e
			c.Path, c.New = e.Path, &e
			c.NewEmpty = cur.advance()
		}
		if c.Status = status(c); c.Status != "" {
			out = append(out, c)
		}
	}
}

// With returns the change with another entry in the place of New, nil for none:
// of a tree that goes on changing, what was there when it was read. It reports
// false if that is no change at all.
func (c Change) With(now *Entry) (Change, bool) {
	if now != nil && (c.New == nil || c.New.Type != now.Type) {
		c.NewEmpty = now.Type == Directory
	}
	c.New = now
	if c.Old == nil && c.New == nil {
		return c, false
	}
	c.Status = status(c)
	return c, c.Status != ""
}

// status returns "" for what is no change.
func status(c Change) string {
	switch {
	case c.Old == nil:
		if c.New.Type != Directory || c.NewEmpty {
			return api.ChangeAdded
		}
	case c.New == nil:
		if c.Old.Type != Directory || c.OldEmpty {
			return api.ChangeDeleted
		}
	case c.Old.Type != c.New.Type:
		return api.ChangeTypeChanged
	case c.New.Type == Directory:
		if c.NewEmpty && !c.OldEmpty {
			return api.ChangeModified
		}
	case c.Old.Size != c.New.Size || c.Old.SHA256 != c.New.SHA256 || c.Old.Target != c.New.Target ||
		c.Old.Executable() != c.New.Executable():
		return api.ChangeModified
	}
	return ""
}

// A side is one of the sequences, with its next entry at hand.
type side struct {
	next func() (Entry, error, bool)
	e    Entry
	err  error
	ok   bool
}

func newSide(seq iter.Seq2[Entry, error]) (s *side, stop func()) {
	next, stop := iter.Pull2(seq)
	s = &side{next: next}
	s.e, s.err, s.ok = next()
	return s, stop
}

// advance goes to the next entry and reports whether the one it leaves is a
// directory without content.
func (s *side) advance() (empty bool) {
	was := s.e
	s.e, s.err, s.ok = s.next()
	return was.Type == Directory && !(s.ok && s.err == nil && below(s.e.Path, was.Path))
}
