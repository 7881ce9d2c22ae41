package ext4

import (
	"encoding/binary"
	"fmt"
)

// File types in the upper bits of an inode's mode.
const (
	modeTypeMask  = 0xF000
	modeCharacter = 0x2000
	modeDirectory = 0x4000
	modeBlock     = 0x6000
	modeRegular   = 0x8000
	modeSymlink   = 0xA000
)

// Inode flags.
const (
	flagEncrypted = 0x00000800
	flagExtents   = 0x00080000
	flagInline    = 0x10000000
)

// An Inode is one checked inode. Its Size fits an int64.
type Inode struct {
	Number uint32
	Mode   uint16 // type and permissions, as in stat
	Links  uint16
	Size   int64
	UID    uint32
	GID    uint32
	Mtime  int64  // seconds since 1970
	Nanos  uint32 // of Mtime, below 1e9

	flags  uint32
	blocks [60]byte // i_block: extent root, block map, inline data or target
	seed   uint32   // of the checksums of the inode's own blocks
	inline []byte   // inline data past the first 60 bytes; nil without
}

// IsDir reports whether the inode is a directory.
func (ino *Inode) IsDir() bool { return ino.Mode&modeTypeMask == modeDirectory }

// IsRegular reports whether the inode is a regular file.
func (ino *Inode) IsRegular() bool { return ino.Mode&modeTypeMask == modeRegular }

// IsSymlink reports whether the inode is a symlink.
func (ino *Inode) IsSymlink() bool { return ino.Mode&modeTypeMask == modeSymlink }

// Inode reads inode n. A number out of range, a wrong checksum or an inode that
// is not in use is ErrDamaged: numbers come from directory entries.
func (fs *FS) Inode(n uint32) (*Inode, error) {
	ino, err := fs.readInode(n)
	if err != nil {
		return nil, fmt.Errorf("reading inode %d: %w", n, err)
	}
	return ino, nil
}

func (fs *FS) readInode(n uint32) (*Inode, error) {
	sb := fs.sb
	raw, err := fs.rawInode(n)
	if err != nil {
		return nil, err
	}
	bs := uint64(sb.blockSize)
	le := binary.LittleEndian
	ino := &Inode{
		Number: n,
		Mode:   le.Uint16(raw),
		Links:  le.Uint16(raw[0x1A:]),
		UID:    uint32(le.Uint16(raw[2:])) | uint32(le.Uint16(raw[0x78:]))<<16,
		GID:    uint32(le.Uint16(raw[0x18:])) | uint32(le.Uint16(raw[0x7A:]))<<16,
		Mtime:  int64(int32(le.Uint32(raw[0x10:]))),
		flags:  le.Uint32(raw[0x20:]),
	}
	if ino.Links == 0 {
		return nil, damaged("it is not in use")
	}
	if sb.hasMetaCsum() {
		if err := ino.verify(sb, raw); err != nil {
			return nil, err
		}
	}
	ino.readNanos(raw)
	size := uint64(le.Uint32(raw[4:]))
	if ino.IsRegular() || ino.IsDir() && sb.incompat&incompatLargeDir != 0 {
		size |= uint64(le.Uint32(raw[0x6C:])) << 32
	}
	// The largest file of the format: 2^32 blocks.
	if size > uint64(1)<<32*bs {
		return nil, damaged("its size of %d bytes is impossible", size)
	}
	ino.Size = int64(size)
	copy(ino.blocks[:], raw[0x28:])
	if ino.flags&flagInline != 0 && sb.incompat&incompatInlineData != 0 {
		if ino.inline, err = inlineTail(raw); err != nil {
			return nil, err
		}
	}
	return ino, nil
}

// rawInode returns the bytes of inode n, which are shared: do not write them.
func (fs *FS) rawInode(n uint32) ([]byte, error) {
	sb := fs.sb
	if n == 0 || n > sb.inodes {
		return nil, damaged("the filesystem has the inodes 1 to %d", sb.inodes)
	}
	table, err := fs.inodeTable(uint64(n-1) / uint64(sb.inodesPerGroup))
	if err != nil {
		return nil, err
	}
	off := uint64(n-1) % uint64(sb.inodesPerGroup) * uint64(sb.inodeSize)
	bs := uint64(sb.blockSize)
	blk, err := fs.tableBlock(table + off/bs) // cannot wrap: table < 2^48 or out of range
	if err != nil {
		return nil, err
	}
	return blk[off%bs:][:sb.inodeSize], nil
}

// readNanos reads the part of the modification time that inodes of more than
// 128 bytes have: two bits more of seconds below 30 bits of nanoseconds
// (document "Index Nodes", "Inode Timestamps"). An impossible fraction counts
// as none.
func (ino *Inode) readNanos(raw []byte) {
	const mtimeExtra = 0x88
	le := binary.LittleEndian
	if len(raw) <= 128 || 128+int(le.Uint16(raw[0x80:])) < mtimeExtra+4 {
		return
	}
	extra := le.Uint32(raw[mtimeExtra:])
	ino.Mtime += int64(extra&3) << 32
	if nanos := extra >> 2; nanos < 1e9 {
		ino.Nanos = nanos
	}
}

// Device returns the numbers of a device's inode, and ok false for others. They
// lie in i_block in the kernel's old or new encoding (include/linux/kdev_t.h).
func (ino *Inode) Device() (major, minor uint32, ok bool) {
	if t := ino.Mode & modeTypeMask; t != modeCharacter && t != modeBlock {
		return 0, 0, false
	}
	le := binary.LittleEndian
	if old := le.Uint32(ino.blocks[0:]); old != 0 {
		return old >> 8 & 0xff, old & 0xff, true
	}
	dev := le.Uint32(ino.blocks[4:])
	return dev >> 8 & 0xfff, dev&0xff | dev>>12&0xfff00, true
}

// IsCharacterDevice reports whether the inode is a character device.
func (ino *Inode) IsCharacterDevice() bool { return ino.Mode&modeTypeMask == modeCharacter }

// verify checks the inode's checksum and remembers its seed.
func (ino *Inode) verify(sb *superblock, raw []byte) error {
	le := binary.LittleEndian
	ino.seed = crc32c(crc32cUint32(sb.csumSeed, ino.Number), raw[0x64:0x68])
	zero := []byte{0, 0}
	c := crc32c(ino.seed, raw[:0x7C])
	c = crc32c(c, zero)
	c = crc32c(c, raw[0x7E:0x80])
	want, mask := uint32(le.Uint16(raw[0x7C:])), uint32(0xFFFF)
	if sb.inodeSize > 128 {
		c = crc32c(c, raw[0x80:0x82])
		if le.Uint16(raw[0x80:]) >= 4 { // i_extra_isize covers i_checksum_hi
			c = crc32c(c, zero)
			c = crc32c(c, raw[0x84:])
			want |= uint32(le.Uint16(raw[0x82:])) << 16
			mask = ^uint32(0)
		} else {
			c = crc32c(c, raw[0x82:])
		}
	}
	if c&mask != want {
		return damaged("its checksum is 0x%08x, not 0x%08x", c&mask, want)
	}
	return nil
}

// inlineTail returns the value of the extended attribute system.data inside
// the inode: what inline data does not fit into i_block. It is empty, not nil,
// where there is none. Document "Extended Attributes", in-inode form.
func inlineTail(raw []byte) ([]byte, error) {
	const (
		indexSystem = 7
		entryLen    = xattrEntryLen
	)
	le := binary.LittleEndian
	if len(raw) <= 128 {
		return []byte{}, nil
	}
	start := 128 + int(le.Uint16(raw[0x80:]))
	if start+4 > len(raw) || start%4 != 0 {
		return nil, damaged("its extra fields of %d bytes leave no room for inline data", start-128)
	}
	if le.Uint32(raw[start:]) != xattrMagic {
		return []byte{}, nil
	}
	body := raw[start+4:]
	for rest := body; len(rest) >= 4 && le.Uint32(rest) != 0; {
		if len(rest) < entryLen {
			return nil, damaged("its extended attributes run over its end")
		}
		nameLen := int(rest[0])
		off, inum, size := int(le.Uint16(rest[2:])), le.Uint32(rest[4:]), le.Uint32(rest[8:])
		next := (entryLen + nameLen + 3) &^ 3
		if next > len(rest) {
			return nil, damaged("its extended attributes run over its end")
		}
		if rest[1] == indexSystem && string(rest[entryLen:entryLen+nameLen]) == "data" {
			if inum != 0 || uint64(off)+uint64(size) > uint64(len(body)) {
				return nil, damaged("its inline data of %d bytes lies outside of it", size)
			}
			return body[off : off+int(size) : off+int(size)], nil
		}
		rest = rest[next:]
	}
	return []byte{}, nil
}

// inlineData returns the whole inline data of ino: Size bytes.
func (ino *Inode) inlineData() ([]byte, error) {
	if ino.Size > int64(len(ino.blocks)+len(ino.inline)) {
		return nil, damaged("inode %d of %d bytes holds only %d bytes inline",
			ino.Number, ino.Size, len(ino.blocks)+len(ino.inline))
	}
	data := make([]byte, 0, len(ino.blocks)+len(ino.inline))
	data = append(append(data, ino.blocks[:]...), ino.inline...)
	return data[:ino.Size], nil
}
