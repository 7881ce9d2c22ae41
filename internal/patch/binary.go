package patch

import (
	"bytes"
	"compress/zlib"
	"io"
	"strconv"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// A binary is the new content of a file, or how to make it of the old one.
type binary struct {
	line     int
	delta    bool
	size     int64  // of data unpacked
	deflated []byte // zlib
}

// base85 is Git's alphabet (base85.c); digits maps back.
const base85 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"

var digits = func() (d [256]int8) {
	for i := range d {
		d[i] = int8(strings.IndexByte(base85, byte(i)))
	}
	return d
}()

// binary parses a file's binary hunks: the one forward, and the one to reverse
// it, which is not used.
func (p *parser) binary(f *filePatch) error {
	p.next()
	var err error
	if f.binary, err = p.binaryHunk(); err != nil {
		return err
	}
	if f.binary == nil {
		return p.errorf(api.ErrInvalid, 0, "the binary patch of %.200q has no content: found %.80q", f.path(), p.header(0))
	}
	_, err = p.binaryHunk()
	return err
}

// binaryHunk returns nil where there is none.
func (p *parser) binaryHunk() (*binary, error) {
	kind, size, _ := strings.Cut(p.header(0), " ")
	if kind != "literal" && kind != "delta" {
		return nil, nil
	}
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil || n < 0 {
		return nil, p.errorf(api.ErrInvalid, 0, "%.80q is no size", size)
	}
	if n > MaxFileBytes {
		return nil, p.errorf(api.ErrExhausted, 0, "a binary file has %d bytes, the limit is %d", n, MaxFileBytes)
	}
	b := &binary{line: p.line + 1, delta: kind == "delta", size: n}
	p.next()
	for {
		line := p.header(0)
		if p.peek(0) == nil || line == "" {
			p.next()
			return b, nil
		}
		if b.deflated, err = decodeLine(b.deflated, line); err != nil {
			return nil, p.errorf(api.ErrInvalid, 0, "%w", err)
		}
		p.next()
	}
}

// decodeLine appends what a line of base85 stands for to to.
func decodeLine(to []byte, line string) ([]byte, error) {
	bad := api.Errorf(api.ErrInvalid, "the line is no base85: %.80q", line)
	n := 0
	switch c := line[0]; {
	case c >= 'A' && c <= 'Z':
		n = int(c-'A') + 1
	case c >= 'a' && c <= 'z':
		n = int(c-'a') + 27
	}
	if n == 0 || len(line) != 1+(n+3)/4*5 {
		return nil, bad
	}
	for i := 1; i < len(line); i += 5 {
		v := uint64(0)
		for _, c := range []byte(line[i : i+5]) {
			d := digits[c]
			if d < 0 {
				return nil, bad
			}
			v = v*85 + uint64(d)
		}
		if v > 1<<32-1 {
			return nil, bad
		}
		four := []byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}
		to = append(to, four[:min(4, n)]...)
		n -= 4
	}
	return to, nil
}

// apply returns the new content.
func (b *binary) apply(old []byte) ([]byte, error) {
	zr, err := zlib.NewReader(bytes.NewReader(b.deflated))
	if err != nil {
		return nil, api.Errorf(api.ErrInvalid, "its data is damaged: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(zr, b.size+1))
	if err != nil {
		return nil, api.Errorf(api.ErrInvalid, "its data is damaged: %w", err)
	}
	if int64(len(data)) != b.size {
		return nil, api.Errorf(api.ErrInvalid, "its data does not have the %d bytes that it says", b.size)
	}
	if !b.delta {
		return data, nil
	}
	return applyDelta(old, data)
}

// applyDelta follows Git's delta format (gitformat-pack(5), "Deltified
// representation").
func applyDelta(old, delta []byte) ([]byte, error) {
	bad := api.Errorf(api.ErrInvalid, "its delta is damaged")
	size := func() (int64, bool) {
		v := int64(0)
		for shift := 0; shift < 56; shift += 7 {
			if len(delta) == 0 {
				return 0, false
			}
			c := delta[0]
			delta = delta[1:]
			v |= int64(c&0x7f) << shift
			if c&0x80 == 0 {
				return v, true
			}
		}
		return 0, false
	}
	from, ok := size()
	to, ok2 := size()
	if !ok || !ok2 || to > MaxFileBytes {
		return nil, bad
	}
	if from != int64(len(old)) {
		return nil, api.Errorf(api.ErrInvalid, "it is made for a file of %d bytes, and the file has %d", from, len(old))
	}
	var out []byte
	for len(delta) > 0 {
		op := delta[0]
		delta = delta[1:]
		var piece []byte
		if op&0x80 == 0 {
			if op == 0 || int(op) > len(delta) {
				return nil, bad
			}
			piece, delta = delta[:op], delta[op:]
		} else {
			var v [7]int64
			for i := range v {
				if op&(1<<i) == 0 {
					continue
				}
				if len(delta) == 0 {
					return nil, bad
				}
				v[i] = int64(delta[0])
				delta = delta[1:]
			}
			off := v[0] | v[1]<<8 | v[2]<<16 | v[3]<<24
			n := v[4] | v[5]<<8 | v[6]<<16
			if n == 0 {
				n = 0x10000
			}
			if off > int64(len(old)) || n > int64(len(old))-off {
				return nil, bad
			}
			piece = old[off : off+n]
		}
		if int64(len(out)+len(piece)) > to {
			return nil, bad
		}
		out = append(out, piece...)
	}
	if int64(len(out)) != to {
		return nil, bad
	}
	return out, nil
}
