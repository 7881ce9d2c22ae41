package termtext

import "github.com/charmbracelet/x/ansi"

// control does what a character below 0x20 says.
func (t *terminal) control(b byte) {
	t.last = 0
	c := &t.cursor
	switch b {
	case '\b':
		t.column(c.x - 1)
	case '\t':
		t.tab(1)
	case '\n', '\v', '\f':
		if t.lineFeedCR {
			c.x = 0
		}
		c.pending = false
		t.lineFeed()
	case '\r':
		t.column(0)
	case ansi.SO:
		c.shifted = true
	case ansi.SI:
		c.shifted = false
	}
}

// escape does what ESC and up to two characters say.
func (t *terminal) escape(cmd ansi.Cmd) {
	t.last = 0
	switch i := cmd.Intermediate(); {
	case i == '(' || i == ')':
		t.cursor.graphics[index(i == ')')] = cmd.Final() == '0'
		return
	case i != 0:
		return
	}
	c := &t.cursor
	switch cmd.Final() {
	case '7':
		t.saved = *c
	case '8':
		t.restore()
	case 'D', 'E':
		c.pending = false
		if cmd.Final() == 'E' {
			c.x = 0
		}
		t.lineFeed()
	case 'M':
		c.pending = false
		t.reverseLineFeed()
	case 'H':
		t.tabs[c.x] = true
	case 'c':
		t.alternate(false)
		t.clearScreen()
		t.reset()
	case 'k': // screen's title, ended by ESC \
		t.oldTitle = true
	}
}

// csi does what ESC [ says. Colours, reports, the mouse and the like leave no
// text and are not here.
func (t *terminal) csi(cmd ansi.Cmd, params ansi.Params) {
	// A parameter left out is 0; none counts further than a screen can be large.
	param := func(i int) int {
		n, _, _ := params.Param(i, 0)
		return min(max(n, 0), maxCols)
	}
	last := t.last
	t.last = 0
	if cmd.Intermediate() != 0 {
		if cmd.Intermediate() == '!' && cmd.Final() == 'p' {
			t.softReset()
		}
		return
	}
	if prefix := cmd.Prefix(); prefix != 0 {
		if set := cmd.Final() == 'h'; prefix == '?' && (set || cmd.Final() == 'l') {
			for i := range params {
				n, _, _ := params.Param(i, 0)
				t.privateMode(n, set)
			}
		}
		return
	}
	n := max(param(0), 1)
	switch c := &t.cursor; cmd.Final() {
	case '@':
		if !c.pending {
			t.lines[c.y].insert(c.x, n, t.cols)
		}
	case 'P':
		if !c.pending {
			t.lines[c.y].remove(c.x, n)
		}
	case 'X':
		if !c.pending {
			t.eraseLine(c.y, c.x, min(c.x+n, t.cols))
		}
	case 'A', 'F':
		t.up(n)
		if cmd.Final() == 'F' {
			c.x = 0
		}
	case 'B', 'e', 'E':
		t.down(n)
		if cmd.Final() == 'E' {
			c.x = 0
		}
	case 'C', 'a':
		t.column(c.x + n)
	case 'D':
		t.column(c.x - n)
	case 'G', '`':
		t.column(n - 1)
	case 'd':
		t.row(n - 1)
	case 'H', 'f':
		t.row(n - 1)
		t.column(max(param(1), 1) - 1)
	case 'I':
		t.tab(n)
	case 'Z':
		t.backTab(n)
	case 'J':
		t.eraseInDisplay(param(0))
	case 'K':
		t.eraseInLine(param(0))
	case 'L', 'M':
		if c.y >= t.top && c.y <= t.bottom {
			t.column(0)
			if cmd.Final() == 'L' {
				t.scrollDown(c.y, n)
			} else {
				t.deleteLines(n)
			}
		}
	case 'S':
		t.scrollUp(t.top, n)
	case 'T':
		if len(params) < 2 { // with more it is the mouse
			t.scrollDown(t.top, n)
		}
	case 'b':
		for range min(n, t.cols-c.x) { // within the row: output pays for each row that scrolls
			if last != 0 {
				t.print(last)
			}
		}
	case 'g':
		if param(0) == 0 {
			t.tabs[c.x] = false
		} else if param(0) == 3 {
			clear(t.tabs)
		}
	case 'h', 'l':
		for i := range params {
			switch param(i) {
			case 4:
				t.inserting = cmd.Final() == 'h'
			case 20:
				t.lineFeedCR = cmd.Final() == 'h'
			}
		}
	case 'r':
		t.margins(n-1, param(1))
	case 's':
		t.saved = *c
	case 'u':
		t.restore()
	}
}

func (t *terminal) privateMode(mode int, set bool) {
	switch mode {
	case 6:
		t.cursor.origin = set
		t.row(0)
		t.column(0)
	case 7:
		t.noWrap = !set
		t.cursor.pending = t.cursor.pending && set
	case 47, 1047:
		t.alternate(set)
	case 1048, 1049:
		if set && (mode == 1048 || t.hidden == nil) {
			t.saved = t.cursor
		}
		was := t.hidden != nil
		if mode == 1049 {
			t.alternate(set)
		}
		// A piece of output may have the way back alone; the cursor stays then.
		if !set && (mode == 1048 || was) {
			t.restore()
		}
	}
}

func (t *terminal) restore() {
	t.cursor = t.saved
	t.cursor.x, t.cursor.y = min(t.cursor.x, t.cols-1), min(t.cursor.y, t.rows-1)
}

// margins sets the rows that scroll: from top on, before bottom.
func (t *terminal) margins(top, bottom int) {
	if bottom == 0 || bottom > t.rows {
		bottom = t.rows
	}
	if top >= bottom-1 {
		return
	}
	t.top, t.bottom = top, bottom-1
	t.row(0)
	t.column(0)
}

// column goes to column x, or the nearest there is.
func (t *terminal) column(x int) {
	t.cursor.x, t.cursor.pending = min(max(x, 0), t.cols-1), false
}

// row goes to row y, which counts from the top margin and ends at the bottom
// one in origin mode.
func (t *terminal) row(y int) {
	first, last := 0, t.rows-1
	if t.cursor.origin {
		first, last = t.top, t.bottom
	}
	t.cursor.y, t.cursor.pending = min(max(first+y, first), last), false
}

// up goes n rows up, no further than the margin from inside.
func (t *terminal) up(n int) {
	first := 0
	if t.cursor.y >= t.top {
		first = t.top
	}
	t.cursor.y, t.cursor.pending = max(t.cursor.y-n, first), false
}

func (t *terminal) down(n int) {
	last := t.rows - 1
	if t.cursor.y <= t.bottom {
		last = t.bottom
	}
	t.cursor.y, t.cursor.pending = min(t.cursor.y+n, last), false
}

func (t *terminal) tab(n int) {
	for x := t.cursor.x + 1; x < t.cols; x++ {
		if t.tabs[x] || x == t.cols-1 {
			t.cursor.x = x
			if n--; n == 0 {
				return
			}
		}
	}
}

func (t *terminal) backTab(n int) {
	x := t.cursor.x
	for ; x > 0 && n > 0; n-- {
		for x--; x > 0 && !t.tabs[x]; x-- {
		}
	}
	t.column(x)
}
