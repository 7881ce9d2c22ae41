package oci_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/environment/oci"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// FuzzLayers makes images of two layers of anything: what is not refused is a
// file system that can be read to the end.
func FuzzLayers(f *testing.F) {
	base := archive(f, dir("a"), file("a/f", "1"), symlink("l", "a"))
	f.Add(base, archive(f, whiteout("a/.wh.f"), whiteout("l/.wh..wh..opq"), link("h", "l"), file("l/g", "2")))
	f.Add(base, archive(f, dir("l"), whiteout("l/.wh..wh..opq"), file("../x", "3"), file("a", "4")))
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	_, _ = w.Write(base)
	_ = w.Close()
	z, err := zstd.NewWriter(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packed.Bytes(), z.EncodeAll(base, nil))
	scratch := f.TempDir()
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		// With the digests right, or nothing would get far.
		config := fmt.Sprintf(`{"os":"linux","architecture":%q,"rootfs":{"type":"layers","diff_ids":["sha256:%x","sha256:%x"]}}`,
			runtime.GOARCH, unpackedSum(lower), unpackedSum(upper))
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		for name, content := range map[string][]byte{
			"config": []byte(config), "lower": lower, "upper": upper,
			"manifest.json": []byte(`[{"Config":"config","Layers":["lower","upper"]}]`),
		} {
			if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o600, Size: int64(len(content))}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(content); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(scratch, fmt.Sprint(os.Getpid()))
		if err := os.WriteFile(path+".tar", buf.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		p := &oci.Puller{Limits: oci.Limits{Layers: 2, CompressedBytes: 1 << 20, TreeBytes: 4 << 20, Entries: 1000, NameBytes: 1 << 20, DocumentBytes: 1 << 20}}
		img, err := p.Resolve(t.Context(), reference(t, "docker-archive:"+path+".tar"))
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		out, err := os.Create(path + ".ext4")
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		if _, err := p.Build(t.Context(), img, out, nil); err != nil {
			if api.Code(err) == "internal" {
				t.Errorf("an error without a class: %v", err)
			}
			return
		}
		d, err := workspacedisk.Open(t.Context(), workspacedisk.Source{Path: out.Name(), Format: workspacedisk.FormatRaw}, workspacedisk.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if err := d.Walk(t.Context(), "/", func(workspacedisk.WalkEntry) error { return nil }); err != nil {
			t.Error(err)
		}
	})
}

// unpackedSum is the digest that a layer of these bytes has, unpacked, as far
// as it can be.
func unpackedSum(b []byte) [32]byte {
	out := b
	if r, err := gzip.NewReader(bytes.NewReader(b)); err == nil {
		var buf bytes.Buffer
		_, _ = buf.ReadFrom(io.LimitReader(r, 8<<20))
		out = buf.Bytes()
	} else if z, err := zstd.NewReader(bytes.NewReader(b)); err == nil && bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		var buf bytes.Buffer
		_, _ = buf.ReadFrom(io.LimitReader(z, 8<<20))
		z.Close()
		out = buf.Bytes()
	}
	return sha256.Sum256(out)
}
