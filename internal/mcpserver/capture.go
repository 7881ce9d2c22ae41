package mcpserver

import (
	"fmt"
	"strings"
	"sync"
	"unicode/utf8"
)

const (
	// outputLimit is how many bytes of one stream a result carries: what a model
	// can read at once without its context being filled by one command.
	outputLimit = 32 << 10
	// progressLines and progressLine bound a progress message of a command.
	progressLines = 3
	progressLine  = 160
)

// A capture keeps the beginning and the end of an endless output.
type capture struct {
	r *reporter // is poked on every write

	mu    sync.Mutex
	head  []byte // up to outputLimit
	tail  []byte // what follows the head; the last outputLimit/2 bytes are of use
	total int64
}

func (c *capture) Write(p []byte) (int, error) {
	n := len(p)
	c.mu.Lock()
	c.total += int64(n)
	k := min(outputLimit-len(c.head), len(p))
	c.head = append(c.head, p[:k]...)
	if p = p[k:]; len(p) >= outputLimit {
		c.tail = append(c.tail[:0], p[len(p)-outputLimit:]...)
	} else if len(p) > 0 {
		c.tail = append(c.tail, p...)
		if len(c.tail) > 2*outputLimit {
			c.tail = append(c.tail[:0], c.tail[len(c.tail)-outputLimit:]...)
		}
	}
	c.mu.Unlock()
	c.r.poke()
	return n, nil
}

func (c *capture) overflowed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.total > outputLimit
}

// text returns the output, cleaned, with its middle left out if it is long.
func (c *capture) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.total <= outputLimit {
		return cleanOutput(validText(c.head))
	}
	const half = outputLimit / 2
	head := c.head[:half]
	all := append(c.head[half:len(c.head):len(c.head)], c.tail...)
	tail := all[len(all)-half:]
	return joinCut(cleanOutput(trimPartial(head)), c.total-2*half, cleanOutput(trimPartial(tail)))
}

// joinCut puts a mark between the two parts of a text.
func joinCut(head string, left int64, tail string) string {
	return fmt.Sprintf("%s\n[... %d bytes left out ...]\n%s", strings.TrimSuffix(head, "\n"), left, tail)
}

// lastLines returns the newest lines, short, for a progress message.
func (c *capture) lastLines() []string {
	const enough = 1 << 10
	c.mu.Lock()
	recent := c.tail
	if len(recent) < enough {
		recent = append(c.head[max(0, len(c.head)-enough):len(c.head):len(c.head)], c.tail...)
	}
	text := validText(recent[max(0, len(recent)-enough):])
	c.mu.Unlock()
	var lines []string
	for l := range strings.Lines(cleanOutput(text)) {
		if l = strings.TrimSpace(l); l != "" {
			lines = append(lines, l[:cutBack(l, progressLine)])
		}
	}
	return lines[max(0, len(lines)-progressLines):]
}

func validText(b []byte) string { return strings.ToValidUTF8(string(b), "\uFFFD") }

// trimPartial is validText without the remains of characters that were cut in
// two at either end.
func trimPartial(b []byte) string {
	for i := 0; i < utf8.UTFMax-1 && len(b) > 0 && !utf8.RuneStart(b[0]); i++ {
		b = b[1:]
	}
	for i := 1; i < utf8.UTFMax && i <= len(b); i++ {
		if last := b[len(b)-i:]; utf8.RuneStart(last[0]) {
			if !utf8.FullRune(last) {
				b = b[:len(b)-i]
			}
			break
		}
	}
	return validText(b)
}
