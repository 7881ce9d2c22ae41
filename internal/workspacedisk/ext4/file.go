package ext4

import (
	"context"
	"io"

	"github.com/pyro-mcp/pyro/api"
)

// A File reads the content of one inode. It may be used concurrently.
type File struct {
	fs     *FS
	ino    *Inode
	inline []byte // the whole content, where it lies in the inode
}

// OpenFile returns the content of a regular file; the caller has checked the
// type. Encrypted content is ErrUnsupported. There is nothing to close.
func (fs *FS) OpenFile(ino *Inode) (*File, error) {
	if ino.flags&flagEncrypted != 0 {
		return nil, api.Errorf(api.ErrUnsupported, "inode %d is encrypted", ino.Number)
	}
	f := &File{fs: fs, ino: ino}
	if ino.inline != nil {
		data, err := ino.inlineData()
		if err != nil {
			return nil, err
		}
		f.inline = data
	}
	return f, nil
}

// Size is the length of the content in bytes. The file may be sparse: the size
// says nothing about the space that it takes.
func (f *File) Size() int64 { return f.ino.Size }

// ReadAt implements [io.ReaderAt]. Holes and unwritten blocks read as zeros.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, api.Errorf(api.ErrInvalid, "reading at the negative offset %d", off)
	}
	if off >= f.ino.Size {
		return 0, io.EOF
	}
	var eof error
	if rest := f.ino.Size - off; int64(len(p)) > rest {
		p, eof = p[:rest], io.EOF
	}
	if f.inline != nil {
		return copy(p, f.inline[off:]), eof
	}
	bs := int64(f.fs.sb.blockSize)
	done := 0
	for done < len(p) {
		pos := off + int64(done)
		r, err := f.fs.mapBlock(f.ino, uint64(pos/bs))
		if err != nil {
			return done, err
		}
		// A run has at most 2^32 blocks of 2^16 bytes, so this cannot wrap.
		part := p[done:]
		if n := int64(r.count)*bs - pos%bs; n < int64(len(part)) {
			part = part[:n]
		}
		if r.hole {
			clear(part)
		} else if err := readFull(f.fs.r, part, int64(r.start)*bs+pos%bs); err != nil {
			return done, err
		}
		done += len(part)
	}
	return done, eof
}

// NextData returns the first stretch of the content, in bytes, that begins at
// or after byte off and is stored on the device; ok is false where there is
// none. What is left out are holes and unwritten blocks, which read as zeros.
// Each call looks at one run of blocks after the other, up to the end of the
// file at worst.
func (f *File) NextData(ctx context.Context, off int64) (start, end int64, ok bool, err error) {
	if f.inline != nil {
		return off, f.ino.Size, off < f.ino.Size, nil
	}
	bs := int64(f.fs.sb.blockSize)
	for off < f.ino.Size {
		if err := ctx.Err(); err != nil {
			return 0, 0, false, err
		}
		r, err := f.fs.mapBlock(f.ino, uint64(off/bs))
		if err != nil {
			return 0, 0, false, err
		}
		// Both fit: at most 2^32 blocks of 2^16 bytes.
		end := min((off/bs+int64(r.count))*bs, f.ino.Size)
		if !r.hole {
			return off, end, true, nil
		}
		off = end
	}
	return 0, 0, false, nil
}

// ReadLink returns the target of a symlink: Size bytes, not checked further
// than that none is NUL.
func (fs *FS) ReadLink(ino *Inode) (string, error) {
	// Slow targets take one block, and the kernel ends them at PATH_MAX.
	if ino.Size == 0 || ino.Size > min(int64(fs.sb.blockSize), 4096) {
		return "", damaged("symlink inode %d has a target of %d bytes", ino.Number, ino.Size)
	}
	if ino.flags&flagEncrypted != 0 {
		return "", api.Errorf(api.ErrUnsupported, "symlink inode %d is encrypted", ino.Number)
	}
	target := make([]byte, ino.Size)
	if ino.inline == nil && ino.flags&flagExtents == 0 && ino.Size < int64(len(ino.blocks)) {
		copy(target, ino.blocks[:])
	} else {
		f, err := fs.OpenFile(ino)
		if err != nil {
			return "", err
		}
		if _, err := f.ReadAt(target, 0); err != nil {
			return "", err
		}
	}
	for _, c := range target {
		if c == 0 {
			return "", damaged("symlink inode %d has a NUL byte in its target", ino.Number)
		}
	}
	return string(target), nil
}
