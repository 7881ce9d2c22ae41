package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
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
	puller *remote.Puller // for manifests
	ref    name.Reference
	closer func()

	// The library fetches blobs from their beginning only, so they are asked
	// for here, by a client that connect makes once it is needed.
	keychain  authn.Keychain
	transport http.RoundTripper
	mu        sync.Mutex
	client    *http.Client
}

var (
	_ manifestSource = (*registrySource)(nil)
	_ remoteSource   = (*registrySource)(nil)
)

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
	backoff := remote.Backoff{Duration: delay, Factor: 3, Jitter: 0.1, Steps: attempts}
	puller, err := remote.NewPuller(
		remote.WithAuthFromKeychain(keychain),
		remote.WithTransport(boundedManifests{rt, p.limits().DocumentBytes}),
		remote.WithUserAgent(userAgent),
		remote.WithRetryBackoff(backoff),
	)
	if err != nil {
		return nil, err
	}
	return p.describe(ctx, ref, &registrySource{
		puller: puller, ref: at, closer: closer, keychain: keychain,
		transport: transport.NewRetry(transport.NewUserAgent(rt, userAgent),
			transport.WithRetryBackoff(backoff), transport.WithRetryStatusCodes(retryStatuses...)),
	})
}

const userAgent = "pyro"

// retryStatuses are those of a registry that is in trouble for the moment.
var retryStatuses = []int{
	http.StatusRequestTimeout, http.StatusInternalServerError, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout,
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
	body, _, err := s.blobFrom(ctx, l, 0)
	return body, err
}

// blobFrom asks for a range unless from is 0 (RFC 9110, 14).
func (s *registrySource) blobFrom(ctx context.Context, l layer, from int64) (_ io.ReadCloser, at int64, err error) {
	client, err := s.connect(ctx)
	if err != nil {
		return nil, 0, explain(ctx, err)
	}
	repo := s.ref.Context()
	u := url.URL{Scheme: repo.Scheme(), Host: repo.RegistryStr(), Path: fmt.Sprintf("/v2/%s/blobs/%s", repo.RepositoryStr(), l.digest)}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, 0, err
	}
	// The digest is that of the bytes as they are stored.
	req.Header.Set("Accept-Encoding", "identity")
	if from > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, l.size-1))
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, 0, explain(ctx, err)
	}
	err = transport.CheckError(resp, http.StatusOK, http.StatusPartialContent)
	switch {
	case from > 0 && resp.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		resp.Body.Close()
		return s.blobFrom(ctx, l, 0)
	case err != nil:
	case resp.StatusCode == http.StatusOK:
	case from > 0 && strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", from)):
		at = from
	default:
		err = api.Errorf(api.ErrUnavailable, "the registry answers with the range %.60q, not the one from %d on", resp.Header.Get("Content-Range"), from)
	}
	if n := resp.ContentLength; err == nil && n >= 0 && n != l.size-at {
		err = api.Errorf(api.ErrDamaged, "the registry has %d bytes of %s from %d on, the manifest says %d", n, l.digest, at, l.size-at)
	}
	if err != nil {
		resp.Body.Close()
		return nil, 0, explain(ctx, err)
	}
	return resp.Body, at, nil
}

// connect asks the registry how it wants to be asked, once, and returns a client
// with what it takes. Where it redirects to is the transport's to check; the
// credentials do not go there.
func (s *registrySource) connect(ctx context.Context) (*http.Client, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.client != nil {
		return s.client, nil
	}
	repo := s.ref.Context()
	auth, err := authn.Resolve(ctx, s.keychain, repo)
	if err != nil {
		return nil, err
	}
	rt, err := transport.NewWithContext(ctx, repo.Registry, auth, s.transport, []string{repo.Scope(transport.PullScope)})
	if err != nil {
		return nil, err
	}
	s.client = &http.Client{Transport: rt}
	return s.client, nil
}

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
