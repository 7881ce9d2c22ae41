package patch

import (
	"bytes"
	"context"
	"slices"

	"github.com/pyro-mcp/pyro/api"
)

// maxWork bounds the lines compared in search of the places of hunks: half a
// second, where an honest patch needs milliseconds.
const maxWork = 50_000_000

// text returns content with a file's hunks applied.
func (a *applier) text(f *filePatch, content []byte) ([]byte, error) {
	lines := slices.Collect(bytes.Lines(content))
	t := &text{a: a, lines: lines}
	var out []byte
	if n := len(content) + 64; n > 64 {
		out = make([]byte, 0, n)
	}
	done, shift := 0, 0 // lines taken over; how far off the last hunk was
	for i := range f.hunks {
		h := &f.hunks[i]
		old := h.side('+')
		expected := h.oldStart - 1
		if h.oldCount == 0 {
			expected = h.oldStart // the lines go behind that one
		}
		at, err := t.find(h, old, done, expected+shift)
		if err != nil {
			return nil, err
		}
		if at < 0 {
			return nil, t.mismatch(f, i, old, done, expected+shift)
		}
		shift = at - expected
		for _, l := range lines[done:at] {
			out = append(out, l...)
		}
		for _, l := range h.side('-') {
			out = append(out, l...)
		}
		if len(out) > MaxFileBytes {
			return nil, api.Errorf(api.ErrExhausted, "the file would have more than %d bytes", MaxFileBytes)
		}
		done = at + len(old)
	}
	// A last line without a newline only stays the last.
	if done < len(lines) && len(out) > 0 && out[len(out)-1] != '\n' {
		return nil, api.Errorf(api.ErrInvalid, "hunk %d of %.200q (line %d of the patch) ends the file, which goes on there", len(f.hunks), f.path(), f.hunks[len(f.hunks)-1].line)
	}
	for _, l := range lines[done:] {
		out = append(out, l...)
	}
	return out, nil
}

// side returns the lines of a hunk without those that begin with not.
func (h *hunk) side(not byte) [][]byte {
	var out [][]byte
	for _, l := range h.lines {
		if l.op != not {
			out = append(out, l.text)
		}
	}
	return out
}

// context returns how many lines of context a hunk begins and ends with.
func (h *hunk) context() (leading, trailing int) {
	for leading < len(h.lines) && h.lines[leading].op == ' ' {
		leading++
	}
	for trailing < len(h.lines) && h.lines[len(h.lines)-1-trailing].op == ' ' {
		trailing++
	}
	return leading, trailing
}

type text struct {
	a     *applier
	lines [][]byte
}

// find returns where the lines old are, at or behind from, -1 for nowhere: the
// place nearest to the expected one. A hunk without context at an end belongs to
// that end of the file, as for git apply; where it does not fit there, it is
// taken if it fits at one place only.
func (t *text) find(h *hunk, old [][]byte, from, expected int) (int, error) {
	if len(old) == 0 {
		if h.oldStart == 0 && len(t.lines) > 0 {
			return -1, nil // a new file, and there is one
		}
		if expected < from || expected > len(t.lines) {
			return -1, nil
		}
		return expected, nil
	}
	_, trailing := h.context()
	atStart := h.oldStart <= 1
	atEnd := trailing == 0
	last := len(t.lines) - len(old)
	fits := func(at int) bool { return at >= from && at <= last && t.matches(old, at) }
	switch {
	case atStart && atEnd:
		if from == 0 && last == 0 && fits(0) {
			return 0, nil
		}
	case atStart:
		if from == 0 && fits(0) {
			return 0, nil
		}
	case atEnd:
		if fits(last) {
			return last, nil
		}
	default:
		return t.nearest(from, last, expected, fits)
	}
	// Where the hunk says, and nothing else like it is there.
	return t.only(from, last, fits)
}

// nearest looks at one place after the other, ever farther away.
func (t *text) nearest(from, last, expected int, fits func(int) bool) (int, error) {
	expected = min(max(expected, from), max(last, from))
	for d := 0; expected-d >= from || expected+d <= last; d++ {
		if fits(expected - d) {
			return expected - d, nil
		}
		if d > 0 && fits(expected+d) {
			return expected + d, nil
		}
		if err := t.tired(); err != nil {
			return 0, err
		}
	}
	return -1, nil
}

// only returns the one place that fits, -1 for none or several.
func (t *text) only(from, last int, fits func(int) bool) (int, error) {
	found := -1
	for at := from; at <= last; at++ {
		if fits(at) {
			if found >= 0 {
				return -1, nil
			}
			found = at
		}
		if err := t.tired(); err != nil {
			return 0, err
		}
	}
	return found, nil
}

func (t *text) matches(old [][]byte, at int) bool {
	for i, l := range old {
		t.a.work++
		if !bytes.Equal(l, t.lines[at+i]) {
			return false
		}
	}
	return true
}

func (t *text) tired() error {
	t.a.work++
	if t.a.work > maxWork {
		return api.Errorf(api.ErrExhausted, "finding the places of the hunks takes too long")
	}
	if t.a.work%65536 == 0 && t.a.ctx.Err() != nil {
		return context.Cause(t.a.ctx)
	}
	return nil
}

// mismatch says why a hunk fits nowhere: the first line that differs at the
// place where most of it fits of those near the expected one.
func (t *text) mismatch(f *filePatch, i int, old [][]byte, from, expected int) error {
	h := &f.hunks[i]
	head := func(format string, args ...any) error {
		args = append([]any{i + 1, f.path(), h.line}, args...)
		return api.WithHint(api.Errorf(api.ErrInvalid, "hunk %d of %.200q (line %d of the patch) does not apply: "+format, args...),
			"read the file and make the patch anew")
	}
	if len(old) == 0 {
		if h.oldStart == 0 {
			return head("it is made for an empty file, and this one has %d lines", len(t.lines))
		}
		return head("it adds behind line %d, and the file has %d lines", h.oldStart, len(t.lines))
	}
	const near = 1000
	best, bestLen := min(max(expected, from), len(t.lines)), -1
	for d := range near {
		for _, at := range []int{expected - d, expected + d} {
			if at < from || at > len(t.lines) {
				continue
			}
			n := 0
			for n < len(old) && at+n < len(t.lines) && bytes.Equal(old[n], t.lines[at+n]) {
				n++
			}
			if n > bestLen {
				best, bestLen = at, n
			}
		}
	}
	bestLen = max(bestLen, 0)
	if bestLen == len(old) {
		return head("its lines are at line %d, but it lacks context to be sure of the place", best+1)
	}
	at := best + bestLen
	if at >= len(t.lines) {
		return head("the file ends after line %d, and the patch expects %.200q", len(t.lines), old[bestLen])
	}
	found, want := t.lines[at], old[bestLen]
	if bytes.Equal(bytes.TrimRight(found, "\r\n"), bytes.TrimRight(want, "\r\n")) {
		return head("line %d of the file ends with %q, and that of the patch with %q", at+1, ending(found), ending(want))
	}
	return head("line %d of the file is %.200q, and the patch expects %.200q", at+1, found, want)
}

func ending(line []byte) []byte { return line[len(bytes.TrimRight(line, "\r\n")):] }
