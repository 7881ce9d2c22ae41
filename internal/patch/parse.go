package patch

import (
	"bytes"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// A Patch is a parsed patch. It keeps parts of the text that it was parsed from.
type Patch struct {
	files []*filePatch
}

// A filePatch is what a patch does to one file.
type filePatch struct {
	line     int    // of its header
	old, cur string // "" for nothing
	oldMode  uint32 // as Git's, 0 where the patch does not say
	newMode  uint32
	create   bool
	remove   bool
	rename   bool
	copy     bool
	hunks    []hunk
	binary   *binary
}

// path is what the file is called in messages.
func (f *filePatch) path() string {
	if f.cur != "" {
		return f.cur
	}
	return f.old
}

// A hunk is one changed place.
type hunk struct {
	line               int // of its header
	oldStart, oldCount int
	newStart, newCount int
	lines              []hunkLine
}

// A hunkLine is a line with its newline, if it has one.
type hunkLine struct {
	op   byte // ' ', '-' or '+'
	text []byte
}

// Git's modes of files.
const (
	modeType    = 0o170000
	modeFile    = 0o100000
	modeSymlink = 0o120000
	modeModule  = 0o160000
)

// Parse parses a patch, which it keeps. What is none, or has a hunk that is not
// what its header says, is ErrInvalid, with the line; a path that leaves the
// tree ErrDenied; a patch that lacks the content of a binary file, or changes a
// submodule, ErrUnsupported; one beyond the bounds ErrExhausted.
func Parse(text []byte) (*Patch, error) {
	if len(text) > MaxPatchBytes {
		return nil, api.Errorf(api.ErrExhausted, "the patch has %d bytes, the limit is %d", len(text), MaxPatchBytes)
	}
	p := &parser{rest: text, patch: &Patch{}}
	if err := p.run(); err != nil {
		return nil, err
	}
	if len(p.patch.files) == 0 {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "the patch changes no file"), "make it with diff -u or git diff")
	}
	return p.patch, nil
}

type parser struct {
	rest  []byte
	line  int // of the first line in rest, from 0
	patch *Patch
}

// errorf is an error at the line n lines from the next.
func (p *parser) errorf(class error, n int, format string, args ...any) error {
	return api.Errorf(class, "line %d of the patch: %w", p.line+n+1, fmt.Errorf(format, args...))
}

// peek returns the line n lines ahead, with its newline, or nil at the end.
func (p *parser) peek(n int) []byte {
	rest := p.rest
	for {
		end := bytes.IndexByte(rest, '\n') + 1
		if end == 0 {
			end = len(rest)
		}
		if n == 0 {
			if end == 0 {
				return nil
			}
			return rest[:end:end]
		}
		rest = rest[end:]
		n--
	}
}

func (p *parser) next() {
	p.rest = p.rest[len(p.peek(0)):]
	p.line++
}

// header returns the line n lines ahead as text without its end.
func (p *parser) header(n int) string {
	return strings.TrimRight(string(p.peek(n)), "\r\n")
}

func (p *parser) run() error {
	behind := false // a hunk ended, and nothing else has begun
	for p.peek(0) != nil {
		line := p.peek(0)
		switch {
		case bytes.HasPrefix(line, []byte("diff --git ")):
			if err := p.gitFile(); err != nil {
				return err
			}
			behind = true
			continue
		case bytes.HasPrefix(line, []byte("--- ")) && bytes.HasPrefix(p.peek(1), []byte("+++ ")) && bytes.HasPrefix(p.peek(2), []byte("@@ -")):
			if err := p.plainFile(); err != nil {
				return err
			}
			behind = true
			continue
		case bytes.HasPrefix(line, []byte("@@ -")):
			return p.errorf(api.ErrInvalid, 0, "a hunk without a file: lines with --- and +++ must come before it")
		case bytes.HasPrefix(line, []byte("Binary files ")) || bytes.HasPrefix(line, []byte("Files ")) && bytes.HasSuffix(bytes.TrimRight(line, "\r\n"), []byte(" differ")):
			return p.noContent()
		}
		switch text := strings.TrimRight(string(line[:min(len(line), 8)]), "\r\n"); {
		case text == "": // says nothing
		case text == "-- " || text == "--": // the end of a mail
			behind = false
		case behind && strings.IndexByte(" +-\\", text[0]) >= 0:
			return p.errorf(api.ErrInvalid, 0, "the hunk before it has more lines than its header says: found %.80q", p.header(0))
		default:
			behind = false
		}
		p.next()
	}
	return nil
}

func (p *parser) noContent() error {
	return api.WithHint(p.errorf(api.ErrUnsupported, 0, "it says that a binary file differs and not how"),
		"make the patch with git diff --binary, or write the file itself")
}

// add takes a file whose header and hunks are complete.
func (p *parser) add(f *filePatch) error {
	if len(p.patch.files) == MaxFiles {
		return api.Errorf(api.ErrExhausted, "the patch changes more than %d files", MaxFiles)
	}
	for _, name := range []string{f.old, f.cur} {
		if name == "" {
			continue
		}
		if err := checkName(name); err != nil {
			return fmt.Errorf("line %d of the patch: %w", f.line, err)
		}
	}
	for _, mode := range []uint32{f.oldMode, f.newMode} {
		switch mode & modeType {
		case 0, modeFile, modeSymlink:
		case modeModule:
			return api.Errorf(api.ErrUnsupported, "line %d of the patch: %.200q is a submodule, which a patch cannot change here", f.line, f.path())
		default:
			return api.Errorf(api.ErrInvalid, "line %d of the patch: %.200q has the unknown mode %o", f.line, f.path(), mode)
		}
	}
	p.patch.files = append(p.patch.files, f)
	return nil
}

// plainFile parses what diff -u writes.
func (p *parser) plainFile() error {
	f := &filePatch{line: p.line + 1}
	old, err := lineName(p.header(0)[4:])
	if err != nil {
		return p.errorf(api.ErrInvalid, 0, "%w", err)
	}
	cur, err := lineName(p.header(1)[4:])
	if err != nil {
		return p.errorf(api.ErrInvalid, 1, "%w", err)
	}
	p.next()
	p.next()
	f.setNames(old, cur)
	if f.old != "" && f.cur != "" && f.old != f.cur {
		// diff -u file.orig file: without a line that says so it is no rename,
		// and the shorter name is the file's, as for Git.
		if strings.HasPrefix(f.cur, f.old) {
			f.cur = f.old
		}
		f.old = f.cur
	}
	if f.old == "" && f.cur == "" {
		return api.Errorf(api.ErrInvalid, "line %d of the patch: both names are %s", f.line, devNull)
	}
	f.create, f.remove = f.old == "", f.cur == ""
	if err := p.hunks(f); err != nil {
		return err
	}
	return p.add(f)
}

func (f *filePatch) setNames(old, cur string) {
	f.old, f.cur, _ = stripBoth(old, cur)
	if f.old == devNull {
		f.old = ""
	}
	if f.cur == devNull {
		f.cur = ""
	}
}

// gitFile parses what git diff writes for one file.
func (p *parser) gitFile() error {
	f := &filePatch{line: p.line + 1}
	f.setNames(headerNames(strings.TrimPrefix(p.header(0), "diff --git ")))
	p.next()
	var old, cur string // of the lines --- and +++
	begun := false
	for !begun && p.peek(0) != nil {
		line := p.header(0)
		known, err := f.extended(line)
		if err != nil {
			return p.errorf(api.ErrInvalid, 0, "%w", err)
		}
		switch {
		case known:
			p.next()
		case strings.HasPrefix(line, "--- ") && strings.HasPrefix(p.header(1), "+++ "):
			if old, err = lineName(line[4:]); err == nil {
				cur, err = lineName(p.header(1)[4:])
			}
			if err != nil {
				return p.errorf(api.ErrInvalid, 0, "%w", err)
			}
			p.next()
			p.next()
			begun = true
		case line == "GIT binary patch":
			if err := p.binary(f); err != nil {
				return err
			}
			begun = true
		case strings.HasPrefix(line, "Binary files "):
			return p.noContent()
		default:
			begun = true
		}
	}
	if f.rename || f.copy {
		if _, o, _ := strings.Cut(old, "/"); old != "" && old != f.old && o != f.old {
			return api.Errorf(api.ErrInvalid, "line %d of the patch: %.200q is renamed or copied, and then called %.200q", f.line, f.old, old)
		}
	} else if old != "" {
		names := filePatch{}
		names.setNames(old, cur)
		if names.old != names.cur && names.old != "" && names.cur != "" {
			return api.Errorf(api.ErrInvalid, "line %d of the patch: the names %.200q and %.200q differ, and it is no rename", f.line, names.old, names.cur)
		}
		f.old, f.cur = names.old, names.cur
		f.create, f.remove = f.create || f.old == "", f.remove || f.cur == ""
	}
	if f.old == "" && f.cur == "" {
		return api.Errorf(api.ErrInvalid, "line %d of the patch: it does not say which file is meant", f.line)
	}
	switch {
	case (f.rename || f.copy) && (f.old == "" || f.cur == "" || f.create || f.remove):
		return api.Errorf(api.ErrInvalid, "line %d of the patch: the rename or copy of %.200q has not just two names", f.line, f.path())
	case f.create && f.remove:
		return api.Errorf(api.ErrInvalid, "line %d of the patch: %.200q is both new and deleted", f.line, f.path())
	case f.create:
		f.old, f.cur = "", f.path()
	case f.remove:
		f.old, f.cur = f.path(), ""
	case !f.rename && !f.copy && f.old != f.cur:
		return api.Errorf(api.ErrInvalid, "line %d of the patch: the names %.200q and %.200q differ, and it is no rename", f.line, f.old, f.cur)
	}
	if err := p.hunks(f); err != nil {
		return err
	}
	if len(f.hunks) == 0 && f.binary == nil && !f.create && !f.remove && !f.rename && !f.copy && f.newMode == 0 {
		return api.Errorf(api.ErrInvalid, "line %d of the patch: nothing of %.200q is changed", f.line, f.path())
	}
	return p.add(f)
}

// extended takes one of Git's own header lines and reports whether it is one.
func (f *filePatch) extended(line string) (known bool, err error) {
	for _, h := range []struct {
		prefix string
		take   func(rest string) error
	}{
		{"old mode ", f.takeMode(&f.oldMode, nil)},
		{"new mode ", f.takeMode(&f.newMode, nil)},
		{"deleted file mode ", f.takeMode(&f.oldMode, &f.remove)},
		{"new file mode ", f.takeMode(&f.newMode, &f.create)},
		{"copy from ", takeName(&f.old, &f.copy)},
		{"copy to ", takeName(&f.cur, &f.copy)},
		{"rename from ", takeName(&f.old, &f.rename)},
		{"rename to ", takeName(&f.cur, &f.rename)},
		{"rename old ", takeName(&f.old, &f.rename)},
		{"rename new ", takeName(&f.cur, &f.rename)},
		{"similarity index ", nil},
		{"dissimilarity index ", nil},
		{"index ", f.takeIndex},
	} {
		if rest, ok := strings.CutPrefix(line, h.prefix); ok {
			if h.take != nil {
				err = h.take(rest)
			}
			return true, err
		}
	}
	return false, nil
}

func (f *filePatch) takeMode(to *uint32, flag *bool) func(string) error {
	return func(s string) error {
		mode, err := strconv.ParseUint(strings.TrimSpace(s), 8, 32)
		if err != nil {
			return api.Errorf(api.ErrInvalid, "%.40q is no mode", s)
		}
		*to = uint32(mode)
		if flag != nil {
			*flag = true
		}
		return nil
	}
}

// takeIndex takes the mode at the end of a line such as "index 12..34 100644".
func (f *filePatch) takeIndex(s string) error {
	_, mode, ok := strings.Cut(s, " ")
	if !ok || f.oldMode != 0 {
		return nil
	}
	return f.takeMode(&f.oldMode, nil)(mode)
}

func takeName(to *string, flag *bool) func(string) error {
	return func(s string) error {
		name, err := restName(s)
		*to, *flag = name, true
		return err
	}
}

var hunkHeader = regexp.MustCompile(`^@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@`)

// hunks parses all hunks of a file.
func (p *parser) hunks(f *filePatch) error {
	for bytes.HasPrefix(p.peek(0), []byte("@@ -")) {
		if f.binary != nil {
			return p.errorf(api.ErrInvalid, 0, "a hunk of a binary file")
		}
		h, err := p.hunk(f.path(), len(f.hunks)+1)
		if err != nil {
			return err
		}
		f.hunks = append(f.hunks, h)
	}
	return nil
}

func (p *parser) hunk(path string, number int) (h hunk, err error) {
	m := hunkHeader.FindStringSubmatch(p.header(0))
	if m == nil {
		return h, p.errorf(api.ErrInvalid, 0, "hunk %d of %.200q has no proper header: found %.80q", number, path, p.header(0))
	}
	num := func(s string, or int) int {
		if s == "" {
			return or
		}
		n, _ := strconv.Atoi(s) // up to nine digits
		return n
	}
	h = hunk{line: p.line + 1, oldStart: num(m[1], 0), oldCount: num(m[2], 1), newStart: num(m[3], 0), newCount: num(m[4], 1)}
	p.next()
	old, cur := h.oldCount, h.newCount
	for old > 0 || cur > 0 {
		line := p.peek(0)
		wrong := func(format string, args ...any) error {
			return p.errorf(api.ErrInvalid, 0, "hunk %d of %.200q (line %d) %w", number, path, h.line, fmt.Errorf(format, args...))
		}
		if line == nil {
			return h, wrong("ends with %d old and %d new lines missing of %d and %d", old, cur, h.oldCount, h.newCount)
		}
		op := line[0]
		text := line[1:]
		if op == '\n' || op == '\r' && len(line) == 2 { // an editor has cut the space away
			op, text = ' ', line
		}
		switch op {
		case ' ':
			old--
			cur--
		case '-':
			old--
		case '+':
			cur--
		case '\\':
			if err := h.noNewline(); err != nil {
				return h, wrong("%w", err)
			}
			p.next()
			continue
		default:
			return h, wrong("has %d old and %d new lines missing of %d and %d: found %.80q", old, cur, h.oldCount, h.newCount, p.header(0))
		}
		if old < 0 || cur < 0 {
			return h, wrong("has more lines than its header says: found %.80q", p.header(0))
		}
		if len(text) == 0 || text[len(text)-1] != '\n' { // the patch itself lacks its last newline
			text = append(bytes.Clone(text), '\n')
		}
		h.lines = append(h.lines, hunkLine{op, text})
		p.next()
	}
	if bytes.HasPrefix(p.peek(0), []byte(`\`)) {
		if err := h.noNewline(); err != nil {
			return h, p.errorf(api.ErrInvalid, 0, "hunk %d of %.200q %w", number, path, err)
		}
		p.next()
	}
	return h, nil
}

// noNewline takes the newline from the last line.
func (h *hunk) noNewline() error {
	if len(h.lines) == 0 {
		return api.Errorf(api.ErrInvalid, "begins with a remark about no line")
	}
	last := &h.lines[len(h.lines)-1]
	last.text = bytes.TrimSuffix(last.text, []byte("\n"))
	return nil
}
