package jbd2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/pyro-mcp/pyro/api"
)

const journalMagic = 0xC03B3998

// Block types in the header of every block that is not a copy.
const (
	typeDescriptor   = 1
	typeCommit       = 2
	typeSuperblockV1 = 3
	typeSuperblockV2 = 4
	typeRevoke       = 5
)

const (
	compatChecksum      = 0x1
	incompatRevoke      = 0x01
	incompat64Bit       = 0x02
	incompatAsyncCommit = 0x04
	incompatCsumV2      = 0x08
	incompatCsumV3      = 0x10
	incompatFastCommit  = 0x20
	knownIncompat       = incompatRevoke | incompat64Bit | incompatCsumV2 | incompatCsumV3
)

const (
	headerLen     = 12   // magic, block type, sequence
	superblockLen = 1024 // also with larger blocks
)

// maxLogBlocks bounds a journal: mke2fs makes none above 10,240,000 blocks.
const maxLogBlocks = 10_240_000

// journal is a log with its checked superblock.
type journal struct {
	log       io.ReaderAt
	blockSize int
	fsBlocks  uint64
	first     uint32 // first block of the log proper
	end       uint32 // one past its last block
	sequence  uint32 // of the oldest transaction that may need replay
	start     uint32 // where it begins; 0: the journal is empty
	incompat  uint32
	csumSeed  uint32
}

func (j *journal) hasCsum() bool { return j.incompat&(incompatCsumV2|incompatCsumV3) != 0 }

// openJournal reads and checks the journal's superblock.
func openJournal(log io.ReaderAt, size int64, blockSize int, fsBlocks uint64) (*journal, error) {
	raw := make([]byte, superblockLen)
	if err := readFull(log, raw, 0); err != nil {
		return nil, err
	}
	be := binary.BigEndian
	kind := be.Uint32(raw[4:])
	if be.Uint32(raw) != journalMagic || kind != typeSuperblockV1 && kind != typeSuperblockV2 {
		return nil, damaged("the journal has no superblock")
	}
	blocks := be.Uint32(raw[16:])
	j := &journal{
		log: log, blockSize: blockSize, fsBlocks: fsBlocks,
		first: be.Uint32(raw[20:]), end: blocks,
		sequence: be.Uint32(raw[24:]), start: be.Uint32(raw[28:]),
	}
	if kind == typeSuperblockV2 {
		j.incompat = be.Uint32(raw[40:])
		if bits := j.incompat &^ knownIncompat; bits != 0 {
			return nil, api.Errorf(api.ErrUnsupported, "journal feature bits 0x%x (%s)", bits, featureNames(bits))
		}
		// The old whole-transaction checksums only exist on request of a
		// mount option, without metadata_csum.
		if be.Uint32(raw[36:])&compatChecksum != 0 && !j.hasCsum() {
			return nil, api.Errorf(api.ErrUnsupported, "journal checksums of version 1")
		}
	}
	switch {
	case int(be.Uint32(raw[12:])) != blockSize:
		return nil, damaged("the journal has blocks of %d bytes, its filesystem %d", be.Uint32(raw[12:]), blockSize)
	case blocks > maxLogBlocks || int64(blocks)*int64(blockSize) > size:
		return nil, damaged("the journal says %d blocks and has %d", blocks, size/int64(blockSize))
	case j.first == 0 || j.first >= j.end:
		return nil, damaged("the journal's log begins at block %d of %d", j.first, j.end)
	case j.start != 0 && (j.start < j.first || j.start >= j.end):
		return nil, damaged("the journal's oldest transaction is at block %d of %d", j.start, j.end)
	}
	if j.hasCsum() {
		if j.incompat&incompatCsumV2 != 0 && j.incompat&incompatCsumV3 != 0 {
			return nil, damaged("the journal claims two versions of checksums")
		}
		if raw[0x50] != 4 { // JBD2_CRC32C_CHKSUM
			return nil, api.Errorf(api.ErrUnsupported, "journal checksums of type %d", raw[0x50])
		}
		want := be.Uint32(raw[0xFC:])
		clear(raw[0xFC:0x100])
		if got := crc32c(^uint32(0), raw); got != want {
			return nil, damaged("the journal superblock's checksum is 0x%08x, not 0x%08x", got, want)
		}
		j.csumSeed = crc32c(^uint32(0), raw[48:64])
	}
	return j, nil
}

func featureNames(bits uint32) string {
	switch {
	case bits&incompatFastCommit != 0:
		return "fast commits"
	case bits&incompatAsyncCommit != 0:
		return "asynchronous commits"
	}
	return "unknown"
}

func damaged(format string, args ...any) error {
	return api.Errorf(api.ErrDamaged, format, args...)
}

// readFull fills p from r at off. An early end is damage.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("the journal ends before byte %d", off+int64(len(p)))
	}
	return fmt.Errorf("reading the journal: %w", err)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c continues the kernel's crc32c, which unlike [crc32.Update] inverts
// neither its seed nor its result.
func crc32c(seed uint32, p []byte) uint32 {
	return ^crc32.Update(^seed, castagnoli, p)
}
