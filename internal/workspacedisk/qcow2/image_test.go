package qcow2_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/qcow2"
)

func load(t testing.TB, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

var images = []string{"plain", "zlib", "zstd", "v2"}

// TestImages compares each image with the raw one that it was made from.
func TestImages(t *testing.T) {
	want := load(t, "../ext4/testdata/extents.gz")
	for _, name := range images {
		t.Run(name, func(t *testing.T) {
			data := load(t, filepath.Join("testdata", name+".gz"))
			img, err := qcow2.Open(bytes.NewReader(data), int64(len(data)), nil)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, img.Size())
			if _, err := img.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Error("the content differs from the raw image's")
			}
			// In odd pieces it is the same.
			got, err = io.ReadAll(io.NewSectionReader(img, 777, img.Size()))
			if err != nil || !bytes.Equal(got, want[777:]) {
				t.Errorf("in pieces the content differs: %v", err)
			}
			zeros := 0
			for off := int64(0); off < img.Size(); {
				end, zero, err := img.NextData(off)
				if err != nil || end <= off {
					t.Fatalf("NextData(%d) = %d, %v", off, end, err)
				}
				if zero {
					zeros++
					if len(bytes.Trim(want[off:end], "\x00")) > 0 {
						t.Errorf("bytes %d to %d are data, not zeros", off, end)
					}
				}
				off = end
			}
			if zeros == 0 {
				t.Error("no holes at all")
			}
		})
	}
}

func TestRefused(t *testing.T) {
	be := binary.BigEndian
	tests := []struct {
		name   string
		change func(b []byte)
		class  error
	}{
		{"no magic number", func(b []byte) { b[0] = 'X' }, api.ErrUnsupported},
		{"version 4", func(b []byte) { be.PutUint32(b[4:], 4) }, api.ErrUnsupported},
		{"encryption", func(b []byte) { be.PutUint32(b[32:], 1) }, api.ErrUnsupported},
		{"tiny clusters", func(b []byte) { be.PutUint32(b[20:], 8) }, api.ErrDamaged},
		{"huge clusters", func(b []byte) { be.PutUint32(b[20:], 63) }, api.ErrDamaged},
		{"an impossible size", func(b []byte) { be.PutUint64(b[24:], 1<<62) }, api.ErrDamaged},
		{"more disk than L1 entries", func(b []byte) { be.PutUint64(b[24:], 1<<40) }, api.ErrDamaged},
		{"a huge L1 table", func(b []byte) { be.PutUint32(b[36:], ^uint32(0)) }, api.ErrDamaged},
		{"an L1 table outside", func(b []byte) { be.PutUint64(b[40:], 1<<40) }, api.ErrDamaged},
		{"an L1 table that wraps", func(b []byte) { be.PutUint64(b[40:], ^uint64(511)) }, api.ErrDamaged},
		{"a backing name outside", func(b []byte) { be.PutUint64(b[8:], 1<<40); be.PutUint32(b[16:], 5) }, api.ErrDamaged},
		{"a long backing name", func(b []byte) { be.PutUint64(b[8:], 600); be.PutUint32(b[16:], 5000) }, api.ErrDamaged},
		{"marked corrupt", func(b []byte) { b[79] |= 2 }, api.ErrDamaged},
		{"an external data file", func(b []byte) { b[79] |= 4 }, api.ErrUnsupported},
		{"extended L2", func(b []byte) { b[79] |= 16 }, api.ErrUnsupported},
		{"an unknown feature", func(b []byte) { b[78] |= 1 }, api.ErrUnsupported},
		{"unknown compression", func(b []byte) { b[79] |= 8; b[104] = 7 }, api.ErrUnsupported},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			data := load(t, "testdata/plain.gz")
			tt.change(data)
			if _, err := qcow2.Open(bytes.NewReader(data), int64(len(data)), nil); !errors.Is(err, tt.class) {
				t.Errorf("got %v, want class %q", err, api.Code(tt.class))
			}
		})
	}
}

// raw is a backing layer in memory.
type raw []byte

func (r raw) Size() int64                             { return int64(len(r)) }
func (r raw) ReadAt(p []byte, off int64) (int, error) { return bytes.NewReader(r).ReadAt(p, off) }

// patch overwrites places of data: the input is four bytes of offset, one of
// length, and the bytes, again and again. Small inputs keep the fuzzer quick.
func patch(data, in []byte) []byte {
	out := bytes.Clone(data)
	for len(in) > 5 {
		off, n := int(binary.LittleEndian.Uint32(in)%uint32(len(out))), int(in[4])
		in = in[5:]
		n = min(n, len(in))
		copy(out[off:], in[:n])
		in = in[n:]
	}
	return out
}

func encodePatch(off uint32, data ...byte) []byte {
	out := binary.LittleEndian.AppendUint32(nil, off)
	return append(append(out, byte(len(data))), data...)
}

// FuzzImage reads images with patches anywhere in them, cut anywhere, with and
// without something beneath.
func FuzzImage(f *testing.F) {
	var bases [][]byte
	for i, name := range images {
		data := load(f, filepath.Join("testdata", name+".gz"))
		bases = append(bases, data)
		f.Add(uint8(i), uint32(len(data)), []byte{})
		f.Add(uint8(i), uint32(len(data)/2), []byte{})
		for _, at := range []uint32{8, 16, 20, 24, 36, 40, 72, 79, 100, 104} { // header fields
			f.Add(uint8(i), uint32(len(data)), encodePatch(at, 1))
			f.Add(uint8(i), uint32(len(data)), encodePatch(at, 0, 0, 0xff, 0xff))
		}
		for at := uint32(512); at < 16<<10; at += 512 { // tables and clusters
			f.Add(uint8(i), uint32(len(data)), encodePatch(at, 0x40, 0, 0, 0, 0, 0, 2, 1))
		}
	}
	backing := raw(bytes.Repeat([]byte("backing "), 1000))
	buf := make([]byte, 10_000)
	f.Fuzz(func(t *testing.T, base uint8, size uint32, in []byte) {
		data := bases[int(base)%len(bases)]
		data = patch(data, in)
		data = data[:min(int(size), len(data))]
		start := time.Now()
		for _, below := range []qcow2.Layer{nil, backing} {
			img, err := qcow2.Open(bytes.NewReader(data), int64(len(data)), below)
			if err != nil {
				typed(t, err)
				return
			}
			step := max(1, img.Size()/20)
			for off := int64(0); off < img.Size(); off += step {
				if _, err := img.ReadAt(buf, off); err != nil && err != io.EOF {
					typed(t, err)
				}
				end, _, err := img.NextData(off)
				if err != nil {
					typed(t, err)
				} else if end <= off || end > img.Size() {
					t.Errorf("NextData(%d) = %d", off, end)
				}
			}
		}
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("took %v", took)
		}
	})
}

func typed(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, api.ErrDamaged) && !errors.Is(err, api.ErrUnsupported) {
		t.Errorf("an error without a class: %v", err)
	}
}

// bottom is a layer of zeros that counts how often it is asked.
type bottom struct {
	bytes.Reader
	size  int64
	asked int
}

func (b *bottom) Size() int64 { return b.size }

func (b *bottom) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }

func (b *bottom) NextData(off int64) (int64, bool, error) {
	b.asked++
	return min(off+1<<20, b.size), true, nil
}

// In a chain every layer asks the one below once for a stretch, not once for
// each of its clusters: that multiplies with every layer.
func TestNextDataOfAChain(t *testing.T) {
	data := load(t, filepath.Join("testdata", "v2.gz"))
	top, err := qcow2.Open(bytes.NewReader(data), int64(len(data)), nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &bottom{size: top.Size()}
	var layer qcow2.Layer = b
	for range 8 {
		if layer, err = qcow2.Open(bytes.NewReader(data), int64(len(data)), layer); err != nil {
			t.Fatal(err)
		}
	}
	steps := 0
	for off := int64(0); off < top.Size(); steps++ {
		end, _, err := layer.(*qcow2.Image).NextData(off)
		if err != nil || end <= off {
			t.Fatalf("NextData(%d) = %d, %v", off, end, err)
		}
		off = end
	}
	if limit := 4*int(top.Size()>>20) + 4*steps; b.asked > limit {
		t.Errorf("the lowest layer was asked %d times for %d stretches of %d MiB", b.asked, steps, top.Size()>>20)
	}
}
