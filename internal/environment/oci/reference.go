package oci

import (
	"errors"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/pyro-mcp/pyro/api"
)

// The kinds of references, each with what stands before it.
const (
	registryScheme = "docker://"
	layoutScheme   = "oci-layout:"
	archiveScheme  = "docker-archive:"
)

// A Reference says where an image is.
type Reference struct {
	scheme string
	image  name.Reference // registryScheme
	path   string         // the others: absolute
	tag    string         // the others: which of several images, "" for the only one
}

// IsReference reports whether s begins like a reference, rather than being the
// name of an environment.
func IsReference(s string) bool {
	for _, scheme := range []string{registryScheme, layoutScheme, archiveScheme} {
		if strings.HasPrefix(s, scheme) {
			return true
		}
	}
	return false
}

// maxReference bounds a reference in bytes: a path of the host, or the 255 of a
// repository with a registry, a tag and a digest.
const maxReference = 4096

var (
	malformed    = regexp.MustCompile(`^/|//|\.\.`)
	errMalformed = errors.New("an element of its path is empty or has two dots")
)

// ParseReference reads docker://[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST],
// oci-layout:DIRECTORY[@NAME] or docker-archive:FILE[@NAME]. A relative path is
// taken from the working directory; one with an @ in it needs another behind it.
func ParseReference(s string) (Reference, error) {
	if len(s) > maxReference {
		return Reference{}, api.Errorf(api.ErrInvalid, "an image reference has %d bytes, the limit is %d", len(s), maxReference)
	}
	if rest, ok := strings.CutPrefix(s, registryScheme); ok {
		image, err := name.ParseReference(rest)
		if err == nil && malformed.MatchString(rest) {
			err = errMalformed // the library lets these pass
		}
		if err != nil {
			return Reference{}, api.WithHint(api.Errorf(api.ErrInvalid, "%.200q is no image reference: %w", s, err),
				"write docker://NAME:TAG, docker://HOST:PORT/NAME:TAG or docker://NAME@sha256:DIGEST")
		}
		return Reference{scheme: registryScheme, image: image}, nil
	}
	for _, scheme := range []string{layoutScheme, archiveScheme} {
		rest, ok := strings.CutPrefix(s, scheme)
		if !ok {
			continue
		}
		r := Reference{scheme: scheme}
		r.path = rest
		if i := strings.LastIndexByte(rest, '@'); i >= 0 {
			r.path, r.tag = rest[:i], rest[i+1:]
		}
		if r.path == "" || strings.ContainsRune(rest, 0) {
			return Reference{}, api.WithHint(api.Errorf(api.ErrInvalid, "%.200q names no file", s), "write %sPATH", scheme)
		}
		var err error
		if r.path, err = filepath.Abs(r.path); err != nil {
			return Reference{}, err
		}
		return r, nil
	}
	return Reference{}, api.WithHint(api.Errorf(api.ErrInvalid, "%.200q is no image reference", s),
		"begin it with docker://, oci-layout: or docker-archive:")
}

// String returns the reference in full: with the registry and the tag that a
// short one means, and an absolute path. Equal strings mean equal places.
func (r Reference) String() string {
	if r.scheme == registryScheme {
		return registryScheme + r.image.Name()
	}
	s := r.scheme + r.path
	if r.tag != "" || strings.Contains(r.path, "@") {
		s += "@" + r.tag
	}
	return s
}

var notInName = regexp.MustCompile(`[^A-Za-z0-9._-]+`)

// ShortName is what an environment from there is called unless the user calls
// it something else: as docker would for a registry's image ("python:3.13-slim"),
// after the file or directory for others.
func (r Reference) ShortName() string {
	if r.scheme != registryScheme {
		base := filepath.Base(r.path)
		for _, ext := range []string{".gz", ".tar"} {
			base = strings.TrimSuffix(base, ext)
		}
		if r.tag != "" {
			base += "-" + r.tag
		}
		return strings.Trim(notInName.ReplaceAllString(base, "-"), "-.")
	}
	repo := r.image.Context()
	short := repo.RepositoryStr()
	if repo.RegistryStr() == name.DefaultRegistry {
		short = strings.TrimPrefix(short, "library/")
	} else {
		short = repo.RegistryStr() + "/" + short
	}
	if d, ok := r.image.(name.Digest); ok {
		return short + "@" + d.DigestStr()
	}
	return short + ":" + r.image.Identifier()
}
