package oci

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// A layoutSource is an image in a directory of the form of the OCI image
// layout. Nothing outside the directory is read, whatever lies in it.
type layoutSource struct {
	dir    *os.Root
	tag    string
	limits Limits
}

var _ manifestSource = (*layoutSource)(nil)

func openLayout(ref Reference, limits Limits) (*layoutSource, error) {
	dir, err := os.OpenRoot(ref.path)
	if err != nil {
		return nil, missing(err)
	}
	return &layoutSource{dir, ref.tag, limits}, nil
}

// missing gives a file that is not there its class.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return api.Errorf(api.ErrNotFound, "%w", err)
	}
	return err
}

// refName is the annotation with an image's name in index.json (OCI image
// layout, "index.json file").
const refName = "org.opencontainers.image.ref.name"

func (s *layoutSource) root(ctx context.Context) ([]byte, types.MediaType, error) {
	doc, err := s.read("index.json")
	if err != nil {
		return nil, "", err
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(doc))
	if err != nil {
		return nil, "", api.Errorf(api.ErrInvalid, "reading index.json: %w", err)
	}
	var fit []v1.Descriptor
	for _, d := range index.Manifests {
		if s.tag == "" || d.Annotations[refName] == s.tag || d.Digest.String() == s.tag {
			fit = append(fit, d)
		}
	}
	switch {
	case len(fit) == 0:
		return nil, "", api.Errorf(api.ErrNotFound, "the directory holds no image %.100q", s.tag)
	case len(fit) > 1:
		d, err := choose(fit)
		if err != nil {
			return nil, "", api.WithHint(api.Errorf(api.ErrInvalid, "the directory holds %d images", len(fit)), "name one: oci-layout:DIRECTORY@NAME")
		}
		fit[0] = d
	}
	doc, err = s.manifest(ctx, fit[0])
	if err != nil {
		return nil, "", err
	}
	return doc, fit[0].MediaType, matches(doc, fit[0].Digest, fit[0].Size)
}

func (s *layoutSource) manifest(_ context.Context, d v1.Descriptor) ([]byte, error) {
	if d.Digest.Algorithm != "sha256" {
		return nil, unknownDigest(d.Digest)
	}
	return s.read("blobs/sha256/" + d.Digest.Hex)
}

func (s *layoutSource) read(name string) ([]byte, error) {
	f, err := s.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	doc, err := readDocument(f, s.limits.DocumentBytes)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	return doc, nil
}

func (s *layoutSource) blob(_ context.Context, l layer) (io.ReadCloser, error) {
	return s.open("blobs/sha256/" + l.digest.Hex)
}

// open opens a regular file; it does not wait for the writer of a pipe.
func (s *layoutSource) open(name string) (*os.File, error) {
	f, err := s.dir.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, missing(err)
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = api.Errorf(api.ErrInvalid, "%s is not a regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (s *layoutSource) Close() error { return s.dir.Close() }
