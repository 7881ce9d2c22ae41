package oci_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/environment/oci"
)

func TestLayersAreShared(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	base := layerOf(t, file("base", "1"))
	first := s.push(t, "first", imageOf(t, v1.Config{}, base, base, layerOf(t, file("a", "2"))))
	second := s.push(t, "second", imageOf(t, v1.Config{}, base, layerOf(t, file("b", "3"))))
	s.blobs()
	for _, tt := range []struct {
		ref   oci.Reference
		blobs int // the configuration included
	}{{first, 3}, {second, 2}, {second, 1}} {
		if _, _, err := build(t.Context(), t, p, tt.ref); err != nil {
			t.Fatal(err)
		}
		if n := s.blobs(); n != tt.blobs {
			t.Errorf("%s took %d blobs, want %d", tt.ref, n, tt.blobs)
		}
	}
}

// TestInterruptedPull: a connection that breaks in the middle, and a caller who
// gives up, cost no layer that was complete.
func TestInterruptedPull(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	last := layerOf(t, file("b", strings.Repeat("x", 1<<20)))
	ref := s.push(t, "image", imageOf(t, v1.Config{}, layerOf(t, file("a", "1")), last))
	digest, err := last.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan struct{})
	var asked atomic.Int32 // for the last layer
	s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, digest.String()) {
			return false
		}
		switch asked.Add(1) {
		case 1: // the caller gives up
			<-first
			cancel()
		case 2, 3: // the connection breaks
			body, err := last.Compressed()
			if err != nil {
				t.Error(err)
				return true
			}
			_, _ = io.CopyN(w, body, 100)
		default:
			return false
		}
		panic(http.ErrAbortHandler)
	}
	img, err := p.Resolve(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	f, err := os.Create(filepath.Join(t.TempDir(), "root"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s.blobs()
	// The first layer is complete when it has its name.
	names := img.LayerDigests()
	go func() {
		defer close(first)
		for ctx.Err() == nil {
			if _, err := os.Stat(filepath.Join(p.CacheDir, strings.TrimPrefix(names[0], "sha256:"))); err == nil {
				return
			}
			runtime.Gosched()
		}
	}()
	if _, err := p.Build(ctx, img, f, nil); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(p.CacheDir, "*")); err != nil || len(left) != 1 {
		t.Errorf("in the cache: %v, %v", left, err)
	}
	s.blobs()

	image, _, err := build(t.Context(), t, p, ref)
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, image); len(got) != 2 {
		t.Errorf("the tree is %v", got)
	}
	if n := s.blobs(); n != 1+3 { // the configuration, and the last layer thrice
		t.Errorf("%d blobs were asked for", n)
	}
}

// flip changes one byte of a file, from the end if at is negative.
func flip(path string, at int) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if at < 0 {
		at += len(b)
	}
	b[at] ^= 1
	return os.WriteFile(path, b, 0o600)
}

// TestDamagedCache: a layer that changed in the cache is fetched again.
func TestDamagedCache(t *testing.T) {
	for _, tt := range []struct {
		name   string
		damage func(path string) error
	}{
		{"Truncated", func(p string) error { return os.Truncate(p, 10) }},
		{"ChangedInFront", func(p string) error { return flip(p, 0) }},
		{"ChangedBehind", func(p string) error { return flip(p, -10) }},
		{"HalfFetched", func(p string) error { return errors.Join(os.Rename(p, p+".part"), os.Truncate(p+".part", 10)) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, p := newServer(t), newPuller(t)
			ref := s.push(t, "image", imageOf(t, v1.Config{}, layerOf(t, file("a", "1"))))
			for range 2 {
				image, img, err := build(t.Context(), t, p, ref)
				if err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(unpack([]entry{file("a", "1")}), read(t, image)); d != "" {
					t.Error(d)
				}
				if err := tt.damage(filepath.Join(p.CacheDir, strings.TrimPrefix(img.LayerDigests()[0], "sha256:"))); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestTwoPulls: two at once fetch each layer once.
func TestTwoPulls(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	ref := s.push(t, "image", imageOf(t, v1.Config{}, layerOf(t, file("a", "1")), layerOf(t, file("b", "2"))))
	s.blobs()
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if _, _, err := build(t.Context(), t, p, ref); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := s.blobs(); n != 2+2 { // each its configuration
		t.Errorf("%d blobs were asked for", n)
	}
}

func TestPlatforms(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	index := v1.ImageIndex(empty.Index)
	for _, arch := range []string{"s390x", runtime.GOARCH, "riscv64"} {
		img := imageOf(t, v1.Config{}, layerOf(t, file("arch", arch)))
		c, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		c.Architecture = arch
		if img, err = mutate.ConfigFile(img, c); err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	}
	tag, err := name.NewTag(s.host + "/many")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(tag, index); err != nil {
		t.Fatal(err)
	}
	image, _, err := build(t.Context(), t, p, reference(t, "docker://"+s.host+"/many"))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(unpack([]entry{file("arch", runtime.GOARCH)}), read(t, image)); d != "" {
		t.Error(d)
	}
}

// TestCredentials: those of docker login are used, and the lack of them is
// said.
func TestCredentials(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	ref := s.push(t, "private", imageOf(t, v1.Config{}, layerOf(t, file("a", "1"))))
	s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if user, password, _ := r.BasicAuth(); user == "someone" && password == "secret" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	if _, err := p.Resolve(t.Context(), ref); !errors.Is(err, api.ErrDenied) || !strings.Contains(api.Hint(err), "docker login") {
		t.Errorf("without: %v, hint %q", err, api.Hint(err))
	}
	config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, s.host, base64.StdEncoding.EncodeToString([]byte("someone:secret")))
	if err := os.WriteFile(filepath.Join(os.Getenv("DOCKER_CONFIG"), "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := build(t.Context(), t, p, ref); err != nil {
		t.Errorf("with: %v", err)
	}
}

// TestMirror: an image of the default registry comes from the mirror.
func TestMirror(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	s.push(t, "cache/library/busybox:1", imageOf(t, v1.Config{}, layerOf(t, file("a", "1"))))
	p.Mirror = s.host + "/cache"
	ref := reference(t, "docker://busybox:1")
	_, img, err := build(t.Context(), t, p, ref)
	if err != nil {
		t.Fatal(err)
	}
	if img.Reference.String() != ref.String() {
		t.Errorf("the image is called %s", img.Reference)
	}
}

func TestUnreachable(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	missing := reference(t, "docker://"+s.host+"/none:1")
	if _, err := p.Resolve(t.Context(), missing); !errors.Is(err, api.ErrNotFound) || api.Hint(err) == "" {
		t.Errorf("an absent image: %v", err)
	}
	s.intercept = func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(http.StatusBadGateway); return true }
	if _, err := p.Resolve(t.Context(), missing); !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("a broken registry: %v (%s)", err, api.Code(err))
	}
	// Nothing listens on port 1.
	if _, err := p.Resolve(t.Context(), reference(t, "docker://127.0.0.1:1/x")); !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("no registry: %v (%s)", err, api.Code(err))
	}
}

func TestPruneLayers(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	_, img, err := build(t.Context(), t, p, s.push(t, "image", imageOf(t, v1.Config{}, layerOf(t, file("a", "1")), layerOf(t, file("b", "2")))))
	if err != nil {
		t.Fatal(err)
	}
	layers := img.LayerDigests()
	for _, name := range []string{strings.Repeat("ab", 32) + ".part", "mine"} {
		if err := os.WriteFile(filepath.Join(p.CacheDir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if freed, err := p.PruneLayers(layers[:1]); err != nil || freed < 2 {
		t.Errorf("freed %d bytes, %v", freed, err)
	}
	var left []string
	entries, err := os.ReadDir(p.CacheDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if d := cmp.Diff([]string{strings.TrimPrefix(layers[0], "sha256:"), "mine"}, left); d != "" {
		t.Error(d)
	}
}

// TestStall: a registry that goes silent is given up, and asked again.
func TestStall(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	p.StallLimit = 50 * time.Millisecond
	layer := layerOf(t, file("a", strings.Repeat("text", 1000)))
	ref := s.push(t, "image", imageOf(t, v1.Config{}, layer))
	digest, err := layer.Digest()
	if err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int32
	s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, digest.String()) {
			return false
		}
		asked.Add(1)
		_, _ = w.Write([]byte("x"))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	}
	_, _, err = build(t.Context(), t, p, ref)
	if !errors.Is(err, api.ErrUnavailable) || !strings.Contains(err.Error(), "nothing has come for 50ms") || asked.Load() != 3 {
		t.Errorf("asked %d times, got %v", asked.Load(), err)
	}
}
