package termtext

import "slices"

// lineFeed goes one row down; at the bottom margin the rows move up instead.
func (t *terminal) lineFeed() {
	switch {
	case t.cursor.y == t.bottom:
		t.scrollUp(t.top, 1)
	case t.cursor.y < t.rows-1:
		t.cursor.y++
	}
}

// reverseLineFeed goes one row up; at the top margin the rows move down instead.
func (t *terminal) reverseLineFeed() {
	switch {
	case t.cursor.y == t.top:
		t.scrollDown(t.top, 1)
	case t.cursor.y > 0:
		t.cursor.y--
	}
}

// scrollUp moves the rows from first to the bottom margin up by n. What leaves
// the main screen at its top goes to the scrollback.
func (t *terminal) scrollUp(first, n int) {
	region := t.lines[first : t.bottom+1]
	n = min(n, len(region))
	if first == 0 && t.hidden == nil {
		for i := range n {
			t.back.push(&region[i])
		}
	} else {
		t.unwrap(first)
	}
	rotate(region, n)
	blank(region[len(region)-n:])
}

// scrollDown moves the rows from first to the bottom margin down by n.
func (t *terminal) scrollDown(first, n int) {
	region := t.lines[first : t.bottom+1]
	n = min(n, len(region))
	t.unwrap(first)
	rotate(region, len(region)-n)
	blank(region[:n])
	region[len(region)-1].wrapped = false
}

// deleteLines takes n rows away at the cursor. None goes to the scrollback: they
// did not scroll, the program took them away.
func (t *terminal) deleteLines(n int) {
	region := t.lines[t.cursor.y : t.bottom+1]
	n = min(n, len(region))
	t.unwrap(t.cursor.y)
	rotate(region, n)
	blank(region[len(region)-n:])
}

// unwrap ends the line above row y, because what was in that row goes.
func (t *terminal) unwrap(y int) {
	if y > 0 {
		t.lines[y-1].wrapped = false
	} else if t.hidden == nil {
		t.back.endLine()
	}
}

// rotate moves the first n lines behind the others, which keeps their memory.
func rotate(lines []line, n int) {
	if n == 1 { // every line feed of a long output
		first := lines[0]
		copy(lines, lines[1:])
		lines[len(lines)-1] = first
		return
	}
	slices.Reverse(lines[:n])
	slices.Reverse(lines[n:])
	slices.Reverse(lines)
}

func blank(lines []line) {
	for i := range lines {
		lines[i] = line{cells: lines[i].cells[:0]}
	}
}

// clearScreen blanks the screen. A person can still scroll back to what was on
// the main one, as in tmux and most terminals of a desktop.
func (t *terminal) clearScreen() {
	if t.hidden == nil {
		used := 0
		for i := range t.lines {
			if len(t.lines[i].cells) > 0 {
				used = i + 1
			}
		}
		for i := range used {
			t.back.push(&t.lines[i])
		}
		t.back.endLine()
	}
	blank(t.lines)
}

// eraseLine blanks the cells [from, to) of row y.
func (t *terminal) eraseLine(y, from, to int) {
	l := &t.lines[y]
	l.erase(from, to)
	if to < t.cols {
		return
	}
	l.wrapped = false
	if from == 0 {
		t.unwrap(y)
	}
}

// eraseInLine is CSI K.
func (t *terminal) eraseInLine(how int) {
	c := t.cursor
	switch how {
	case 0:
		// After the last column nothing is left to erase. xterm takes the last
		// character away, which tmux does not, nor what prints CSI K mean.
		if !c.pending {
			t.eraseLine(c.y, c.x, t.cols)
		}
	case 1:
		t.eraseLine(c.y, 0, c.x+1)
	case 2:
		t.eraseLine(c.y, 0, t.cols)
	}
}

// eraseInDisplay is CSI J.
func (t *terminal) eraseInDisplay(how int) {
	c := t.cursor
	switch how {
	case 0:
		if c.x == 0 && c.y == 0 {
			t.clearScreen()
			return
		}
		t.eraseInLine(0)
		blank(t.lines[c.y+1:])
	case 1:
		blank(t.lines[:c.y])
		t.eraseInLine(1)
	case 2:
		t.clearScreen()
	case 3:
		t.back = scrollback{}
	}
}

// alternate brings the alternate screen into view, blank, or the main one back.
func (t *terminal) alternate(on bool) {
	switch {
	case on && t.hidden == nil:
		t.hidden, t.lines = t.lines, make([]line, t.rows)
	case !on && t.hidden != nil:
		t.lines, t.hidden = t.hidden, nil
	}
}
