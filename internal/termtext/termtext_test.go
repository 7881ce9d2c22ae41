package termtext_test

import (
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/internal/termtext"
)

// tests are shown to tmux too, except where unlikeTmux says why it differs.
var tests = []struct {
	name       string
	cols, rows int
	output     string
	want       string
	unlikeTmux string
}{
	{"nothing", 20, 5, "", "", ""},
	{"lines", 20, 5, "one\r\n\r\nthree  \r\n\r\n", "one\n\nthree", ""},
	{"line feed only", 20, 5, "one\ntwo", "one\n   two", ""},
	{"line feed mode", 20, 5, "\x1b[20hone\ntwo\x1b[20l\nx", "one\ntwo\n   x", "it has no such mode"},
	{"scrolled off", 20, 2, "1\r\n2\r\n3\r\n4\r\n5", "1\n2\n3\n4\n5", ""},
	{"progress bar", 20, 5, "get  10%\rget  50%\rget 100%\r\ndone\r\n", "get 100%\ndone", ""},
	{"shorter progress", 20, 5, "loading 10%\rdone\x1b[K\r\n", "done", ""},
	{"two bars", 20, 5, "a 1%\r\nb 1%\r\n\x1b[2A\x1b[2Ka 9%\r\n\x1b[2Kb 9%\r\n", "a 9%\nb 9%", ""},
	{"spinner", 20, 5, "\\\b|\b/\b-\bok", "ok", ""},
	{"erased input", 20, 5, "$ lsx\b \b\r\nfile", "$ ls\nfile", ""},
	{"colours", 20, 5, "\x1b[1;31mred\x1b[0m \x1b[38;2;1;2;3mrgb\x1b[38:2::4:5:6m!\x1b[m", "red rgb!", ""},
	{"title", 20, 5, "\x1b]0;a title\adone", "done", ""},
	{"title with a star", 20, 5, "\x1b]2;\u2733 working\x1b\\done", "done", ""},
	{"title of screen", 20, 5, "\x1bka title\x1b\\done", "done", ""},
	{"link", 20, 5, "\x1b]8;;http://x.example/\x1b\\here\x1b]8;;\x1b\\.", "here.", ""},
	{"device control string", 20, 5, "a\x1bP1$r0m\x1b\\b\x1b_app\x1b\\c\x1b^pm\x1b\\d", "abcd", ""},
	{"bracketed paste", 20, 5, "\x1b[?2004h$ ls\r\n\x1b[?2004l\rfile\r\n", "$ ls\nfile", ""},
	{"cancelled", 20, 5, "a\x1b[12\x18b\x1b]0;t\x18c", "abc", ""},
	{"escape in sequence", 20, 5, "a\x1b[12\x1b[1mb", "ab", ""},
	{"tabs", 40, 5, "a\tb\tc\r\n1234567\tx\r\n12345678\tx", "a       b       c\n1234567 x\n12345678        x", ""},
	{"own tabs", 40, 5, "\x1b[3g    \x1bH  \x1bH\ra\tb\tc\r\n\x1b[10Cx\x1b[2Zy", "a   b c\n    y     x", ""},
	{"wrapped", 10, 5, "0123456789abcdef\r\nx", "0123456789abcdef\nx", ""},
	{"wrapped with blank", 10, 5, "012345678 abc  def   ghi\r\n", "012345678 abc  def   ghi", ""},
	{"wrapped and written over", 10, 5, "0123456789ab\x1b[H9876543210\r\nx", "9876543210\nxb", "it still joins them"},
	{"as long as the screen", 10, 5, "0123456789\r\nx", "0123456789\nx", ""},
	{"wrapped and scrolled off", 10, 2, "0123456789abcdefghijklmnopq\r\nx\r\ny", "0123456789abcdefghijklmnopq\nx\ny", ""},
	{"no wrap", 10, 5, "\x1b[?7l0123456789abc\x1b[?7h", "012345678c", ""},
	{"full line and erase", 10, 5, "0123456789\x1b[K\r\nx", "0123456789\nx", ""},
	{"shell breaks a long line", 10, 5, "$ 34567890 \rabc", "$ 34567890abc", ""},
	{"wide", 10, 5, "世界!\r\n", "世界!", ""},
	{"wide at the margin", 5, 5, "a世界b", "a世界b", ""},
	{"wide beyond the margin", 5, 5, "世界世b", "世界世b", ""},
	{"half of a wide one", 10, 5, "世界\x1b[2Gx", " x界", "it keeps the left half"},
	{"left half of a wide one", 10, 5, "世界\rx", "x 界", ""},
	{"combining", 10, 5, "e\u0301a\u0308\u0323o", "e\u0301a\u0308\u0323o", ""},
	{"combining in the last column", 5, 5, "abcde\u0301f", "abcde\u0301f", ""},
	{"combining alone", 10, 5, "\u0301a", "a", "it makes a place for it"},
	{"emoji", 10, 5, "👍 ok", "👍 ok", ""},
	{"emoji of several", 10, 5, "👨\u200d👩\u200d👧 ok", "👨\u200d👩\u200d👧 ok", "Debian's is too old for it"},
	{"line drawing", 10, 5, "\x1b(0lqk\x1b(B\r\n\x1b)0\x0ex\x0fx", "┌─┐\n│x", "it prints these as letters"},
	{"invalid UTF-8", 10, 5, "a\xffb\xc3c", "a\ufffdb\ufffdc", "it drops them"},
	{"begins in a character", 10, 5, "\x96\x8cx", "x", "it does not know that it is a piece"},
	{"ends in a character", 10, 5, "x\xe4\xb8", "x", ""},
	{"ends in a sequence", 10, 5, "x\x1b[1;", "x", ""},
	{"ends in a title", 10, 5, "x\x1b]0;ab", "x", ""},
	{"C1 controls", 10, 5, "a\u009b1mb\u0085c", "a1mbc", "it may show a blank"},
	{"turned around", 20, 5, "a\u202eb\u2066c\u2028d", "abcd", "it shows them"},
	{"insert and delete", 10, 5, "abcdef\x1b[3G\x1b[2@\x1b[5G\x1b[P", "ab  def", ""},
	{"insert mode", 10, 5, "abc\r\x1b[4hxy\x1b[4lz", "xyzbc", ""},
	{"erase", 10, 5, "abcdef\x1b[3G\x1b[2X\r\n123456\x1b[3G\x1b[1K", "ab  ef\n   456", ""},
	{"repeat", 10, 5, "ab\x1b[3b\r\n", "abbbb", ""},
	{"lines in and out", 10, 5, "1\r\n2\r\n3\r\n4\x1b[2H\x1b[Lx\x1b[4H\x1b[M", "1\nx\n2\n4", ""},
	{"clear", 10, 3, "one\r\ntwo\x1b[H\x1b[2Jthree", "one\ntwo\nthree", ""},
	{"clear with the scrollback", 10, 3, "1\r\n2\r\n3\r\n4\x1b[H\x1b[2J\x1b[3Jx", "x", ""},
	{"region", 10, 4, "title\x1b[2;3r\x1b[2;1Ha\r\nb\r\nc\x1b[r\x1b[4Hend", "title\nb\nc\nend", "it keeps a"},
	{"region at the top", 10, 4, "\x1b[4Hend\x1b[1;3r\x1b[H1\r\n2\r\n3\r\n4", "1\n2\n3\n4\nend", ""},
	{"origin", 10, 4, "\x1b[2;3r\x1b[?6h\x1b[1;1Ha\x1b[9;1Hb\x1b[?6l\x1b[r", "\na\nb", ""},
	{"reverse line feed", 10, 4, "a\r\nb\x1b[H\x1bMc", "c\na\nb", ""},
	{"scroll by hand", 10, 3, "a\r\nb\r\nc\x1b[2S\x1b[1T", "a\nb\n\nc", ""},
	{"alternate screen", 10, 3, "$ vi\r\n\x1b[?1049h\x1b[Hin vi\x1b[?1049l$ ", "$ vi\n$", ""},
	{"in the alternate screen", 10, 3, "1\r\n2\r\n3\r\n4\x1b[?1049h\x1b[H\x1b[2Jin vi\r\n\n\n\nend", "1\n\n\nend", ""},
	{"alternate screen below a broken line", 10, 2, "0123456789abcdefghijklmno\x1b[?1049h\x1b[H\x1b[2Jvi", "0123456789\nvi", "it joins them"},
	{"alternate screen left only", 10, 3, "a\r\nb\x1b[?1049lc", "a\nbc", ""},
	{"save and restore", 10, 3, "ab\x1b7cd\r\nx\x1b8y\x1b[sz\x1b[uw", "abyw\nx", ""},
	{"reset", 10, 3, "\x1b[2;3r\x1b[4hab\x1bcxy\rz", "ab\nzy", ""},
	{"home from everywhere", 10, 3, "ab\x1b[999;999Hz\x1b[999A\x1b[999Dy", "yb\n\n         z", ""},
}

func TestPlain(t *testing.T) {
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, termtext.Plain([]byte(tt.output), tt.cols, tt.rows)); diff != "" {
				t.Errorf("%q (-want +got):\n%s", tt.output, diff)
			}
		})
	}
}

// A piece may be cut anywhere: what is before the cut is shown like the whole.
func TestPlainCutAnywhere(t *testing.T) {
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for i := range len(tt.output) {
				for _, piece := range []string{tt.output[:i], tt.output[i:]} {
					check(t, piece, tt.cols, tt.rows)
				}
			}
		})
	}
	whole := "one\r\n\x1b[1;31m世界\x1b[0m"
	for i, want := range map[int]string{5: "one", 8: "one", 13: "one", 15: "one\n世", 18: "one\n世界", len(whole): "one\n世界"} {
		if got := termtext.Plain([]byte(whole[:i]), 20, 5); got != want {
			t.Errorf("the first %d bytes show %q, want %q", i, got, want)
		}
	}
}

// check holds what Plain promises of any output.
func check(t testing.TB, output string, cols, rows int) string {
	t.Helper()
	text := termtext.Plain([]byte(output), cols, rows)
	if !utf8.ValidString(text) {
		t.Fatalf("%q shows invalid %q", output, text)
	}
	for _, r := range text {
		if r != '\n' && unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) {
			t.Fatalf("%q shows %q with %q", output, text, r)
		}
	}
	if strings.Contains(text, " \n") || strings.HasSuffix(text, "\n") || strings.HasSuffix(text, " ") {
		t.Fatalf("%q shows %q with blanks at an end", output, text)
	}
	return text
}

func TestPlainSizes(t *testing.T) {
	for _, tt := range []struct {
		name       string
		cols, rows int
		want       string
	}{
		{"zero", 0, 0, "ab"},
		{"negative", -1, -5, "ab"},
		{"huge", 1 << 40, 1 << 40, "ab"},
		{"one cell", 1, 1, "ab"}, // no room for a wide one
		{"two cells", 2, 1, "a世b"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := tt.want
			if tt.cols > 2 {
				want = "a世b"
			}
			if got := termtext.Plain([]byte("a世b"), tt.cols, tt.rows); got != want {
				t.Errorf("Plain = %q, want %q", got, want)
			}
		})
	}
}

// What somebody hostile prints costs no more than its length says.
func TestPlainHostile(t *testing.T) {
	const size = 32 << 10
	fill := func(s string) string { return strings.Repeat(s, size/len(s)) }
	for _, tt := range []struct{ name, output, end string }{
		{"parameters", "\x1b[" + fill("9;") + "mend", "end"},
		{"one parameter", "\x1b[" + fill("9") + "Gend\r\n", ""},
		{"huge positions", fill("\x1b[4294967296;99999999999999999999H\x1b[2147483647A\x1b[18446744073709551615C") + "\x1b[Hend", "end"},
		{"endless title", "\x1b]0;" + fill("x"), ""},
		{"endless device control string", "\x1bP" + fill("\xe2\x9c\xb3"), ""},
		{"marks", "a" + fill("\u0301") + "end", "end"},
		{"joiners", "a" + fill("\u200d") + "end", "end"},
		{"repeats", fill("x\x1b[999999999b\x1b[2J") + "\x1b[3J\x1b[Hend", "end"},
		{"scrolling", fill("\x1b[999999S") + "\x1b[Hend", "end"},
		{"scrolling back", fill("\x1b[999999T\x1bM") + "\x1b[Hend", "end"},
		{"rows in and out", fill("\x1b[999999L\x1b[9999M") + "\x1b[Hend", "end"},
		{"characters in and out", fill("x\x1b[99999@\x1b[9999P\x1b[9999X\r") + "\x1b[Hend", "end"},
		{"clearing", fill("\x1b[2Jx\n") + "\x1b[Hend", "x"},
		{"screens", fill("\x1b[?1049h\x1b[?1049l") + "\x1b[Hend", "end"},
		{"escapes", fill("\x1b") + "[mend", "end"},
		{"one line", fill("0123456789"), "9"},
		{"invalid", fill("\xff"), "\ufffd"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			text := check(t, tt.output, 1<<20, 1<<20)
			// It takes less than a second; the bound is for a busy machine.
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("it takes %v", took)
			}
			if !strings.HasSuffix(text, tt.end) {
				t.Errorf("the end is %q, want %q", text[max(0, len(text)-20):], tt.end)
			}
		})
	}
}

func TestScrollbackIsBounded(t *testing.T) {
	t.Run("lines", func(t *testing.T) {
		const lines = 250_000
		var b strings.Builder
		for i := range lines {
			fmt.Fprintf(&b, "%d\r\n", i)
		}
		text := strings.Split(termtext.Plain([]byte(b.String()), 80, 24), "\n")
		// The last line feed leaves an empty row, so 23 of 24 have text.
		if n := len(text); n != 100_000+23 || text[0] != fmt.Sprint(lines-n) || text[n-1] != fmt.Sprint(lines-1) {
			t.Errorf("%d lines, from %q to %q", n, text[0], text[n-1])
		}
	})
	t.Run("bytes", func(t *testing.T) {
		// Rows of 640 characters of 4 bytes, for 12 bytes each.
		text := check(t, strings.Repeat("\U00010000\x1b[999b\r\n", 15_000), 640, 24)
		if len(text) < 15<<20 || len(text) > 17<<20 {
			t.Errorf("%d bytes", len(text))
		}
		if line, _, _ := strings.Cut(text, "\n"); len(line) != 4*640 {
			t.Errorf("the first line has %d bytes", len(line))
		}
	})
	t.Run("one line", func(t *testing.T) {
		text := check(t, strings.Repeat("x\x1b[999b世", 30_000), 640, 24)
		if len(text) < 15<<20 || len(text) > 17<<20 {
			t.Errorf("%d bytes", len(text))
		}
	})
}

func FuzzPlain(f *testing.F) {
	for _, tt := range tests {
		f.Add([]byte(tt.output), tt.cols, tt.rows)
	}
	f.Fuzz(func(t *testing.T, output []byte, cols, rows int) {
		text := check(t, string(output), cols, rows)
		// Text alone is shown as it is.
		for _, line := range strings.Split(text, "\n") {
			if again := check(t, line, 640, 10); len(line) < 640 && again != line {
				t.Fatalf("%q of %q shows %q", line, output, again)
			}
		}
	})
}

func BenchmarkPlain(b *testing.B) {
	for name, unit := range map[string]string{
		"log":      "2026-01-01T00:00:00Z \x1b[32mbuilding\x1b[0m package foo\r\n",
		"progress": "\rReceiving objects:  50% (500/1000), 1.00 MiB | 1.00 MiB/s",
	} {
		b.Run(name, func(b *testing.B) {
			output := []byte(strings.Repeat(unit, 1<<20/len(unit)))
			b.SetBytes(int64(len(output)))
			for b.Loop() {
				termtext.Plain(output, 120, 30)
			}
		})
	}
}
