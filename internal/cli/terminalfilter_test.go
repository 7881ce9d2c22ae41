package cli

import (
	"bytes"
	"strings"
	"testing"
)

func filtered(t testing.TB, chunks ...string) string {
	t.Helper()
	var out bytes.Buffer
	f := &terminalFilter{to: &out}
	for _, c := range chunks {
		if n, err := f.Write([]byte(c)); n != len(c) || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
	}
	return out.String()
}

func TestTerminalFilter(t *testing.T) {
	for _, test := range []struct{ name, in, want string }{
		{"Text", "a\tb\r\nc\b", "a\tb\r\nc\b"},
		{"Colour", "\x1b[1;31mred\x1b[0m", "\x1b[1;31mred\x1b[0m"},
		{"Colon", "\x1b[38:5:1mx", "\x1b[38:5:1mx"},
		{"ClearScreen", "a\x1b[2Jb", "ab"},
		{"Cursor", "a\x1b[10;10Hb", "ab"},
		{"PrivateMode", "a\x1b[?1049hb", "ab"},
		{"PrivateEndingInM", "a\x1b[>4mb", "ab"},
		{"ClipboardBEL", "a\x1b]52;c;ZXZpbA==\x07b", "ab"},
		{"TitleST", "a\x1b]0;title\x1b\\b", "ab"},
		{"DeviceControl", "a\x1bP$q\"p\x1b\\b", "ab"},
		{"Reset", "a\x1bcb", "ab"},
		{"Charset", "a\x1b(0b", "ab"},
		{"BellAndOthers", "a\x07\x00\x7f\x0eb", "ab"},
		{"C1CSI", "a\u009b2Jb", "a2Jb"},
		{"RawC1", "a\x9bb", "ab"},
		{"Letters", "é € 日本 🙂 Â\u00a0", "é € 日本 🙂 Â\u00a0"},
		{"LongColour", "a\x1b[" + strings.Repeat("1;", 200) + "mb", "ab"},
		{"EscapeInSequence", "a\x1b[1\x1b[31mb", "a\x1b[31mb"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := filtered(t, test.in); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
			var bytewise []string
			for i := range len(test.in) {
				bytewise = append(bytewise, test.in[i:i+1])
			}
			if got := filtered(t, bytewise...); got != test.want {
				t.Errorf("byte by byte: got %q, want %q", got, test.want)
			}
		})
	}
}

func FuzzTerminalFilter(f *testing.F) {
	f.Add([]byte("a\x1b[31mb\x1b]0;x\x07\xc2\x9b"))
	f.Fuzz(func(t *testing.T, in []byte) {
		out := filtered(t, string(in))
		for i := 0; i < len(out); i++ {
			switch b := out[i]; {
			case b == 0x1b:
				end := strings.IndexByte(out[i:], 'm')
				if end < 2 || out[i+1] != '[' || strings.Trim(out[i+2:i+end], "0123456789;:") != "" {
					t.Fatalf("%q lets an escape through: %q", in, out)
				}
			case b < 0x20 && !strings.ContainsRune("\n\t\r\b", rune(b)), b == 0x7f:
				t.Fatalf("%q lets %#x through", in, b)
			case b == 0xc2 && i+1 < len(out) && out[i+1] < 0xa0:
				t.Fatalf("%q lets a C1 control through", in)
			}
		}
	})
}
