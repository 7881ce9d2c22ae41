package guestkernel_test

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestkernel"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

func open(t *testing.T, opts guestkernel.Options) *guestkernel.Store {
	t.Helper()
	opts.CacheDir = filepath.Join(t.TempDir(), "cache")
	s, err := guestkernel.Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func writeFile(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
}

func moduleNames(k *guestkernel.Kernel) (names []string) {
	for _, m := range k.Modules {
		names = append(names, filepath.Base(m))
	}
	return names
}

func TestOwnKernel(t *testing.T) {
	dir := t.TempDir()
	image, modules := filepath.Join(dir, "vmlinux"), filepath.Join(dir, "6.6.6-mine")
	writeFile(t, image, []byte("\x7fELF and so on"))
	writeFile(t, filepath.Join(modules, "kernel/tun.ko"), guestkernel.MakeModule("vsock"))
	writeFile(t, filepath.Join(modules, "kernel/vsock.ko"), guestkernel.MakeModule(""))
	s := open(t, guestkernel.Options{Image: image, ModulesDir: modules})
	k, err := s.Use(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if diff := cmp.Diff([]string{"00-vsock.ko", "01-tun.ko"}, moduleNames(k)); diff != "" {
		t.Errorf("modules (-want +got):\n%s", diff)
	}
	if k.Release != "6.6.6-mine" {
		t.Errorf("the release is %q", k.Release)
	}
	// The copy stays; a changed file is a new one.
	writeFile(t, image, []byte("\x7fELF and something else"))
	fresh, err := s.Use(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer fresh.Close()
	for path, want := range map[string]string{k.Image: "\x7fELF and so on", fresh.Image: "\x7fELF and something else"} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s holds %q, %v", path, got, err)
		}
	}
}

func TestOwnKernelRefusals(t *testing.T) {
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	writeFile(t, text, bytes.Repeat([]byte("not a kernel "), 100))
	for _, image := range []string{filepath.Join(dir, "nothing"), dir, text} {
		s := open(t, guestkernel.Options{Image: image})
		if _, err := s.Use(t.Context(), nil); !errors.Is(err, api.ErrInvalid) || !strings.Contains(err.Error(), image) {
			t.Errorf("%s gave %v", image, err)
		}
	}
}

// TestFetch takes a package apart that a tool in mmdebstrap's place hands over.
func TestFetch(t *testing.T) {
	testenv.RequireTools(t, "dpkg", "dpkg-deb")
	dir := t.TempDir()
	pkg := filepath.Join(dir, "package")
	kernel := append([]byte("\x7fELF"), bytes.Repeat([]byte("kernel "), 10000)...)
	writeFile(t, filepath.Join(pkg, "DEBIAN/control"), []byte("Package: linux-image-test\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: test\n"))
	writeFile(t, filepath.Join(pkg, "boot/vmlinuz-6.1.0-99-cloud-amd64"), guestkernel.MakeBzImage(kernel))
	modules := filepath.Join(pkg, "lib/modules/6.1.0-99-cloud-amd64/kernel")
	writeFile(t, filepath.Join(modules, "virtio/virtio.ko"), guestkernel.MakeModule("virtio_ring"))
	writeFile(t, filepath.Join(modules, "virtio/virtio_ring.ko"), guestkernel.MakeModule(""))
	writeFile(t, filepath.Join(modules, "block/virtio_blk.ko"), guestkernel.MakeModule("virtio,virtio_ring"))
	writeFile(t, filepath.Join(modules, "sound/unneeded.ko"), guestkernel.MakeModule(""))
	deb := filepath.Join(dir, "linux-image-test_1_all.deb")
	if out, err := exec.Command("dpkg-deb", "--build", pkg, deb).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb: %v\n%s", err, out)
	}
	content, err := os.ReadFile(deb)
	if err != nil {
		t.Fatal(err)
	}
	var tree bytes.Buffer
	w := tar.NewWriter(&tree)
	for name, c := range map[string][]byte{"./etc/passwd": []byte("x"), "./linux-image-test_1_all.deb": content} {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(c))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(c); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "tree.tar"), tree.Bytes())
	tool := filepath.Join(dir, "mmdebstrap")
	if err := os.WriteFile(tool, fmt.Appendf(nil, "#!/bin/sh\necho run >> %[1]s/runs\ncat %[1]s/tree.tar\n", dir), 0o700); err != nil {
		t.Fatal(err)
	}
	s := open(t, guestkernel.Options{Mmdebstrap: tool, TempDir: t.TempDir()})
	if s.Installed() {
		t.Error("it is installed before it was fetched")
	}
	k, err := s.Use(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if !s.Installed() {
		t.Error("it is not installed after it was fetched")
	}
	if got, err := os.ReadFile(k.Image); err != nil || !bytes.Equal(got, kernel) {
		t.Errorf("the kernel has %d bytes, %v", len(got), err)
	}
	if k.Release != "6.1.0-99-cloud-amd64" {
		t.Errorf("the release is %q", k.Release)
	}
	if diff := cmp.Diff([]string{"00-virtio_ring.ko", "01-virtio.ko", "02-virtio_blk.ko"}, moduleNames(k)); diff != "" {
		t.Errorf("modules (-want +got):\n%s", diff)
	}
	k.Close()
	// A damaged one is fetched again, silently: it is nobody's choice.
	if err := os.Remove(k.Image); err != nil {
		t.Fatal(err)
	}
	again, err := s.Use(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if again.Digest != k.Digest {
		t.Errorf("the mended one has the digest %s", again.Digest)
	}
	runs, err := os.ReadFile(filepath.Join(dir, "runs"))
	if err != nil || strings.Count(string(runs), "run") != 2 {
		t.Errorf("the tool ran: %q, %v", runs, err)
	}
}

// TestRealKernel fetches Debian's kernel.
func TestRealKernel(t *testing.T) {
	if !testenv.Wanted("mmdebstrap") {
		t.Skip("it takes Debian's mirror; PYRO_TEST_REQUIRE=mmdebstrap runs it")
	}
	testenv.RequireTools(t, "mmdebstrap", "mmdebstrap", "dpkg-deb")
	s := open(t, guestkernel.Options{DebianMirror: os.Getenv("PYRO_DEBIAN_MIRROR")})
	k, err := s.Use(t.Context(), nil)
	if err != nil {
		t.Fatalf("%v (%s)", err, api.Hint(err))
	}
	defer k.Close()
	f, err := elf.Open(k.Image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC {
		t.Errorf("the kernel is %v %v", f.Machine, f.Type)
	}
	all := strings.Join(moduleNames(k), " ")
	for _, want := range []string{"virtio_pci.ko", "virtio_blk.ko", "virtio_console.ko", "vmw_vsock_virtio_transport.ko", "tun.ko", "overlay.ko"} {
		if !strings.Contains(all, want) {
			t.Errorf("%s is missing in %s", want, all)
		}
	}
	if strings.Index(all, "virtio_ring.ko") > strings.Index(all, "virtio.ko") {
		t.Errorf("virtio comes before what it needs: %s", all)
	}
}
