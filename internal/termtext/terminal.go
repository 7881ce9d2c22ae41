package termtext

import (
	"bytes"
	"unicode"
	"unicode/utf8"

	"github.com/charmbracelet/x/ansi"
	"github.com/charmbracelet/x/ansi/parser"
	"github.com/clipperhouse/displaywidth"
)

// zeroWidthJoiner makes one emoji of those before and after it.
const zeroWidthJoiner = "\u200d"

// A cursor is where the next character goes, and what is saved with that.
type cursor struct {
	x, y     int
	pending  bool    // a character stands in the last column; the next one goes to the next row
	origin   bool    // rows count from the top margin
	graphics [2]bool // whether G0 and G1 are the line drawing characters
	shifted  bool    // G1 is in use
}

// A terminal is a screen and what was on it.
type terminal struct {
	cols, rows  int
	lines       []line // the screen in view
	hidden      []line // the main screen while the alternate one is in view, or nil
	cursor      cursor
	saved       cursor // by ESC 7, or on the way to the alternate screen
	top, bottom int    // the first and last row that scroll
	tabs        []bool // columns with a stop
	noWrap      bool
	inserting   bool
	lineFeedCR  bool // LF goes to the first column as well
	last        rune // the character that CSI b repeats, or 0
	back        scrollback

	parser   *ansi.Parser
	oldTitle bool // ESC k came: a string follows that the parser does not know
}

func newTerminal(cols, rows int) *terminal {
	t := &terminal{cols: cols, rows: rows, lines: make([]line, rows)}
	t.reset()
	t.parser = ansi.NewParser()
	t.parser.SetDataSize(1) // strings are dropped; 0 would keep them without bound
	t.parser.SetHandler(ansi.Handler{Print: t.print, Execute: t.control, HandleEsc: t.escape, HandleCsi: t.csi})
	return t
}

// reset sets everything back that ESC c does, but for the screen.
func (t *terminal) reset() {
	t.softReset()
	t.cursor = cursor{}
	t.lineFeedCR = false
	t.tabs = make([]bool, t.cols)
	for x := 8; x < t.cols; x += 8 {
		t.tabs[x] = true
	}
}

func (t *terminal) softReset() {
	t.top, t.bottom = 0, t.rows-1
	t.noWrap, t.inserting = false, false
	t.cursor.origin, t.cursor.graphics, t.cursor.shifted = false, [2]bool{}, false
	t.saved = cursor{}
}

// feed shows output. The parser sees its ASCII only: it takes bytes of a UTF-8
// character for the controls 0x80 to 0x9f, which would end a title inside "✳",
// and half a character for the beginning of one that swallows an escape.
func (t *terminal) feed(output []byte) {
	for i := 0; i < utf8.UTFMax-1 && len(output) > 0 && !utf8.RuneStart(output[0]); i++ {
		output = output[1:] // of a character that began before
	}
	for len(output) > 0 {
		ground := t.parser.State() == parser.GroundState
		if c := output[0]; c < utf8.RuneSelf {
			output = output[1:]
			if ground && c >= ' ' && c < 0x7f {
				t.print(rune(c))
				continue
			}
			t.parser.Advance(c)
			if t.oldTitle {
				t.oldTitle = false
				t.parser.Advance(ansi.ESC)
				t.parser.Advance('^') // a private message: a string that is dropped as well
			}
			continue
		}
		r, size := utf8.DecodeRune(output)
		if r == utf8.RuneError && !utf8.FullRune(output) {
			return
		}
		output = output[size:]
		if ground {
			t.print(r)
		}
	}
}

// text returns what Plain does.
func (t *terminal) text() string {
	t.back.trim()
	text := t.back.text
	if t.hidden != nil {
		t.back.endLine() // the alternate screen does not continue a line of the main one
		text = t.back.text
	}
	for i := range t.lines {
		text = t.lines[i].appendTo(text)
	}
	return string(bytes.TrimRight(text, " \n"))
}

// print shows one character.
func (t *terminal) print(r rune) {
	width := 1
	if r >= utf8.RuneSelf {
		// Terminals act on those that turn the direction of text, or show nothing:
		// here they would make one read what is not there.
		if unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) || r == '\u2028' || r == '\u2029' {
			return
		}
		width = min(displaywidth.Rune(r), 2)
		if t.mark(r, width) {
			return
		}
	} else if t.cursor.graphics[index(t.cursor.shifted)] && r >= '`' && r <= '~' {
		r = lineDrawing[r-'`']
	}
	if width > t.cols {
		return
	}
	c := &t.cursor
	if !t.noWrap && (c.pending || c.x+width > t.cols) {
		t.lines[c.y].wrapped = true
		c.x, c.pending = 0, false
		t.lineFeed()
	}
	c.x = min(c.x, t.cols-width)
	l := &t.lines[c.y]
	if t.inserting {
		l.insert(c.x, width, t.cols)
	}
	l.put(c.x, width, r)
	c.x += width
	if c.x == t.cols {
		c.x--
		c.pending = !t.noWrap
		l.wrapped = false
	}
	t.last = r
}

// mark adds r to the character before the cursor if it belongs to that: it has
// no width of its own, or follows a joiner.
func (t *terminal) mark(r rune, width int) bool {
	x := t.cursor.x - 1
	if t.cursor.pending {
		x++
	}
	cells := t.lines[t.cursor.y].cells
	if x > 0 && x < len(cells) && cells[x].char == tail {
		x--
	}
	if x < 0 || x >= len(cells) || cells[x].char == 0 {
		return width == 0
	}
	before := &cells[x].marks
	joined := len(*before) >= len(zeroWidthJoiner) && (*before)[len(*before)-len(zeroWidthJoiner):] == zeroWidthJoiner
	if width != 0 && !joined {
		return false
	}
	if len(*before)+utf8.RuneLen(r) <= maxMarks {
		*before += string(r)
	}
	return true
}

func index(b bool) int {
	if b {
		return 1
	}
	return 0
}

// lineDrawing is the DEC Special Graphics set from 0x60 on (VT220 Programmer
// Reference Manual, table 2-4).
var lineDrawing = [...]rune{
	'◆', '▒', '␉', '␌', '␍', '␊', '°', '±', '␤', '␋', '┘', '┐', '┌', '└', '┼', '⎺',
	'⎻', '─', '⎼', '⎽', '├', '┤', '┴', '┬', '│', '≤', '≥', 'π', '≠', '£', '·',
}
