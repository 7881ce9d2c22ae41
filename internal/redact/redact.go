// Package redact takes a workspace's secrets out of what its guest prints. A
// [Set] holds the values; text, errors, streams and pieces read by cursor come
// out of it with [Mark] where a value was, also where a value is split between
// two writes or two reads, and where several overlap.
//
// It is a courtesy and no barrier: it keeps a token out of a log or a
// conversation that prints it by accident. A program that wants to print a
// secret prints it backwards, in base64 or letter by letter, and no filter
// finds that.
package redact

import (
	"fmt"
	"io"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

const (
	// Mark is what stands where a value was.
	Mark = "[REDACTED]"

	// MinLength is the length in bytes of the shortest value that can be
	// redacted. Whoever takes in a secret refuses a shorter one: its bytes occur
	// in ordinary output by chance, and marks there both destroy the output and
	// tell what the value is.
	MinLength = 8
)

// A Set is the values that must not be seen. It does not change after [New], so
// everything may use it at the same time. A nil Set has no values.
type Set struct {
	states  []state
	root    [256]int32 // the first step, which nearly every byte takes, without a search
	longest int
}

// New returns the set of values, each of which is any bytes. It leaves out
// those shorter than [MinLength]. A set takes some 50 bytes of memory for each
// byte of a value of one line, and a few times that for one of several.
//
// A value with line ends is found as a terminal prints it too, with CR LF for
// each line feed; and one that ends in line ends, like the content of most
// files, also without these, because $(cat FILE) drops them.
func New(values ...string) *Set {
	s := &Set{states: []state{{}}}
	for _, value := range values {
		for _, form := range forms(value) {
			s.add(form)
		}
	}
	s.link()
	return s
}

// forms returns what value looks like in output, value itself first.
func forms(value string) []string {
	unix := strings.ReplaceAll(value, "\r\n", "\n")
	var out []string
	for _, v := range []string{value, unix, strings.TrimRight(value, "\r\n"), strings.TrimRight(unix, "\n")} {
		out = append(out, v, strings.ReplaceAll(v, "\n", "\r\n"))
	}
	return out
}

// Empty reports whether there is nothing to redact.
func (s *Set) Empty() bool { return s == nil || s.longest == 0 }

// Format prints that this is a set, never what is in it.
func (s *Set) Format(f fmt.State, _ rune) {
	_, _ = io.WriteString(f, "redact.Set") // fmt's own buffer takes everything
}

// String returns text with [Mark] for every value in it. Values that overlap
// share a mark; values side by side have one each.
func (s *Set) String(text string) string {
	if s.Empty() {
		return text
	}
	clean, _ := s.Window(nil, []byte(text), true)
	return string(clean)
}

// Error returns err if neither its text nor its hint has a value in it, and
// otherwise an error with the same class and with both redacted. That one does
// not wrap err, whose text would still have the value. A nil err stays nil.
func (s *Set) Error(err error) error {
	if err == nil || s.Empty() {
		return err
	}
	wire := api.ToWire(err)
	message, hint := s.String(wire.Message), s.String(wire.Hint)
	if message == wire.Message && hint == wire.Hint {
		return err
	}
	wire.Message, wire.Hint = message, hint
	return wire.Err()
}
