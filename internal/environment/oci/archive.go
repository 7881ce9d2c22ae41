package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// An archiveSource is an image in a file that docker save has written: a tar
// archive with manifest.json. It is not unpacked: its entries are found once
// and then read in their place.
type archiveSource struct {
	f       *os.File
	entries map[string]*io.SectionReader
	links   map[string]string
}

var _ source = (*archiveSource)(nil)

// maxArchiveEntries is far above what docker save writes, three for each layer.
const maxArchiveEntries = 10_000

func openArchive(ref Reference) (_ *archiveSource, err error) {
	f, err := os.OpenFile(ref.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, missing(err)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(err, api.Errorf(api.ErrInvalid, "it is not a regular file"))
	}
	s := &archiveSource{f: f, entries: map[string]*io.SectionReader{}, links: map[string]string{}}
	// The reader seeks over content and reads no more than headers, so the
	// file's position behind a header is where the content begins.
	for tr, n := tar.NewReader(f), 0; ; n++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return s, nil
		}
		if err != nil {
			return nil, api.WithHint(api.Errorf(api.ErrInvalid, "reading the archive: %w", err), "a compressed archive must be unpacked first: gunzip FILE")
		}
		if n == maxArchiveEntries {
			return nil, tooMuch("the archive has %d entries or more, the limit is %d", int64(n)+1, maxArchiveEntries)
		}
		name := path.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			at, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			s.entries[name] = io.NewSectionReader(f, at, h.Size)
		case tar.TypeSymlink: // a layer that occurs twice
			s.links[name] = path.Join(path.Dir(name), h.Linkname)
		}
	}
}

// entry returns what has that name, by way of at most one link.
func (s *archiveSource) entry(name string) (*io.SectionReader, error) {
	name = path.Clean(name)
	if to, ok := s.links[name]; ok {
		name = to
	}
	e := s.entries[name]
	if e == nil {
		return nil, api.Errorf(api.ErrInvalid, "the archive lacks %.200q", name)
	}
	return io.NewSectionReader(e, 0, e.Size()), nil
}

func (s *archiveSource) read(name string, limit int64) ([]byte, error) {
	e, err := s.entry(name)
	if err != nil {
		return nil, err
	}
	return readDocument(e, limit)
}

// An archivedImage is one element of manifest.json.
type archivedImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

func (p *Puller) openArchive(ref Reference) (_ *Image, err error) {
	s, err := openArchive(ref)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	doc, err := s.read("manifest.json", p.limits().DocumentBytes)
	if err != nil {
		return nil, err
	}
	var all []archivedImage
	if err := json.Unmarshal(doc, &all); err != nil {
		return nil, api.Errorf(api.ErrInvalid, "reading manifest.json: %w", err)
	}
	if ref.tag != "" {
		all = slices.DeleteFunc(all, func(i archivedImage) bool { return !slices.Contains(i.RepoTags, ref.tag) })
	}
	if len(all) != 1 {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "the archive holds %d such images", len(all)), "name one: docker-archive:FILE@NAME:TAG")
	}
	if n, limit := len(all[0].Layers), p.limits().Layers; n > limit {
		return nil, tooMuch("the image has %d layers, the limit is %d", int64(n), int64(limit))
	}
	raw, err := s.read(all[0].Config, p.limits().DocumentBytes)
	if err != nil {
		return nil, err
	}
	digest, _, err := v1.SHA256(bytes.NewReader(raw))
	if err != nil {
		return nil, err
	}
	img := &Image{Reference: ref, Digest: digest.String(), source: s}
	for _, name := range all[0].Layers {
		e, err := s.entry(name)
		if err != nil {
			return nil, err
		}
		img.layers = append(img.layers, layer{size: e.Size(), name: name})
	}
	return img, img.configure(raw)
}

func (s *archiveSource) blob(_ context.Context, l layer) (io.ReadCloser, error) {
	e, err := s.entry(l.name)
	if err != nil {
		return nil, err
	}
	return io.NopCloser(e), nil
}

func (s *archiveSource) Close() error { return s.f.Close() }
