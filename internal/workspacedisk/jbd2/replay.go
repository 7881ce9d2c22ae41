package jbd2

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/pyro-mcp/pyro/api"
)

// maxBlocks bounds the blocks that a replay may change and the revocations
// that it may keep, about 64 bytes of memory each. At 4 KiB blocks it is four
// times the largest journal that mke2fs makes by itself.
const maxBlocks = 1 << 20

const (
	flagEscape   = 1
	flagSameUUID = 2
	flagLastTag  = 8
)

// Replay reads the journal in the first size bytes of log and returns base
// with the journal's blocks laid over it. blockSize and fsBlocks are the
// filesystem's; a copy of a block outside of it is damage. A transaction that
// never got its commit block, or a torn one, ends the log: it never happened.
// A committed block whose checksum is wrong is ErrDamaged. The overlay goes on
// using base and log and closes neither.
func Replay(ctx context.Context, base, log io.ReaderAt, size int64, blockSize int, fsBlocks uint64) (*Overlay, error) {
	j, err := openJournal(log, size, blockSize, fsBlocks)
	if err != nil {
		return nil, err
	}
	overlay := &Overlay{base: base, log: log, blockSize: int64(blockSize), blocks: map[uint64]copyOf{}}
	if j.start == 0 {
		return overlay, nil
	}
	end, err := j.scan(ctx)
	if err != nil {
		return nil, fmt.Errorf("looking for the end of the log: %w", err)
	}
	revoked, err := j.revocations(ctx, end)
	if err != nil {
		return nil, fmt.Errorf("reading revocations: %w", err)
	}
	if err := j.replay(ctx, end, revoked, overlay.blocks); err != nil {
		return nil, fmt.Errorf("replaying: %w", err)
	}
	return overlay, nil
}

// cursor walks the log once around at most.
type cursor struct {
	j    *journal
	next uint32
	left uint32 // blocks that may still be read before the log repeats
	buf  []byte
}

func (j *journal) cursor() *cursor {
	return &cursor{j: j, next: j.start, left: j.end - j.first, buf: make([]byte, j.blockSize)}
}

// advance returns the next block's number and steps over it, around the end
// of the log. ok is false when the whole log was seen.
func (c *cursor) advance() (block uint32, ok bool) {
	if c.left == 0 {
		return 0, false
	}
	c.left--
	block = c.next
	c.next++
	if c.next >= c.j.end {
		c.next = c.j.first
	}
	return block, true
}

// header reads the next block and returns its type if it belongs to
// transaction sequence; ok is false at the end of the log.
func (c *cursor) header(ctx context.Context, sequence uint32) (kind uint32, ok bool, err error) {
	if err := ctx.Err(); err != nil {
		return 0, false, err
	}
	block, ok := c.advance()
	if !ok {
		return 0, false, nil
	}
	if err := readFull(c.j.log, c.buf, int64(block)*int64(c.j.blockSize)); err != nil {
		return 0, false, err
	}
	be := binary.BigEndian
	if be.Uint32(c.buf) != journalMagic || be.Uint32(c.buf[8:]) != sequence {
		return 0, false, nil
	}
	return be.Uint32(c.buf[4:]), true, nil
}

// scan returns the first sequence number that is not committed.
func (j *journal) scan(ctx context.Context) (uint32, error) {
	c := j.cursor()
	sequence := j.sequence
	doubtful := false // a block of this transaction has a wrong checksum
	var lastCommit uint64
	for {
		kind, ok, err := c.header(ctx, sequence)
		if err != nil || !ok {
			return sequence, err
		}
		switch kind {
		case typeDescriptor:
			if !j.tailCsumOK(c.buf) {
				doubtful = true
			}
			for range j.tags(c.buf) {
				if _, ok := c.advance(); !ok {
					return sequence, nil
				}
			}
		case typeRevoke:
			if !j.tailCsumOK(c.buf) {
				doubtful = true
			}
		case typeCommit:
			committed := binary.BigEndian.Uint64(c.buf[48:])
			if doubtful {
				// Blocks of an older life of the log can look like this one's;
				// then the commit is older than the one before it.
				if committed >= lastCommit {
					return 0, damaged("a block of transaction %d has a wrong checksum", sequence)
				}
				return sequence, nil
			}
			if !j.commitCsumOK(c.buf) {
				return sequence, nil
			}
			lastCommit = committed
			sequence++
		default:
			return sequence, nil
		}
	}
}

// revocations returns for each revoked block the last transaction that revoked
// it: copies from that one and older ones are not to be replayed.
func (j *journal) revocations(ctx context.Context, end uint32) (map[uint64]uint32, error) {
	revoked := map[uint64]uint32{}
	return revoked, j.walk(ctx, end, func(c *cursor, kind, sequence uint32) error {
		switch kind {
		case typeDescriptor:
			for range j.tags(c.buf) {
				c.advance()
			}
		case typeRevoke:
			return j.revoke(c.buf, sequence, revoked)
		}
		return nil
	})
}

func (j *journal) revoke(buf []byte, sequence uint32, revoked map[uint64]uint32) error {
	const recordsAt = headerLen + 4
	be := binary.BigEndian
	used, limit, width := int64(be.Uint32(buf[headerLen:])), len(buf), 4
	if j.hasCsum() {
		limit -= 4
	}
	if j.incompat&incompat64Bit != 0 {
		width = 8
	}
	if used < recordsAt || used > int64(limit) {
		return damaged("a revocation block of transaction %d uses %d bytes", sequence, used)
	}
	for records := buf[recordsAt:used]; len(records) >= width; records = records[width:] {
		block := uint64(be.Uint32(records))
		if width == 8 {
			block = be.Uint64(records)
		}
		if last, ok := revoked[block]; !ok || after(sequence, last) {
			revoked[block] = sequence
		}
		if len(revoked) > maxBlocks {
			return api.Errorf(api.ErrExhausted, "the journal revokes more than %d blocks", maxBlocks)
		}
	}
	return nil
}

// replay fills blocks with the newest copy of every block that a committed
// transaction wrote.
func (j *journal) replay(ctx context.Context, end uint32, revoked map[uint64]uint32, blocks map[uint64]copyOf) error {
	data := make([]byte, j.blockSize)
	return j.walk(ctx, end, func(c *cursor, kind, sequence uint32) error {
		if kind != typeDescriptor {
			return nil
		}
		for _, t := range j.tags(c.buf) {
			at, ok := c.advance()
			if !ok {
				return damaged("transaction %d is longer than the log", sequence)
			}
			if last, ok := revoked[t.block]; ok && !after(sequence, last) {
				continue
			}
			if t.block >= j.fsBlocks {
				return damaged("transaction %d writes block %d, outside of the filesystem", sequence, t.block)
			}
			if j.hasCsum() {
				if err := readFull(j.log, data, int64(at)*int64(j.blockSize)); err != nil {
					return err
				}
				if !j.tagCsumOK(t, sequence, data) {
					return damaged("the copy of block %d in transaction %d has a wrong checksum", t.block, sequence)
				}
			}
			blocks[t.block] = copyOf{logBlock: at, escaped: t.flags&flagEscape != 0}
			if len(blocks) > maxBlocks {
				return api.Errorf(api.ErrExhausted, "the journal changes more than %d blocks", maxBlocks)
			}
		}
		return nil
	})
}

// walk calls fn for each block with a header of the committed transactions.
// fn steps over the copies behind a descriptor.
func (j *journal) walk(ctx context.Context, end uint32, fn func(c *cursor, kind, sequence uint32) error) error {
	c := j.cursor()
	for sequence := j.sequence; after(end, sequence); {
		kind, ok, err := c.header(ctx, sequence)
		if err != nil {
			return err
		}
		if !ok {
			return damaged("the log ends within transaction %d, which has a commit", sequence)
		}
		if kind == typeCommit {
			sequence++
			continue
		}
		if err := fn(c, kind, sequence); err != nil {
			return err
		}
	}
	return nil
}

// A tag names the block whose copy follows the descriptor.
type tag struct {
	block    uint64
	flags    uint16
	checksum uint32
}

// tags decodes a descriptor block; there are at most blockSize/8 of them.
func (j *journal) tags(buf []byte) []tag {
	be := binary.BigEndian
	v3, wide := j.incompat&incompatCsumV3 != 0, j.incompat&incompat64Bit != 0
	// journal_tag_bytes of the kernel: a v3 tag is always 16 bytes; else 8,
	// with v2 checksums 10, and 4 more for wide block numbers.
	width, limit := 8, len(buf)
	switch {
	case v3:
		width = 16
	case j.incompat&incompatCsumV2 != 0:
		width = 10
	}
	if !v3 && wide {
		width += 4
	}
	if j.hasCsum() {
		limit -= 4
	}
	var out []tag
	for pos := headerLen; pos+width <= limit; {
		raw := buf[pos : pos+width]
		t := tag{block: uint64(be.Uint32(raw))}
		if v3 {
			t.flags, t.checksum = uint16(be.Uint32(raw[4:])), be.Uint32(raw[12:])
		} else {
			t.checksum, t.flags = uint32(be.Uint16(raw[4:])), be.Uint16(raw[6:])
		}
		if wide {
			t.block |= uint64(be.Uint32(raw[8:])) << 32
		}
		out = append(out, t)
		pos += width
		if t.flags&flagSameUUID == 0 {
			pos += 16
		}
		if t.flags&flagLastTag != 0 {
			break
		}
	}
	return out
}

// tailCsumOK checks the checksum in the last four bytes of a descriptor or
// revocation block.
func (j *journal) tailCsumOK(buf []byte) bool {
	if !j.hasCsum() {
		return true
	}
	end := len(buf) - 4
	c := crc32c(crc32c(j.csumSeed, buf[:end]), make([]byte, 4))
	return c == binary.BigEndian.Uint32(buf[end:])
}

// commitCsumOK checks a commit block, whose checksum counts as zero itself.
func (j *journal) commitCsumOK(buf []byte) bool {
	if !j.hasCsum() {
		return true
	}
	c := crc32c(j.csumSeed, buf[:16])
	c = crc32c(c, make([]byte, 4))
	c = crc32c(c, buf[20:])
	return c == binary.BigEndian.Uint32(buf[16:])
}

// tagCsumOK checks a copy as it is stored, that is, escaped.
func (j *journal) tagCsumOK(t tag, sequence uint32, data []byte) bool {
	var seq [4]byte
	binary.BigEndian.PutUint32(seq[:], sequence)
	c := crc32c(crc32c(j.csumSeed, seq[:]), data)
	if j.incompat&incompatCsumV3 != 0 {
		return c == t.checksum
	}
	return uint16(c) == uint16(t.checksum)
}

// after reports whether sequence a is later than b; the numbers wrap.
func after(a, b uint32) bool { return int32(a-b) > 0 }
