package ext4image

import (
	"encoding/binary"
)

// journalNode describes the journal as the file that it is.
func (w *Writer) journalNode() *node {
	return &node{
		inode: journalInode, mode: ModeFile | 0o600, links: 1, mtime: w.opts.Time,
		size: int64(w.journal.count) * blockSize, extents: []extent{w.journal},
	}
}

// writeJournal writes an empty journal: its superblock (ext4 "Journal (jbd2)",
// big-endian). The rest is never read before it is written.
func (w *Writer) writeJournal() error {
	be := binary.BigEndian
	b := make([]byte, blockSize)
	be.PutUint32(b[0x0:], 0xC03B3998)
	be.PutUint32(b[0x4:], 4) // superblock, version 2
	be.PutUint32(b[0xC:], blockSize)
	be.PutUint32(b[0x10:], w.journal.count)
	be.PutUint32(b[0x14:], 1) // first block of the log
	be.PutUint32(b[0x18:], 1) // first commit expected
	copy(b[0x30:], w.opts.UUID[:])
	be.PutUint32(b[0x40:], 1) // file systems using it
	return w.write(int64(w.journal.start)*blockSize, b)
}

// The resize inode holds the blocks that are kept for further descriptors, so
// that nothing else takes them and the kernel finds them when it enlarges a
// mounted file system. Its double-indirect block lists the reserved blocks of
// group 0, at the positions of their descriptors; each of those lists its
// copies in the backup groups. (e2fsprogs, lib/ext2fs/res_gdt.c.)

func (w *Writer) encodeResizeInode() []byte {
	le := binary.LittleEndian
	n := &node{inode: resizeInode, mode: ModeFile | 0o600, links: 1, mtime: w.opts.Time}
	n.size = (addrPerBlock*addrPerBlock + addrPerBlock + 12) * blockSize
	b := encodeInode(n)
	le.PutUint32(b[32:], 0) // no extents
	clear(b[40:100])
	le.PutUint32(b[40+4*13:], w.resizeBlock)
	blocks := 1 + w.layout.reservedDescBlocks()*uint32(1+len(w.layout.backups()))
	le.PutUint32(b[28:], blocks*(blockSize/512))
	return b
}

func (w *Writer) writeResizeBlocks() error {
	le := binary.LittleEndian
	backups := w.layout.backups()
	index := make([]byte, blockSize)
	for i := w.layout.descBlocks(); i < descBlocksMax; i++ {
		block := 1 + i // behind the superblock
		le.PutUint32(index[4*i:], block)
		if len(backups) == 0 {
			continue
		}
		list := make([]byte, blockSize)
		for j, g := range backups {
			le.PutUint32(list[4*j:], block+g*blocksPerGroup)
		}
		if _, err := w.f.WriteAt(list, int64(block)*blockSize); err != nil {
			return err
		}
	}
	_, err := w.f.WriteAt(index, int64(w.resizeBlock)*blockSize)
	return err
}
