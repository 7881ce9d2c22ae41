package guestkernel

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"

	"github.com/pyro-mcp/pyro/api"
)

// makeBzImage wraps a payload as the kernel's build does.
func makeBzImage(payload []byte) []byte {
	const sects = 3
	b := make([]byte, (sects+1)*512+64)
	le := binary.LittleEndian
	b[offSetupSects] = sects
	le.PutUint16(b[offBootFlag:], 0xAA55)
	copy(b[offMagic:], "HdrS")
	le.PutUint16(b[offVersion:], 0x020F)
	le.PutUint16(b[offKernelVersion:], 0x100)
	copy(b[0x300:], "6.1.0-99-test (someone@somewhere) #1\x00")
	le.PutUint32(b[offPayloadOffset:], 64)
	le.PutUint32(b[offPayloadLength:], uint32(len(payload)))
	return append(append(b, payload...), "what else is in the file"...)
}

func appendSize(b []byte, n int) []byte { return binary.LittleEndian.AppendUint32(b, uint32(n)) }

// compressors make payloads as the kernel's build makes them.
var compressors = map[string]func(kernel []byte) []byte{
	"lz4": func(k []byte) []byte {
		var buf bytes.Buffer
		w := lz4.NewWriter(&buf)
		if err := w.Apply(lz4.LegacyOption(true)); err != nil {
			panic(err)
		}
		w.Write(k)
		w.Close()
		return appendSize(buf.Bytes(), len(k))
	},
	"gzip": func(k []byte) []byte {
		var buf bytes.Buffer
		w := gzip.NewWriter(&buf)
		w.Write(k)
		w.Close()
		return buf.Bytes() // which ends in the size
	},
	"zstd": func(k []byte) []byte {
		w, err := zstd.NewWriter(nil)
		if err != nil {
			panic(err)
		}
		return appendSize(w.EncodeAll(k, nil), len(k))
	},
	"xz": func(k []byte) []byte {
		var buf bytes.Buffer
		w, err := xz.NewWriter(&buf)
		if err != nil {
			panic(err)
		}
		w.Write(k)
		w.Close()
		return appendSize(buf.Bytes(), len(k))
	},
	"lzma": func(k []byte) []byte {
		var buf bytes.Buffer
		w, err := lzma.NewWriter(&buf)
		if err != nil {
			panic(err)
		}
		w.Write(k)
		w.Close()
		return appendSize(buf.Bytes(), len(k))
	},
}

func testKernel(size int) []byte {
	k := []byte("\x7fELF")
	for i := 0; len(k) < size; i++ {
		k = append(k, byte(i>>8), byte(i>>13))
	}
	return k
}

func extractBytes(image []byte) ([]byte, *bzImage, error) {
	b, err := openBzImage(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		return nil, nil, err
	}
	var out bytes.Buffer
	err = b.extract(&out)
	return out.Bytes(), b, err
}

func TestExtract(t *testing.T) {
	for name, compress := range compressors {
		t.Run(name, func(t *testing.T) {
			kernel := testKernel(1 << 20)
			if name == "lz4" { // more than one block of its legacy form
				kernel = testKernel(9 << 20)
			}
			got, b, err := extractBytes(makeBzImage(compress(kernel)))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, kernel) {
				t.Errorf("the kernel came out different, with %d bytes", len(got))
			}
			if b.release != "6.1.0-99-test" {
				t.Errorf("the release is %q", b.release)
			}
		})
	}
}

func TestExtractRefusals(t *testing.T) {
	kernel := testKernel(100 << 10)
	good := makeBzImage(compressors["lz4"](kernel))
	changed := func(change func(b []byte)) []byte {
		b := bytes.Clone(good)
		change(b)
		return b
	}
	le := binary.LittleEndian
	for _, tt := range []struct {
		name  string
		image []byte
		class error
	}{
		{"empty", nil, api.ErrInvalid},
		{"text", []byte(strings.Repeat("not a kernel ", 100)), api.ErrInvalid},
		{"old protocol", changed(func(b []byte) { le.PutUint16(b[offVersion:], 0x0207) }), api.ErrUnsupported},
		{"cut", good[:len(good)/2], api.ErrDamaged},
		{"payload outside", changed(func(b []byte) { le.PutUint32(b[offPayloadOffset:], 1<<31) }), api.ErrDamaged},
		{"length outside", changed(func(b []byte) { le.PutUint32(b[offPayloadLength:], 1<<32-1) }), api.ErrDamaged},
		{"no length", changed(func(b []byte) { le.PutUint32(b[offPayloadLength:], 0) }), api.ErrDamaged},
		{"unknown compression", makeBzImage([]byte("????\x00\x00\x01\x00")), api.ErrUnsupported},
		{"changed data", changed(func(b []byte) { clear(b[2200:2600]) }), api.ErrDamaged},
		{"not ELF", makeBzImage(compressors["lz4"]([]byte("MZ and so on"))), api.ErrDamaged},
		{"bomb", makeBzImage(appendSize(compressors["gzip"](make([]byte, 1000)), maxKernelSize+1)), api.ErrExhausted},
		{"longer than announced", makeBzImage(appendSize(compressors["zstd"](kernel)[:len(compressors["zstd"](kernel))-4], 4096)), api.ErrDamaged},
		{"shorter than announced", makeBzImage(appendSize(compressors["zstd"](kernel)[:len(compressors["zstd"](kernel))-4], len(kernel)+1)), api.ErrDamaged},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, _, err := extractBytes(tt.image); !errors.Is(err, tt.class) {
				t.Errorf("got %v, want the class %q", err, tt.class)
			}
		})
	}
}

func FuzzExtract(f *testing.F) {
	kernel := append([]byte("\x7fELF"), make([]byte, 2000)...)
	for _, compress := range compressors {
		f.Add(makeBzImage(compress(kernel)))
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		b, err := openBzImage(bytes.NewReader(image), int64(len(image)))
		if err == nil {
			_ = b.extract(io.Discard)
		}
	})
}
