package workspace

import (
	"io"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/pyro-mcp/pyro/api"
)

// capture passes output on, or keeps the first maxCapture bytes of it where
// there is nobody to pass it to.
type capture struct {
	to        io.Writer
	kept      []byte
	truncated bool
}

func (c *capture) Write(p []byte) (int, error) {
	if c.to != nil {
		return c.to.Write(p)
	}
	room := maxCapture - len(c.kept)
	c.kept = append(c.kept, p[:min(room, len(p))]...)
	c.truncated = c.truncated || len(p) > room
	return len(p), nil
}

// String returns what was kept as text: a character that the bound cut in two
// is left out, and bytes that are not UTF-8 become U+FFFD.
func (c *capture) String() string {
	b := c.kept
	if c.truncated {
		for i := 1; i < utf8.UTFMax && i <= len(b); i++ {
			if tail := b[len(b)-i:]; utf8.RuneStart(tail[0]) {
				if !utf8.FullRune(tail) {
					b = b[:len(b)-i]
				}
				break
			}
		}
	}
	return strings.ToValidUTF8(string(b), "\uFFFD")
}

// commandText shows an argument list as one line that a shell would read as the
// same words. A single word is a shell command already.
func commandText(argv []string) string {
	if len(argv) == 1 {
		return argv[0]
	}
	words := make([]string, len(argv))
	for i, a := range argv {
		words[i] = quote(a)
	}
	return strings.Join(words, " ")
}

func quote(word string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("@%+=:,./_-", r)
	}
	if word != "" && strings.IndexFunc(word, func(r rune) bool { return !plain(r) }) < 0 {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

// serialized makes progress callable from several goroutines at once.
func serialized(progress func(api.Progress)) func(api.Progress) {
	var mu sync.Mutex
	return func(p api.Progress) {
		mu.Lock()
		defer mu.Unlock()
		progress(p)
	}
}
