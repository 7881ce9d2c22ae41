package ext4image

import (
	"encoding/binary"
	"fmt"

	"github.com/pyro-mcp/pyro/api"
)

// finish writes directories, inodes, bitmaps, descriptors and superblocks.
func (w *Writer) finish() error {
	// What needs blocks comes first: the bitmaps are only then complete.
	var err error
	w.walk(func(n *node) {
		if err == nil {
			err = w.placeNode(n)
		}
	})
	if err != nil {
		return err
	}
	used := newBitmap(w.layout.inodes())
	used.set(0, firstFreeInode-1) // the reserved ones and lost+found
	dirs := make([]uint16, w.layout.groups)
	w.walk(func(n *node) {
		used.set(n.inode-1, 1)
		if n.isDir() {
			dirs[(n.inode-1)/inodesPerGroup]++
		}
	})
	if err := w.writeInodes(); err != nil {
		return err
	}
	if err := w.writeJournal(); err != nil {
		return err
	}
	if err := w.writeResizeBlocks(); err != nil {
		return err
	}
	return w.writeGroups(used, dirs)
}

// placeNode writes a directory's blocks and the blocks that an inode's own
// room does not suffice for.
func (w *Writer) placeNode(n *node) error {
	if n.isDir() {
		data := encodeDirectory(n)
		n.size = int64(len(data))
		var err error
		if n.extents, err = w.allocate(blocksFor(n.size)); err != nil {
			return err
		}
		for _, e := range n.extents {
			part := data[:int(e.count)*blockSize]
			if err := w.write(int64(e.start)*blockSize, part); err != nil {
				return err
			}
			data = data[len(part):]
		}
	}
	if len(n.extents) > inodeExtents {
		leaves := (len(n.extents) + blockExtents - 1) / blockExtents
		if leaves > inodeExtents {
			return api.Errorf(api.ErrExhausted, "a file is in %d pieces, the limit is %d", len(n.extents), inodeExtents*blockExtents)
		}
		for range leaves {
			run, err := w.allocate(1)
			if err != nil {
				return err
			}
			n.tree = append(n.tree, run[0])
		}
		if err := w.writeExtentLeaves(n); err != nil {
			return err
		}
	}
	if len(n.xattrs) > 0 && !fitsInode(n.xattrs) {
		run, err := w.allocate(1)
		if err != nil {
			return err
		}
		n.xattrBlock = run[0].start
		return w.write(int64(n.xattrBlock)*blockSize, encodeXattrBlock(n.xattrs))
	}
	return nil
}

// encodeDirectory returns a directory's blocks: linear, without an index. The
// kernel makes an index by itself where a directory outgrows one block.
func encodeDirectory(n *node) []byte {
	le := binary.LittleEndian
	var out []byte
	last := -1 // where the last entry of the current block begins
	add := func(name string, child *node) {
		need := align4(8 + len(name))
		if len(out)%blockSize+need > blockSize || len(out) == 0 || len(out)%blockSize == 0 {
			for len(out)%blockSize != 0 {
				out = append(out, 0)
			}
			if last >= 0 {
				le.PutUint16(out[last+4:], uint16(len(out)-last))
			}
		}
		last = len(out)
		out = append(out, make([]byte, need)...)
		e := out[last:]
		le.PutUint32(e[0:], child.inode)
		le.PutUint16(e[4:], uint16(need))
		e[6] = byte(len(name))
		e[7] = directoryType(child.mode)
		copy(e[8:], name)
	}
	add(".", n)
	add("..", n.parent)
	for _, name := range n.names() {
		add(name, n.children[name])
	}
	for len(out)%blockSize != 0 {
		out = append(out, 0)
	}
	le.PutUint16(out[last+4:], uint16(len(out)-last))
	return out
}

// directoryType is the file type of a directory entry (ext4 "Directory
// Entries").
func directoryType(mode uint16) byte {
	switch mode & modeType {
	case ModeFile:
		return 1
	case ModeDir:
		return 2
	case ModeChar:
		return 3
	case ModeBlock:
		return 4
	case ModeFIFO:
		return 5
	case ModeSocket:
		return 6
	case ModeSymlink:
		return 7
	}
	return 0
}

func (w *Writer) writeInodes() error {
	put := func(inode uint32, b []byte) error {
		_, err := w.f.WriteAt(b, w.layout.inodeOffset(inode))
		return err
	}
	var err error
	w.walk(func(n *node) {
		if err == nil {
			err = put(n.inode, encodeInode(n))
		}
	})
	if err == nil {
		err = put(journalInode, encodeInode(w.journalNode()))
	}
	if err == nil {
		err = put(resizeInode, w.encodeResizeInode())
	}
	return err
}

// writeGroups writes bitmaps, descriptors and every copy of the superblock.
func (w *Writer) writeGroups(inodes *bitmap, dirs []uint16) error {
	le := binary.LittleEndian
	l := w.layout
	descs := make([]byte, l.descBlocks()*blockSize)
	var freeBlocks, freeInodes uint32
	for g := uint32(0); g < l.groups; g++ {
		blockBits := w.blocks.group(g)
		inodeBits := make([]byte, blockSize)
		n := copy(inodeBits, inodes.b[g*inodesPerGroup/8:(g+1)*inodesPerGroup/8])
		usedInodes := countBits(inodeBits)
		for i := n; i < blockSize; i++ { // bits without an inode count as used
			inodeBits[i] = 0xff
		}
		if _, err := w.f.WriteAt(blockBits, int64(l.blockBitmap(g))*blockSize); err != nil {
			return err
		}
		if _, err := w.f.WriteAt(inodeBits, int64(l.inodeBitmap(g))*blockSize); err != nil {
			return err
		}
		d := descs[g*descSize:]
		fb, fi := blocksPerGroup-countBits(blockBits), inodesPerGroup-usedInodes
		le.PutUint32(d[0:], l.blockBitmap(g))
		le.PutUint32(d[4:], l.inodeBitmap(g))
		le.PutUint32(d[8:], l.inodeTable(g))
		le.PutUint16(d[12:], uint16(fb))
		le.PutUint16(d[14:], uint16(fi))
		le.PutUint16(d[16:], dirs[g])
		freeBlocks += fb
		freeInodes += fi
	}
	for g := uint32(0); g < l.groups; g++ {
		if !hasSuper(g) {
			continue
		}
		pos := int64(g) * blocksPerGroup * blockSize
		if _, err := w.f.WriteAt(descs, pos+blockSize); err != nil {
			return err
		}
		if g == 0 {
			pos += 1024 // room for a boot sector
		}
		if _, err := w.f.WriteAt(w.encodeSuper(g, freeBlocks, freeInodes), pos); err != nil {
			return fmt.Errorf("writing a superblock: %w", err)
		}
	}
	return nil
}
