package qcow2

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/pyro-mcp/pyro/api"
)

// A Layer is one readable disk of known size: an image of this package or a
// raw file.
type Layer interface {
	io.ReaderAt
	Size() int64
}

// An Image is the virtual disk of a qcow2 file. It may be used concurrently.
type Image struct {
	r        io.ReaderAt
	fileSize int64
	h        *header
	l1       []uint64
	backing  Layer // nil: what is not allocated reads as zeros

	mu      sync.Mutex
	tables  []l2Table // direct-mapped by L1 index
	cluster []byte    // the last decompressed cluster
	from    uint64    // the L2 entry that it came from

	belowMu sync.Mutex
	below   stretchBelow
}

type l2Table struct {
	index   uint64
	entries []byte // never written after it was stored
}

// l2Slots bounds the L2 tables in memory: 64 tables of 64 KiB map 32 GiB.
const l2Slots = 64

// Bits of L1 and L2 entries.
const (
	offsetMask     = 0x00fffffffffffe00
	flagCompressed = 1 << 62
	flagZero       = 1 << 0 // version 3: reads as zeros
)

// Open reads the header and L1 table of the image in the first fileSize bytes
// of r. backing is what lies beneath, nil for nothing: it is the caller's
// decision, the name in the header only says whether there should be one (see
// BackingName). The image closes neither r nor backing.
func Open(r io.ReaderAt, fileSize int64, backing Layer) (*Image, error) {
	h, err := readHeader(r, fileSize)
	if err != nil {
		return nil, err
	}
	raw := make([]byte, int(h.l1Entries)*8)
	if err := readFull(r, raw, int64(h.l1Offset)); err != nil {
		return nil, err
	}
	img := &Image{r: r, fileSize: fileSize, h: h, backing: backing,
		l1: make([]uint64, h.l1Entries), tables: make([]l2Table, l2Slots)}
	for i := range img.l1 {
		img.l1[i] = binary.BigEndian.Uint64(raw[i*8:])
	}
	return img, nil
}

// BackingName is the backing file's name as the header gives it, "" for none.
// It is the image's word, not to be opened.
func (img *Image) BackingName() string { return img.h.backingName }

// Size is the size of the virtual disk in bytes.
func (img *Image) Size() int64 { return int64(img.h.size) }

// ReadAt implements [io.ReaderAt] on the virtual disk.
func (img *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, api.Errorf(api.ErrInvalid, "reading at the negative offset %d", off)
	}
	if off >= img.Size() {
		return 0, io.EOF
	}
	var eof error
	if rest := img.Size() - off; int64(len(p)) > rest {
		p, eof = p[:rest], io.EOF
	}
	for done := 0; done < len(p); {
		n, err := img.readSome(p[done:], off+int64(done))
		if err != nil {
			return done, err
		}
		done += n
	}
	return len(p), eof
}

// extent is where a stretch of the virtual disk comes from.
type extent struct {
	kind   extentKind
	offset int64  // in the file, for kindData
	entry  uint64 // the L2 entry, for kindCompressed
}

type extentKind int

const (
	kindBacking extentKind = iota
	kindZero
	kindData
	kindCompressed
)

// lookup says where the cluster at disk offset off comes from and, in in, how
// far into the cluster off is.
func (img *Image) lookup(off int64) (e extent, in int64, err error) {
	bits := img.h.clusterBits
	cluster := uint64(off) >> bits
	in = off & (1<<bits - 1)
	l2Bits := bits - 3
	index := cluster >> l2Bits
	table := img.l1[index] & offsetMask
	if table == 0 {
		return extent{kind: kindBacking}, in, nil
	}
	entries, err := img.table(index, table)
	if err != nil {
		return extent{}, 0, err
	}
	entry := binary.BigEndian.Uint64(entries[(cluster&(1<<l2Bits-1))*8:])
	offset := entry & offsetMask
	switch {
	case entry&flagCompressed != 0:
		return extent{kind: kindCompressed, entry: entry}, in, nil
	case entry&flagZero != 0:
		return extent{kind: kindZero}, in, nil
	case offset == 0:
		return extent{kind: kindBacking}, in, nil
	case offset&(1<<bits-1) != 0 || offset >= uint64(img.fileSize):
		return extent{}, 0, damaged("the qcow2 image puts a cluster at byte %d of its %d", offset, img.fileSize)
	}
	return extent{kind: kindData, offset: int64(offset) + in}, in, nil
}

// table returns the L2 table of L1 entry index, which lies at offset.
func (img *Image) table(index, offset uint64) ([]byte, error) {
	slot := &img.tables[index%l2Slots]
	img.mu.Lock()
	if slot.entries != nil && slot.index == index {
		entries := slot.entries
		img.mu.Unlock()
		return entries, nil
	}
	img.mu.Unlock()
	if offset&(1<<img.h.clusterBits-1) != 0 || offset >= uint64(img.fileSize) {
		return nil, damaged("the qcow2 image puts an L2 table at byte %d of its %d", offset, img.fileSize)
	}
	entries := make([]byte, 1<<img.h.clusterBits)
	if err := readFull(img.r, entries, int64(offset)); err != nil {
		return nil, err
	}
	img.mu.Lock()
	*slot = l2Table{index: index, entries: entries}
	img.mu.Unlock()
	return entries, nil
}

// readSome reads a first part of p, at least one byte, joining clusters that
// follow each other in the file or in the backing.
func (img *Image) readSome(p []byte, off int64) (int, error) {
	e, in, err := img.lookup(off)
	if err != nil {
		return 0, err
	}
	size := int64(1) << img.h.clusterBits
	n := min(int64(len(p)), size-in)
	for e.kind != kindCompressed && n < int64(len(p)) {
		next, _, err := img.lookup(off + n)
		if err != nil {
			return 0, err
		}
		if next.kind != e.kind || e.kind == kindData && next.offset != e.offset+n {
			break
		}
		n = min(int64(len(p)), n+size)
	}
	p = p[:n]
	switch e.kind {
	case kindZero:
		clear(p)
	case kindBacking:
		err = img.readBacking(p, off)
	case kindData:
		err = img.readData(p, e.offset)
	case kindCompressed:
		err = img.readCompressed(p, e.entry, in)
	}
	return int(n), err
}

// readData reads allocated clusters. The last one may end early in the file:
// QEMU does not write its unused rest.
func (img *Image) readData(p []byte, off int64) error {
	if short := off + int64(len(p)) - img.fileSize; short > 0 {
		size := int64(1) << img.h.clusterBits
		if short >= size {
			return damaged("the qcow2 image ends before byte %d", off+int64(len(p)))
		}
		clear(p[int64(len(p))-short:])
		p = p[:int64(len(p))-short]
	}
	return readFull(img.r, p, off)
}

// readBacking reads from below; past its end the disk is zeros.
func (img *Image) readBacking(p []byte, off int64) error {
	n := 0
	if img.backing != nil && off < img.backing.Size() {
		n = int(min(int64(len(p)), img.backing.Size()-off))
		if err := readFull(img.backing, p[:n], off); err != nil {
			return fmt.Errorf("reading the backing image: %w", err)
		}
	}
	clear(p[n:])
	return nil
}

// readCompressed copies from the decompressed cluster of an L2 entry.
func (img *Image) readCompressed(p []byte, entry uint64, in int64) error {
	img.mu.Lock()
	defer img.mu.Unlock()
	if img.cluster == nil || img.from != entry {
		data, err := img.decompress(entry)
		if err != nil {
			return err
		}
		img.cluster, img.from = data, entry
	}
	copy(p, img.cluster[in:])
	return nil
}

// decompress returns one whole cluster. An entry gives the offset in its low
// bits, and above them the number of further 512-byte sectors it takes.
func (img *Image) decompress(entry uint64) ([]byte, error) {
	offsetBits := 62 - (img.h.clusterBits - 8)
	offset := entry & (1<<offsetBits - 1)
	sectors := entry & (flagCompressed - 1) >> offsetBits
	length := (sectors+1)*512 - offset%512
	if offset >= uint64(img.fileSize) {
		return nil, damaged("the qcow2 image puts a compressed cluster at byte %d of its %d", offset, img.fileSize)
	}
	// The last sector may lie past the end of the file.
	length = min(length, uint64(img.fileSize)-offset)
	packed := make([]byte, length)
	if err := readFull(img.r, packed, int64(offset)); err != nil {
		return nil, err
	}
	out := make([]byte, 1<<img.h.clusterBits)
	var err error
	if img.h.compression == compressionZstd {
		err = unzstd(out, packed)
	} else {
		_, err = io.ReadFull(flate.NewReader(bytes.NewReader(packed)), out)
	}
	if err != nil {
		return nil, damaged("a compressed cluster at byte %d of the qcow2 image cannot be read: %v", offset, err)
	}
	return out, nil
}

// unzstd fills out from the zstd frame at the start of packed. Its window is
// bounded, so a hostile frame costs little memory.
func unzstd(out, packed []byte) error {
	dec, err := zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return fmt.Errorf("preparing the decoder: %w", err)
	}
	defer dec.Close()
	_, err = io.ReadFull(dec, out)
	return err
}

// maxStretchSteps bounds the work of one NextData call.
const maxStretchSteps = 1 << 16

// NextData returns the end of a stretch of the disk that starts at off and
// whether it certainly reads as zeros. A stretch ends at the end of the disk at
// the latest; two stretches in a row may be alike. off lies inside the disk.
// Where the backing layer has a NextData too, it is asked.
func (img *Image) NextData(off int64) (end int64, zero bool, err error) {
	for pos, step := off, 0; pos < img.Size(); step++ {
		next, isZero, err := img.stretch(pos)
		if err != nil {
			return 0, false, err
		}
		if pos == off {
			zero = isZero
		} else if isZero != zero || step == maxStretchSteps {
			return pos, zero, nil
		}
		pos = min(next, img.Size())
	}
	return img.Size(), zero, nil
}

// stretch looks at one cluster, or at one whole L1 entry without a table.
func (img *Image) stretch(pos int64) (next int64, zero bool, err error) {
	e, in, err := img.lookup(pos)
	if err != nil {
		return 0, false, err
	}
	span := int64(1) << img.h.clusterBits
	next = pos - in + span
	if e.kind != kindBacking {
		return next, e.kind == kindZero, nil
	}
	if l1Span := span << (img.h.clusterBits - 3); img.l1[pos/l1Span]&offsetMask == 0 {
		next = pos - pos%l1Span + l1Span
	}
	if img.backing == nil || pos >= img.backing.Size() {
		return next, true, nil
	}
	below, ok := img.backing.(interface {
		NextData(off int64) (end int64, zero bool, err error)
	})
	if !ok {
		return min(next, img.backing.Size()), false, nil
	}
	img.belowMu.Lock()
	defer img.belowMu.Unlock()
	if s := img.below; pos < s.from || pos >= s.end {
		end, zero, err := below.NextData(pos)
		if err != nil {
			return 0, false, fmt.Errorf("reading the backing image: %w", err)
		}
		img.below = stretchBelow{pos, end, zero}
	}
	return min(next, img.below.end), img.below.zero, nil
}

// stretchBelow is the last answer of the backing layer's NextData. Without
// remembering it every cluster here would have all clusters of the same stretch
// there looked at, and in a chain each layer multiplies that.
type stretchBelow struct {
	from, end int64
	zero      bool
}
