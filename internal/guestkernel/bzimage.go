package guestkernel

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"

	"github.com/pyro-mcp/pyro/api"
)

// Offsets in the setup header of a bzImage (kernel documentation, "The
// Linux/x86 Boot Protocol").
const (
	offSetupSects     = 0x1F1
	offBootFlag       = 0x1FE // 0xAA55
	offMagic          = 0x202 // "HdrS"
	offVersion        = 0x206
	offKernelVersion  = 0x20E // minus 0x200, where the version text lies
	offPayloadOffset  = 0x248
	offPayloadLength  = 0x24C
	setupHeaderSize   = 0x250
	firstWithPayload  = 0x0208
	maxKernelSize     = 512 << 20 // uncompressed; distribution kernels have 30 to 80 MB
	maxVersionText    = 256
	sizeBehindPayload = 4
)

// A bzImage is a compressed x86 kernel.
type bzImage struct {
	release string // "" if it names none
	payload *io.SectionReader
}

// openBzImage reads the headers; r has size bytes.
func openBzImage(r io.ReaderAt, size int64) (*bzImage, error) {
	h := make([]byte, setupHeaderSize)
	if _, err := r.ReadAt(h, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	le := binary.LittleEndian
	if le.Uint16(h[offBootFlag:]) != 0xAA55 || string(h[offMagic:offMagic+4]) != "HdrS" {
		return nil, api.Errorf(api.ErrInvalid, "it is not a bzImage")
	}
	if v := le.Uint16(h[offVersion:]); v < firstWithPayload {
		return nil, api.Errorf(api.ErrUnsupported, "its boot protocol %d.%02d says not where the kernel proper is", v>>8, v&0xff)
	}
	sects := int64(h[offSetupSects])
	if sects == 0 {
		sects = 4 // the oldest images leave it out
	}
	start := (sects+1)*512 + int64(le.Uint32(h[offPayloadOffset:]))
	length := int64(le.Uint32(h[offPayloadLength:]))
	if length <= sizeBehindPayload || start > size || length > size-start {
		return nil, api.Errorf(api.ErrDamaged, "its payload of %d bytes at %d lies outside its %d bytes", length, start, size)
	}
	b := &bzImage{payload: io.NewSectionReader(r, start, length)}
	if off := int64(le.Uint16(h[offKernelVersion:])); off != 0 {
		text := make([]byte, maxVersionText)
		n, _ := r.ReadAt(text, off+0x200)
		line, _, _ := bytes.Cut(text[:n], []byte{0})
		if fields := strings.Fields(string(line)); len(fields) > 0 {
			b.release = fields[0]
		}
	}
	return b, nil
}

// extract writes the uncompressed kernel, an ELF file, to w.
func (b *bzImage) extract(w io.Writer) error {
	length := b.payload.Size()
	tail := make([]byte, sizeBehindPayload)
	if _, err := b.payload.ReadAt(tail, length-sizeBehindPayload); err != nil {
		return err
	}
	want := int64(binary.LittleEndian.Uint32(tail))
	if want > maxKernelSize {
		return api.Errorf(api.ErrExhausted, "its kernel has %d bytes, the limit is %d", want, int64(maxKernelSize))
	}
	// The build puts the size behind the compressed data, but for gzip, which
	// ends in it by itself (scripts/Makefile.lib, size_append).
	r, err := decompress(io.NewSectionReader(b.payload, 0, length), length-sizeBehindPayload)
	if err != nil {
		return err
	}
	head := make([]byte, len(elf.ELFMAG))
	if _, err := io.ReadFull(r, head); err != nil {
		return fmt.Errorf("decompressing the kernel: %w", asDamaged(err))
	}
	if string(head) != elf.ELFMAG {
		return api.Errorf(api.ErrDamaged, "what it holds is not an ELF kernel")
	}
	n, err := io.Copy(w, io.LimitReader(io.MultiReader(bytes.NewReader(head), r), want+1))
	if err != nil {
		return fmt.Errorf("decompressing the kernel: %w", asDamaged(err))
	}
	if n != want {
		return api.Errorf(api.ErrDamaged, "its kernel has not the %d bytes that it announces", want)
	}
	return nil
}

// asDamaged gives a class to the errors of decompressors, which have none.
// Those of writing are kept apart by the caller's copy having the file's path.
func asDamaged(err error) error {
	var pathErr interface{ Timeout() bool } // *fs.PathError and syscall errors
	if errors.As(err, &pathErr) {
		return err
	}
	return api.Errorf(api.ErrDamaged, "%w", err)
}

// decompress tells the format by its first bytes. bare is the length without
// what stands behind the compressed data.
func decompress(r *io.SectionReader, bare int64) (io.Reader, error) {
	head := make([]byte, 6)
	if _, err := r.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	data := io.NewSectionReader(r, 0, bare)
	has := func(magic string) bool { return strings.HasPrefix(string(head), magic) }
	var out io.Reader
	var err error
	switch {
	case has("\x02\x21\x4c\x18"): // LZ4, the legacy frame
		out = lz4.NewReader(data)
	case has("\x1f\x8b"):
		var z *gzip.Reader
		if z, err = gzip.NewReader(r); err == nil {
			z.Multistream(false)
			out = z
		}
	case has("\x28\xb5\x2f\xfd"):
		var z *zstd.Decoder
		// Kernels are compressed with windows of up to 128 MiB.
		if z, err = zstd.NewReader(data, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20)); err == nil {
			out = z.IOReadCloser()
		}
	case has("\xfd7zXZ\x00"):
		out, err = xz.ReaderConfig{DictCap: lzma.MinDictCap, SingleStream: true}.NewReader(data)
	case has("BZh"):
		out = bzip2.NewReader(data)
	case has("\x5d\x00\x00"):
		out, err = lzma.NewReader(data)
	default:
		return nil, api.Errorf(api.ErrUnsupported, "the compression that begins with % x is unknown", head)
	}
	if err != nil {
		return nil, api.Errorf(api.ErrDamaged, "decompressing: %w", err)
	}
	return out, nil
}
