// Package boundedlog keeps logs that somebody hostile may fill. A [File] never
// holds more than its bound on disk and always the newest bytes; it also keeps
// the last few kilobytes in memory, for the error that explains why a guest
// died.
package boundedlog

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"sync"
	"unicode/utf8"
)

// tailSize is how much [File.Tail] remembers: some fifty console lines.
const tailSize = 8 << 10

// A File is a log of at most max bytes: when the current half is full it
// becomes PATH.1, over the one before, and a new half begins. Its methods may
// be called concurrently. Write never fails and never blocks on more than the
// host's page cache: a log that cannot be written is dropped, not an error for
// whoever produced the text.
type File struct {
	mu   sync.Mutex
	path string
	half int64
	size int64
	f    *os.File
	tail []byte
}

// Open opens or continues the log at path. The bound max covers both halves.
func Open(path string, max int64) (*File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening log: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("opening log: %w", err)
	}
	return &File{path: path, half: max / 2, size: st.Size(), f: f}, nil
}

// Write appends p. It always returns len(p), nil.
func (l *File) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.remember(p)
	for rest := p; len(rest) > 0 && l.f != nil; {
		if l.size >= l.half {
			l.rotate()
			continue
		}
		n := int(min(int64(len(rest)), l.half-l.size))
		if _, err := l.f.Write(rest[:n]); err != nil {
			break
		}
		l.size += int64(n)
		rest = rest[n:]
	}
	return len(p), nil
}

func (l *File) rotate() {
	l.f.Close()
	l.f = nil
	if err := os.Rename(l.path, l.path+".1"); err != nil {
		return
	}
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return
	}
	l.f, l.size = f, 0
}

func (l *File) remember(p []byte) {
	if len(p) >= tailSize {
		l.tail = append(l.tail[:0], p[len(p)-tailSize:]...)
		return
	}
	if over := len(l.tail) + len(p) - tailSize; over > 0 {
		l.tail = append(l.tail[:0], l.tail[over:]...)
	}
	l.tail = append(l.tail, p...)
}

// Tail returns up to lines of the newest non-empty lines, cleaned by
// [Printable] and each cut at 200 characters.
func (l *File) Tail(lines int) []string {
	l.mu.Lock()
	text := string(bytes.Clone(l.tail))
	l.mu.Unlock()
	var out []string
	for line := range strings.SplitSeq(text, "\n") {
		line = strings.TrimSpace(Printable(line))
		if line == "" {
			continue
		}
		if r := []rune(line); len(r) > 200 {
			line = string(r[:200]) + "…"
		}
		out = append(out, line)
	}
	return out[max(0, len(out)-lines):]
}

// Close closes the file; later writes are remembered but not stored.
func (l *File) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return nil
	}
	err := l.f.Close()
	l.f = nil
	return err
}

// Printable returns s without what could drive a terminal: control characters
// other than tab, and the escape sequences they begin, are left out; bytes that
// are not UTF-8 become U+FFFD.
func Printable(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		if s[i] == 0x1b {
			i += escapeLen(s[i:])
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		i += n
		if r == '\t' || (r >= 0x20 && r != 0x7f && (r < 0x80 || r > 0x9f)) {
			b.WriteRune(r)
		}
	}
	return b.String()
}

// escapeLen returns the length of the escape sequence that s begins with, by
// ECMA-48: ESC [ parameters final, ESC ] … BEL or ST, or ESC and one byte.
func escapeLen(s string) int {
	if len(s) < 2 {
		return len(s)
	}
	switch s[1] {
	case '[':
		for i := 2; i < len(s); i++ {
			if s[i] >= 0x40 && s[i] <= 0x7e {
				return i + 1
			}
		}
		return len(s)
	case ']', 'P', 'X', '^', '_':
		for i := 2; i < len(s); i++ {
			if s[i] == 0x07 {
				return i + 1
			}
			if s[i] == 0x1b && i+1 < len(s) && s[i+1] == '\\' {
				return i + 2
			}
		}
		return len(s)
	}
	return 2
}
