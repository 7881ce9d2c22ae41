package ext4

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/jbd2"
)

// RootInode is the number of the root directory's inode.
const RootInode = 2

// CacheBlocks times the block size is what an FS keeps of metadata in memory:
// 8 MiB at 4 KiB blocks, enough for the inode tables of 32,000 files. (A block
// of a table keeps its chunk alive, so it can be 16 times that at worst.)
const CacheBlocks = 2048

// An FS is one filesystem, open for reading. Its methods may be called
// concurrently.
type FS struct {
	r        io.ReaderAt
	sb       *superblock
	replayed bool

	mu    sync.Mutex
	cache []cachedBlock // direct-mapped by block number
}

type cachedBlock struct {
	number uint64
	data   []byte // never written after it was stored, so callers may keep it
}

// Open checks and opens the filesystem on the first size bytes of r. If its
// journal needs recovery, the journal is replayed in memory and the FS shows
// the result; r is only read. A journal that cannot be replayed here is
// refused with ErrUnsupported and a hint, a damaged one with ErrDamaged:
// stale content is never shown. The FS does not close r.
func Open(ctx context.Context, r io.ReaderAt, size int64) (*FS, error) {
	fs, err := open(r, size)
	if err != nil {
		return nil, err
	}
	if !fs.sb.needsRecovery() {
		return fs, nil
	}
	overlay, err := fs.replay(ctx)
	if err != nil {
		return nil, api.WithHint(fmt.Errorf("recovering the journal: %w", err),
			"run e2fsck -p -E journal_only on a copy of the raw image and use that")
	}
	// The replay may have changed the superblock and the group descriptors.
	fs, err = open(overlay, size)
	if err != nil {
		return nil, fmt.Errorf("reading the recovered filesystem: %w", err)
	}
	fs.replayed = true
	return fs, nil
}

func open(r io.ReaderAt, size int64) (*FS, error) {
	sb, err := readSuperblock(r, size)
	if err != nil {
		return nil, err
	}
	return &FS{r: r, sb: sb, cache: make([]cachedBlock, CacheBlocks)}, nil
}

// Replayed reports whether the journal needed recovery.
func (fs *FS) Replayed() bool { return fs.replayed }

// Size is the filesystem's size in bytes; it never exceeds the image's.
func (fs *FS) Size() int64 { return int64(fs.sb.blocks) * int64(fs.sb.blockSize) }

// Inodes is the number of inodes, used or not.
func (fs *FS) Inodes() uint32 { return fs.sb.inodes }

// LimitCache makes the FS keep n blocks of metadata in memory, n > 0, instead of
// [CacheBlocks]. What it keeps so far is dropped. Call it before the FS is used
// concurrently.
func (fs *FS) LimitCache(n int) { fs.cache = make([]cachedBlock, n) }

// slot is where block n is kept.
func (fs *FS) slot(n uint64) *cachedBlock { return &fs.cache[n%uint64(len(fs.cache))] }

// block returns block n, for metadata. The slice is shared: do not write it.
func (fs *FS) block(n uint64) ([]byte, error) {
	if n >= fs.sb.blocks {
		return nil, damaged("block %d lies outside of the filesystem's %d blocks", n, fs.sb.blocks)
	}
	slot := fs.slot(n)
	fs.mu.Lock()
	if slot.data != nil && slot.number == n {
		data := slot.data
		fs.mu.Unlock()
		return data, nil
	}
	fs.mu.Unlock()
	data := make([]byte, fs.sb.blockSize)
	if err := readFull(fs.r, data, int64(n)*int64(fs.sb.blockSize)); err != nil {
		return nil, err
	}
	fs.mu.Lock()
	*slot = cachedBlock{number: n, data: data}
	fs.mu.Unlock()
	return data, nil
}

// tableBlock is block for inode tables, which are mostly read in a row: what
// is not cached is read together with the blocks around it.
func (fs *FS) tableBlock(n uint64) ([]byte, error) {
	const chunk = 64 << 10
	count := uint64(chunk / fs.sb.blockSize)
	first := n - n%count
	if n >= fs.sb.blocks || first+count > fs.sb.blocks || fs.cached(n) {
		return fs.block(n)
	}
	data := make([]byte, chunk)
	if err := readFull(fs.r, data, int64(first)*int64(fs.sb.blockSize)); err != nil {
		return nil, err
	}
	bs := uint64(fs.sb.blockSize)
	fs.mu.Lock()
	defer fs.mu.Unlock()
	for i := range count {
		*fs.slot(first + i) = cachedBlock{number: first + i, data: data[i*bs : (i+1)*bs : (i+1)*bs]}
	}
	return data[(n-first)*bs:][:bs:bs], nil
}

func (fs *FS) cached(n uint64) bool {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	slot := fs.slot(n)
	return slot.data != nil && slot.number == n
}

// inodeTable returns the first block of group g's inode table.
func (fs *FS) inodeTable(g uint64) (uint64, error) {
	sb := fs.sb
	perBlock := uint64(sb.blockSize / sb.descSize)
	meta := g / perBlock // which block of descriptors
	at := sb.descriptors() + meta
	if sb.incompat&incompatMetaBG != 0 && meta >= uint64(sb.firstMetaBG) && meta > 0 {
		first := meta * perBlock // the group that holds this descriptor block
		at = uint64(sb.firstDataBlock) + first*uint64(sb.blocksPerGroup)
		if sb.hasBackup(first) {
			at++
		}
	}
	blk, err := fs.block(at)
	if err != nil {
		return 0, fmt.Errorf("reading the descriptor of group %d: %w", g, err)
	}
	desc := blk[g%perBlock*uint64(sb.descSize):][:sb.descSize]
	le := binary.LittleEndian
	if sb.hasMetaCsum() {
		c := crc32cUint32(sb.csumSeed, uint32(g))
		c = crc32c(c, desc[:0x1E])
		c = crc32c(c, []byte{0, 0})
		c = crc32c(c, desc[0x20:])
		if want := le.Uint16(desc[0x1E:]); uint16(c) != want {
			return 0, damaged("the descriptor of group %d has the checksum 0x%04x, not 0x%04x", g, uint16(c), want)
		}
	}
	table := uint64(le.Uint32(desc[8:]))
	if sb.descSize >= 64 && sb.incompat&incompat64Bit != 0 {
		table |= uint64(le.Uint32(desc[0x28:])) << 32
	}
	return table, nil
}

// replay reads the journal and returns the device as it will be after
// recovery.
func (fs *FS) replay(ctx context.Context) (*jbd2.Overlay, error) {
	if fs.sb.compat&compatHasJournal == 0 || fs.sb.journalInode == 0 {
		return nil, unsupportedFS("the journal lies on another device")
	}
	ino, err := fs.Inode(fs.sb.journalInode)
	if err != nil {
		return nil, err
	}
	if !ino.IsRegular() {
		return nil, damaged("the journal's inode %d is no regular file", ino.Number)
	}
	f, err := fs.OpenFile(ino)
	if err != nil {
		return nil, err
	}
	return jbd2.Replay(ctx, fs.r, f, f.Size(), fs.sb.blockSize, fs.sb.blocks)
}

// readFull fills p from r at off. An early end of the image is damage.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("the image ends before byte %d", off+int64(len(p)))
	}
	return fmt.Errorf("reading the image at byte %d: %w", off, err)
}
