package ext4image

import (
	"encoding/binary"
	"math"
	"time"
)

// Feature bits (ext4 "Super Block"). No checksums of metadata: the image is
// checked as a whole, by its digest. No orphan_file: e2fsprogs before 1.47.2
// can leave such an image inconsistent.
const (
	compatHasJournal  = 0x4
	compatExtAttr     = 0x8
	compatResizeInode = 0x10
	compatDirIndex    = 0x20

	incompatFileType = 0x2
	incompatExtents  = 0x40
	incompatFlexBG   = 0x200

	roCompatSparseSuper = 0x1
	roCompatLargeFile   = 0x2
	roCompatDirNlink    = 0x20
	roCompatExtraIsize  = 0x40
)

const (
	flagExtents = 0x80000
	extraIsize  = 32
	// inodeExtents and blockExtents are how many extents fit into an inode
	// and into a block of the tree: 12 bytes each, behind a header of 12.
	inodeExtents = 4
	blockExtents = (blockSize - 12) / 12
)

func (w *Writer) encodeSuper(group, freeBlocks, freeInodes uint32) []byte {
	le := binary.LittleEndian
	b := make([]byte, 1024)
	now := uint32(clampUnix(w.opts.Time))
	for _, f := range []struct {
		at int
		v  uint32
	}{
		{0x00, w.layout.inodes()},
		{0x04, w.layout.blocks()},
		{0x0C, freeBlocks},
		{0x10, freeInodes},
		{0x18, 2}, // block size 1024<<2
		{0x1C, 2}, // cluster size, the same
		{0x20, blocksPerGroup},
		{0x24, blocksPerGroup},
		{0x28, inodesPerGroup},
		{0x30, now}, // last write
		{0x40, now}, // last check
		{0x4C, 1},   // dynamic revision
		{0x54, firstFreeInode - 1},
		{0x5C, compatHasJournal | compatExtAttr | compatResizeInode | compatDirIndex},
		{0x60, incompatFileType | incompatExtents | incompatFlexBG},
		{0x64, roCompatSparseSuper | roCompatLargeFile | roCompatDirNlink | roCompatExtraIsize},
		{0xE0, journalInode},
		{0x100, 0x0C}, // default mount options: user_xattr, acl
		{0x108, now},  // made
		{0x160, 1},    // signed directory hash
	} {
		le.PutUint32(b[f.at:], f.v)
	}
	le.PutUint16(b[0x36:], math.MaxUint16) // no check after a number of mounts
	le.PutUint16(b[0x38:], 0xEF53)
	le.PutUint16(b[0x3A:], 1) // clean
	le.PutUint16(b[0x3C:], 1) // on errors: continue
	le.PutUint16(b[0x58:], inodeSize)
	le.PutUint16(b[0x5A:], uint16(group))
	copy(b[0x68:0x78], w.opts.UUID[:])
	copy(b[0x78:0x88], w.opts.Label)
	le.PutUint16(b[0xCE:], uint16(w.layout.reservedDescBlocks()))
	for i, c := range w.opts.UUID { // any constant will do that differs from the UUID
		b[0xEC+i] = c ^ 0x5A
	}
	b[0xFC] = 1 // half MD4
	b[0xFD] = 1 // the journal inode is backed up below
	journal := encodeInode(w.journalNode())
	copy(b[0x10C:], journal[40:100])
	copy(b[0x10C+60:], journal[108:112])
	copy(b[0x10C+64:], journal[4:8])
	le.PutUint16(b[0x15C:], extraIsize)
	le.PutUint16(b[0x15E:], extraIsize)
	b[0x174] = logFlexSize
	return b
}

// encodeInode returns the inode's bytes (ext4 "Index Nodes").
func encodeInode(n *node) []byte {
	le := binary.LittleEndian
	b := make([]byte, inodeSize)
	le.PutUint16(b[0:], n.mode)
	le.PutUint16(b[2:], uint16(n.uid))
	le.PutUint32(b[4:], uint32(n.size))
	le.PutUint16(b[24:], uint16(n.gid))
	le.PutUint16(b[26:], linkCount(n))
	blocks := uint64(len(n.tree))
	for _, e := range n.extents {
		blocks += uint64(e.count)
	}
	if n.xattrBlock != 0 {
		blocks++
	}
	le.PutUint32(b[28:], uint32(blocks*(blockSize/512)))
	le.PutUint16(b[116:], uint16(blocks*(blockSize/512)>>32))
	le.PutUint32(b[104:], n.xattrBlock)
	le.PutUint32(b[108:], uint32(n.size>>32))
	le.PutUint16(b[120:], uint16(n.uid>>16))
	le.PutUint16(b[122:], uint16(n.gid>>16))
	le.PutUint16(b[128:], extraIsize)
	putTimes(b, n.mtime)
	switch n.mode & modeType {
	case ModeChar, ModeBlock:
		if n.major < 256 && n.minor < 256 {
			le.PutUint32(b[40:], n.major<<8|n.minor)
		} else {
			le.PutUint32(b[44:], n.minor&0xff|n.major<<8|n.minor&^0xff<<12)
		}
	case ModeFIFO, ModeSocket:
	default:
		if n.mode&modeType == ModeSymlink && len(n.extents) == 0 {
			copy(b[40:100], n.target)
			break
		}
		le.PutUint32(b[32:], flagExtents)
		encodeExtentRoot(b[40:100], n)
	}
	if len(n.xattrs) > 0 && n.xattrBlock == 0 {
		le.PutUint32(b[160:], xattrMagic)
		encodeXattrs(b[164:], 0, n.xattrs)
	}
	return b
}

func linkCount(n *node) uint16 {
	if !n.isDir() {
		return uint16(n.links)
	}
	links := 2
	for _, c := range n.children {
		if c.isDir() {
			links++
		}
	}
	if links >= maxLinks {
		return 1 // dir_nlink: more than can be counted
	}
	return uint16(links)
}

// clampUnix brings t into what the format's 34 bits hold: 1901 to 2446.
func clampUnix(t time.Time) int64 {
	return min(max(t.Unix(), math.MinInt32), 3<<32+math.MaxInt32)
}

// putTimes sets the four times to t: an image has no history.
func putTimes(b []byte, t time.Time) {
	le := binary.LittleEndian
	sec := clampUnix(t)
	epoch := uint32((sec-int64(int32(sec)))>>32) & 3
	extra := uint32(t.Nanosecond())<<2 | epoch
	for _, at := range []int{8, 12, 16, 144} { // access, change, modification, creation
		le.PutUint32(b[at:], uint32(sec))
	}
	for _, at := range []int{132, 136, 140, 148} {
		le.PutUint32(b[at:], extra)
	}
}

// putExtentHeader starts a node of the extent tree (ext4 "Extent Tree").
func putExtentHeader(b []byte, entries, room, depth int) {
	le := binary.LittleEndian
	le.PutUint16(b[0:], 0xF30A)
	le.PutUint16(b[2:], uint16(entries))
	le.PutUint16(b[4:], uint16(room))
	le.PutUint16(b[6:], uint16(depth))
}

// putExtents writes leaf entries.
func putExtents(b []byte, extents []extent) {
	le := binary.LittleEndian
	for i, e := range extents {
		p := b[12+12*i:]
		le.PutUint32(p[0:], e.file)
		le.PutUint16(p[4:], uint16(e.count))
		le.PutUint32(p[8:], e.start)
	}
}

func encodeExtentRoot(b []byte, n *node) {
	if len(n.tree) == 0 {
		putExtentHeader(b, len(n.extents), inodeExtents, 0)
		putExtents(b, n.extents)
		return
	}
	le := binary.LittleEndian
	putExtentHeader(b, len(n.tree), inodeExtents, 1)
	for i, leaf := range n.tree {
		p := b[12+12*i:]
		le.PutUint32(p[0:], leafExtents(n, i)[0].file)
		le.PutUint32(p[4:], leaf.start)
	}
}

// leafExtents returns the extents in leaf i of n's tree.
func leafExtents(n *node, i int) []extent {
	return n.extents[i*blockExtents : min((i+1)*blockExtents, len(n.extents))]
}

func (w *Writer) writeExtentLeaves(n *node) error {
	for i, leaf := range n.tree {
		b := make([]byte, blockSize)
		extents := leafExtents(n, i)
		putExtentHeader(b, len(extents), blockExtents, 0)
		putExtents(b, extents)
		if err := w.write(int64(leaf.start)*blockSize, b); err != nil {
			return err
		}
	}
	return nil
}
