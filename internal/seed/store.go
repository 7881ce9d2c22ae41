package seed

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// The names below a store's directory; the package comment says what they are.
const (
	objectsDir   = "objects"
	locksDir     = "locks"
	buildDir     = "build"
	imageName    = "seed.ext4"
	manifestName = "manifest"
	recordName   = "seed.json"
)

var digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// A record is what seed.json holds.
type record struct {
	Digest        string    `json:"digest"`
	ImageBytes    int64     `json:"image_bytes"`
	ManifestBytes int64     `json:"manifest_bytes"`
	EntryCount    int64     `json:"entry_count"`
	BytesWritten  int64     `json:"bytes_written"`
	Created       time.Time `json:"created"`
}

// A Store is a directory of seeds. It keeps nothing in memory: several
// processes may use the same directory at once. Its methods may be called
// concurrently.
type Store struct {
	dir string
	log *slog.Logger
}

// Open makes the store's directories where they are missing. logger may be nil.
func Open(dir string, logger *slog.Logger) (*Store, error) {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	s := &Store{dir: dir, log: logger}
	for _, d := range []string{dir, s.sub(objectsDir), s.sub(locksDir), s.sub(buildDir)} {
		if err := statedir.MakePrivate(d); err != nil {
			return nil, fmt.Errorf("opening the seed store: %w", err)
		}
	}
	return s, nil
}

func (s *Store) sub(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

func (s *Store) objectDir(digest string) string {
	return s.sub(objectsDir, strings.TrimPrefix(digest, "sha256:"))
}

func (s *Store) lockFile(digest string) string {
	return s.sub(locksDir, strings.TrimPrefix(digest, "sha256:"))
}

// Build makes a seed of a source and returns it held. A tree that is there
// already, from whatever source, is not stored twice. What cannot be read is
// left out and reported in Seed.Info; a damaged archive is ErrDamaged, one with
// names that leave it ErrDenied, and more than a million entries, 64 GiB, or
// the room on the disk is ErrExhausted. progress may be nil.
func (s *Store) Build(ctx context.Context, src Source, progress func(api.Progress)) (*Seed, error) {
	in, err := open(ctx, src, progress)
	if err != nil {
		return nil, err
	}
	defer in.close()
	what := src.Path
	if what == "" {
		what = "nothing"
	}
	seed, err := s.build(ctx, in, src)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		err = api.WithHint(api.Errorf(api.ErrExhausted, "%w", err), "free space on the disk of %s", s.dir)
	}
	if err != nil {
		return nil, fmt.Errorf("making a seed of %s: %w", what, err)
	}
	return seed, nil
}

func (s *Store) build(ctx context.Context, in input, src Source) (_ *Seed, err error) {
	size := in.size()
	disk, need, err := size.diskBytes()
	if err != nil {
		return nil, err
	}
	if err := artifact.CheckFree(s.dir, need); err != nil {
		return nil, err
	}
	name := make([]byte, 8)
	if _, err := rand.Read(name); err != nil {
		return nil, err
	}
	dir := s.sub(buildDir, hex.EncodeToString(name))
	// Whoever finds the lock free may remove the directory.
	own, err := artifact.TryOwn(dir + ".lock")
	if err != nil {
		return nil, err
	}
	defer func() {
		if rerr := os.RemoveAll(dir); rerr != nil {
			s.log.Warn("removing a build directory", "dir", dir, "error", rerr)
		} else {
			_ = os.Remove(dir + ".lock")
		}
		own.Close()
	}()
	out := filepath.Join(dir, "out")
	if err := os.MkdirAll(out, 0o700); err != nil {
		return nil, err
	}
	rec, err := write(in, src, out, disk)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	seed, err := s.install(ctx, out, rec)
	if err != nil {
		return nil, err
	}
	seed.Info = in.info()
	return seed, nil
}

// write makes the files of a seed in dir, all on stable storage.
func write(in input, src Source, dir string, disk int64) (rec record, err error) {
	image, err := os.OpenFile(filepath.Join(dir, imageName), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return rec, err
	}
	defer image.Close()
	list, err := os.OpenFile(filepath.Join(dir, manifestName), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return rec, err
	}
	defer list.Close()
	sink, err := newImageSink(image, list, disk, in.topTime(), in.sorted(), src.UID, src.GID)
	if err != nil {
		return rec, err
	}
	if err := in.copy(sink); err != nil {
		return rec, err
	}
	if rec.Digest, err = sink.close(); err != nil {
		return rec, err
	}
	if rec.ImageBytes, err = seal(image); err != nil {
		return rec, err
	}
	if rec.ManifestBytes, err = seal(list); err != nil {
		return rec, err
	}
	info := in.info()
	rec.EntryCount, rec.BytesWritten, rec.Created = info.EntryCount, info.BytesWritten, time.Now().UTC().Truncate(time.Second)
	if err := statedir.WriteJSON(filepath.Join(dir, recordName), rec); err != nil {
		return rec, err
	}
	return rec, syncDir(dir)
}

// seal makes a file read-only and durable, and returns its size.
func seal(f *os.File) (int64, error) {
	if err := f.Chmod(0o400); err != nil {
		return 0, err
	}
	if err := f.Sync(); err != nil {
		return 0, fmt.Errorf("writing to the disk: %w", err)
	}
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// install moves what was built in out to its place, or finds it there.
func (s *Store) install(ctx context.Context, out string, rec record) (_ *Seed, err error) {
	// Held from before it is there, so that no Prune can take it away.
	hold, err := artifact.Hold(ctx, s.lockFile(rec.Digest))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			hold.Close()
		}
	}()
	object := s.objectDir(rec.Digest)
	for i := range 3 {
		if err = os.Rename(out, object); err == nil || !errors.Is(err, fs.ErrExist) {
			break
		}
		if _, err = s.check(rec.Digest); err == nil {
			return s.seed(rec, hold), nil
		}
		// What is damaged makes way; who has it open keeps it.
		if err = os.Rename(object, fmt.Sprintf("%s-damaged-%d", out, i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	if err != nil {
		return nil, err
	}
	if err := syncDir(s.sub(objectsDir)); err != nil {
		return nil, err
	}
	return s.seed(rec, hold), nil
}

func (s *Store) seed(rec record, hold *os.File) *Seed {
	dir := s.objectDir(rec.Digest)
	return &Seed{
		Digest: rec.Digest, ImagePath: filepath.Join(dir, imageName), Lock: hold, dir: dir,
		Info: api.WorkspaceSeed{Destination: api.WorkspacePath, EntryCount: rec.EntryCount, BytesWritten: rec.BytesWritten, Skipped: []api.SkippedEntry{}},
	}
}

// check reads the record of an installed seed and compares the files' sizes.
func (s *Store) check(digest string) (rec record, err error) {
	dir := s.objectDir(digest)
	err = statedir.ReadJSON(filepath.Join(dir, recordName), &rec)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return rec, api.Errorf(api.ErrNotFound, "seed %s is not there", digest)
	case err != nil:
		return rec, api.Errorf(api.ErrDamaged, "seed %s: %w", digest, err)
	case rec.Digest != digest:
		return rec, api.Errorf(api.ErrDamaged, "seed %s: its record is that of another", digest)
	}
	for name, size := range map[string]int64{imageName: rec.ImageBytes, manifestName: rec.ManifestBytes} {
		fi, err := os.Lstat(filepath.Join(dir, name))
		if err != nil || !fi.Mode().IsRegular() || fi.Size() != size {
			return rec, api.Errorf(api.ErrDamaged, "seed %s: its file %s is not what was written", digest, name)
		}
	}
	return rec, nil
}

// Get returns an installed seed, held. An absent one is ErrNotFound; one whose
// files have gone or changed their size ErrDamaged.
func (s *Store) Get(ctx context.Context, digest string) (*Seed, error) {
	if !digestPattern.MatchString(digest) {
		return nil, api.Errorf(api.ErrInvalid, "%.80q is not a digest", digest)
	}
	hold, err := artifact.Hold(ctx, s.lockFile(digest))
	if err != nil {
		return nil, err
	}
	rec, err := s.check(digest)
	if err != nil {
		hold.Close()
		return nil, err
	}
	return s.seed(rec, hold), nil
}

// Prune removes the seeds that inUse does not name and nobody holds, and what
// broken-off builds have left.
func (s *Store) Prune(ctx context.Context, inUse []string) (api.PruneResult, error) {
	out := api.PruneResult{Removed: []string{}}
	objects, err := os.ReadDir(s.sub(objectsDir))
	if err != nil {
		return out, err
	}
	var errs []error
	for _, o := range objects {
		if ctx.Err() != nil {
			return out, context.Cause(ctx)
		}
		digest := "sha256:" + o.Name()
		if slices.Contains(inUse, digest) || !digestPattern.MatchString(digest) {
			continue
		}
		freed, err := s.remove(digest)
		switch {
		case errors.Is(err, api.ErrBusy):
		case err != nil:
			errs = append(errs, fmt.Errorf("removing seed %s: %w", digest, err))
		default:
			out.Removed = append(out.Removed, digest)
			out.FreedBytes += freed
		}
	}
	builds, err := filepath.Glob(s.sub(buildDir, "*.lock"))
	if err != nil {
		return out, err
	}
	for _, lock := range builds {
		own, err := artifact.TryOwn(lock)
		if err != nil {
			continue // its builder lives
		}
		dir := strings.TrimSuffix(lock, ".lock")
		out.FreedBytes += artifact.UsedBytes(dir)
		errs = append(errs, os.RemoveAll(dir), os.Remove(lock))
		out.Removed = append(out.Removed, "unfinished seed "+filepath.Base(dir))
		own.Close()
	}
	return out, errors.Join(errs...)
}

func (s *Store) remove(digest string) (int64, error) {
	own, err := artifact.TryOwn(s.lockFile(digest))
	if err != nil {
		return 0, err
	}
	defer own.Close()
	dir := s.objectDir(digest)
	freed := artifact.UsedBytes(dir)
	// The record goes first, so that what a kill leaves is no seed.
	if err := os.Remove(filepath.Join(dir, recordName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	if err := os.RemoveAll(dir); err != nil {
		return 0, err
	}
	return freed, os.Remove(s.lockFile(digest))
}
