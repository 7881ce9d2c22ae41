package ext4image

import (
	"math/bits"

	"github.com/pyro-mcp/pyro/api"
)

// A bitmap has one bit for every block, in the order of the on-disk bitmaps.
type bitmap struct {
	b []byte
	n uint32
}

func newBitmap(n uint32) *bitmap { return &bitmap{make([]byte, n/8), n} }

func (b *bitmap) has(i uint32) bool { return b.b[i/8]&(1<<(i%8)) != 0 }

func (b *bitmap) set(start, n uint32) {
	for i := start; i < start+n; i++ {
		b.b[i/8] |= 1 << (i % 8)
	}
}

func (b *bitmap) clear(start, n uint32) {
	for i := start; i < start+n; i++ {
		b.b[i/8] &^= 1 << (i % 8)
	}
}

// group returns the part that belongs to block group g.
func (b *bitmap) group(g uint32) []byte {
	return b.b[g*blocksPerGroup/8 : (g+1)*blocksPerGroup/8]
}

func countBits(p []byte) (n uint32) {
	for _, c := range p {
		n += uint32(bits.OnesCount8(c))
	}
	return n
}

// An extent is a run of blocks, and where in its file it lies. 0x8000 is the most that one on-disk extent of
// initialized blocks describes (ext4 "Extent Tree").
type extent struct {
	start, count uint32
	file         uint32 // block of the file that start holds
}

const maxExtent = 0x8000

// allocate finds n free blocks and marks them used, in as few runs as the
// position it has reached allows. They follow each other in the file, from its
// first block on.
func (w *Writer) allocate(n uint32) ([]extent, error) {
	var out []extent
	turned := false
	file := uint32(0)
	for n > 0 {
		if w.nextBlock == w.blocks.n {
			// Blocks of removed entries lie behind; look there once.
			if turned {
				for _, e := range out {
					w.blocks.clear(e.start, e.count)
				}
				return nil, api.Errorf(api.ErrExhausted, "the content does not fit into a disk of %d MiB", int64(w.blocks.n)*blockSize>>20)
			}
			turned, w.wrapped = true, true
			w.nextBlock = 0
		}
		if w.blocks.has(w.nextBlock) {
			w.nextBlock++
			continue
		}
		e := extent{start: w.nextBlock, file: file}
		for e.count < min(n, maxExtent) && w.nextBlock < w.blocks.n && !w.blocks.has(w.nextBlock) {
			e.count++
			w.nextBlock++
		}
		w.blocks.set(e.start, e.count)
		out = append(out, e)
		file += e.count
		n -= e.count
	}
	return out, nil
}

func (w *Writer) free(extents []extent) {
	for _, e := range extents {
		w.blocks.clear(e.start, e.count)
	}
}
