package termtext

import (
	"bytes"
	"unicode/utf8"
)

// A cell is one place on the screen.
type cell struct {
	char  rune   // 0 where nothing was written, tail in the right half of a wide character
	marks string // combining characters, at most maxMarks bytes
}

const tail rune = -1

// A line is one row of the screen.
type line struct {
	cells   []cell // up to the last one that was written
	wrapped bool   // the text goes on in the next row
}

// put writes char and blanks the other half of a wide character that it cuts.
func (l *line) put(x, width int, char rune) {
	l.split(x)
	l.split(x + width)
	for len(l.cells) < x+width {
		l.cells = append(l.cells, cell{})
	}
	l.cells[x] = cell{char: char}
	if width == 2 {
		l.cells[x+1] = cell{char: tail}
	}
}

// split makes x the border between two characters: a wide one across it goes.
func (l *line) split(x int) {
	if x > 0 && x < len(l.cells) && l.cells[x].char == tail {
		l.cells[x-1], l.cells[x] = cell{}, cell{}
	}
}

// erase blanks the cells [from, to).
func (l *line) erase(from, to int) {
	l.split(from)
	l.split(to)
	if to >= len(l.cells) {
		l.cells = l.cells[:min(from, len(l.cells))]
		return
	}
	clear(l.cells[min(from, to):to])
}

// insert moves the cells from x on to the right by n, within cols.
func (l *line) insert(x, n, cols int) {
	l.split(x)
	if x >= len(l.cells) {
		return
	}
	n = min(n, cols-x)
	size := min(len(l.cells)+n, cols)
	l.split(size - n)
	for len(l.cells) < size {
		l.cells = append(l.cells, cell{})
	}
	copy(l.cells[x+n:size], l.cells[x:])
	clear(l.cells[x : x+n])
}

// remove takes n cells away at x; those right of them move left.
func (l *line) remove(x, n int) {
	l.split(x)
	l.split(x + n)
	size := len(l.cells)
	if x >= size {
		return
	}
	l.cells = append(l.cells[:x], l.cells[min(x+n, size):]...)
	for l.wrapped && len(l.cells) < size { // the text goes on after the gap
		l.cells = append(l.cells, cell{})
	}
}

// appendTo appends the text of the line, without a line end unless it has one.
func (l *line) appendTo(text []byte) []byte {
	for _, c := range l.cells {
		switch c.char {
		case 0:
			text = append(text, ' ')
		case tail:
		default:
			text = utf8.AppendRune(text, c.char)
			text = append(text, c.marks...)
		}
	}
	if l.wrapped {
		return text
	}
	return append(bytes.TrimRight(text, " "), '\n')
}

// A scrollback is the text that left the screen at the top.
type scrollback struct {
	text  []byte
	lines int // line ends in text
}

func (s *scrollback) push(l *line) {
	s.text = l.appendTo(s.text)
	if !l.wrapped {
		s.lines++
	}
	if s.lines >= 2*maxScrollbackLines || len(s.text) >= 2*maxScrollback {
		s.trim()
	}
}

// endLine ends the last line if it was wrapped and its rest is gone.
func (s *scrollback) endLine() {
	if n := len(s.text); n > 0 && s.text[n-1] != '\n' {
		s.push(&line{})
	}
}

// trim drops the oldest lines beyond the bounds. A line longer than the bound
// loses its beginning.
func (s *scrollback) trim() {
	text := s.text
	if over := len(text) - maxScrollback; over > 0 {
		text = text[over:]
		if end := bytes.IndexByte(text, '\n'); end >= 0 {
			text = text[end+1:]
		}
		for len(text) > 0 && !utf8.RuneStart(text[0]) {
			text = text[1:]
		}
	}
	s.lines = bytes.Count(text, []byte{'\n'})
	for ; s.lines > maxScrollbackLines; s.lines-- {
		text = text[bytes.IndexByte(text, '\n')+1:]
	}
	s.text = append(s.text[:0], text...)
}
