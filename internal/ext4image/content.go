package ext4image

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/pyro-mcp/pyro/api"
)

// maxSparse is the largest file of the format: 2^32-1 blocks.
const maxSparse = (1<<32 - 1) * blockSize

// store writes a regular file's content.
func (w *Writer) store(n *node, r io.Reader, e Entry) error {
	stored, limit := e.Stored, int64(maxSparse)
	if stored == nil {
		stored, limit = []Stretch{{0, e.Size}}, maxSize
	}
	if e.Size < 0 || e.Size > limit {
		return api.Errorf(api.ErrInvalid, "a file has the size %d", e.Size)
	}
	n.size = e.Size
	end := int64(0) // of the last stretch
	for i, s := range stored {
		// All but the end of the file lies at a block's boundary.
		if s.Off < end || s.Off%blockSize != 0 || s.Len < 0 || s.Len > maxSize || s.Len > e.Size-s.Off ||
			s.Len%blockSize != 0 && s.Off+s.Len != e.Size {
			return api.Errorf(api.ErrInvalid, "stretch %d of a file, %d bytes at %d of %d, is impossible", i, s.Len, s.Off, e.Size)
		}
		end = s.Off + s.Len
		run, err := w.allocate(blocksFor(s.Len))
		if err != nil {
			return err
		}
		if err := w.fill(run, r, s.Len); err != nil {
			return err
		}
		for _, e := range run {
			e.file += uint32(s.Off / blockSize)
			n.extents = append(n.extents, e)
		}
	}
	return nil
}

// fill writes size bytes from r into the blocks of run.
func (w *Writer) fill(run []extent, r io.Reader, size int64) error {
	for _, e := range run {
		pos := int64(e.start) * blockSize
		for room := min(int64(e.count)*blockSize, size); room > 0; {
			part := w.buf[:min(int64(len(w.buf)), room)]
			if _, err := io.ReadFull(r, part); err != nil {
				if errors.Is(err, io.EOF) {
					err = io.ErrUnexpectedEOF
				}
				return fmt.Errorf("reading a file's content: %w", err)
			}
			if err := w.write(pos, part); err != nil {
				return err
			}
			pos += int64(len(part))
			room -= int64(len(part))
			size -= int64(len(part))
		}
	}
	return nil
}

var zeroBlock [blockSize]byte

// write writes p, which begins at a block, but for its blocks of zeros: the
// file is sparse and reads as zeros there already.
func (w *Writer) write(pos int64, p []byte) error {
	if w.wrapped { // not where something else has been
		if rest := len(p) % blockSize; rest != 0 {
			p = append(bytes.Clone(p), zeroBlock[rest:]...)
		}
		_, err := w.f.WriteAt(p, pos)
		return err
	}
	for len(p) > 0 {
		run := 0
		for run < len(p) && !isZero(p[run:min(run+blockSize, len(p))]) {
			run += blockSize
		}
		if run = min(run, len(p)); run > 0 {
			if _, err := w.f.WriteAt(p[:run], pos); err != nil {
				return err
			}
		}
		skip := min(run+blockSize, len(p)) // the block after the run is zero, or the end
		pos += int64(skip)
		p = p[skip:]
	}
	return nil
}

func isZero(p []byte) bool { return bytes.Equal(p, zeroBlock[:len(p)]) }

// fastTarget is how long a symlink's target may be to be kept in the inode.
const fastTarget = 60

func (w *Writer) storeTarget(n *node, target string) error {
	if target == "" || len(target) >= blockSize || bytes.IndexByte([]byte(target), 0) >= 0 {
		return api.Errorf(api.ErrInvalid, "a symlink's target has %d bytes, allowed are 1 to %d without NUL", len(target), blockSize-1)
	}
	n.target = target
	n.size = int64(len(target))
	if len(target) < fastTarget {
		return nil
	}
	var err error
	if n.extents, err = w.allocate(1); err != nil {
		return err
	}
	block := make([]byte, blockSize)
	copy(block, target)
	return w.write(int64(n.extents[0].start)*blockSize, block)
}

func blocksFor(size int64) uint32 { return uint32((size + blockSize - 1) / blockSize) }
