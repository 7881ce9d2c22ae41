package ext4

import (
	"encoding/binary"
	"io"

	"github.com/pyro-mcp/pyro/api"
)

// The superblock lies 1024 bytes into the filesystem and is 1024 bytes long.
const (
	superblockOffset = 1024
	superblockLen    = 1024
	superblockMagic  = 0xEF53
)

// Incompatible features: a reader that does not know one must not read on.
const (
	incompatFiletype    = 0x0002
	incompatRecover     = 0x0004
	incompatMetaBG      = 0x0010
	incompatExtents     = 0x0040
	incompat64Bit       = 0x0080
	incompatMMP         = 0x0100
	incompatFlexBG      = 0x0200
	incompatEAInode     = 0x0400
	incompatCsumSeed    = 0x2000
	incompatLargeDir    = 0x4000
	incompatInlineData  = 0x8000
	knownIncompat       = incompatFiletype | incompatRecover | incompatMetaBG | incompatExtents | incompat64Bit | incompatMMP | incompatFlexBG | incompatEAInode | incompatCsumSeed | incompatLargeDir | incompatInlineData
	roCompatSparseSuper = 0x0001
	roCompatMetaCsum    = 0x0400
	compatHasJournal    = 0x0004
	compatSparseSuper2  = 0x0200
)

// maxBlockSize is the largest block size of the format.
const maxBlockSize = 64 << 10

// superblock holds the checked fields of the superblock.
type superblock struct {
	inodes         uint32
	blocks         uint64
	firstDataBlock uint32
	blockSize      int
	blocksPerGroup uint32
	inodesPerGroup uint32
	inodeSize      int
	descSize       int
	firstMetaBG    uint32
	compat         uint32
	incompat       uint32
	roCompat       uint32
	uuid           [16]byte
	journalInode   uint32
	journalDev     uint32
	backupBGs      [2]uint32
	csumSeed       uint32
	groups         uint64
}

func (sb *superblock) hasMetaCsum() bool   { return sb.roCompat&roCompatMetaCsum != 0 }
func (sb *superblock) needsRecovery() bool { return sb.incompat&incompatRecover != 0 }

// readSuperblock reads and checks the superblock of a filesystem on a device
// of size bytes. After it returns, the block size is a power of two from 1 KiB
// to 64 KiB, all blocks lie within size, and group and inode counts agree.
func readSuperblock(r io.ReaderAt, size int64) (*superblock, error) {
	if size < superblockOffset+superblockLen {
		return nil, unsupportedFS("the image of %d bytes is too small to hold an ext4 filesystem", size)
	}
	raw := make([]byte, superblockLen)
	if err := readFull(r, raw, superblockOffset); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if le.Uint16(raw[0x38:]) != superblockMagic {
		return nil, unsupportedFS("unsupported filesystem: no ext4 superblock")
	}
	sb := &superblock{
		inodes:         le.Uint32(raw[0x00:]),
		blocks:         uint64(le.Uint32(raw[0x04:])),
		firstDataBlock: le.Uint32(raw[0x14:]),
		blocksPerGroup: le.Uint32(raw[0x20:]),
		inodesPerGroup: le.Uint32(raw[0x28:]),
		inodeSize:      128,
		descSize:       32,
	}
	if le.Uint32(raw[0x4C:]) > 0 { // dynamic revision: the fields below exist
		sb.inodeSize = int(le.Uint16(raw[0x58:]))
		sb.compat = le.Uint32(raw[0x5C:])
		sb.incompat = le.Uint32(raw[0x60:])
		sb.roCompat = le.Uint32(raw[0x64:])
		copy(sb.uuid[:], raw[0x68:])
		sb.journalInode = le.Uint32(raw[0xE0:])
		sb.journalDev = le.Uint32(raw[0xE4:])
		sb.firstMetaBG = le.Uint32(raw[0x104:])
		sb.backupBGs = [2]uint32{le.Uint32(raw[0x24C:]), le.Uint32(raw[0x250:])}
	}
	if unknown := sb.incompat &^ knownIncompat; unknown != 0 {
		return nil, unsupportedFS("unsupported filesystem: ext4 feature bits 0x%x are not known here", unknown)
	}
	if sb.hasMetaCsum() {
		if kind := raw[0x175]; kind != 1 {
			return nil, unsupportedFS("unsupported filesystem: ext4 checksum type %d", kind)
		}
		if got, want := crc32c(^uint32(0), raw[:0x3FC]), le.Uint32(raw[0x3FC:]); got != want {
			return nil, damaged("the superblock's checksum is 0x%08x, not 0x%08x", got, want)
		}
		sb.csumSeed = crc32c(^uint32(0), sb.uuid[:])
		if sb.incompat&incompatCsumSeed != 0 {
			sb.csumSeed = le.Uint32(raw[0x270:])
		}
	}
	logSize := le.Uint32(raw[0x18:])
	if logSize > 6 {
		return nil, damaged("the superblock gives a block size of 2^%d KiB", logSize)
	}
	sb.blockSize = 1024 << logSize
	if sb.incompat&incompat64Bit != 0 {
		sb.blocks |= uint64(le.Uint32(raw[0x150:])) << 32
		sb.descSize = int(le.Uint16(raw[0xFE:]))
	}
	return sb, sb.check(size)
}

// descriptors returns the first block of group descriptors: the one after the
// superblock's, whatever the first data block is (0 with bigalloc).
func (sb *superblock) descriptors() uint64 {
	return superblockOffset/uint64(sb.blockSize) + 1
}

// check verifies that the numbers of the superblock agree with each other and
// with the device's size.
func (sb *superblock) check(size int64) error {
	bs := uint64(sb.blockSize)
	switch {
	case sb.blocks > uint64(size)/bs:
		return damaged("the filesystem of %d blocks of %d bytes is larger than its image of %d bytes", sb.blocks, bs, size)
	case sb.firstDataBlock > 1:
		return damaged("the superblock gives %d as its first data block", sb.firstDataBlock)
	case uint64(sb.firstDataBlock) >= sb.blocks:
		return damaged("the filesystem has no data blocks")
	case sb.blocksPerGroup == 0 || sb.blocksPerGroup > 1<<24 || sb.inodesPerGroup == 0 || uint64(sb.inodesPerGroup) > 8*bs:
		return damaged("the superblock gives %d blocks and %d inodes per group", sb.blocksPerGroup, sb.inodesPerGroup)
	case sb.inodeSize < 128 || sb.inodeSize > sb.blockSize || sb.inodeSize&(sb.inodeSize-1) != 0:
		return damaged("the superblock gives inodes of %d bytes", sb.inodeSize)
	case sb.descSize < 32 || sb.descSize > 1024 || sb.descSize&(sb.descSize-1) != 0 ||
		sb.incompat&incompat64Bit != 0 && sb.descSize < 64:
		return damaged("the superblock gives group descriptors of %d bytes", sb.descSize)
	}
	perGroup := uint64(sb.blocksPerGroup)
	sb.groups = (sb.blocks - uint64(sb.firstDataBlock) + perGroup - 1) / perGroup
	if uint64(sb.inodes) != sb.groups*uint64(sb.inodesPerGroup) {
		return damaged("the superblock counts %d inodes in %d groups of %d", sb.inodes, sb.groups, sb.inodesPerGroup)
	}
	return nil
}

// hasBackup reports whether group g starts with a copy of the superblock,
// which with meta_bg moves the group's descriptor block by one.
func (sb *superblock) hasBackup(g uint64) bool {
	if sb.compat&compatSparseSuper2 != 0 {
		return g == 0 || g == uint64(sb.backupBGs[0]) || g == uint64(sb.backupBGs[1])
	}
	if g <= 1 || sb.roCompat&roCompatSparseSuper == 0 {
		return true
	}
	for _, base := range []uint64{3, 5, 7} {
		for p := base; p <= g; p *= base {
			if p == g {
				return true
			}
		}
	}
	return false
}

func unsupportedFS(format string, args ...any) error {
	return api.Errorf(api.ErrUnsupported, format, args...)
}

func damaged(format string, args ...any) error {
	return api.Errorf(api.ErrDamaged, format, args...)
}
