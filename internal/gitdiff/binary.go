package gitdiff

import (
	"bufio"
	"fmt"
	"io"

	"github.com/klauspost/compress/zlib"
)

// base85 is Git's alphabet (base85.c).
const base85 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"

// lineBytes is how many bytes one line of a binary patch stands for, at most.
const lineBytes = 52

// A base85Writer writes Git's lines of base85: a letter for the number of
// bytes, then five digits for each four of them.
type base85Writer struct {
	w    *bufio.Writer
	line [lineBytes]byte
	n    int
}

func (b *base85Writer) Write(p []byte) (int, error) {
	total := len(p)
	for len(p) > 0 {
		n := copy(b.line[b.n:], p)
		b.n += n
		p = p[n:]
		if b.n == lineBytes {
			if err := b.flush(); err != nil {
				return 0, err
			}
		}
	}
	return total, nil
}

func (b *base85Writer) flush() error {
	if b.n == 0 {
		return nil
	}
	out := make([]byte, 0, 1+lineBytes/4*5+1)
	if b.n <= 26 {
		out = append(out, byte('A'+b.n-1))
	} else {
		out = append(out, byte('a'+b.n-27))
	}
	clear(b.line[b.n:])
	for i := 0; i < b.n; i += 4 {
		v := uint32(b.line[i])<<24 | uint32(b.line[i+1])<<16 | uint32(b.line[i+2])<<8 | uint32(b.line[i+3])
		var digits [5]byte
		for j := 4; j >= 0; j-- {
			digits[j] = base85[v%85]
			v /= 85
		}
		out = append(out, digits[:]...)
	}
	b.n = 0
	_, err := b.w.Write(append(out, '\n'))
	return err
}

// fastAbove is from what size on speed counts more than the patch's length.
const fastAbove = 8 << 20

// writeLiteral writes a binary patch's new content, size bytes of r.
func writeLiteral(w *bufio.Writer, r io.Reader, size int64) error {
	if _, err := fmt.Fprintf(w, "GIT binary patch\nliteral %d\n", size); err != nil {
		return err
	}
	level := zlib.DefaultCompression
	if size > fastAbove {
		level = zlib.BestSpeed
	}
	lines := &base85Writer{w: w}
	zw, err := zlib.NewWriterLevel(lines, level)
	if err != nil {
		return err
	}
	if _, err := io.Copy(zw, r); err != nil {
		return err
	}
	if err := zw.Close(); err != nil {
		return err
	}
	if err := lines.flush(); err != nil {
		return err
	}
	return w.WriteByte('\n')
}
