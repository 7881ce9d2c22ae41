package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/pyro-mcp/pyro/api"
)

// Magic is what a qcow2 image starts with.
const Magic = "QFI\xfb"

const (
	headerLenV2 = 72
	headerLenV3 = 104
	// maxL1Bytes is QEMU's own bound (QCOW_MAX_L1_SIZE in block/qcow2.h).
	maxL1Bytes = 32 << 20
	// maxBackingName is QEMU's own bound on the backing file's name.
	maxBackingName = 1023
)

const (
	incompatDirty       = 1 << 0 // reference counts may be wrong: reading does not use them
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
	readableIncompat    = incompatDirty | incompatCompression
)

const (
	compressionZlib = 0
	compressionZstd = 1
)

// header holds the checked fields of the header.
type header struct {
	clusterBits uint
	size        uint64 // of the virtual disk, in bytes
	l1Offset    uint64
	l1Entries   uint32
	compression byte
	backingName string
}

// readHeader reads and checks the header of an image file of fileSize bytes.
func readHeader(r io.ReaderAt, fileSize int64) (*header, error) {
	raw := make([]byte, headerLenV3+8)
	if fileSize < headerLenV2 {
		return nil, damaged("the qcow2 image of %d bytes is shorter than its header", fileSize)
	}
	if err := readFull(r, raw[:min(int64(len(raw)), fileSize)], 0); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	if string(raw[:4]) != Magic {
		return nil, api.Errorf(api.ErrUnsupported, "this is no qcow2 image")
	}
	version := be.Uint32(raw[4:])
	if version != 2 && version != 3 {
		return nil, api.Errorf(api.ErrUnsupported, "qcow2 version %d is not supported", version)
	}
	h := &header{
		clusterBits: uint(be.Uint32(raw[20:])),
		size:        be.Uint64(raw[24:]),
		l1Entries:   be.Uint32(raw[36:]),
		l1Offset:    be.Uint64(raw[40:]),
	}
	if method := be.Uint32(raw[32:]); method != 0 {
		return nil, api.Errorf(api.ErrUnsupported, "encrypted qcow2 images are not supported")
	}
	if version == 3 {
		if err := h.readV3(raw); err != nil {
			return nil, err
		}
	}
	if err := h.check(fileSize); err != nil {
		return nil, err
	}
	if off, n := be.Uint64(raw[8:]), be.Uint32(raw[16:]); off != 0 {
		if n > maxBackingName || off > uint64(fileSize) || uint64(n) > uint64(fileSize)-off {
			return nil, damaged("the backing file's name of %d bytes lies outside of the qcow2 image", n)
		}
		name := make([]byte, n)
		if err := readFull(r, name, int64(off)); err != nil {
			return nil, err
		}
		h.backingName = string(name)
	}
	return h, nil
}

// readV3 reads the fields that version 3 added.
func (h *header) readV3(raw []byte) error {
	be := binary.BigEndian
	bits := be.Uint64(raw[72:])
	switch {
	case bits&incompatCorrupt != 0:
		return damaged("the qcow2 image is marked as corrupt")
	case bits&incompatDataFile != 0:
		return api.Errorf(api.ErrUnsupported, "qcow2 images with an external data file are not supported")
	case bits&incompatExtendedL2 != 0:
		return api.Errorf(api.ErrUnsupported, "qcow2 images with extended L2 entries are not supported")
	case bits&^readableIncompat != 0:
		return api.Errorf(api.ErrUnsupported, "qcow2 feature bits 0x%x are not known here", bits)
	}
	headerLen := be.Uint32(raw[100:])
	if headerLen < headerLenV3 {
		return damaged("the qcow2 header says that it is %d bytes long", headerLen)
	}
	if bits&incompatCompression != 0 && headerLen > headerLenV3 {
		h.compression = raw[104]
	}
	if h.compression != compressionZlib && h.compression != compressionZstd {
		return api.Errorf(api.ErrUnsupported, "qcow2 compression type %d is not supported", h.compression)
	}
	return nil
}

// check verifies that the numbers agree: afterwards the L1 table lies in the
// file, is bounded, and covers the whole virtual disk.
func (h *header) check(fileSize int64) error {
	if h.clusterBits < 9 || h.clusterBits > 21 {
		return damaged("the qcow2 image has clusters of 2^%d bytes", h.clusterBits)
	}
	if h.size > 1<<56 {
		return damaged("the qcow2 image says that its disk has %d bytes", h.size)
	}
	perL1 := uint64(1) << (2*h.clusterBits - 3) // bytes that one L1 entry covers
	need := (h.size + perL1 - 1) / perL1
	tableLen := uint64(h.l1Entries) * 8
	switch {
	case uint64(h.l1Entries) < need || tableLen > maxL1Bytes:
		return damaged("the qcow2 image has %d L1 entries where %d are needed", h.l1Entries, need)
	case h.l1Offset%(1<<h.clusterBits) != 0 || h.l1Offset > uint64(fileSize) || tableLen > uint64(fileSize)-h.l1Offset:
		return damaged("the L1 table lies outside of the qcow2 image")
	}
	h.l1Entries = uint32(need)
	return nil
}

func damaged(format string, args ...any) error {
	return api.Errorf(api.ErrDamaged, format, args...)
}

// readFull fills p from r at off. An early end of the file is damage.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("the qcow2 image ends before byte %d", off+int64(len(p)))
	}
	return fmt.Errorf("reading the qcow2 image at byte %d: %w", off, err)
}
