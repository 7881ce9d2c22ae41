package ext4

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/pyro-mcp/pyro/api"
)

// A Dirent is one name in a directory. The name is 1 to 255 bytes without
// slash and NUL, and neither "." nor "..".
type Dirent struct {
	Name  string
	Inode uint32 // as the entry says; FS.Inode checks it
}

// A Budget bounds the directory bytes that a sequence of calls may scan, so
// that directories whose blocks are all the same block cannot keep a reader
// busy. A directory of 100,000 entries takes about 4 MiB.
type Budget struct {
	DirBytes int64
}

func (b *Budget) spend(n int64) error {
	if n > b.DirBytes {
		return api.Errorf(api.ErrExhausted, "the directories are larger than the limit on what is scanned in one call")
	}
	b.DirBytes -= n
	return nil
}

const (
	direntHeaderLen = 8
	maxNameLen      = 255
)

// ReadDir calls fn for every entry of directory dir, in the order of the disk,
// "." and ".." left out, until fn returns an error, which ReadDir returns.
// Names that no kernel would make (with a slash, NUL, or doubled dots) are
// ErrDamaged. It does not look for duplicate names.
func (fs *FS) ReadDir(ctx context.Context, dir *Inode, budget *Budget, fn func(Dirent) error) error {
	err := fs.scanDir(ctx, dir, budget, func(name []byte, inode uint32) error {
		return fn(Dirent{Name: string(name), Inode: inode})
	})
	if err != nil {
		return fmt.Errorf("reading the directory of inode %d: %w", dir.Number, err)
	}
	return nil
}

// A direntFunc gets one entry; name is valid during the call only.
type direntFunc func(name []byte, inode uint32) error

func (fs *FS) scanDir(ctx context.Context, dir *Inode, budget *Budget, fn direntFunc) error {
	if dir.flags&flagEncrypted != 0 {
		return api.Errorf(api.ErrUnsupported, "it is encrypted")
	}
	if dir.inline != nil {
		return fs.readInlineDir(ctx, dir, budget, fn)
	}
	bs := int64(fs.sb.blockSize)
	if dir.Size == 0 || dir.Size%bs != 0 {
		return damaged("its size of %d bytes is no multiple of the block size", dir.Size)
	}
	buf := make([]byte, min(dir.Size, max(bs, 64<<10)))
	for n := int64(0); n < dir.Size/bs; {
		r, err := fs.mapBlock(dir, uint64(n))
		if err != nil {
			return err
		}
		if r.hole {
			return damaged("it has a hole")
		}
		count := min(int64(r.count), dir.Size/bs-n, int64(len(buf))/bs)
		chunk := buf[:count*bs]
		if err := readFull(fs.r, chunk, int64(r.start)*bs); err != nil {
			return err
		}
		for i := range count {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := budget.spend(bs); err != nil {
				return err
			}
			blk := chunk[i*bs : (i+1)*bs]
			if err := fs.verifyDirBlock(dir, blk); err != nil {
				return err
			}
			if err := fs.direntBlock(blk, n+i == 0, fn); err != nil {
				return err
			}
		}
		n += count
	}
	return nil
}

// readInlineDir reads a directory inside its inode: the parent's number, then
// entries in the rest of i_block, then entries in system.data; without dots.
func (fs *FS) readInlineDir(ctx context.Context, dir *Inode, budget *Budget, fn direntFunc) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	data, err := dir.inlineData()
	if err != nil {
		return err
	}
	if len(data) < 4 {
		return damaged("its inline data is %d bytes long", len(data))
	}
	if err := budget.spend(int64(len(data))); err != nil {
		return err
	}
	split := min(len(data), len(dir.blocks))
	if err := fs.direntBlock(data[4:split], false, fn); err != nil {
		return err
	}
	return fs.direntBlock(data[split:], false, fn)
}

// verifyDirBlock checks the checksum in the tail of a block of entries. Blocks
// of the hash index have theirs elsewhere and hold no entry but the dots. A
// tail counts only where a record begins: index blocks can hold the bytes of
// the tail that they had as a leaf.
func (fs *FS) verifyDirBlock(dir *Inode, blk []byte) error {
	const tailLen = 12
	if !fs.sb.hasMetaCsum() {
		return nil
	}
	le := binary.LittleEndian
	end := len(blk) - tailLen
	pos := 0
	for pos < end {
		n := fs.recLen(le.Uint16(blk[pos+4:]))
		if n < direntHeaderLen {
			return nil // direntBlock refuses it
		}
		pos += n
	}
	// inode 0, record length 12, name length 0, type 0xDE
	if pos != end || !bytes.Equal(blk[end:end+8], []byte{0, 0, 0, 0, tailLen, 0, 0, 0xDE}) {
		return nil
	}
	if got, want := crc32c(dir.seed, blk[:end]), le.Uint32(blk[end+8:]); got != want {
		return damaged("a block's checksum is 0x%08x, not 0x%08x", got, want)
	}
	return nil
}

// direntBlock walks the entries of one block. Each record is at least as long
// as its header, so the walk ends. dots says that the block may open with "."
// and "..".
func (fs *FS) direntBlock(blk []byte, dots bool, fn direntFunc) error {
	le := binary.LittleEndian
	for pos, index := 0, 0; pos < len(blk); index++ {
		rest := blk[pos:]
		if len(rest) < direntHeaderLen {
			return damaged("an entry runs over the end of its block")
		}
		inode, recLen := le.Uint32(rest), fs.recLen(le.Uint16(rest[4:]))
		nameLen := int(le.Uint16(rest[6:]))
		if fs.sb.incompat&incompatFiletype != 0 {
			nameLen = int(rest[6]) // the other byte is the type, a hint only
		}
		if recLen < direntHeaderLen || recLen%4 != 0 || recLen > len(rest) || nameLen > recLen-direntHeaderLen {
			return damaged("an entry has a record of %d bytes and a name of %d bytes", recLen, nameLen)
		}
		pos += recLen
		if inode == 0 {
			continue
		}
		name := rest[direntHeaderLen : direntHeaderLen+nameLen]
		isDots := len(name) == 1 && name[0] == '.' || len(name) == 2 && name[0] == '.' && name[1] == '.'
		if dots && index < 2 && isDots {
			continue
		}
		if isDots || nameLen == 0 || nameLen > maxNameLen || bytes.IndexByte(name, '/') >= 0 || bytes.IndexByte(name, 0) >= 0 {
			return damaged("it holds the impossible name %q", name)
		}
		if err := fn(name, inode); err != nil {
			return err
		}
	}
	return nil
}

// recLen decodes a record length: with 64 KiB blocks 0 and 65535 both mean a
// whole block (ext4_rec_len_from_disk).
func (fs *FS) recLen(v uint16) int {
	if fs.sb.blockSize == maxBlockSize && (v == 0 || v == 65535) {
		return maxBlockSize
	}
	return int(v)
}

// Lookup returns the inode number behind name in directory dir, or ok false.
func (fs *FS) Lookup(ctx context.Context, dir *Inode, budget *Budget, name string) (inode uint32, ok bool, err error) {
	err = fs.scanDir(ctx, dir, budget, func(entry []byte, n uint32) error {
		if string(entry) == name {
			inode, ok = n, true
			return errFound
		}
		return nil
	})
	switch {
	case ok:
		return inode, true, nil
	case err != nil:
		return 0, false, fmt.Errorf("looking for %q in the directory of inode %d: %w", name, dir.Number, err)
	}
	return 0, false, nil
}

// errFound ends a scan early; it never leaves the package.
var errFound = errors.New("found")
