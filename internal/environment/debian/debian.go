// Package debian builds environment images from Debian's signed packages.
//
// mmdebstrap resolves, downloads, checks and installs the packages and writes
// the tree as a tar stream; the stream becomes an ext4 image while it arrives,
// so that nothing is unpacked a second time and no privilege is needed.
package debian

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/ext4image"
	"github.com/pyro-mcp/pyro/internal/mmdebstrap"
)

// ImageFile is the image's name in an artifact that Build makes.
const ImageFile = "root.ext4"

// DiskMiBProperty is the name of the artifact property with the image's size.
const DiskMiBProperty = "disk_mib"

// A Builder builds environments.
type Builder struct {
	Tool   mmdebstrap.Tool
	Logger *slog.Logger
}

// Architecture returns Debian's name of this machine's architecture; for those
// that pyro runs on, Go has the same names.
func Architecture() string { return runtime.GOARCH }

// RecipeID identifies everything that decides what Build makes, but for the
// packages' versions.
func (b *Builder) RecipeID(r Recipe) string {
	h := sha256.Sum256(fmt.Appendf(nil, "%q %q %q %d %q %q", r.Version, r.Suite, r.Packages, r.DiskMiB, b.Tool.Mirror, Architecture()))
	return hex.EncodeToString(h[:8])
}

// Build makes the image of r, as a builder of package artifact.
func (b *Builder) Build(ctx context.Context, r Recipe, build *artifact.Build, progress func(api.Progress)) error {
	f, err := os.OpenFile(filepath.Join(build.Out, ImageFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	began := time.Now()
	err = b.Tool.Run(ctx, build, mmdebstrap.Job{
		Suite:     r.Suite,
		Variant:   "apt",
		Include:   r.Packages,
		Options:   options(),
		NeedBytes: r.NeedBytes,
		Progress:  progress,
		Consume: func(ctx context.Context, tree io.Reader) error {
			return WriteImage(ctx, f, r, began, tree)
		},
	})
	if err != nil {
		return err
	}
	build.Properties[DiskMiBProperty] = strconv.Itoa(r.DiskMiB)
	build.Properties["suite"] = r.Suite
	return f.Close()
}

// Clean is the artifact.Cleaner that belongs to Build.
func (b *Builder) Clean(ctx context.Context, build *artifact.Build, all bool) error {
	return b.Tool.Clean(ctx, build, all)
}

// options are mmdebstrap's arguments that make the tree small and quick to
// build. The dpkg options stay in the environment's own configuration.
func options() []string {
	out := []string{
		// A tree that a crash has spoilt is built again, and a guest's disk is
		// as disposable: no waiting for the disk after every file.
		"--dpkgopt=force-unsafe-io",
		"--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/info/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
		"--dpkgopt=path-include=/usr/share/locale/locale.alias",
		"--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-include=/usr/share/doc/*/copyright",
		"--dpkgopt=path-exclude=/usr/share/lintian/*",
	}
	// Without the hook Debian 12 gets its merged /usr from the package
	// usrmerge, which brings all of Perl.
	const hooks = "/usr/share/mmdebstrap/hooks/merged-usr"
	if _, err := os.Stat(hooks); err == nil {
		out = append(out, "--hook-dir="+hooks)
	}
	return out
}

// WriteImage makes f the image of r from the tar stream of its tree. What is
// younger than began was made by the build itself and gets the age of the
// newest file of the packages.
func WriteImage(ctx context.Context, f *os.File, r Recipe, began time.Time, tree io.Reader) error {
	w, err := ext4image.New(f, ext4image.Options{
		SizeBytes:  int64(r.DiskMiB) << 20,
		UUID:       imageUUID(r.Name),
		Label:      "pyro-root",
		Time:       began,
		ClampAfter: began.Add(-time.Minute), // the builder's clock is the same, a margin costs nothing
	})
	if err != nil {
		return err
	}
	if err := w.AddTar(ctx, tree, keep); err != nil {
		return err
	}
	for _, e := range standardEntries {
		if e.always || !w.Exists(e.path) {
			if err := w.Add(e.entry(began), e.content()); err != nil {
				return err
			}
		}
	}
	return w.Close()
}

// imageUUID is fixed for a name, so that equal trees make equal images. It has
// the form of a random UUID (RFC 9562, version 4).
func imageUUID(name string) (id [16]byte) {
	sum := sha256.Sum256([]byte("pyro environment " + name))
	copy(id[:], sum[:])
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return id
}

var _ ext4image.Filter = keep

// keep is the filter between mmdebstrap's tree and the image.
func keep(h *tar.Header, content io.Reader) (io.Reader, error) {
	switch decide(h.Name, h.Typeflag) {
	case drop:
		return nil, nil
	case rewriteShadow:
		return withoutDates(h, content)
	}
	return content, nil
}
