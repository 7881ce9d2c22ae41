package artifact

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// Pruned is what Prune removed.
type Pruned struct {
	Removed    []string // digests, and names of broken-off builds
	FreedBytes int64
}

// Prune removes the artifacts that no name means, that keep does not name by
// digest and that nobody holds, and what broken-off builds have left. clean is
// called for the latter; it may be nil.
func (s *Store) Prune(ctx context.Context, keep []string, clean Cleaner) (Pruned, error) {
	var out Pruned
	wanted := map[string]bool{}
	for _, d := range keep {
		wanted[strings.TrimPrefix(d, "sha256:")] = true
	}
	refs, err := s.Refs()
	if err != nil {
		return out, err
	}
	for _, r := range refs {
		wanted[hexOf(r.Digest)] = true
	}
	objects, err := os.ReadDir(s.sub("objects"))
	if err != nil {
		return out, err
	}
	var errs []error
	for _, o := range objects {
		if wanted[o.Name()] || !digestPattern.MatchString("sha256:"+o.Name()) {
			continue
		}
		freed, err := s.removeObject(o.Name())
		if errors.Is(err, api.ErrBusy) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("removing %s %s: %w", s.noun, short("sha256:"+o.Name()), err))
			continue
		}
		out.Removed = append(out.Removed, "sha256:"+o.Name())
		out.FreedBytes += freed
	}
	names, err := s.builds()
	if err != nil {
		return out, err
	}
	for _, base := range names {
		freed, err := s.removeBuild(ctx, base, clean)
		if errors.Is(err, api.ErrBusy) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("removing the unfinished build of %s: %w", base, err))
			continue
		}
		out.Removed = append(out.Removed, "unfinished build of "+base)
		out.FreedBytes += freed
	}
	return out, errors.Join(errs...)
}

// Forget takes a name's meaning away; the artifact is left to Prune.
func (s *Store) Forget(name string) error {
	base, err := fileName(name)
	if err != nil {
		return err
	}
	if err := os.Remove(s.sub("refs", base+".json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(s.sub("refs"))
}

func (s *Store) removeObject(hex string) (int64, error) {
	path := s.sub("locks", hex)
	f, err := tryLock(path, unix.LOCK_EX)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	// A pull may have given it a name since the names were read; from here on
	// it would have to wait for the lock.
	refs, err := s.Refs()
	if err != nil {
		return 0, err
	}
	for _, r := range refs {
		if hexOf(r.Digest) == hex {
			return 0, api.ErrBusy
		}
	}
	dir := s.sub("objects", hex)
	freed := UsedBytes(dir)
	// The manifest goes first, so that what a kill leaves is no artifact.
	if err := os.Remove(filepath.Join(dir, manifestName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	if err := os.RemoveAll(dir); err != nil {
		return 0, err
	}
	return freed, os.Remove(path)
}

func (s *Store) removeBuild(ctx context.Context, base string, clean Cleaner) (int64, error) {
	f, err := tryLock(s.sub("build", base+".lock"), unix.LOCK_EX)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b, err := s.newBuild(base)
	if err != nil {
		return 0, err
	}
	defer b.Leash.Close()
	freed := UsedBytes(b.Dir) + UsedBytes(b.Keep)
	return freed, s.clean(ctx, Install{Name: base, Clean: clean}, b, true)
}

// builds returns the names of which something unfinished is left.
func (s *Store) builds() ([]string, error) {
	entries, err := os.ReadDir(s.sub("build"))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if name := strings.TrimSuffix(e.Name(), ".keep"); e.IsDir() && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names, nil
}

// UsedBytes returns the space that the files below dir take on the disk. What
// cannot be read counts as nothing.
func UsedBytes(dir string) int64 {
	var sum int64
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // it is a figure for people
		}
		var st unix.Stat_t
		if unix.Lstat(path, &st) == nil {
			sum += st.Blocks * 512
		}
		return nil
	})
	return sum
}
