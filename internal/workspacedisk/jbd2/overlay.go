package jbd2

import (
	"encoding/binary"
	"io"
)

// An Overlay is a device with the blocks of a journal laid over it. It may be
// used concurrently if its base and log may.
type Overlay struct {
	base      io.ReaderAt
	log       io.ReaderAt
	blockSize int64
	blocks    map[uint64]copyOf // by block number on the device
}

// copyOf says where the newest copy of a block lies in the log.
type copyOf struct {
	logBlock uint32
	escaped  bool // its first four bytes are the magic number, stored as zeros
}

// Blocks is the number of blocks that the journal changes.
func (o *Overlay) Blocks() int { return len(o.blocks) }

// ReadAt implements [io.ReaderAt].
func (o *Overlay) ReadAt(p []byte, off int64) (int, error) {
	n, err := o.base.ReadAt(p, off)
	if len(o.blocks) == 0 || off < 0 {
		return n, err
	}
	// Only what base could read is laid over: a block outside of the base
	// does not come into being.
	for done := 0; done < n; {
		pos := off + int64(done)
		in := pos % o.blockSize
		part := p[done:min(n, done+int(o.blockSize-in))]
		if c, ok := o.blocks[uint64(pos/o.blockSize)]; ok {
			if rerr := o.readCopy(part, c, in); rerr != nil {
				return done, rerr
			}
		}
		done += len(part)
	}
	return n, err
}

// readCopy fills part with the bytes from in on of a block's copy.
func (o *Overlay) readCopy(part []byte, c copyOf, in int64) error {
	if err := readFull(o.log, part, int64(c.logBlock)*o.blockSize+in); err != nil {
		return err
	}
	if c.escaped && in < 4 {
		var magic [4]byte
		binary.BigEndian.PutUint32(magic[:], journalMagic)
		copy(part, magic[in:])
	}
	return nil
}
