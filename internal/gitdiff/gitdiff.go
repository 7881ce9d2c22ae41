// Package gitdiff writes changes of a tree as a patch that git apply takes, and
// renders them for people.
//
// The content may come from a guest and be anything: what a line diff would
// cost too much for, or is no text, goes into the patch as Git's own binary
// form, streamed. The patch is always valid UTF-8, whatever the files hold, so
// that it survives JSON: text in other encodings is taken as binary too.
package gitdiff

import (
	"context"
	"io"

	"github.com/pyro-mcp/pyro/api"
)

// A Content opens the regular file at path of one of the two trees. The caller
// closes it. It must yield what the manifest said: another length or hash is
// ErrBusy ("changed while it was read").
type Content func(ctx context.Context, path string) (io.ReadCloser, error)

// Options says where the content is and what is worth a line diff. Zero fields
// mean the defaults.
type Options struct {
	// Old and New open the files of the base and of the current tree.
	Old, New Content
	// MaxText is how long a file may be, on each side, for its changes to be
	// shown as lines; default 16 MiB.
	MaxText int64
	// MaxEntryPatch is how long an entry's part of the patch may be to be
	// repeated in Entry.TextPatch, and MaxEntryPatches how long all these may
	// be together; defaults 64 KiB and 1 MiB.
	MaxEntryPatch, MaxEntryPatches int64
}

// A Result says what a patch holds and what it could not.
type Result struct {
	Entries []api.DiffEntry
	Summary api.DiffSummary
	// Stats has one element for each of Entries.
	Stats []Stat
	// Unpatched are the changes that no patch can carry: empty directories,
	// Git's own files, and names that Git refuses.
	Unpatched []api.SkippedEntry
}

// A Stat counts the changed lines of one entry.
type Stat struct {
	Path           string
	Added, Deleted int64
	// Binary says that the sizes count and not the lines.
	Binary           bool
	OldSize, NewSize int64
}
