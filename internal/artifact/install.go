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
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// An Install says what to install under a name and how to make it.
type Install struct {
	Name string
	// Recipe identifies what Build makes. An artifact that was installed from
	// the same recipe and is whole is used as it is.
	Recipe string
	// NeedBytes is the room that Build and its result take at most, checked
	// before it begins.
	NeedBytes int64
	// Build makes the artifact's files below b.Out.
	Build func(ctx context.Context, b *Build) error
	// Clean removes what Build, if killed, may have left outside b.Dir or
	// inside it and hard to remove (another user's files). It is called before
	// and after Build, and by Prune; nil if there is no such thing.
	Clean Cleaner
	// Progress may be nil.
	Progress func(api.Progress)
}

// A Cleaner removes what a build leaves besides plain files of the user's own.
// It has to work in any state that a kill can leave. Before keep is removed,
// which outlives failed attempts otherwise, it is called with all set.
type Cleaner func(ctx context.Context, b *Build, all bool) error

// A Build is one attempt to make an artifact.
type Build struct {
	// Dir is private to this attempt, empty at first and removed afterwards.
	Dir string
	// Keep is a directory that outlives failed attempts, for downloads. It is
	// removed after a successful one and by Prune.
	Keep string
	// Out is the directory below Dir whose regular files become the artifact.
	Out string
	// Leash must be inherited by every process that Build starts: if this
	// process is killed, the next attempt ends whatever still has it open.
	Leash *os.File
	// Properties go into the manifest. Build may fill it.
	Properties map[string]string
}

// Do returns the artifact that in describes, held: the installed one if it is
// whole, else one built now, or by another process that was quicker. A failed
// or cancelled build leaves what was installed before as it was.
func (s *Store) Do(ctx context.Context, in Install) (*Held, error) {
	base, err := fileName(in.Name)
	if err != nil {
		return nil, err
	}
	progress := in.Progress
	if progress == nil {
		progress = func(api.Progress) {}
	}
	if h, err := s.installed(ctx, in); h != nil || err != nil {
		return h, err
	}
	waited := false
	lockFile, err := lock(ctx, s.sub("build", base+".lock"), unix.LOCK_EX, func() {
		waited = true
		progress(api.Progress{Phase: "waiting", Message: fmt.Sprintf("another pyro is building %s %s, waiting for it", s.noun, in.Name)})
	})
	if err != nil {
		return nil, err
	}
	defer lockFile.Close()
	if waited {
		if h, err := s.installed(ctx, in); h != nil || err != nil {
			return h, err
		}
	}
	return s.build(ctx, in, base, progress)
}

// installed returns the installed artifact if it is whole and of the right
// recipe, and nil if it has to be built.
func (s *Store) installed(ctx context.Context, in Install) (*Held, error) {
	ref, err := s.readRef(in.Name)
	if err == nil && ref.Recipe != in.Recipe {
		s.log.Info("installed from another recipe, building anew", "name", in.Name)
		return nil, nil
	}
	var h *Held
	if err == nil {
		h, err = s.acquire(ctx, in.Name, true)
	}
	switch {
	case err == nil:
		return h, nil
	case errors.Is(err, api.ErrNotFound):
		return nil, nil
	case errors.Is(err, api.ErrDamaged):
		s.log.Warn("the installed one is damaged, building anew", "name", in.Name, "error", err)
		return nil, nil
	}
	return nil, err
}

func (s *Store) build(ctx context.Context, in Install, base string, progress func(api.Progress)) (_ *Held, err error) {
	b, err := s.newBuild(base)
	if err != nil {
		return nil, err
	}
	defer b.Leash.Close()
	if err := s.clean(ctx, in, b, false); err != nil {
		return nil, fmt.Errorf("clearing away an earlier attempt: %w", err)
	}
	if err := CheckFree(s.dir, in.NeedBytes); err != nil {
		return nil, err
	}
	defer func() {
		// Also when the caller cancelled: what is left now is in nobody's
		// way, but takes room.
		bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if cerr := s.clean(bound, in, b, err == nil); cerr != nil {
			s.log.Warn("clearing a build directory", "dir", b.Dir, "error", cerr)
		}
	}()
	for _, dir := range []string{b.Dir, b.Out, b.Keep} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := in.Build(ctx, b); err != nil {
		return nil, explainFull(err, s.dir)
	}
	progress(api.Progress{Phase: "verifying", Message: "writing to the disk and verifying"})
	h, err := s.publish(ctx, in, b)
	if err != nil {
		return nil, explainFull(fmt.Errorf("installing %s %q: %w", s.noun, in.Name, err), s.dir)
	}
	return h, nil
}

func (s *Store) newBuild(base string) (*Build, error) {
	b := &Build{Dir: s.sub("build", base), Keep: s.sub("build", base+".keep"), Properties: map[string]string{}}
	b.Out = filepath.Join(b.Dir, "out")
	var err error
	b.Leash, err = os.OpenFile(s.sub("build", base+".leash"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	return b, err
}

// clean ends what an attempt has left running and removes its files, with all
// set also those that the next attempt could use.
func (s *Store) clean(ctx context.Context, in Install, b *Build, all bool) error {
	killed, err := killHolders(ctx, b.Leash)
	if killed > 0 {
		s.log.Info("ended processes of an unfinished build", "name", in.Name, "count", killed)
	}
	if err != nil {
		return err
	}
	if in.Clean != nil {
		if err := in.Clean(ctx, b, all); err != nil {
			return err
		}
	}
	if all {
		if err := os.RemoveAll(b.Keep); err != nil {
			return err
		}
	}
	return os.RemoveAll(b.Dir)
}

// publish makes what Build left in b.Out the artifact that in.Name means.
func (s *Store) publish(ctx context.Context, in Install, b *Build) (*Held, error) {
	m := Manifest{Properties: b.Properties, Created: time.Now().UTC().Truncate(time.Second)}
	err := filepath.WalkDir(b.Out, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return nil
		}
		file, err := seal(ctx, b.Out, path)
		m.Files = append(m.Files, file)
		return err
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(m.Files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	m.Digest = digestOf(m.Files)
	if err := statedir.WriteJSON(filepath.Join(b.Out, manifestName), m); err != nil {
		return nil, err
	}
	if err := syncTree(b.Out); err != nil {
		return nil, err
	}
	// Held from before it is there, so that no prune can take it away.
	lockFile, err := lock(ctx, s.sub("locks", hexOf(m.Digest)), unix.LOCK_SH, nil)
	if err != nil {
		return nil, err
	}
	if err := s.moveIn(ctx, in, b, m); err != nil {
		lockFile.Close()
		return nil, err
	}
	return &Held{Manifest: m, Dir: s.ObjectDir(m.Digest), Lock: lockFile}, nil
}

func (s *Store) moveIn(ctx context.Context, in Install, b *Build, m Manifest) error {
	object := s.ObjectDir(m.Digest)
	// The same content may be there under another name, or damaged. Whole, it
	// stays: machines run on it. Damaged, it makes way; who has its files open
	// keeps them.
	if old, err := s.readManifest(m.Digest); err == nil && s.verify(ctx, &old, true) == nil {
		return s.writeRef(in, m.Digest)
	}
	if err := os.Rename(object, filepath.Join(b.Dir, "damaged")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(b.Out, object); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(object)); err != nil {
		return err
	}
	failpoint.Hit("install/moved")
	return s.writeRef(in, m.Digest)
}

func (s *Store) writeRef(in Install, digest string) error {
	base, err := fileName(in.Name)
	if err != nil {
		return err
	}
	return statedir.WriteJSON(s.sub("refs", base+".json"), Ref{Name: in.Name, Digest: digest, Recipe: in.Recipe})
}

// seal makes a built file read-only and durable, and describes it.
func seal(ctx context.Context, root, path string) (File, error) {
	rel, err := filepath.Rel(root, path)
	if err != nil {
		return File{}, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return File{}, err
	}
	if !fi.Mode().IsRegular() {
		return File{}, api.Errorf(api.ErrInternal, "%s is not a regular file", rel)
	}
	if err := f.Chmod(0o400); err != nil {
		return File{}, err
	}
	sum, err := HashFile(ctx, f)
	if err != nil {
		return File{}, err
	}
	if err := f.Sync(); err != nil {
		return File{}, fmt.Errorf("writing %s to the disk: %w", rel, err)
	}
	stamp, size, err := stampOf(f)
	if err != nil {
		return File{}, err
	}
	return File{Path: filepath.ToSlash(rel), Size: size, SHA256: sum, Stamp: stamp}, nil
}

func syncTree(root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return syncDir(path)
	})
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
