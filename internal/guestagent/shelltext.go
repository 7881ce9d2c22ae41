package guestagent

import (
	"strings"
	"unicode/utf8"

	"github.com/pyro-mcp/pyro/internal/guestagent/ring"
)

// A passage is a part of an output as text.
type passage struct {
	text  string
	at    int64 // where it begins
	next  int64 // where to read on
	chars int64
	// missed is how many bytes between the position asked for and at are no
	// longer kept.
	missed int64
}

// readText reads at most maxChars characters of an output from a position on.
// Bytes that are no UTF-8 become U+FFFD each; a character whose rest may still
// come is left for the next read.
func readText(r *ring.Ring, from, maxChars int64) passage {
	_, end, ended := r.Bounds()
	buf := make([]byte, min(maxChars*utf8.UTFMax, max(end-from, 0)))
	at, n := r.ReadAt(buf, from)
	buf = buf[:n]
	p := passage{at: at, missed: max(at-from, 0)}
	if p.missed > 0 {
		// What is kept may begin in the middle of a character.
		for i := 0; i < utf8.UTFMax-1 && len(buf) > 0 && !utf8.RuneStart(buf[0]); i++ {
			buf = buf[1:]
			p.at++
			p.missed++
		}
	}
	var b strings.Builder
	p.next = p.at
	for len(buf) > 0 && p.chars < maxChars {
		c, size := utf8.DecodeRune(buf)
		if c == utf8.RuneError && size == 1 && !utf8.FullRune(buf) && !ended {
			break
		}
		b.WriteRune(c)
		buf = buf[size:]
		p.next += int64(size)
		p.chars++
	}
	p.text = b.String()
	return p
}
