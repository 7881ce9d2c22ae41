package mcpserver

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

// maxMessage bounds a text that goes into an error or a progress message.
const maxMessage = 1000

// clean makes a text that a guest may have written fit for a message: without
// control characters and escape sequences, and not long. Lines stay lines.
func clean(s string) string {
	if len(s) > maxMessage {
		s = shorten(s)
	}
	return cleanOutput(s)
}

// shorten cuts s to maxMessage bytes, at a character.
func shorten(s string) string {
	if len(s) <= maxMessage {
		return s
	}
	return s[:cutBack(s, maxMessage)] + "…"
}

// cutBack returns the last position up to n at which no character of s is split.
func cutBack(s string, n int) int {
	if n >= len(s) {
		return len(s)
	}
	for i := n; i > n-utf8.UTFMax && i > 0; i-- {
		if utf8.RuneStart(s[i]) {
			return i
		}
	}
	return n
}

// pieceOf returns the bounds of the piece of s from offset on with at most n
// bytes, at characters. The piece of a caller that goes on at its end begins
// there.
func pieceOf(s string, offset, n int64) (from, to int) {
	from = cutBack(s, int(min(offset, int64(len(s)))))
	return from, max(from, cutBack(s, int(min(offset+n, int64(len(s))))))
}

// cleanOutput leaves out of a command's output what drives a terminal: colours,
// cursor movements and other control characters. A carriage return alone, with
// which progress bars overwrite themselves, begins a new line.
func cleanOutput(s string) string {
	s = strings.ReplaceAll(s, "\r\n", "\n")
	s = strings.ReplaceAll(s, "\r", "\n")
	clear := true
	for _, r := range s {
		if (r < ' ' && r != '\n' && r != '\t') || (r >= 0x7f && r < 0xa0) || r == utf8.RuneError {
			clear = false
			break
		}
	}
	if clear {
		return s
	}
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = boundedlog.Printable(l)
	}
	return strings.Join(lines, "\n")
}

// invisible reports whether a reader cannot see r, or r changes the order in
// which text is seen: format characters (zero width, direction, tags), variation
// selectors and fillers. Text hides in them, for a model to read and a person to
// miss.
func invisible(r rune) bool {
	switch {
	case r < 0xad:
		return false
	case unicode.Is(unicode.Cf, r), unicode.Is(unicode.Variation_Selector, r):
		return true
	case r == 0x2028, r == 0x2029, r == 0x115f, r == 0x1160, r == 0x3164, r == 0xffa0, r == 0x034f:
		return true
	case r >= 0xe0000 && r <= 0xe0fff: // tags, and the rest of their plane
		return true
	}
	return false
}

// escapeInvisible replaces invisible characters in JSON by their escapes. They
// can only be inside of strings.
func escapeInvisible(b []byte) []byte {
	out, from := []byte(nil), 0
	for i := 0; i < len(b); {
		if b[i] < utf8.RuneSelf {
			i++
			continue
		}
		r, n := utf8.DecodeRune(b[i:])
		if invisible(r) {
			out = append(out, b[from:i]...)
			if r > 0xffff {
				hi, lo := utf16.EncodeRune(r)
				out = fmt.Appendf(out, `\u%04x\u%04x`, hi, lo)
			} else {
				out = fmt.Appendf(out, `\u%04x`, r)
			}
			from = i + n
		}
		i += n
	}
	if out == nil {
		return b
	}
	return append(out, b[from:]...)
}
