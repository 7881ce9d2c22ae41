package guestkernel

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
)

// makeModule makes the least ELF file that has a .modinfo section.
func makeModule(depends string) []byte {
	const headerSize, sectionSize = 64, 64
	info := "license=GPL\x00depends=" + depends + "\x00name=x\x00"
	names := "\x00.modinfo\x00.shstrtab\x00"
	le := binary.LittleEndian
	b := make([]byte, headerSize)
	copy(b, "\x7fELF\x02\x01\x01") // 64 bits, little-endian
	le.PutUint16(b[16:], 1)        // relocatable
	le.PutUint16(b[18:], 62)       // x86-64
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[40:], uint64(headerSize+len(info)+len(names)))
	le.PutUint16(b[52:], headerSize)
	le.PutUint16(b[58:], sectionSize)
	le.PutUint16(b[60:], 3) // sections
	le.PutUint16(b[62:], 2) // the one with the names
	b = append(b, info...)
	b = append(b, names...)
	section := func(name, kind uint32, offset, size int) {
		s := make([]byte, sectionSize)
		le.PutUint32(s[0:], name)
		le.PutUint32(s[4:], kind)
		le.PutUint64(s[24:], uint64(offset))
		le.PutUint64(s[32:], uint64(size))
		b = append(b, s...)
	}
	section(0, 0, 0, 0)
	section(1, 1, headerSize, len(info))
	section(10, 3, headerSize+len(info), len(names))
	return b
}

func writeModule(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestClosure(t *testing.T) {
	dir := t.TempDir()
	for path, depends := range map[string]string{
		"kernel/virtio/virtio.ko":      "virtio_ring",
		"kernel/virtio/virtio_ring.ko": "",
		"kernel/virtio/virtio-pci.ko":  "virtio,virtio-ring,built_in",
		"kernel/block/virtio_blk.ko":   "virtio_ring,virtio",
		"kernel/net/unrelated.ko":      "virtio",
	} {
		writeModule(t, filepath.Join(dir, path), makeModule(depends))
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	z.Write(makeModule(""))
	z.Close()
	writeModule(t, filepath.Join(dir, "kernel/net/tun.ko.gz"), packed.Bytes())
	writeModule(t, filepath.Join(dir, "modules.alias"), []byte("no module"))
	if err := os.Symlink("/", filepath.Join(dir, "build")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/null", filepath.Join(dir, "linked.ko")); err != nil {
		t.Fatal(err)
	}
	files, err := findModules(dir)
	if err != nil {
		t.Fatal(err)
	}
	got, err := closure(files, []string{"virtio_pci", "virtio_blk", "built_in_too", "tun", "linked"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range got {
		names = append(names, m.name)
		if !strings.HasPrefix(string(m.content), "\x7fELF") {
			t.Errorf("%s is still packed", m.name)
		}
	}
	want := []string{"virtio_ring", "virtio", "virtio_pci", "virtio_blk", "tun"}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("load order (-want +got):\n%s", diff)
	}
}

func TestClosureRefusals(t *testing.T) {
	for _, tt := range []struct {
		name    string
		content []byte
	}{
		{"needs itself", makeModule("tun")},
		{"not ELF", []byte("hello")},
		{"no modinfo", bytes.ReplaceAll(makeModule(""), []byte(".modinfo"), []byte(".modinfX"))},
		{"cut", makeModule("")[:100]},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "tun.ko")
			writeModule(t, path, tt.content)
			if _, err := closure(map[string]string{"tun": path}, []string{"tun"}); !errors.Is(err, api.ErrDamaged) {
				t.Errorf("got %v", err)
			}
		})
	}
}
