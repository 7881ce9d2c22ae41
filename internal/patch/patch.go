// Package patch says what a unified or git-style patch makes of a tree. It
// changes nothing itself: everything is parsed and checked against all files
// first, and the result is for the caller to write.
package patch

import (
	"context"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

// The bounds of one patch.
const (
	MaxPatchBytes = 64 << 20
	MaxFiles      = 10_000
	MaxFileBytes  = 256 << 20
)

// A File is one file of the tree.
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
	// Read returns what lies at path, without following a link at its end or
	// on the way. Nothing there is ErrNotFound. For a file above MaxFileBytes
	// it returns ErrExhausted.
	Read(ctx context.Context, path string) (File, error)
}

// A Result is what to do: first remove, then write.
type Result struct {
	// Remove are files and links to remove, and with them each directory that
	// becomes empty by it.
	Remove []string
	// Write are files and links with their whole content. Directories on the
	// way are to be made; what lies at the path is to be replaced.
	Write   []File
	Entries []api.PatchedFile
	Summary api.PatchSummary
}

var _ = manifest.File
