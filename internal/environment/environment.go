// Package environment keeps the images that workspaces start from: it knows
// the curated catalog, builds an environment on this machine from its
// distribution's signed packages or from any OCI image, and hands out the
// installed image, checked and held for as long as somebody uses it.
//
// What "installed" promises (whole or absent, shared, never written) is the
// business of package artifact; what goes into an image is that of the
// packages below this one.
package environment

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/environment/debian"
	"github.com/pyro-mcp/pyro/internal/environment/oci"
	"github.com/pyro-mcp/pyro/internal/mmdebstrap"
)

// Options configures a Store.
type Options struct {
	// CacheDir is pyro's cache directory; the store uses environments and
	// layers below it.
	CacheDir string
	Logger   *slog.Logger
	// DebianMirror is used in place of Debian's own mirrors: a URL, and after
	// a space optionally another one for the security updates; "" for
	// Debian's. The packages' signatures are checked all the same. It also
	// becomes what apt uses in the guest.
	DebianMirror string
	// TempDir is where a build unpacks packages, "" for $TMPDIR or /var/tmp.
	// Other users must be able to pass through it: apt downloads as its own
	// user.
	TempDir string
	// Mmdebstrap is the build tool, "" for the one on PATH.
	Mmdebstrap string
	// RegistryMirror is asked first for images of the default registry:
	// HOST[:PORT][/PATH], "" for none.
	RegistryMirror string
}

// A Store is the catalog together with what is installed of it, and the OCI
// images that were pulled. Its methods may be called concurrently, by several
// processes too.
//
// An environment goes by its name. Where a method takes one, the reference of
// an OCI image means the environment that was pulled from there.
type Store struct {
	artifacts *artifact.Store
	debian    *debian.Builder
	images    *oci.Puller
	log       *slog.Logger
}

// Open makes the store's directory if it is not there.
func Open(opts Options) (*Store, error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	dir := filepath.Join(opts.CacheDir, "environments")
	artifacts, err := artifact.Open(artifact.Options{Dir: dir, Noun: "environment", Logger: opts.Logger})
	if err != nil {
		return nil, err
	}
	return &Store{
		artifacts: artifacts,
		log:       opts.Logger,
		images: &oci.Puller{
			CacheDir: filepath.Join(opts.CacheDir, "layers"),
			Logger:   opts.Logger,
			Mirror:   opts.RegistryMirror,
		},
		debian: &debian.Builder{
			Tool: mmdebstrap.Tool{
				Path:    opts.Mmdebstrap,
				Mirror:  opts.DebianMirror,
				TempDir: opts.TempDir,
				Logger:  opts.Logger,
			},
			Logger: opts.Logger,
		},
	}, nil
}

// Default is the environment to use when none is named.
const Default = "debian:12"

// An Image is an installed environment that was checked and will not be
// removed until Close.
type Image struct {
	Name   string
	Digest string
	// Path is the raw ext4 image. It must not be written.
	Path string
	// DiskMiB is the size of the disk that the image is.
	DiskMiB int
	// Config holds the settings of an OCI image, nothing for a curated one.
	Config api.ImageConfig
	// Lock holds the image. A child process that inherits it holds the image
	// too, also after Close here.
	Lock *os.File
}

// Close gives up this process's hold. Safe to call twice and on nil.
func (i *Image) Close() error {
	if i == nil || i.Lock == nil {
		return nil
	}
	err := i.Lock.Close()
	i.Lock = nil
	return err
}

// List returns the catalog and what is installed of it, and the pulled images
// behind it, each by name.
func (s *Store) List(ctx context.Context) ([]api.Environment, error) {
	var out []api.Environment
	for _, r := range debian.Catalog {
		env, err := s.describe(r)
		if err != nil {
			return nil, err
		}
		out = append(out, env)
	}
	installed, err := s.installedImages()
	if err != nil {
		return nil, err
	}
	for _, i := range installed {
		out = append(out, s.describeImage(i))
	}
	return out, nil
}

// Inspect describes one environment. An unknown name is api.ErrNotFound; what
// an image's reference means is only known when it is pulled.
func (s *Store) Inspect(ctx context.Context, name string) (api.Environment, error) {
	if r, ok := curated(name); ok {
		return s.describe(r)
	}
	i, err := s.findImage(name)
	if err != nil {
		return api.Environment{}, err
	}
	return s.describeImage(i), nil
}

// Pull builds the environment if it is not installed, or damaged, or made by
// an older recipe. An installed one is read in full to be sure. An image is
// looked up anew, and pulled if its reference means another one by now.
// progress may be nil; it is called from one goroutine at a time, and not any
// more when Pull has returned.
func (s *Store) Pull(ctx context.Context, name string, progress func(api.Progress)) (api.Environment, error) {
	return s.PullAs(ctx, name, "", progress)
}

// PullAs is Pull, and calls what is pulled from an image's reference alias, if
// that is not "". A name that means another image is api.ErrExists.
func (s *Store) PullAs(ctx context.Context, name, alias string, progress func(api.Progress)) (api.Environment, error) {
	r, ok := curated(name)
	if ok && alias != "" {
		return api.Environment{}, api.Errorf(api.ErrInvalid, "%s has its name from the catalog, only an image can be given another", name)
	}
	if !ok {
		i, held, err := s.pullImage(ctx, name, alias, progress)
		if err != nil {
			return api.Environment{}, err
		}
		defer held.Close()
		return s.describeImage(i), nil
	}
	held, err := s.install(ctx, r, progress)
	if err != nil {
		return api.Environment{}, err
	}
	defer held.Close()
	return s.describe(r)
}

// Use returns the environment's image, pulling it if it is not installed and
// is curated or named by an image's reference. An installed image is checked:
// at little cost unless somebody touched it. A damaged one is api.ErrDamaged;
// the next Pull mends it.
func (s *Store) Use(ctx context.Context, name string, progress func(api.Progress)) (*Image, error) {
	var held *artifact.Held
	var err error
	if r, ok := curated(name); ok {
		held, err = s.artifacts.Acquire(ctx, name)
		if errors.Is(err, api.ErrNotFound) {
			held, err = s.install(ctx, r, progress)
		}
	} else {
		held, err = s.useImage(ctx, name, progress)
	}
	if errors.Is(err, api.ErrDamaged) && api.Hint(err) == "" {
		err = api.WithHint(err, "run pyro env pull %s to build it again", name)
	}
	if err != nil {
		return nil, err
	}
	return newImage(name, held)
}

// UseDigest returns exactly the image with that digest, which a workspace was
// made from, whatever the environment's name means by now. It never pulls: an
// absent image is api.ErrNotFound.
func (s *Store) UseDigest(ctx context.Context, name, digest string) (*Image, error) {
	held, err := s.artifacts.AcquireDigest(ctx, digest)
	if errors.Is(err, api.ErrDamaged) {
		err = api.WithHint(err, "run pyro env pull %s to build it again", name)
	}
	if err != nil {
		return nil, fmt.Errorf("environment %q: %w", name, err)
	}
	return newImage(name, held)
}

// PruneOptions says what to keep.
type PruneOptions struct {
	// InUse are the digests that workspaces were made from.
	InUse []string
	// All also removes installed environments that no workspace uses.
	All bool
}

// Prune removes images that no environment name means any more, what
// broken-off pulls have left, and downloaded packages; never what a workspace
// was made from, nor what anybody holds at the moment.
func (s *Store) Prune(ctx context.Context, opts PruneOptions) (api.PruneResult, error) {
	out := api.PruneResult{Removed: []string{}}
	names := map[string]string{}
	if refs, err := s.artifacts.Refs(); err == nil {
		for _, r := range refs {
			names[r.Digest] = r.Name
			if opts.All && !slices.Contains(opts.InUse, r.Digest) {
				if err := s.forget(r); err != nil {
					return out, err
				}
			}
		}
	}
	pruned, err := s.artifacts.Prune(ctx, opts.InUse, s.debian.Clean)
	for _, what := range pruned.Removed {
		if name := names[what]; name != "" {
			what = name + " " + what
		}
		out.Removed = append(out.Removed, what)
	}
	out.FreedBytes = pruned.FreedBytes
	if err != nil {
		return out, err
	}
	return out, s.pruneLayers(opts.All, &out)
}

// forget takes the name from an image that nobody holds right now.
func (s *Store) forget(r artifact.Ref) error {
	held, err := s.artifacts.IsHeld(r.Digest)
	if err != nil || held {
		return err
	}
	return s.artifacts.Forget(r.Name)
}

func (s *Store) install(ctx context.Context, r debian.Recipe, progress func(api.Progress)) (*artifact.Held, error) {
	held, err := s.artifacts.Do(ctx, artifact.Install{
		Name:      r.Name,
		Recipe:    s.debian.RecipeID(r),
		NeedBytes: r.NeedBytes,
		Progress:  progress,
		Clean:     s.debian.Clean,
		Build: func(ctx context.Context, b *artifact.Build) error {
			return s.debian.Build(ctx, r, b, progress)
		},
	})
	if err != nil {
		return nil, fmt.Errorf("building environment %q: %w", r.Name, err)
	}
	return held, nil
}

func newImage(name string, held *artifact.Held) (*Image, error) {
	mib, err := strconv.Atoi(held.Properties[debian.DiskMiBProperty])
	if err != nil || mib <= 0 {
		held.Close()
		return nil, api.Errorf(api.ErrDamaged, "environment %q: its manifest names no disk size", name)
	}
	config, err := configOf(held.Manifest)
	if err != nil {
		held.Close()
		return nil, fmt.Errorf("environment %q: %w", name, err)
	}
	return &Image{
		Name:    name,
		Digest:  held.Digest,
		Path:    held.Path(debian.ImageFile),
		DiskMiB: mib,
		Config:  config,
		Lock:    held.Lock,
	}, nil
}

func (s *Store) describe(r debian.Recipe) (api.Environment, error) {
	env := api.Environment{
		Name:                r.Name,
		Version:             r.Version,
		Description:         r.Description,
		Source:              "debian packages",
		DefaultPackages:     r.Packages,
		Distribution:        "debian",
		DistributionVersion: r.Release,
		Platform:            "linux/" + debian.Architecture(),
	}
	ref, _, err := s.artifacts.Lookup(r.Name)
	switch {
	case errors.Is(err, api.ErrNotFound), errors.Is(err, api.ErrDamaged):
		return env, nil
	case err != nil:
		return env, err
	}
	env.Digest = ref.Digest
	env.Installed = true
	env.InstallDir = s.artifacts.ObjectDir(ref.Digest)
	env.SizeBytes = artifact.UsedBytes(env.InstallDir)
	return env, nil
}

// curated looks a name up in the catalog.
func curated(name string) (debian.Recipe, bool) {
	for _, r := range debian.Catalog {
		if r.Name == name {
			return r, true
		}
	}
	return debian.Recipe{}, false
}
