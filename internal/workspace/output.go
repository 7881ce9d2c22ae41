package workspace

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/pyro-mcp/pyro/api"
)

// keptHalf is how much is kept of the beginning and of the end of an output:
// what went wrong is most often said last.
const keptHalf = 512 << 10

// A recorder passes output on and keeps the beginning and the end of it. With a
// file it keeps the beginning there too, as it comes, so that it outlives a
// killed process. A file that cannot be written ends the keeping, not the
// command.
type recorder struct {
	to   io.Writer    // may be nil
	file *journalFile // may be nil
	head []byte
	tail []byte // ring of keptHalf bytes once it is full
	next int    // in a full tail, where the oldest byte is
	n    int64  // all that was written
}

func (r *recorder) Write(p []byte) (int, error) {
	r.keep(p)
	if r.to != nil {
		return r.to.Write(p)
	}
	return len(p), nil
}

func (r *recorder) keep(p []byte) {
	r.n += int64(len(p))
	k := min(keptHalf-len(r.head), len(p))
	r.head = append(r.head, p[:k]...)
	r.file.write(p[:k])
	p = p[k:]
	if over := len(p) - keptHalf; over > 0 {
		p = p[over:]
	}
	k = min(keptHalf-len(r.tail), len(p))
	r.tail = append(r.tail, p[:k]...)
	for p = p[k:]; len(p) > 0; p = p[k:] {
		k = copy(r.tail[r.next:], p)
		r.next = (r.next + k) % keptHalf
	}
}

// end returns what is kept behind the head, with the mark of what is left out.
func (r *recorder) end() (mark string, tail []byte) {
	tail = append(r.tail[r.next:len(r.tail):len(r.tail)], r.tail[:r.next]...)
	if left := r.n - int64(len(r.head)+len(tail)); left > 0 {
		mark = fmt.Sprintf("\n[pyro: %d bytes left out]\n", left)
	}
	return mark, tail
}

// finish completes the file.
func (r *recorder) finish() error {
	mark, tail := r.end()
	r.file.write([]byte(mark))
	r.file.write(tail)
	return r.file.close()
}

// truncated reports whether something is left out.
func (r *recorder) truncated() bool { return r.n > int64(len(r.head)+len(r.tail)) }

// String returns what is kept as text: a character that a bound cut in two is
// left out, and bytes that are not UTF-8 become U+FFFD.
func (r *recorder) String() string {
	mark, tail := r.end()
	head := r.head
	if mark == "" {
		head = append(head[:len(head):len(head)], tail...)
		tail = nil
	} else {
		head, tail = wholeRunes(head), tail[leadingRest(tail):]
	}
	return validText(head) + mark + validText(tail)
}

// validText returns what a guest wrote, or what it calls a file, as text that
// JSON can carry: bytes that are not UTF-8 become U+FFFD.
func validText[T string | []byte](t T) string { return strings.ToValidUTF8(string(t), "\uFFFD") }

// wholeRunes returns b without a character that it ends in the middle of.
func wholeRunes(b []byte) []byte {
	for i := 1; i < utf8.UTFMax && i <= len(b); i++ {
		if last := b[len(b)-i:]; utf8.RuneStart(last[0]) {
			if !utf8.FullRune(last) {
				return b[:len(b)-i]
			}
			break
		}
	}
	return b
}

// leadingRest returns how many bytes of b belong to a character that began
// before it.
func leadingRest(b []byte) int {
	for i := 0; i < utf8.UTFMax && i < len(b); i++ {
		if utf8.RuneStart(b[i]) {
			return i
		}
	}
	return 0
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
