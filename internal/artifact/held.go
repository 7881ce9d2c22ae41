package artifact

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// Held is an artifact that was checked and will not be removed until Close.
type Held struct {
	Manifest
	// Dir is the artifact's directory.
	Dir string
	// Lock holds the artifact. A child process that inherits it holds the
	// artifact too, also after Close here.
	Lock *os.File
}

// Path returns where a file of the artifact lies on the host.
func (h *Held) Path(name string) string { return filepath.Join(h.Dir, filepath.FromSlash(name)) }

// Close gives up this process's hold. Safe to call twice and on nil.
func (h *Held) Close() error {
	if h == nil || h.Lock == nil {
		return nil
	}
	err := h.Lock.Close()
	h.Lock = nil
	return err
}

// Acquire holds and checks what name means. Absent is api.ErrNotFound; content
// that is not what was installed is api.ErrDamaged.
func (s *Store) Acquire(ctx context.Context, name string) (*Held, error) {
	return s.acquire(ctx, name, false)
}

func (s *Store) acquire(ctx context.Context, name string, full bool) (*Held, error) {
	// An install of the same name together with a prune can take the digest
	// away between the two steps; then the reference is a new one.
	for range 3 {
		ref, err := s.readRef(name)
		if err != nil {
			return nil, err
		}
		h, err := s.acquireDigest(ctx, ref.Digest, full)
		if errors.Is(err, api.ErrNotFound) {
			if again, rerr := s.readRef(name); rerr == nil && again.Digest == ref.Digest {
				return nil, api.Errorf(api.ErrDamaged, "%s %q: its files are gone", s.noun, name)
			}
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s %q: %w", s.noun, name, err)
		}
		return h, nil
	}
	return nil, api.Errorf(api.ErrBusy, "%s %q keeps changing", s.noun, name)
}

// AcquireDigest is [Store.Acquire] for one exact artifact, whatever any name
// means by now.
func (s *Store) AcquireDigest(ctx context.Context, digest string) (*Held, error) {
	if !digestPattern.MatchString(digest) {
		return nil, api.Errorf(api.ErrInvalid, "%q is not a digest", digest)
	}
	return s.acquireDigest(ctx, digest, false)
}

func (s *Store) acquireDigest(ctx context.Context, digest string, full bool) (_ *Held, err error) {
	f, err := lock(ctx, s.sub("locks", hexOf(digest)), unix.LOCK_SH, nil)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	m, err := s.readManifest(digest)
	if err != nil {
		return nil, err
	}
	if err := s.verify(ctx, &m, full); err != nil {
		return nil, err
	}
	return &Held{Manifest: m, Dir: s.ObjectDir(digest), Lock: f}, nil
}

// verify checks the files of m: their stamps, and where a stamp differs or full
// is set their content. Stamps that had changed over equal content (a restored
// backup) are recorded.
func (s *Store) verify(ctx context.Context, m *Manifest, full bool) error {
	restamped := false
	for i := range m.Files {
		file := &m.Files[i]
		changed, err := verifyFile(ctx, filepath.Join(s.ObjectDir(m.Digest), filepath.FromSlash(file.Path)), file, full)
		if err != nil {
			return err
		}
		restamped = restamped || changed
	}
	if restamped {
		if err := statedir.WriteJSON(filepath.Join(s.ObjectDir(m.Digest), manifestName), m); err != nil {
			s.log.Warn("recording new file stamps", "error", err) // costs only time, next time
		}
	}
	return nil
}

func verifyFile(ctx context.Context, path string, want *File, full bool) (restamped bool, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) {
		return false, api.Errorf(api.ErrDamaged, "%s is missing", want.Path)
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	stamp, size, err := stampOf(f)
	if err != nil {
		return false, err
	}
	if size != want.Size {
		return false, api.Errorf(api.ErrDamaged, "%s has %d bytes instead of %d", want.Path, size, want.Size)
	}
	if stamp == want.Stamp && !full {
		return false, nil
	}
	sum, err := HashFile(ctx, f)
	if err != nil {
		return false, fmt.Errorf("checking %s: %w", want.Path, err)
	}
	if sum != want.SHA256 {
		return false, api.Errorf(api.ErrDamaged, "%s is not what was installed", want.Path)
	}
	restamped = stamp != want.Stamp
	want.Stamp = stamp
	return restamped, nil
}

// IsHeld reports whether anybody holds the artifact at this moment.
func (s *Store) IsHeld(digest string) (bool, error) {
	if !digestPattern.MatchString(digest) {
		return false, api.Errorf(api.ErrInvalid, "%q is not a digest", digest)
	}
	f, err := tryLock(s.sub("locks", hexOf(digest)), unix.LOCK_EX)
	if errors.Is(err, api.ErrBusy) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return false, f.Close()
}
