// Package patch says what a unified or git-style patch makes of a tree. It
// changes nothing itself: everything is parsed and checked against all files
// first, and the result is for the caller to write.
//
// It accepts what git apply accepts, and finds a hunk whose line numbers are
// off, as Git does. Beyond that it takes a hunk that lacks context at the end or
// the beginning, if there is just one place for it: patches are often written by
// models. It refuses what Git would pass over in silence: lines behind a hunk
// that its header does not count.
//
// Why not a library: go-gitdiff drops such lines too, applies a hunk at its
// line number only, and cannot read a quoted name that ends in a backslash.
package patch

import (
	"context"

	"github.com/pyro-mcp/pyro/api"
)

// The bounds of one patch.
const (
	MaxPatchBytes = 64 << 20
	MaxFiles      = 10_000
	MaxFileBytes  = 256 << 20
	// MaxTotalBytes bounds all files together that a patch reads and writes.
	MaxTotalBytes = 1 << 30
)

// A File is one thing in the tree.
type File struct {
	Path string
	// Type is manifest.File, manifest.Symlink or manifest.Directory.
	Type string
	// Mode are the permission bits of a regular file.
	Mode uint32
	// Content is what a file holds or where a link points.
	Content []byte
}

// A Tree is what a patch is applied to.
type Tree interface {
	// Read returns what lies at path; a directory without its content.
	// Nothing there is ErrNotFound, also where something on the way is no
	// directory. No link is followed, at the end or on the way. A file above
	// MaxFileBytes is ErrExhausted.
	Read(ctx context.Context, path string) (File, error)
	// List returns the names in the directory at path. It is asked only where
	// a patch puts a file in the place of a directory.
	List(ctx context.Context, path string) ([]string, error)
}

// A Result is what to do: first remove, then write.
type Result struct {
	// Remove are files and links to remove, and with them each directory that
	// becomes empty by it.
	Remove []string
	// Write are files and links with their whole content. Directories on the
	// way are to be made; a file or link that is there is to be replaced.
	Write   []File
	Entries []api.PatchedFile
	Summary api.PatchSummary
}
