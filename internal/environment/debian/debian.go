// Package debian builds environment images from Debian's signed packages.
//
// mmdebstrap (Debian's own tool, as root or in a user namespace) resolves,
// downloads, checks and installs the packages into a tree of its own and
// writes that as a tar archive; the archive becomes an ext4 image while it
// arrives, so that nothing is unpacked a second time.
package debian

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"runtime"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
)

// ImageFile is the image's name in an artifact that Build makes.
const ImageFile = "root.ext4"

// DiskMiBProperty is the name of the artifact property with the image's size.
const DiskMiBProperty = "disk_mib"

// A Builder builds environments.
type Builder struct {
	Mmdebstrap string // "" for the one on PATH
	Mirror     string // "" for Debian's own
	TempDir    string // "" for $TMPDIR or /var/tmp
	// ArchiveDir keeps downloaded packages from one attempt to the next.
	ArchiveDir string
	Logger     *slog.Logger
}

// RecipeID identifies everything that decides what Build makes, but for the
// packages' versions.
func (b *Builder) RecipeID(r Recipe) string {
	h := sha256.Sum256(fmt.Appendf(nil, "%q", []any{r.Version, r.Suite, r.Packages, r.DiskMiB, b.Mirror, Architecture()}))
	return hex.EncodeToString(h[:8])
}

// Architecture returns Debian's name of this machine's architecture.
func Architecture() string { return runtime.GOARCH }

// Build makes the image.
func (b *Builder) Build(ctx context.Context, r Recipe, build *artifact.Build, progress func(api.Progress)) error {
	return api.Errorf(api.ErrUnsupported, "building environments is being written")
}

// Clean removes what a killed Build has left outside the build directory.
func (b *Builder) Clean(ctx context.Context, build *artifact.Build) error { return nil }

// PruneArchives removes the downloaded packages.
func (b *Builder) PruneArchives() (freed int64, err error) { return 0, nil }
