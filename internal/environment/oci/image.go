package oci

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/pyro-mcp/pyro/api"
)

// A Puller finds images and makes file systems of them. Its methods may be
// called concurrently, by several processes too.
type Puller struct {
	// CacheDir keeps the layers of registries' images, each by its digest.
	CacheDir string
	Logger   *slog.Logger
	// Mirror is asked before the default registry for that one's images:
	// HOST[:PORT][/PATH], "" for none.
	Mirror string
	// Keychain knows the user's credentials; nil for those of docker.
	Keychain authn.Keychain
	// Limits are DefaultLimits unless set.
	Limits Limits
	// RetryDelay is the wait before the second attempt to fetch something,
	// before the third it is thrice that; 0 means a second.
	RetryDelay time.Duration
	// StallLimit is how long a registry may send nothing in the middle of a
	// layer; 0 means a minute.
	StallLimit time.Duration
	// Transport replaces the connection to registries, and with it the check
	// of where they redirect to; nil but in tests.
	Transport http.RoundTripper
}

// An Image was found and its description checked; its layers were not fetched.
type Image struct {
	Reference Reference
	// Digest is that of the manifest for this platform; of an archive, which
	// has none, that of the configuration (docker's image id).
	Digest string
	Config api.ImageConfig
	// Created is when the image says it was made, the zero time if it does not.
	Created time.Time

	layers []layer
	source source
}

// CompressedBytes is the size of all layers as they are fetched.
func (i *Image) CompressedBytes() (sum int64) {
	for _, l := range i.layers {
		sum += l.size
	}
	return sum
}

// LayerDigests names the layers in the cache, from the lowest up; none for an
// image that is not from a registry.
func (i *Image) LayerDigests() []string {
	var out []string
	if _, remote := i.source.(remoteSource); remote {
		for _, l := range i.layers {
			out = append(out, l.digest.String())
		}
	}
	return out
}

// Close closes the files that the image is read from.
func (i *Image) Close() error { return i.source.Close() }

// A layer is one archive of changes.
type layer struct {
	digest v1.Hash // of the bytes as they are fetched; of no algorithm if unknown
	size   int64   // of the same
	diffID v1.Hash // of the archive, unpacked
	name   string  // in a docker archive
}

// A source is where an image's layers are.
type source interface {
	// blob returns the bytes of a layer, or of the configuration, from the
	// beginning. The caller checks them.
	blob(ctx context.Context, l layer) (io.ReadCloser, error)
	Close() error
}

// A remoteSource is worth to keep layers of, once fetched.
type remoteSource interface {
	source
	// blobFrom returns a layer's bytes from at on, which is from or, where the
	// source cannot begin there, 0.
	blobFrom(ctx context.Context, l layer, from int64) (body io.ReadCloser, at int64, err error)
}

// A manifestSource has manifests as well.
type manifestSource interface {
	source
	// root returns what the reference names: a manifest or an index.
	root(ctx context.Context) ([]byte, types.MediaType, error)
	// manifest returns the manifest or index with that digest. The caller
	// checks it.
	manifest(ctx context.Context, d v1.Descriptor) ([]byte, error)
}

// Platform returns the platform whose images are used, as in "linux/amd64".
func Platform() string { return "linux/" + runtime.GOARCH }

func (p *Puller) limits() Limits {
	if p.Limits == (Limits{}) {
		return DefaultLimits
	}
	return p.Limits
}

func (p *Puller) log() *slog.Logger {
	if p.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return p.Logger
}

// Resolve finds out what the reference means now. The caller closes the image.
func (p *Puller) Resolve(ctx context.Context, ref Reference) (_ *Image, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("looking at the image %s: %w", ref, err)
		}
	}()
	switch ref.scheme {
	case layoutScheme:
		src, err := openLayout(ref, p.limits())
		if err != nil {
			return nil, err
		}
		return p.describe(ctx, ref, src)
	case archiveScheme:
		return p.openArchive(ref)
	}
	return p.resolveRemote(ctx, ref)
}

// describe reads an image's manifest and configuration from src, which it
// closes on an error.
func (p *Puller) describe(ctx context.Context, ref Reference, src manifestSource) (_ *Image, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, src.Close())
		}
	}()
	doc, mediaType, err := src.root(ctx)
	if err != nil {
		return nil, err
	}
	m, err := p.findManifest(ctx, src, doc, mediaType)
	if err != nil {
		return nil, err
	}
	if err := p.checkManifest(m.parsed); err != nil {
		return nil, err
	}
	conf := m.parsed.Config
	body, err := src.blob(ctx, layer{digest: conf.Digest, size: conf.Size})
	if err != nil {
		return nil, fmt.Errorf("fetching the image's configuration: %w", err)
	}
	raw, err := readDocument(body, p.limits().DocumentBytes)
	body.Close()
	if err != nil {
		return nil, fmt.Errorf("fetching the image's configuration: %w", err)
	}
	if err := matches(raw, conf.Digest, conf.Size); err != nil {
		return nil, fmt.Errorf("the image's configuration: %w", err)
	}
	img := &Image{Reference: ref, Digest: m.digest.String(), source: src}
	for _, d := range m.parsed.Layers {
		img.layers = append(img.layers, layer{digest: d.Digest, size: d.Size})
	}
	return img, img.configure(raw)
}

// configure takes over the configuration file raw.
func (i *Image) configure(raw []byte) error {
	c, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return api.Errorf(api.ErrInvalid, "reading the image's configuration: %w", err)
	}
	if c.OS != "" && c.OS != "linux" || c.Architecture != "" && c.Architecture != runtime.GOARCH {
		return wrongPlatform(fmt.Sprintf("%.40s/%.40s", c.OS, c.Architecture))
	}
	if len(c.RootFS.DiffIDs) != len(i.layers) {
		return api.Errorf(api.ErrInvalid, "the image's configuration names %d layers and its manifest %d", len(c.RootFS.DiffIDs), len(i.layers))
	}
	for n, id := range c.RootFS.DiffIDs {
		if id.Algorithm != "sha256" {
			return unknownDigest(id)
		}
		i.layers[n].diffID = id
	}
	i.Created = c.Created.Time
	i.Config, err = checkConfig(c.Config)
	return err
}

// A manifest is a manifest with the digest of its bytes.
type manifest struct {
	parsed *v1.Manifest
	digest v1.Hash
}

// maxIndexes bounds indexes that lead to indexes. Images have one.
const maxIndexes = 3

// findManifest follows indexes to the manifest for this platform.
func (p *Puller) findManifest(ctx context.Context, src manifestSource, doc []byte, mediaType types.MediaType) (manifest, error) {
	for range maxIndexes {
		if err := unambiguous(doc); err != nil {
			return manifest{}, err
		}
		switch {
		case mediaType.IsImage():
			m, err := v1.ParseManifest(bytes.NewReader(doc))
			if err != nil {
				return manifest{}, api.Errorf(api.ErrInvalid, "reading the image's manifest: %w", err)
			}
			digest, _, err := v1.SHA256(bytes.NewReader(doc))
			return manifest{m, digest}, err
		case !mediaType.IsIndex():
			return manifest{}, api.Errorf(api.ErrUnsupported, "it has the media type %.100q, which is no image", mediaType)
		}
		index, err := v1.ParseIndexManifest(bytes.NewReader(doc))
		if err != nil {
			return manifest{}, api.Errorf(api.ErrInvalid, "reading the image's index: %w", err)
		}
		d, err := choose(index.Manifests)
		if err != nil {
			return manifest{}, err
		}
		if d.Size > p.limits().DocumentBytes {
			return manifest{}, tooMuch("the image's manifest has %d bytes, the limit is %d", d.Size, p.limits().DocumentBytes)
		}
		if doc, err = src.manifest(ctx, d); err != nil {
			return manifest{}, fmt.Errorf("fetching the image's manifest: %w", err)
		}
		if err := matches(doc, d.Digest, d.Size); err != nil {
			return manifest{}, fmt.Errorf("the image's manifest: %w", err)
		}
		mediaType = d.MediaType
	}
	return manifest{}, api.Errorf(api.ErrInvalid, "its indexes lead to more than %d others", maxIndexes)
}

// unambiguous refuses a document that is a manifest to one reader and an index
// to another (CVE-2021-41190).
func unambiguous(doc []byte) error {
	var both struct {
		Manifests, Layers, FSLayers json.RawMessage
		Config                      json.RawMessage
	}
	if err := json.Unmarshal(doc, &both); err != nil {
		return api.Errorf(api.ErrInvalid, "reading the image's manifest: %w", err)
	}
	if both.Manifests != nil && (both.Layers != nil || both.Config != nil || both.FSLayers != nil) {
		return api.Errorf(api.ErrInvalid, "the image's manifest is an index as well")
	}
	return nil
}

// choose picks the manifest for this platform. One that names none counts only
// if it is alone. What is no image, such as an attestation, has the platform
// "unknown".
func choose(all []v1.Descriptor) (v1.Descriptor, error) {
	var found []string
	for _, d := range all {
		if d.Platform == nil {
			if len(all) == 1 {
				return d, nil
			}
			continue
		}
		if d.Platform.OS == "linux" && d.Platform.Architecture == runtime.GOARCH {
			return d, nil
		}
		if len(found) < 20 && d.Platform.OS != "unknown" {
			found = append(found, fmt.Sprintf("%.40s/%.40s", d.Platform.OS, d.Platform.Architecture))
		}
	}
	return v1.Descriptor{}, wrongPlatform(strings.Join(found, ", "))
}

func wrongPlatform(has string) error {
	return api.WithHint(api.Errorf(api.ErrUnsupported, "there is no image for %s", Platform()), "the image is for %s", has)
}

func (p *Puller) checkManifest(m *v1.Manifest) error {
	limits := p.limits()
	if len(m.Layers) > limits.Layers {
		return tooMuch("the image has %d layers, the limit is %d", int64(len(m.Layers)), int64(limits.Layers))
	}
	if m.Config.Size < 0 || m.Config.Size > limits.DocumentBytes {
		return tooMuch("the image's configuration has %d bytes, the limit is %d", m.Config.Size, limits.DocumentBytes)
	}
	// Other things than images lie in registries too.
	if !m.Config.MediaType.IsConfig() {
		return api.Errorf(api.ErrUnsupported, "its configuration has the media type %.100q, which is no image's", m.Config.MediaType)
	}
	total := int64(0)
	for i, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		if d.Digest.Algorithm != "sha256" {
			return unknownDigest(d.Digest)
		}
		if i == 0 {
			continue
		}
		switch {
		case len(d.URLs) > 0 || !d.MediaType.IsDistributable():
			return api.Errorf(api.ErrUnsupported, "layer %d is to be fetched from somewhere else (media type %.100q)", i, d.MediaType)
		case !knownLayer(d.MediaType):
			return api.Errorf(api.ErrUnsupported, "layer %d has the unknown media type %.100q", i, d.MediaType)
		case d.Size < 0:
			return api.Errorf(api.ErrInvalid, "layer %d has %d bytes", i, d.Size)
		case d.Size > limits.CompressedBytes-total:
			return tooMuch("the image's layers have %d bytes or more, the limit is %d", d.Size, limits.CompressedBytes)
		}
		total += d.Size
	}
	return nil
}

// knownLayer reports whether t is an archive in a compression that is known.
// Which one it really is shows in its first bytes.
func knownLayer(t types.MediaType) bool {
	switch t {
	case types.OCILayer, types.OCILayerZStd, types.OCIUncompressedLayer, types.DockerLayer, types.DockerUncompressedLayer,
		"application/vnd.docker.image.rootfs.diff.tar.zstd":
		return true
	}
	return false
}

func unknownDigest(h v1.Hash) error {
	return api.Errorf(api.ErrUnsupported, "the digest algorithm %.40q is not supported, only sha256 is", h.Algorithm)
}

// matches checks a document against its description.
func matches(doc []byte, digest v1.Hash, size int64) error {
	got, n, err := v1.SHA256(bytes.NewReader(doc))
	if err != nil {
		return err
	}
	if digest.Algorithm != "sha256" {
		return unknownDigest(digest)
	}
	if n != size || got != digest {
		return api.Errorf(api.ErrDamaged, "%d bytes with the digest %s came for the %d with %s", n, got, size, digest)
	}
	return nil
}

// readDocument reads all of r, which may not be more than limit bytes.
func readDocument(r io.Reader, limit int64) ([]byte, error) {
	doc, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(doc)) > limit {
		return nil, tooMuch("it has %d bytes or more, the limit is %d", limit+1, limit)
	}
	return doc, nil
}

func tooMuch(format string, got, limit int64) error {
	return api.Errorf(api.ErrExhausted, format, got, limit)
}
