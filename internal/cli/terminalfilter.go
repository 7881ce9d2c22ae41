package cli

import "io"

// A terminalFilter lets text and colours through to a terminal and nothing that
// could drive it: no title, no clipboard, no cursor movement, no answers from
// the terminal typed into the person's shell. It works on a stream, so an
// escape sequence may come in any number of pieces.
//
// What passes: everything from space up but DEL and C1 controls, newline, tab,
// carriage return, backspace, and SGR (ESC [ digits and semicolons m). What an
// escape sequence that does not pass consists of is dropped whole.
type terminalFilter struct {
	to    io.Writer
	state filterState
	seq   []byte // the sequence under way, while it may still be SGR
	// expect is how many continuation bytes of a UTF-8 character are to come,
	// and c1 whether its first byte was 0xC2, which C1 controls begin with.
	expect int
	c1     bool
	out    []byte
}

type filterState int

const (
	filterText   filterState = iota
	filterEscape             // after ESC
	filterCSI                // after ESC [
	filterString             // in OSC, DCS, SOS, PM or APC, up to BEL or ST
	filterStringEscape
)

// maxSGR bounds a colour sequence; longer ones are dropped.
const maxSGR = 64

func (f *terminalFilter) Write(p []byte) (int, error) {
	f.out = f.out[:0]
	for _, b := range p {
		f.step(b)
	}
	if len(f.out) > 0 {
		if _, err := f.to.Write(f.out); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

func (f *terminalFilter) step(b byte) {
	switch f.state {
	case filterText:
		f.text(b)
	case filterEscape:
		switch b {
		case '[':
			f.state, f.seq = filterCSI, append(f.seq[:0], 0x1b, '[')
		case ']', 'P', 'X', '^', '_':
			f.state = filterString
		default:
			if b < 0x20 || b > 0x2f { // intermediate bytes go on
				f.state = filterText
			}
		}
	case filterCSI:
		switch {
		case b >= 0x40 && b <= 0x7e:
			if b == 'm' && f.seq != nil {
				f.out = append(append(f.out, f.seq...), b)
			}
			f.state = filterText
		case b == 0x1b:
			f.state = filterEscape
		case (b >= '0' && b <= '9' || b == ';' || b == ':') && f.seq != nil && len(f.seq) < maxSGR:
			f.seq = append(f.seq, b)
		default:
			f.seq = nil // not SGR: dropped up to its final byte
		}
	case filterString:
		switch b {
		case 0x07:
			f.state = filterText
		case 0x1b:
			f.state = filterStringEscape
		}
	case filterStringEscape:
		if b == '\\' {
			f.state = filterText
		} else {
			f.state = filterString
		}
	}
}

func (f *terminalFilter) text(b byte) {
	if f.expect > 0 && b >= 0x80 && b <= 0xbf {
		f.expect--
		if f.c1 {
			f.c1 = false
			if b < 0xa0 {
				return // U+0080 to U+009F
			}
			f.out = append(f.out, 0xc2)
		}
		f.out = append(f.out, b)
		return
	}
	f.expect, f.c1 = 0, false
	switch {
	case b == 0x1b:
		f.state = filterEscape
	case b == '\n', b == '\t', b == '\r', b == '\b', b >= 0x20 && b < 0x7f:
		f.out = append(f.out, b)
	case b == 0xc2:
		f.expect, f.c1 = 1, true
	case b >= 0xc3 && b <= 0xdf:
		f.expect = 1
		f.out = append(f.out, b)
	case b >= 0xe0 && b <= 0xef:
		f.expect = 2
		f.out = append(f.out, b)
	case b >= 0xf0 && b <= 0xf4:
		f.expect = 3
		f.out = append(f.out, b)
	}
	// Other controls, and bytes that begin no character, are dropped.
}
