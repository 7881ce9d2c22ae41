package ext4

import (
	"encoding/binary"
	"fmt"
)

// A run says where consecutive blocks of a file lie: count blocks from
// physical block start, or, with hole, nowhere: they read as zeros.
type run struct {
	start uint64
	count uint64
	hole  bool
}

// maxLogical is the number of blocks that a file can have.
const maxLogical = uint64(1) << 32

// mapBlock returns the run that begins at logical block n of ino. Its count is
// at least 1 and may reach past the end of the file, and its blocks lie inside
// the filesystem.
func (fs *FS) mapBlock(ino *Inode, n uint64) (run, error) {
	if n >= maxLogical {
		return run{}, damaged("inode %d has no block %d", ino.Number, n)
	}
	var r run
	var err error
	if ino.flags&flagExtents != 0 {
		r, err = fs.mapExtent(ino, n)
	} else {
		r, err = fs.mapIndirect(ino, n)
	}
	if err != nil {
		return run{}, fmt.Errorf("mapping block %d of inode %d: %w", n, ino.Number, err)
	}
	if !r.hole && (r.start >= fs.sb.blocks || r.count > fs.sb.blocks-r.start) {
		return run{}, damaged("inode %d has blocks %d to %d, outside of the filesystem", ino.Number, r.start, r.start+r.count-1)
	}
	return r, nil
}

const (
	extentMagic    = 0xF30A
	extentEntryLen = 12
	// maxExtentDepth is EXT4_MAX_EXTENT_DEPTH of the kernel.
	maxExtentDepth = 5
	// maxExtentLen is the longest written extent; a longer length marks an
	// unwritten one, which reads as zeros.
	maxExtentLen = 32768
)

// mapExtent walks the extent tree down to logical block n. Each level must say
// a smaller depth than the one above, so the walk ends.
func (fs *FS) mapExtent(ino *Inode, n uint64) (run, error) {
	le := binary.LittleEndian
	node := ino.blocks[:]
	limit := maxLogical // first block that this subtree does not cover
	wantDepth := -1
	for {
		if le.Uint16(node) != extentMagic {
			return run{}, damaged("an extent node has no magic number")
		}
		entries, most, depth := int(le.Uint16(node[2:])), int(le.Uint16(node[4:])), int(le.Uint16(node[6:]))
		if entries > most || (most+1)*extentEntryLen > len(node) {
			return run{}, damaged("an extent node holds %d of %d entries in %d bytes", entries, most, len(node))
		}
		if depth > maxExtentDepth || wantDepth >= 0 && depth != wantDepth {
			return run{}, damaged("an extent node says depth %d", depth)
		}
		if wantDepth >= 0 && fs.sb.hasMetaCsum() {
			end := (most + 1) * extentEntryLen
			if end+4 > len(node) {
				return run{}, damaged("an extent node has no room for its checksum")
			}
			if got, want := crc32c(ino.seed, node[:end]), le.Uint32(node[end:]); got != want {
				return run{}, damaged("an extent node's checksum is 0x%08x, not 0x%08x", got, want)
			}
		}
		// The last entry that starts at or before n.
		lo, hi := 0, entries
		for lo < hi {
			mid := (lo + hi) / 2
			if uint64(le.Uint32(node[(mid+1)*extentEntryLen:])) <= n {
				lo = mid + 1
			} else {
				hi = mid
			}
		}
		if lo < entries {
			if next := uint64(le.Uint32(node[(lo+1)*extentEntryLen:])); next > n && next < limit {
				limit = next
			}
		}
		if lo == 0 { // everything lies behind n
			return run{count: limit - n, hole: true}, nil
		}
		entry := node[lo*extentEntryLen:][:extentEntryLen]
		if depth == 0 {
			return leafRun(entry, n, limit)
		}
		child := uint64(le.Uint32(entry[4:])) | uint64(le.Uint16(entry[8:]))<<32
		blk, err := fs.block(child)
		if err != nil {
			return run{}, err
		}
		node, wantDepth = blk, depth-1
	}
}

// leafRun returns the run at n from the last extent that starts at or before
// n; limit is where the next one starts.
func leafRun(entry []byte, n, limit uint64) (run, error) {
	le := binary.LittleEndian
	first, length := uint64(le.Uint32(entry)), uint64(le.Uint16(entry[4:]))
	start := uint64(le.Uint32(entry[8:])) | uint64(le.Uint16(entry[6:]))<<32
	unwritten := length > maxExtentLen
	if unwritten {
		length -= maxExtentLen
	}
	if length == 0 || first+length > limit {
		return run{}, damaged("an extent of %d blocks at %d overlaps the next or is empty", length, first)
	}
	if n >= first+length {
		return run{count: limit - n, hole: true}, nil
	}
	return run{start: start + n - first, count: first + length - n, hole: unwritten}, nil
}

// mapIndirect finds logical block n in a classic block map: 12 direct blocks,
// then one tree each of depth one, two and three.
func (fs *FS) mapIndirect(ino *Inode, n uint64) (run, error) {
	const direct = 12
	le := binary.LittleEndian
	if n < direct {
		return pointerRun(ino.blocks[n*4 : direct*4]), nil
	}
	perBlock := uint64(fs.sb.blockSize / 4)
	n -= direct
	span := uint64(1) // blocks that one pointer of the level covers
	for level := range uint64(3) {
		size := span * perBlock
		if n >= size {
			n -= size
			span = size
			continue
		}
		ptr := uint64(le.Uint32(ino.blocks[(direct+level)*4:]))
		covered := size
		for ; ; span /= perBlock {
			if ptr == 0 {
				return run{count: covered - n%covered, hole: true}, nil
			}
			blk, err := fs.block(ptr)
			if err != nil {
				return run{}, err
			}
			i := n / span % perBlock
			if span == 1 {
				return pointerRun(blk[i*4:]), nil
			}
			ptr = uint64(le.Uint32(blk[i*4:]))
			covered = span
		}
	}
	return run{}, damaged("the block map ends before it")
}

// pointerRun returns the run that a non-empty list of block pointers starts
// with.
func pointerRun(ptrs []byte) run {
	le := binary.LittleEndian
	first := uint64(le.Uint32(ptrs))
	r := run{start: first, count: 1, hole: first == 0}
	for i := uint64(1); i < uint64(len(ptrs)/4); i++ {
		p := uint64(le.Uint32(ptrs[i*4:]))
		if r.hole && p != 0 || !r.hole && p != first+i {
			break
		}
		r.count++
	}
	return r
}
