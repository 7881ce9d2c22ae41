package ext4image

import "github.com/pyro-mcp/pyro/api"

// The sizes are fixed: one block size, one group size, no partial last group.
// They are what mke2fs chooses for file systems of this size.
const (
	blockSize      = 4096
	blocksPerGroup = 8 * blockSize // one bit each in a block of bitmap
	inodesPerGroup = 8192          // one for every 16 KiB
	inodeSize      = 256
	descSize       = 32
	tableBlocks    = inodesPerGroup * inodeSize / blockSize
	// flexSize groups keep their bitmaps and inode tables together in the
	// first of them, which leaves the others to data.
	logFlexSize = 4
	flexSize    = 1 << logFlexSize
	// descBlocksMax is the room for group descriptors, those of groups that
	// an enlargement adds included: enough for 4 TiB.
	descBlocksMax  = 256
	descPerBlock   = blockSize / descSize
	addrPerBlock   = blockSize / 4
	journalBlocks  = 32 << 20 / blockSize
	resizeInode    = 7
	journalInode   = 8
	rootInode      = 2
	lostFoundInode = 11
	firstFreeInode = 12
)

// A layout is where the file system's own structures lie.
type layout struct {
	groups uint32
}

func newLayout(size int64) layout {
	const group = blocksPerGroup * blockSize
	return layout{groups: uint32((size + group - 1) / group)}
}

func (l layout) blocks() uint32 { return l.groups * blocksPerGroup }
func (l layout) inodes() uint32 { return l.groups * inodesPerGroup }

// SizeFor returns the smallest Options.SizeBytes at which so many files,
// directories included, and so many blocks of 4096 bytes fit: those of content,
// directories, long links, extended attributes and extent trees. What has no
// size is ErrExhausted.
func SizeFor(files, blocks int64) (int64, error) {
	const group = blocksPerGroup * blockSize
	used := int64(journalBlocks + 1) // and the resize inode's block
	for g := int64(0); (g+1)*group <= maxSize; g++ {
		used += 2 + tableBlocks
		if hasSuper(uint32(g)) {
			used += 1 + descBlocksMax
		}
		if (g+1)*inodesPerGroup >= files+firstFreeInode-1 && (g+1)*blocksPerGroup-used >= blocks {
			return (g + 1) * group, nil
		}
	}
	return 0, api.Errorf(api.ErrExhausted, "%d files of %d blocks do not fit into the largest file system", files, blocks)
}

// descBlocks is how many blocks the descriptors of today's groups take.
func (l layout) descBlocks() uint32 { return (l.groups + descPerBlock - 1) / descPerBlock }

// reservedDescBlocks is how many more are kept for an enlargement.
func (l layout) reservedDescBlocks() uint32 { return descBlocksMax - l.descBlocks() }

// hasSuper reports whether group g holds a copy of the superblock and the
// descriptors: the first two groups and the powers of 3, 5 and 7.
func hasSuper(g uint32) bool {
	if g <= 1 {
		return true
	}
	for _, base := range []uint32{3, 5, 7} {
		p := base
		for p < g && p < 1<<29 {
			p *= base
		}
		if p == g {
			return true
		}
	}
	return false
}

// backups lists the groups besides the first that have a superblock copy.
func (l layout) backups() []uint32 {
	var out []uint32
	for g := uint32(1); g < l.groups; g++ {
		if hasSuper(g) {
			out = append(out, g)
		}
	}
	return out
}

// flexStart returns the first block of the bitmaps and tables of the flexible
// group that g belongs to, and how many groups that has.
func (l layout) flexStart(g uint32) (block, groups uint32) {
	first := g &^ (flexSize - 1)
	block = first * blocksPerGroup
	if hasSuper(first) {
		block += 1 + descBlocksMax
	}
	return block, min(flexSize, l.groups-first)
}

func (l layout) blockBitmap(g uint32) uint32 {
	start, _ := l.flexStart(g)
	return start + g%flexSize
}

func (l layout) inodeBitmap(g uint32) uint32 {
	start, n := l.flexStart(g)
	return start + n + g%flexSize
}

func (l layout) inodeTable(g uint32) uint32 {
	start, n := l.flexStart(g)
	return start + 2*n + g%flexSize*tableBlocks
}

// reserve marks the blocks of all these in b.
func (l layout) reserve(b *bitmap) {
	for g := uint32(0); g < l.groups; g++ {
		if hasSuper(g) {
			b.set(g*blocksPerGroup, 1+descBlocksMax)
		}
		b.set(l.blockBitmap(g), 1)
		b.set(l.inodeBitmap(g), 1)
		b.set(l.inodeTable(g), tableBlocks)
	}
}

// inodeOffset is where in the file an inode lies.
func (l layout) inodeOffset(inode uint32) int64 {
	g, i := (inode-1)/inodesPerGroup, (inode-1)%inodesPerGroup
	return int64(l.inodeTable(g))*blockSize + int64(i)*inodeSize
}
