package oci_test

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/environment/oci"
)

// An entry is one of a layer's archive. Mode 0 means 0755.
type entry struct {
	name    string
	kind    byte
	content string // or where a link leads
	mode    int64
	uid     int
	pax     map[string]string
}

var day = time.Date(2024, 2, 29, 12, 0, 0, 0, time.UTC)

func dir(name string) entry           { return entry{name: name, kind: tar.TypeDir} }
func file(name, content string) entry { return entry{name: name, kind: tar.TypeReg, content: content} }
func symlink(name, to string) entry   { return entry{name: name, kind: tar.TypeSymlink, content: to} }
func link(name, to string) entry      { return entry{name: name, kind: tar.TypeLink, content: to} }
func whiteout(name string) entry      { return file(name, "") }

func archive(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Mode: 0o755, Uid: e.uid, Gid: e.uid, ModTime: day, PAXRecords: e.pax}
		if e.mode != 0 {
			h.Mode = e.mode
		}
		switch e.kind {
		case tar.TypeReg:
			h.Size = int64(len(e.content))
		case tar.TypeSymlink, tar.TypeLink:
			h.Linkname = e.content
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if e.kind == tar.TypeReg {
			if _, err := io.WriteString(w, e.content); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func layerOf(t testing.TB, entries ...entry) v1.Layer {
	t.Helper()
	return rawLayer(t, archive(t, entries...))
}

func rawLayer(t testing.TB, b []byte) v1.Layer {
	t.Helper()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// imageOf makes an image for this machine.
func imageOf(t testing.TB, config v1.Config, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err == nil {
		var c *v1.ConfigFile
		if c, err = img.ConfigFile(); err == nil {
			c = c.DeepCopy()
			c.OS, c.Architecture, c.Config = "linux", runtime.GOARCH, config
			c.Created = v1.Time{Time: day}
			img, err = mutate.ConfigFile(img, c)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// A server is a registry in this process.
type server struct {
	host string
	// intercept may answer a request itself; nil for none.
	intercept func(w http.ResponseWriter, r *http.Request) (done bool)
	gets      chan string // paths of blobs that were asked for
}

func newServer(t testing.TB) *server {
	s := &server{gets: make(chan string, 1000)}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	ts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			s.gets <- r.URL.Path
		}
		if s.intercept == nil || !s.intercept(w, r) {
			inner.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(ts.Close)
	s.host = strings.TrimPrefix(ts.URL, "http://")
	return s
}

// blobs returns how many blobs were asked for since the last call.
func (s *server) blobs() int {
	n := len(s.gets)
	for range n {
		<-s.gets
	}
	return n
}

func (s *server) push(t testing.TB, repo string, img v1.Image) oci.Reference {
	t.Helper()
	ref, err := name.ParseReference(s.host + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return reference(t, "docker://"+s.host+"/"+repo)
}

func reference(t testing.TB, s string) oci.Reference {
	t.Helper()
	ref, err := oci.ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func newPuller(t testing.TB) *oci.Puller {
	t.Setenv("DOCKER_CONFIG", t.TempDir()) // not the credentials of who runs the tests
	return &oci.Puller{CacheDir: filepath.Join(t.TempDir(), "layers"), RetryDelay: time.Millisecond}
}

// build resolves and builds, and returns the file system's path.
func build(ctx context.Context, t testing.TB, p *oci.Puller, ref oci.Reference) (string, *oci.Image, error) {
	t.Helper()
	img, err := p.Resolve(ctx, ref)
	if err != nil {
		return "", nil, err
	}
	defer img.Close()
	f, err := os.Create(filepath.Join(t.TempDir(), "root.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mib, err := p.Build(ctx, img, f, func(api.Progress) {})
	if err != nil {
		return "", nil, err
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != int64(mib)<<20 {
		t.Errorf("a disk of %d MiB has %d bytes, %v", mib, fi.Size(), err)
	}
	return f.Name(), img, nil
}

// zstdLayer is a layer in zstd, which the library does not make.
type zstdLayer struct {
	v1.Layer
	packed []byte
}

func newZstdLayer(t testing.TB, entries ...entry) v1.Layer {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return zstdLayer{layerOf(t, entries...), w.EncodeAll(archive(t, entries...), nil)}
}

func (z zstdLayer) Digest() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(z.packed))
	return h, err
}
func (z zstdLayer) Size() (int64, error) { return int64(len(z.packed)), nil }
func (z zstdLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(z.packed)), nil
}
func (z zstdLayer) MediaType() (types.MediaType, error) { return types.OCILayerZStd, nil }
