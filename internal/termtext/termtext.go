// Package termtext gives the text that a person would have read on a terminal:
// with the last state of a progress bar and not each, without colours and
// titles, and with what a full-screen program painted where it painted it.
//
// The sequences are taken apart by the parser of charmbracelet/x/ansi, the
// state machine that xterm and the VT500 have. What they do to a screen is
// here, after xterm's ctlseqs document (https://invisible-island.net/xterm)
// and, where terminals differ, the one of them that loses the least text. The
// libraries that have a screen as well have no scrollback and no wide
// characters (vt10x), or trust what they are fed.
package termtext

// Bounds of what hostile output can make of a terminal.
const (
	// maxCols and maxRows bound the screen: a 4K monitor in print of 6x7 pixels.
	maxCols, maxRows = 640, 300

	// maxScrollbackLines and maxScrollback, in bytes, bound what has scrolled
	// off the top; the oldest lines go.
	maxScrollbackLines, maxScrollback = 100_000, 16 << 20

	// maxMarks is how many bytes of combining characters one cell holds: enough
	// for a family emoji. Further ones are dropped.
	maxMarks = 32
)

// Plain returns what a person can read on a terminal of cols by rows characters
// that has shown output, and by scrolling back: what scrolled off the top, and
// the screen. A full-screen program that still runs is on the screen; one that
// has ended is not. A size outside 1x1 to 640x300 is taken as the nearest one.
//
// The text is valid UTF-8, of printable characters and line feeds. Lines have no
// blanks at their end, the text no empty lines; a line that the terminal broke
// because it was too long is one again.
//
// Output may begin and end inside a character or a sequence: a cut end does
// nothing, the rest of a cut beginning cannot be told from text, and is text. An
// LF only goes down, as on every terminal; it is the PTY that makes CR LF of it.
//
// Whatever output is, the text has no more than the last 100,000 lines or 16 MiB
// that scrolled off, and Plain needs at most some 150 MiB of memory besides output,
// and time that grows with its length only: at worst seconds for a MiB.
func Plain(output []byte, cols, rows int) string {
	t := newTerminal(min(max(cols, 1), maxCols), min(max(rows, 1), maxRows))
	t.feed(output)
	return t.text()
}
