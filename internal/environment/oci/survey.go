package oci

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// A survey is what a first look at the layers has found: whether they are what
// the manifest says, how large the tree can become, and what they take away.
type survey struct {
	limits  Limits
	bytes   int64 // of archives
	entries int64
	names   int64
	files   int64 // that will be in the tree, at most
	blocks  int64 // of 4096 bytes

	removals []removals // by layer
}

// removals are the whiteouts of one layer (OCI image layer, "Whiteouts"), as
// cleaned paths without a leading slash. They concern the layers below only,
// wherever in the layer they stand, so they have to be known before the layer's
// files are added.
type removals struct {
	paths  []string // what goes, with all below it
	opaque []string // directories that are emptied
	dirs   map[string]bool
}

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
	// Other names that begin so are notes of aufs to itself.
	whiteoutMeta = ".wh..wh."
)

// look reads one layer and adds it to the survey.
func (s *survey) look(ctx context.Context, r io.Reader, l layer) error {
	u, err := newUnpacker(r, l, s.limits.TreeBytes-s.bytes)
	if err != nil {
		return err
	}
	defer u.close()
	gone := removals{dirs: map[string]bool{}}
	tr := tar.NewReader(u)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return readingArchive(err)
		}
		if err := s.entry(h, &gone); err != nil {
			return fmt.Errorf("archive entry %.200q: %w", h.Name, err)
		}
	}
	if err := u.finish(); err != nil {
		return err
	}
	s.bytes = s.limits.TreeBytes - u.left
	if len(gone.paths)+len(gone.opaque) == 0 {
		gone.dirs = nil
	}
	s.removals = append(s.removals, gone)
	return nil
}

// entry checks and counts one entry.
func (s *survey) entry(h *tar.Header, gone *removals) error {
	name, err := clean(h.Name)
	if err != nil {
		return err
	}
	if s.entries++; s.entries > s.limits.Entries {
		return tooMuch("the image has %d entries or more, the limit is %d", s.entries, s.limits.Entries)
	}
	s.names += int64(len(h.Name) + len(h.Linkname))
	s.blocks += 2 // what a long link, attributes or the directory's growth take
	for key, value := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return errSparse
		}
		s.names += int64(len(key) + len(value))
	}
	if s.names > s.limits.NameBytes {
		return tooMuch("the image's names and attributes have %d bytes or more, the limit is %d", s.names, s.limits.NameBytes)
	}
	dir, base := path.Split(name)
	switch {
	case h.Typeflag == tar.TypeGNUSparse:
		return errSparse
	case base == opaqueMarker:
		gone.opaque = append(gone.opaque, strings.TrimSuffix(dir, "/"))
		return nil
	case strings.HasPrefix(base, whiteoutMeta):
		return nil
	case strings.HasPrefix(base, whiteoutPrefix):
		victim := strings.TrimPrefix(base, whiteoutPrefix)
		if victim == "" || victim == "." || victim == ".." {
			return api.Errorf(api.ErrInvalid, "the whiteout names nothing")
		}
		gone.paths = append(gone.paths, dir+victim)
		return nil
	case h.Typeflag == tar.TypeDir:
		gone.dirs[name] = true
	}
	s.files++
	if h.Size > s.limits.TreeBytes {
		return tooMuch("it has %d bytes, the limit is %d for the image", h.Size, s.limits.TreeBytes)
	}
	s.blocks += (h.Size + 4095) / 4096
	return nil
}

// errSparse: with holes, a few bytes of an archive could be terabytes of a
// file. No builder of images writes them.
var errSparse = api.Errorf(api.ErrUnsupported, "it is a sparse file")

// clean returns a path without leading slash, "" for the root.
func clean(name string) (string, error) {
	if len(name) > maxPath {
		return "", api.Errorf(api.ErrInvalid, "the path has %d bytes, the limit is %d", len(name), maxPath)
	}
	for elem := range strings.SplitSeq(name, "/") {
		if elem == ".." {
			return "", api.Errorf(api.ErrInvalid, "the path leaves its directory")
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

// readingArchive gives what package tar says its class.
func readingArchive(err error) error {
	if api.Code(err) != api.Code(api.ErrInternal) {
		return err
	}
	return api.Errorf(api.ErrInvalid, "reading its archive: %w", err)
}
