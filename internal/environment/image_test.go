package environment_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/environment"
)

// newRegistry starts a registry in this process and returns its HOST:PORT.
func newRegistry(t *testing.T) string {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir()) // not the credentials of who runs the tests
	ts := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(ts.Close)
	return strings.TrimPrefix(ts.URL, "http://")
}

// oneFile is an image with the file /version.
func oneFile(t *testing.T, version string) v1.Image {
	t.Helper()
	return withConfig(t, version, oneFileLayer(t, version))
}

// oneFileLayer is an archive of the file /version.
func oneFileLayer(t *testing.T, version string) v1.Layer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	err := w.WriteHeader(&tar.Header{Name: "version", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(version)), ModTime: releaseDay})
	if err == nil {
		_, err = io.WriteString(w, version)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return layer
}

func withConfig(t *testing.T, version string, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", runtime.GOARCH
	c.Config = v1.Config{Env: []string{"VERSION=" + version}, WorkingDir: "/srv", User: "1000", Cmd: []string{"sh"}}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

func push(t *testing.T, to string, img v1.Image) {
	t.Helper()
	ref, err := name.ParseReference(to)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
}

func TestImageLife(t *testing.T) {
	host, ctx := newRegistry(t), t.Context()
	s, dir := newStore(t, "")
	short := host + "/tools:1"
	push(t, short, oneFile(t, "1"))

	if e, err := s.Inspect(ctx, "docker://"+short); err != nil || e.Installed || e.Name != short {
		t.Errorf("before the pull: %+v, %v", e, err)
	}
	if _, err := s.Use(ctx, short, nil); !errors.Is(err, api.ErrNotFound) || !strings.Contains(api.Hint(err), "pyro env pull docker://"+short) {
		t.Errorf("use before the pull: %v, hint %q", err, api.Hint(err))
	}
	phases := map[string]bool{}
	pulled, err := s.Pull(ctx, "docker://"+short, func(p api.Progress) { phases[p.Phase] = true })
	if err != nil {
		t.Fatal(err)
	}
	for _, phase := range []string{"lists", "downloading", "checking", "writing", "verifying"} {
		if !phases[phase] {
			t.Errorf("nothing was heard of the phase %q", phase)
		}
	}
	want := &api.ImageConfig{Env: []string{"VERSION=1"}, WorkingDir: "/srv", User: "1000", Cmd: []string{"sh"}}
	if d := cmp.Diff(want, pulled.Config); d != "" {
		t.Error(d)
	}
	list, err := s.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(pulled, list[len(list)-1]); d != "" {
		t.Errorf("listed: %s", d)
	}

	// Every way to name it means it, and none asks the registry.
	var img *environment.Image
	for _, given := range []string{short, "docker://" + short} {
		if img, err = s.Use(ctx, given, nil); err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		if img.Digest != pulled.Digest || img.Config.User != "1000" || img.DiskMiB < 1024 {
			t.Errorf("%s is %+v", given, img)
		}
	}
	if same, err := s.UseDigest(ctx, short, img.Digest); err != nil || same.Config.WorkingDir != "/srv" {
		t.Errorf("config %+v, %v", same, err)
	} else {
		same.Close()
	}

	// The tag moves: what is installed stays until the next pull, and then for
	// those who hold it.
	push(t, short, oneFile(t, "2"))
	if again, err := s.Inspect(ctx, short); err != nil || again.Digest != pulled.Digest {
		t.Errorf("inspected: %+v, %v", again, err)
	}
	second, err := s.Pull(ctx, short, nil)
	if err != nil || second.Digest == pulled.Digest || second.Config.Env[0] != "VERSION=2" {
		t.Fatalf("pulled again: %+v, %v", second, err)
	}
	if _, err := s.Prune(ctx, environment.PruneOptions{InUse: []string{pulled.Digest}}); err != nil {
		t.Fatal(err)
	}
	old, err := s.UseDigest(ctx, short, pulled.Digest)
	if err != nil || old.Config.Env[0] != "VERSION=1" {
		t.Fatalf("the old one: %+v, %v", old, err)
	}
	old.Close()

	// Removed, its files stay for the workspace that was made from it.
	res, err := s.Remove(ctx, "docker://"+short, []string{second.Digest})
	if err != nil || !slices.Contains(res.Removed, short) {
		t.Errorf("removed %+v, %v", res, err)
	}
	if _, err := s.Inspect(ctx, short); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("after the removal: %v", err)
	}
	if kept, err := s.UseDigest(ctx, short, second.Digest); err != nil {
		t.Error(err)
	} else {
		kept.Close()
	}
	if _, err := s.Remove(ctx, short, nil); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	if _, err := s.Prune(ctx, environment.PruneOptions{}); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "cache", "layers")); err != nil || len(left) != 0 {
		t.Errorf("layers left: %v, %v", left, err)
	}
}

// TestImageAtFirstUse: a reference is pulled when it is used.
func TestImageAtFirstUse(t *testing.T) {
	host := newRegistry(t)
	s, _ := newStore(t, "")
	push(t, host+"/a", oneFile(t, "1"))
	for range 2 {
		img, err := s.Use(t.Context(), "docker://"+host+"/a", nil)
		if err != nil {
			t.Fatal(err)
		}
		img.Close()
	}
	if img, err := s.Use(t.Context(), host+"/a", nil); err != nil { // the tag is added
		t.Error(err)
	} else {
		img.Close()
	}
}

func TestImageNames(t *testing.T) {
	host, ctx := newRegistry(t), t.Context()
	s, dir := newStore(t, "")
	push(t, host+"/a:1", oneFile(t, "1"))
	push(t, host+"/b:1", oneFile(t, "2"))
	file := filepath.Join(dir, "my tools.tar")
	tag, err := name.NewTag("x:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(file, tag, oneFile(t, "3")); err != nil {
		t.Fatal(err)
	}
	long := "docker://" + host + "/" + strings.Repeat("long/", 20) + "a:1"
	for _, tt := range []struct {
		pull, as string
		name     string // as it is called then
		class    error
	}{
		{pull: "docker://" + host + "/a:1", name: host + "/a:1"},
		{pull: "docker://" + host + "/a:1", as: "tools", name: "tools"},
		{pull: "docker://" + host + "/a:1", as: "tools", name: "tools"}, // again
		{pull: "docker://" + host + "/b:1", as: "tools", class: api.ErrExists},
		{pull: "docker://" + host + "/b:1", as: "debian:12", class: api.ErrExists},
		{pull: "docker://" + host + "/b:1", as: "../x", class: api.ErrInvalid},
		{pull: "docker://" + host + "/b:1", as: "a b", class: api.ErrInvalid},
		{pull: "docker://" + host + "/b:1", as: "docker://busybox", class: api.ErrInvalid},
		{pull: "docker-archive:" + file, name: "my-tools"},
		{pull: long, class: api.ErrInvalid},
		{pull: "debian:12", as: "x", class: api.ErrInvalid},
		{pull: "nothing", class: api.ErrNotFound},
		{pull: "docker://UPPER", class: api.ErrInvalid},
		{pull: "tools", name: "tools"}, // by its name
	} {
		e, err := s.PullAs(ctx, tt.pull, tt.as, nil)
		if !errors.Is(err, tt.class) || e.Name != tt.name {
			t.Errorf("pull %s as %q: %q, %v; want %q, %v", tt.pull, tt.as, e.Name, err, tt.name, tt.class)
		}
		if err != nil && api.Hint(err) == "" && tt.as != "x" {
			t.Errorf("pull %s as %q: no hint: %v", tt.pull, tt.as, err)
		}
	}
	// One image under two names is one on the disk.
	a, err := s.Inspect(ctx, host+"/a:1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := s.Inspect(ctx, "tools")
	if err != nil || a.Digest != b.Digest || a.ImageReference != b.ImageReference {
		t.Errorf("%+v and %+v, %v", a, b, err)
	}
	if e, err := s.Inspect(ctx, "docker://debian:12"); err != nil || e.Name != "docker://debian:12" {
		t.Errorf("the image with a curated name is %+v, %v", e, err)
	}
}

// TestImageDamaged: what changed on the disk is noticed, and mended by the
// next pull.
func TestImageDamaged(t *testing.T) {
	host := newRegistry(t)
	s, _ := newStore(t, "")
	push(t, host+"/a:1", oneFile(t, "1"))
	img, err := s.Use(t.Context(), "docker://"+host+"/a:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	img.Close()
	garble(t, img.Path)
	if _, err := s.Use(t.Context(), host+"/a:1", nil); !errors.Is(err, api.ErrDamaged) || !strings.Contains(api.Hint(err), "pyro env pull ") {
		t.Errorf("use gave %v, hint %q", err, api.Hint(err))
	}
	healed, err := s.Pull(t.Context(), host+"/a:1", nil)
	if err != nil || healed.Digest != img.Digest {
		t.Fatalf("healed to %+v, %v", healed, err)
	}
	if again, err := s.Use(t.Context(), host+"/a:1", nil); err != nil {
		t.Error(err)
	} else {
		again.Close()
	}
}

// TestKilledImagePull kills a pull at random moments, again and again. Each goes
// on where the one before it was killed, and what comes of it at last is what one
// that nobody killed makes.
func TestKilledImagePull(t *testing.T) {
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	var sent atomic.Int64
	ts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			w = &slowWriter{w, &sent}
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(ts.Close)
	host := strings.TrimPrefix(ts.URL, "http://")
	noise := make([]byte, 6<<20)
	_, _ = rand.NewChaCha8([32]byte{9}).Read(noise)
	half := len(noise) / 2
	img := withConfig(t, "1", oneFileLayer(t, string(noise[:half])), oneFileLayer(t, string(noise[half:])), oneFileLayer(t, "1"))
	push(t, host+"/a:1", img)
	ref := "docker://" + host + "/a:1"

	_, dir := newStore(t, "")
	kills := 0
	for {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "ENVIRONMENT_TEST_PULL="+dir, "ENVIRONMENT_TEST_NAME="+ref)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if kills < 12 {
			time.Sleep(time.Duration(rand.Int64N(int64(250 * time.Millisecond))))
			_ = cmd.Process.Kill() // or it has ended
		}
		err := cmd.Wait()
		if err == nil {
			break
		}
		if cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled() {
			kills++
			continue
		}
		t.Fatalf("%v: %s", err, stderr.String())
	}
	if kills < 3 {
		t.Errorf("%d pulls were killed: this tests little", kills)
	}
	// What was in flight when a process was killed comes twice: the registry's
	// and the kernel's buffers.
	if limit := int64(len(noise) + kills*(1<<20)); sent.Load() > limit {
		t.Errorf("%d bytes were sent for %d and %d kills, want %d at most", sent.Load(), len(noise), kills, limit)
	}
	s, err := environment.Open(options(dir))
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Inspect(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	fresh, freshDir := newStore(t, "")
	want, err := fresh.Pull(t.Context(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest == "" || got.Digest != want.Digest {
		t.Errorf("the digest is %s, want %s", got.Digest, want.Digest)
	}
	if _, err := s.Prune(t.Context(), environment.PruneOptions{}); err != nil {
		t.Error(err)
	}
	if d := cmp.Diff(files(t, freshDir), files(t, dir)); d != "" {
		t.Error(d)
	}
}

// files are those of a store's cache.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	cache := filepath.Join(dir, "cache")
	err := filepath.WalkDir(cache, func(path string, _ fs.DirEntry, err error) error {
		out = append(out, strings.TrimPrefix(path, cache))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A slowWriter takes a while for each piece and counts what it was given.
type slowWriter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (s *slowWriter) Write(p []byte) (n int, err error) {
	for len(p) > 0 && err == nil {
		var k int
		k, err = s.ResponseWriter.Write(p[:min(len(p), 64<<10)])
		s.n.Add(int64(k))
		n, p = n+k, p[k:]
		time.Sleep(5 * time.Millisecond)
	}
	return n, err
}
