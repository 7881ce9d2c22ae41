// Package artifact keeps large, immutable things that pyro makes once and uses
// often: environment images, guest kernels. Each is a small directory of files
// named by its digest; a name (such as "debian:12") is a reference to one.
//
// An install appears as a whole or not at all, whatever is killed when; two
// installs of one name at once build it once; what was installed is checked
// whenever it is used, cheaply as long as nobody has touched it; and nothing
// is removed while somebody holds it. Below the store's directory:
//
//	objects/HEX/             one artifact: its files and manifest.json
//	refs/NAME.json           which artifact a name means
//	locks/HEX                shared by those who hold an artifact
//	build/NAME.lock          held by the process that builds NAME
//	build/NAME.leash         open in the builder and in all that it starts
//	build/NAME/              what the builder has made so far
//	build/NAME.keep/         downloads that the next attempt can use
package artifact

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// Options configures a Store.
type Options struct {
	// Dir is made with mode 0700 if it is not there.
	Dir string
	// Noun says in messages what the store keeps: "environment".
	Noun   string
	Logger *slog.Logger
}

// A Store is one directory of artifacts. It keeps nothing in memory: several
// processes may use the same directory at once. Its methods may be called
// concurrently.
type Store struct {
	dir  string
	noun string
	log  *slog.Logger
}

// Open makes the store's directories where they are missing.
func Open(opts Options) (*Store, error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Store{dir: opts.Dir, noun: opts.Noun, log: opts.Logger}
	for _, dir := range []string{s.dir, s.sub("objects"), s.sub("refs"), s.sub("locks"), s.sub("build")} {
		if err := statedir.MakePrivate(dir); err != nil {
			return nil, fmt.Errorf("opening the %s cache: %w", s.noun, err)
		}
	}
	return s, nil
}

// Dir returns the store's directory.
func (s *Store) Dir() string { return s.dir }

func (s *Store) sub(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// A Manifest describes one installed artifact.
type Manifest struct {
	// Digest is "sha256:" and the hexadecimal SHA-256 of the list of files,
	// one line "HASH SIZE PATH\n" each in the order of Files, where HASH is
	// that of [HashFile]. Equal content has equal digests.
	Digest string `json:"digest"`
	// Files is sorted by path.
	Files []File `json:"files"`
	// Properties are the builder's own facts about the content.
	Properties map[string]string `json:"properties,omitempty"`
	Created    time.Time         `json:"created"`
}

// A File is one file of an artifact.
type File struct {
	Path   string `json:"path"` // slash-separated, below the artifact's directory
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // as made by HashFile
	Stamp  Stamp  `json:"stamp"`
}

// A Stamp changes whenever a file is written, replaced or copied: as long as
// it is the same, the content that was hashed is still there.
type Stamp struct {
	ModTimeNS    int64  `json:"mtime_ns"`
	ChangeTimeNS int64  `json:"ctime_ns"`
	Inode        uint64 `json:"inode"`
}

// A Ref is what a name means now.
type Ref struct {
	Name   string `json:"name"`
	Digest string `json:"digest"`
	// Recipe identifies what it was built from; an install with another
	// recipe builds anew.
	Recipe string `json:"recipe"`
}

const manifestName = "manifest.json"

var digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// maxName bounds a name so that its file name, escaped, stays below the 255
// bytes of every Linux file system.
const maxName = 80

// Lookup returns the reference and the manifest of an installed name without
// holding or checking it. An absent one is api.ErrNotFound.
func (s *Store) Lookup(name string) (Ref, Manifest, error) {
	ref, err := s.readRef(name)
	if err != nil {
		return Ref{}, Manifest{}, err
	}
	m, err := s.readManifest(ref.Digest)
	if err != nil {
		return Ref{}, Manifest{}, err
	}
	return ref, m, nil
}

// ObjectDir returns the directory of the artifact with that digest.
func (s *Store) ObjectDir(digest string) string { return s.sub("objects", hexOf(digest)) }

// Refs returns what every installed name means.
func (s *Store) Refs() ([]Ref, error) {
	entries, err := os.ReadDir(s.sub("refs"))
	if err != nil {
		return nil, fmt.Errorf("listing the %s cache: %w", s.noun, err)
	}
	var refs []Ref
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".json" {
			continue
		}
		var r Ref
		if err := statedir.ReadJSON(s.sub("refs", e.Name()), &r); err != nil || !digestPattern.MatchString(r.Digest) {
			s.log.Warn("ignoring an unreadable reference", "file", e.Name(), "error", err)
			continue
		}
		refs = append(refs, r)
	}
	return refs, nil
}

func (s *Store) readRef(name string) (Ref, error) {
	base, err := fileName(name)
	if err != nil {
		return Ref{}, err
	}
	var r Ref
	err = statedir.ReadJSON(s.sub("refs", base+".json"), &r)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Ref{}, api.Errorf(api.ErrNotFound, "%s %q is not installed", s.noun, name)
	case err != nil:
		return Ref{}, api.Errorf(api.ErrDamaged, "%s %q: %w", s.noun, name, err)
	case r.Name != name || !digestPattern.MatchString(r.Digest):
		return Ref{}, api.Errorf(api.ErrDamaged, "%s %q: its reference file holds something else", s.noun, name)
	}
	return r, nil
}

func (s *Store) readManifest(digest string) (Manifest, error) {
	if !digestPattern.MatchString(digest) {
		return Manifest{}, api.Errorf(api.ErrInvalid, "%q is not a digest", digest)
	}
	var m Manifest
	err := statedir.ReadJSON(filepath.Join(s.ObjectDir(digest), manifestName), &m)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Manifest{}, api.Errorf(api.ErrNotFound, "%s %s is not installed", s.noun, short(digest))
	case err != nil:
		return Manifest{}, api.Errorf(api.ErrDamaged, "%s %s: %w", s.noun, short(digest), err)
	case m.Digest != digest || digestOf(m.Files) != digest:
		return Manifest{}, api.Errorf(api.ErrDamaged, "%s %s: its manifest describes something else", s.noun, short(digest))
	}
	return m, nil
}

// fileName turns a name into one path element.
func fileName(name string) (string, error) {
	if name == "" || len(name) > maxName {
		return "", api.Errorf(api.ErrInvalid, "the name %.90q is empty or longer than %d bytes", name, maxName)
	}
	return url.PathEscape(name), nil
}

func hexOf(digest string) string {
	if !digestPattern.MatchString(digest) {
		panic("artifact: a digest that was not checked: " + digest)
	}
	return digest[len("sha256:"):]
}

// short is the form of a digest for messages.
func short(digest string) string {
	if len(digest) > len("sha256:")+12 {
		return digest[:len("sha256:")+12]
	}
	return digest
}
