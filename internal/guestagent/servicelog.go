package guestagent

import (
	"bytes"
	"strings"
	"unicode/utf8"

	"github.com/pyro-mcp/pyro/internal/guestagent/ring"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// A tail is the end of an output, from position from to end.
type tail struct {
	from, end int64
	missed    bool // more was asked for than is kept
}

// findTail finds where the last lines of what r keeps begin; nil means all. A
// last line without a newline counts as one.
func findTail(r *ring.Ring, lines *int64) tail {
	start, end, _ := r.Bounds()
	t := tail{from: start, end: end, missed: start > 0}
	if lines == nil {
		return t
	}
	if *lines == 0 {
		return tail{from: end, end: end}
	}
	buf := chunks.Get().(*[outputChunk]byte)
	defer chunks.Put(buf)
	left := *lines
	for pos := end; pos > start; {
		from := max(start, pos-int64(len(buf)))
		at, n := r.ReadAt(buf[:pos-from], from)
		if at != from || int64(n) != pos-from {
			break // it is being overwritten: all that is kept was asked for
		}
		part := buf[:n]
		if pos == end {
			part = bytes.TrimSuffix(part, []byte("\n"))
		}
		for {
			i := bytes.LastIndexByte(part, '\n')
			if i < 0 {
				break
			}
			if left--; left == 0 {
				return tail{from: at + int64(i) + 1, end: end}
			}
			part = part[:i]
		}
		pos = from
	}
	// Even all that is kept has no more lines.
	return t
}

// text returns the tail as text, its last MaxPlainOutput bytes at most, and
// whether more would have belonged to it.
func (t tail) text(r *ring.Ring) (string, bool) {
	from := max(t.from, t.end-guestproto.MaxPlainOutput)
	buf := make([]byte, t.end-from)
	at, n := r.ReadAt(buf, from)
	buf = buf[:n]
	cut := at > t.from
	if cut {
		// Not in the middle of a character.
		for i := 0; i < utf8.UTFMax-1 && len(buf) > 0 && !utf8.RuneStart(buf[0]); i++ {
			buf = buf[1:]
		}
	}
	s := strings.ToValidUTF8(string(buf), "\uFFFD")
	if over := len(s) - guestproto.MaxPlainOutput; over > 0 {
		// Replacing may make it longer. The end counts.
		s, cut = strings.ToValidUTF8(s[over:], ""), true
	}
	return s, cut
}
