package bench

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/klauspost/compress/gzip"

	"github.com/pyro-mcp/pyro/internal/testenv"
)

//page:topic 6 Environments from OCI images
// The reference is what makes a file system of an image's layers without a
// registry and without pyro: `tar x` of each of them into a directory, and
// `mke2fs -d` of that directory. It checks no digest and needs no network. The
// image is 1 GiB in 50,000 files, in a registry on the loopback device.

// The image is 1 GiB in 50,000 files.
const (
	imageLayers = 5
	layerFiles  = 10_000
	imageFile   = 1 << 30 / (imageLayers * layerFiles)
)

// A pullFixture is a registry on loopback with an image, whose layers are files
// too.
type pullFixture struct {
	b      *testing.B
	dir    string
	host   string
	layers []v1.Layer
	files  []string

	mu    sync.Mutex
	asked map[string]int // blobs, by digest
}

func newPullFixture(b *testing.B) *pullFixture {
	b.Helper()
	testenv.RequireTools(b, "e2fsprogs", "mke2fs", "tar", "gzip")
	// On a disk, not in memory.
	dir, err := os.MkdirTemp("/var/tmp", "pyro-bench-image")
	check(b, err)
	b.Cleanup(func() { os.RemoveAll(dir) })
	f := &pullFixture{b: b, dir: dir, asked: map[string]int{}}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithBlobHandler(registry.NewDiskBlobHandler(f.fresh("registry"))))
	ts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, digest, ok := strings.Cut(r.URL.Path, "/blobs/"); ok && r.Method == http.MethodGet {
			f.mu.Lock()
			f.asked[digest]++
			f.mu.Unlock()
		}
		inner.ServeHTTP(w, r)
	}))
	b.Cleanup(ts.Close)
	f.host = strings.TrimPrefix(ts.URL, "http://")
	b.Setenv("DOCKER_CONFIG", dir) // not the credentials of who runs this
	for i := range imageLayers {
		f.addLayer(i, layerFiles)
	}
	f.push("image", f.layers...)
	return f
}

// addLayer makes a layer of files that get about half as large when they are
// compressed.
func (f *pullFixture) addLayer(number, files int) v1.Layer {
	f.b.Helper()
	path := filepath.Join(f.dir, fmt.Sprintf("layer%d.tar.gz", number))
	out, err := os.Create(path)
	check(f.b, err)
	z, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	check(f.b, err)
	w := tar.NewWriter(z)
	random := rand.NewChaCha8([32]byte{byte(number)})
	content := make([]byte, imageFile)
	for i := range files {
		if i%100 == 0 {
			check(f.b, w.WriteHeader(&tar.Header{Name: fmt.Sprintf("data/%d/%d/", number, i/100), Typeflag: tar.TypeDir, Mode: 0o755}))
		}
		_, _ = random.Read(content[:imageFile/2])
		check(f.b, w.WriteHeader(&tar.Header{Name: fmt.Sprintf("data/%d/%d/%d", number, i/100, i), Typeflag: tar.TypeReg, Mode: 0o644, Size: imageFile}))
		_, err := w.Write(content)
		check(f.b, err)
	}
	check(f.b, w.Close())
	check(f.b, z.Close())
	check(f.b, out.Close())
	layer, err := tarball.LayerFromFile(path)
	check(f.b, err)
	f.files, f.layers = append(f.files, path), append(f.layers, layer)
	return layer
}

func (f *pullFixture) push(repo string, layers ...v1.Layer) {
	f.b.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	check(f.b, err)
	c, err := img.ConfigFile()
	check(f.b, err)
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", runtime.GOARCH
	img, err = mutate.ConfigFile(img, c)
	check(f.b, err)
	ref, err := name.ParseReference(f.host + "/" + repo)
	check(f.b, err)
	check(f.b, remote.Write(ref, img))
}

// fresh returns a directory that is empty and on the disk.
func (f *pullFixture) fresh(name string) string {
	f.b.Helper()
	dir := filepath.Join(f.dir, name)
	check(f.b, os.RemoveAll(dir))
	check(f.b, os.Mkdir(dir, 0o700))
	return dir
}

// pull makes an environment of an image and returns how long that took, and how
// much memory the process had at most.
func (f *pullFixture) pull(cache, repo string) (took time.Duration, peakKiB int) {
	f.b.Helper()
	cmd := exec.Command(program("pyro"), "env", "pull", "--quiet", "docker://"+f.host+"/"+repo)
	cmd.Env = append(os.Environ(), "PYRO_CACHE_DIR="+cache, "PYRO_STATE_DIR="+filepath.Join(f.dir, "state"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	began := time.Now()
	check(f.b, cmd.Start())
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case err := <-done:
			if err != nil {
				f.b.Fatalf("%v: %s", err, stderr.String())
			}
			return time.Since(began), peakKiB
		case <-time.After(20 * time.Millisecond):
			peakKiB = max(peakKiB, highWater(cmd.Process.Pid))
		}
	}
}

// highWater is the largest resident set that a process has had, in KiB; 0 when
// it is gone.
func highWater(pid int) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
			return n
		}
	}
	return 0
}

// byHand does what the reference does.
func (f *pullFixture) byHand() time.Duration {
	f.b.Helper()
	root := f.fresh("root")
	image := filepath.Join(f.fresh("byhand"), "root.ext4")
	began := time.Now()
	for _, file := range f.files[:imageLayers] {
		mustRun(f.b, "", "tar", "xzf", file, "-C", root)
	}
	mustRun(f.b, "", "mke2fs", "-q", "-t", "ext4", "-d", root, image, "8G")
	return time.Since(began)
}

// BenchmarkImagePull is the time until an image of a registry is an
// environment. Peak is the memory that the whole process has at most.
//
//page:row pulling an image
//page:aim ratio <= 2
//page:aim peak-MiB <= 150
func BenchmarkImagePull(b *testing.B) {
	f := newPullFixture(b)
	peak := 0
	compare(b, 3, func() time.Duration {
		took, kib := f.pull(f.fresh("cache"), "image")
		peak = max(peak, kib)
		return took
	}, f.byHand)
	b.ReportMetric(float64(peak)/1024, "peak-MiB")
}

// BenchmarkImageShared is a second image that has one small layer more than
// the first, against the first. It fails if anything is fetched twice.
//
//page:row pulling another on the same layers
func BenchmarkImageShared(b *testing.B) {
	f := newPullFixture(b)
	more := f.addLayer(imageLayers, 10)
	f.push("second", append(f.layers[:imageLayers:imageLayers], more)...)
	digest, err := more.Digest()
	check(b, err)
	compare(b, 1, func() time.Duration {
		cache := f.fresh("cache")
		f.pull(cache, "image")
		f.mu.Lock()
		clear(f.asked)
		f.mu.Unlock()
		took, _ := f.pull(cache, "second")
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.asked) != 2 || f.asked[digest.String()] != 1 { // the other one is the configuration
			b.Fatalf("fetched for the second image: %v", f.asked)
		}
		return took
	}, func() time.Duration {
		took, _ := f.pull(f.fresh("cache"), "image")
		return took
	})
}
