//go:build linux

package workspacedisk_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// makeQcow2 converts a raw image.
func makeQcow2(t testing.TB, raw string, opts ...string) string {
	t.Helper()
	testenv.RequireTools(t, "qemu", "qemu-img")
	img := filepath.Join(t.TempDir(), "disk.qcow2")
	tool(t, nil, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, opts...), raw, img)...)
	return img
}

// TestQcow2 reads all kinds of qcow2 images and compares every file.
func TestQcow2(t *testing.T) {
	t.Parallel()
	needTools(t)
	dir := oddTree(t)
	raw := makeImage(t, dir, "96M")
	want := hostTree(t, dir)
	kinds := map[string][]string{
		"default":       nil,
		"v2":            {"-o", "compat=0.10"},
		"small cluster": {"-o", "cluster_size=512"},
		"large cluster": {"-o", "cluster_size=2M"},
		"zlib":          {"-c"},
		"zstd":          {"-c", "-o", "compression_type=zstd"},
		"small zlib":    {"-c", "-o", "cluster_size=4k"},
	}
	for name, opts := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			img := makeQcow2(t, raw, opts...)
			d := openSource(t, workspacedisk.Source{Path: img, Format: workspacedisk.FormatAuto})
			compareTree(t, want, d)
			out := filepath.Join(t.TempDir(), "out.ext4")
			if _, err := d.Export(context.Background(), out); err != nil {
				t.Fatal(err)
			}
			sameBytes(t, raw, out)
			if a, b := diskUsage(t, raw), diskUsage(t, out); b > a+1<<20 {
				t.Errorf("the export takes %d bytes of the host's disk, the raw image %d", b, a)
			}
		})
	}
}

// TestOverlay reads a chain: a raw base, an overlay that is larger than it and
// was written with qemu-io, and one more on top.
func TestOverlay(t *testing.T) {
	t.Parallel()
	needTools(t)
	testenv.RequireTools(t, "qemu", "qemu-img", "qemu-io")
	dir := sampleTree(t)
	base := makeImage(t, dir, "16M")
	tmp := t.TempDir()
	// What the overlays add: another filesystem's blocks, in the top layers.
	writeFile(t, dir, "workspace/new.txt", "written above")
	other := makeImage(t, dir, "16M", "-U", "7b1c3a52-0d1e-4a6e-9c3a-3f6c1f0c2a11")
	mid, top := filepath.Join(tmp, "mid.qcow2"), filepath.Join(tmp, "top.qcow2")
	tool(t, nil, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", mid, "32M")
	tool(t, nil, "qemu-img", "create", "-q", "-f", "qcow2", "-b", mid, "-F", "qcow2", top)
	for _, layer := range []struct{ img, at string }{{mid, "0 8M"}, {top, "8M 8M"}} {
		var off, n string
		off, n, _ = strings.Cut(layer.at, " ")
		tool(t, nil, "qemu-io", "-f", "qcow2", "-c", "write -s "+slice(t, other, off)+" "+off+" "+n, layer.img)
	}
	rawBase := workspacedisk.Source{Path: base, Format: workspacedisk.FormatRaw}
	midSrc := workspacedisk.Source{Path: mid, Format: workspacedisk.FormatQcow2, Backing: &rawBase}
	topSrc := workspacedisk.Source{Path: top, Format: workspacedisk.FormatQcow2, Backing: &midSrc}
	d := openSource(t, topSrc)
	compareTree(t, hostTree(t, dir), d)
	out := filepath.Join(tmp, "out.ext4")
	got, err := d.Export(context.Background(), out)
	if err != nil || got.BytesWritten != 32<<20 {
		t.Fatalf("exporting: %+v, %v", got, err)
	}
	flat := filepath.Join(tmp, "flat.raw")
	tool(t, nil, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, flat)
	sameBytes(t, flat, out)
	d.Close()

	refused := map[string]struct {
		src   workspacedisk.Source
		class error
	}{
		"no backing given":         {workspacedisk.Source{Path: top, Format: workspacedisk.FormatQcow2}, api.ErrDenied},
		"no backing given, auto":   {workspacedisk.Source{Path: top, Format: workspacedisk.FormatAuto}, api.ErrDenied},
		"the chain is cut further": {workspacedisk.Source{Path: top, Format: workspacedisk.FormatQcow2, Backing: &workspacedisk.Source{Path: mid, Format: workspacedisk.FormatQcow2}}, api.ErrDenied},
		"backing by magic":         {workspacedisk.Source{Path: mid, Format: workspacedisk.FormatQcow2, Backing: &workspacedisk.Source{Path: base, Format: workspacedisk.FormatAuto}}, api.ErrInvalid},
		"raw on something":         {workspacedisk.Source{Path: base, Format: workspacedisk.FormatRaw, Backing: &rawBase}, api.ErrInvalid},
		"qcow2 read as raw":        {workspacedisk.Source{Path: top, Format: workspacedisk.FormatRaw}, api.ErrUnsupported},
		"raw read as qcow2":        {workspacedisk.Source{Path: base, Format: workspacedisk.FormatQcow2}, api.ErrUnsupported},
	}
	for name, tt := range refused {
		t.Run(name, func(t *testing.T) {
			d, err := workspacedisk.Open(context.Background(), tt.src, workspacedisk.Options{})
			if err == nil {
				d.Close()
			}
			if !errors.Is(err, tt.class) {
				t.Errorf("got %v, want class %q", err, api.Code(tt.class))
			}
		})
	}
}

// slice writes the 8 MiB of a raw image from off ("0", "8M") on to a file.
func slice(t testing.TB, img, off string) string {
	t.Helper()
	data, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	part := data[:8<<20]
	if off == "8M" {
		part = data[8<<20:]
	}
	p := filepath.Join(t.TempDir(), "slice")
	if err := os.WriteFile(p, part, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestHostileBacking is a raw disk over which a guest wrote a qcow2 header
// that names a file of the host: neither reading nor exporting shows it, and
// the export does not carry the header to the next tool.
func TestHostileBacking(t *testing.T) {
	t.Parallel()
	needTools(t)
	testenv.RequireTools(t, "qemu", "qemu-img")
	dir := sampleTree(t)
	img := makeImage(t, dir, "16M")
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte(strings.Repeat("HOST-SECRET\n", 100_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	evil := filepath.Join(t.TempDir(), "evil.qcow2")
	tool(t, nil, "qemu-img", "create", "-q", "-f", "qcow2", "-b", victim, "-F", "raw", evil, "1M")
	header, err := os.ReadFile(evil)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(img, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(header[:1024], 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
	// As the raw disk that it is, it is fully usable.
	d := openRaw(t, img)
	compareTree(t, hostTree(t, dir), d)
	out := filepath.Join(t.TempDir(), "out.ext4")
	if _, err := d.Export(context.Background(), out); err != nil {
		t.Fatal(err)
	}
	if info := tool(t, nil, "qemu-img", "info", out); !strings.Contains("\n"+info, "\nfile format: raw\n") || strings.Contains(info, "backing") {
		t.Errorf("the export is not taken for raw:\n%s", info)
	}
	// Taken for what its magic says, it is refused.
	for _, p := range []string{img, evil} {
		if _, err := workspacedisk.Open(context.Background(), workspacedisk.Source{Path: p, Format: workspacedisk.FormatAuto}, workspacedisk.Options{}); err == nil {
			t.Errorf("%s was opened by its magic", p)
		}
	}
}
