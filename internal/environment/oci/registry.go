package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/pyro-mcp/pyro/api"
)

// A registrySource is an image in a registry.
type registrySource struct {
	puller *remote.Puller
	ref    name.Reference
	closer func()
}

var _ manifestSource = (*registrySource)(nil)

// resolveRemote asks the mirror, if there is one for the reference, and then
// the registry.
func (p *Puller) resolveRemote(ctx context.Context, ref Reference) (*Image, error) {
	if at, err := p.mirrored(ref.image); err != nil {
		return nil, err
	} else if at != nil {
		img, err := p.resolveAt(ctx, ref, at)
		if err == nil {
			return img, nil
		}
		if ctx.Err() != nil {
			return nil, err
		}
		p.log().Warn("the registry mirror has not answered, asking the registry", "image", at.Name(), "error", err)
	}
	return p.resolveAt(ctx, ref, ref.image)
}

// mirrored returns where the mirror has the image, nil if it is not for it.
func (p *Puller) mirrored(image name.Reference) (name.Reference, error) {
	repo := image.Context()
	if p.Mirror == "" || repo.RegistryStr() != name.DefaultRegistry {
		return nil, nil
	}
	sep := ":"
	if _, ok := image.(name.Digest); ok {
		sep = "@"
	}
	at, err := name.ParseReference(strings.TrimSuffix(p.Mirror, "/") + "/" + repo.RepositoryStr() + sep + image.Identifier())
	if err != nil {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "the registry mirror %.200q: %w", p.Mirror, err), "write HOST[:PORT][/PATH], without https://")
	}
	return at, nil
}

// describeLimit is how long a registry may take to describe an image: a few
// requests with small answers, each tried several times.
const describeLimit = 5 * time.Minute

func (p *Puller) resolveAt(ctx context.Context, ref Reference, at name.Reference) (*Image, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, describeLimit, api.Errorf(api.ErrUnavailable, "the registry has not answered within %s", describeLimit))
	defer cancel()
	if d, ok := at.(name.Digest); ok && !strings.HasPrefix(d.DigestStr(), "sha256:") {
		return nil, api.Errorf(api.ErrUnsupported, "only sha256 digests are supported")
	}
	keychain := p.Keychain
	if keychain == nil {
		keychain = authn.DefaultKeychain
	}
	delay := p.RetryDelay
	if delay == 0 {
		delay = time.Second
	}
	rt, closer := p.Transport, func() {}
	if rt == nil {
		g := newGuard(at.Context().Registry)
		rt, closer = g.transport, g.transport.CloseIdleConnections
	}
	puller, err := remote.NewPuller(
		remote.WithAuthFromKeychain(keychain),
		remote.WithTransport(boundedManifests{rt, p.limits().DocumentBytes}),
		remote.WithUserAgent("pyro"),
		remote.WithRetryBackoff(remote.Backoff{Duration: delay, Factor: 3, Jitter: 0.1, Steps: attempts}),
	)
	if err != nil {
		return nil, err
	}
	return p.describe(ctx, ref, &registrySource{puller: puller, ref: at, closer: closer})
}

func (s *registrySource) root(ctx context.Context) ([]byte, types.MediaType, error) {
	d, err := s.puller.Get(ctx, s.ref)
	if err != nil {
		return nil, "", explain(ctx, err)
	}
	if want, ok := s.ref.(name.Digest); ok {
		h, err := v1.NewHash(want.DigestStr())
		if err != nil {
			return nil, "", api.Errorf(api.ErrInvalid, "%w", err)
		}
		if err := matches(d.Manifest, h, int64(len(d.Manifest))); err != nil {
			return nil, "", fmt.Errorf("the image's manifest: %w", err)
		}
	}
	return d.Manifest, d.MediaType, nil
}

func (s *registrySource) manifest(ctx context.Context, want v1.Descriptor) ([]byte, error) {
	d, err := s.puller.Get(ctx, s.ref.Context().Digest(want.Digest.String()))
	if err != nil {
		return nil, explain(ctx, err)
	}
	return d.Manifest, nil
}

func (s *registrySource) blob(ctx context.Context, l layer) (io.ReadCloser, error) {
	b, err := s.puller.Layer(ctx, s.ref.Context().Digest(l.digest.String()))
	if err != nil {
		return nil, explain(ctx, err)
	}
	r, err := b.Compressed()
	if err != nil {
		return nil, explain(ctx, err)
	}
	return r, nil
}

func (s *registrySource) cached() bool { return true }

func (s *registrySource) Close() error {
	s.closer()
	return nil
}

// explain gives an error of the registry or of the way to it its class.
func explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var refused *transport.Error
	if errors.As(err, &refused) {
		switch refused.StatusCode {
		case http.StatusUnauthorized, http.StatusForbidden:
			return api.WithHint(api.Errorf(api.ErrDenied, "%w", err),
				"check the image's name; a private one needs docker login, whose credentials are used here")
		case http.StatusNotFound:
			return api.WithHint(api.Errorf(api.ErrNotFound, "%w", err), "check the image's name and tag")
		case http.StatusTooManyRequests:
			return api.WithHint(api.Errorf(api.ErrUnavailable, "%w", err), "wait, log in with docker login, or set PYRO_REGISTRY_MIRROR")
		}
	}
	if errors.Is(err, errForbiddenAddress) {
		return api.Errorf(api.ErrDenied, "%w", err)
	}
	if api.Code(err) != api.Code(api.ErrInternal) {
		return err
	}
	return api.WithHint(api.Errorf(api.ErrUnavailable, "%w", err), "check the network and the registry's name")
}

// boundedManifests is a transport in which a manifest ends in an error where it
// is longer than limit: the library reads 100 MiB.
type boundedManifests struct {
	http.RoundTripper
	limit int64
}

func (b boundedManifests) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(req)
	if err == nil && strings.Contains(req.URL.Path, "/manifests/") {
		resp.Body = &boundedBody{resp.Body, b.limit}
	}
	return resp, err
}

type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, api.Errorf(api.ErrExhausted, "the image's manifest is longer than allowed")
	}
	return n, err
}
