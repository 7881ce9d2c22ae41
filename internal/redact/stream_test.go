package redact_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/internal/redact"
)

// written is what comes out of a Writer that is given pieces.
func written(t *testing.T, set *redact.Set, pieces ...string) string {
	t.Helper()
	var out strings.Builder
	w := set.Writer(&out)
	for _, p := range pieces {
		if n, err := w.Write([]byte(p)); n != len(p) || err != nil {
			t.Fatalf("Write(%q) = %d, %v", p, n, err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestWriterSplitAnywhere(t *testing.T) {
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := redact.New(tt.values...)
			for i := range len(tt.text) + 1 {
				for j := i; j <= len(tt.text); j++ {
					if got := written(t, set, tt.text[:i], tt.text[i:j], tt.text[j:]); got != tt.want {
						t.Fatalf("%q, %q, %q give %q, want %q", tt.text[:i], tt.text[i:j], tt.text[j:], got, tt.want)
					}
				}
			}
			if got := written(t, set, strings.Split(tt.text, "")...); got != tt.want {
				t.Errorf("single bytes give %q, want %q", got, tt.want)
			}
		})
	}
}

// cut cuts text into up to six pieces, some of them empty.
func cut(r *rand.Rand, text string) []string {
	var pieces []string
	for range r.IntN(6) {
		n := r.IntN(len(text) + 1)
		pieces, text = append(pieces, text[:n]), text[n:]
	}
	return append(pieces, text)
}

func TestWriterEqualsNaive(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 20000 {
		values, text := random(r)
		pieces := cut(r, text)
		if got, want := written(t, redact.New(values...), pieces...), naive(text, values); got != want {
			t.Fatalf("values %q, pieces %q give %q, want %q", values, pieces, got, want)
		}
	}
}

// A long Write is looked at in pieces; the value lies on each border.
func TestWriterLongWrite(t *testing.T) {
	set := redact.New("hunter2hunter2")
	for n := 32<<10 - 16; n <= 32<<10+1; n++ {
		text := strings.Repeat("x", n) + "hunter2hunter2" + strings.Repeat("y", 40<<10)
		if got, want := written(t, set, text), strings.Replace(text, "hunter2hunter2", redact.Mark, 1); got != want {
			t.Fatalf("a value at offset %d remains", n)
		}
	}
}

// A person at a terminal sees what was typed, but for the beginning of a value.
func TestWriterHoldsBackOnlyBeginnings(t *testing.T) {
	var out strings.Builder
	w := redact.New("hunter2hunter2", "hunter2hunter2-and-more", "terribly secret").Writer(&out)
	for _, step := range []struct{ write, out string }{
		{"$ ", "$ "},
		{"echo h", "$ echo "},
		{"u", "$ echo "},
		{"s", "$ echo hus"},
		{"hunter", "$ echo hus"}, // "ter" begins a value as well
		{"rib", "$ echo hushun"},
		{"hunter2", "$ echo hushunterrib"},
		{"hunter2", "$ echo hushunterrib[REDACTED]"}, // a longer one has the same mark
		{"-and-more", "$ echo hushunterrib[REDACTED]"},
		{"!", "$ echo hushunterrib[REDACTED]!"},
	} {
		if _, err := io.WriteString(w, step.write); err != nil {
			t.Fatal(err)
		}
		if got := out.String(); got != step.out {
			t.Fatalf("after %q there is %q, want %q", step.write, got, step.out)
		}
	}
}

func TestWriterFlush(t *testing.T) {
	var out strings.Builder
	w := redact.New("hunter2hunter2").Writer(&out)
	for _, step := range []struct{ write, out string }{
		{"a hunter", "a hunter"},
		{"2hunter2", "a hunter2hunter2"}, // promised: the rest is not recognised
		{" hunter2hunter2", "a hunter2hunter2 [REDACTED]"},
	} {
		if _, err := io.WriteString(w, step.write); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			if got := out.String(); got != step.out {
				t.Fatalf("after %q and Flush there is %q, want %q", step.write, got, step.out)
			}
		}
	}
}

// brokenWriter takes some writes and then fails.
type brokenWriter struct {
	left int
	err  error
	got  bytes.Buffer
}

func (b *brokenWriter) Write(p []byte) (int, error) {
	if b.left == 0 {
		return 0, b.err
	}
	b.left--
	return b.got.Write(p)
}

func TestWriterKeepsTheError(t *testing.T) {
	for name, set := range map[string]*redact.Set{"empty set": nil, "set": redact.New("hunter2hunter2")} {
		t.Run(name, func(t *testing.T) {
			broken := &brokenWriter{left: 1, err: errors.New("pipe is gone")}
			w := set.Writer(broken)
			if _, err := io.WriteString(w, "first"); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if n, err := io.WriteString(w, "second"); n != 0 || !errors.Is(err, broken.err) {
					t.Errorf("Write = %d, %v", n, err)
				}
				broken.left = 1 // that it works again comes too late: bytes are missing
			}
			if err := w.Flush(); !errors.Is(err, broken.err) {
				t.Errorf("Flush = %v", err)
			}
			if got := broken.got.String(); got != "first" {
				t.Errorf("%q was written", got)
			}
		})
	}
}

// read reads text by cursor, in chunks of the sizes that next gives, and
// returns the pieces. It fails if a chunk with room for the longest value
// brings nothing, or more is left out than may be.
func read(t testing.TB, set *redact.Set, text string, next func() int) []string {
	t.Helper()
	var out []string
	for cursor, size := 0, 0; cursor < len(text); {
		size += next()
		end := min(cursor+size, len(text))
		before := text[max(0, cursor-set.Overlap()):cursor]
		clean, used := set.Window([]byte(before), []byte(text[cursor:end]), end == len(text))
		if left := end - cursor - used; used < 0 || left < 0 || left > set.Overlap() || (end == len(text) && left != 0) {
			t.Fatalf("%q after %q: %d used", text[cursor:end], before, used)
		}
		if used > 0 {
			out = append(out, string(clean))
			size = 0
		}
		cursor += used
	}
	return out
}

func TestWindowSplitAnywhere(t *testing.T) {
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			set := redact.New(tt.values...)
			for n := 1; n <= len(tt.text)+1; n++ {
				pieces := read(t, set, tt.text, func() int { return n })
				got, want := strings.Join(pieces, ""), tt.want
				if strings.HasPrefix(tt.name, "overlapping") { // a mark in each piece
					got = strings.ReplaceAll(got, redact.Mark+redact.Mark, redact.Mark)
				}
				if got != want {
					t.Errorf("chunks of %d give %q, want %q", n, pieces, want)
				}
			}
		})
	}
}

func TestWindowEqualsNaive(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 20000 {
		values, text := random(r)
		pieces := read(t, redact.New(values...), text, func() int { return 1 + r.IntN(20) })
		// Marks of overlapping values may be more, but the rest is the same.
		got := strings.ReplaceAll(strings.Join(pieces, ""), redact.Mark, "")
		if want := strings.ReplaceAll(naive(text, values), redact.Mark, ""); got != want {
			t.Fatalf("values %q: %q gives %q, want %q", values, text, pieces, want)
		}
	}
}

func TestWindow(t *testing.T) {
	values := []string{"hunter2hunter2", "terribly secret"}
	for _, tt := range []struct {
		name, before, chunk string
		final               bool
		clean               string
		used                int
	}{
		{"nothing", "", "", false, "", 0},
		{"plain", "abc", "def", false, "def", 3},
		{"value that began before", "xhunter2", "hunter2x", false, "[REDACTED]x", 8},
		{"value that ended before", "hunter2hunter2", "x", false, "x", 1},
		{"value at the end", "", "hunter2hunter2", false, "[REDACTED]", 14},
		{"beginning at the end", "", "see hunter2hunt", false, "see ", 4},
		{"beginning at the end, final", "", "see hunter2hunt", true, "see hunter2hunt", 15},
		{"nothing but a beginning", "", "hunter2hunt", false, "", 0},
		{"beginning in before", "hunter2", "hunt", false, "", 0},
		{"beginning in before, final", "hunter2", "hunt", true, "hunt", 4},
		{"no beginning any more", "hunter2", "huntex", false, "huntex", 6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			clean, used := redact.New(values...).Window([]byte(tt.before), []byte(tt.chunk), tt.final)
			if string(clean) != tt.clean || used != tt.used {
				t.Errorf("Window = %q, %d, want %q, %d", clean, used, tt.clean, tt.used)
			}
		})
	}
	t.Run("empty set", func(t *testing.T) {
		chunk := []byte("text")
		clean, used := (*redact.Set)(nil).Window(nil, chunk, false)
		chunk[0] = 'x'
		if string(clean) != "text" || used != 4 {
			t.Errorf("Window = %q, %d", clean, used)
		}
	})
}

func FuzzRedact(f *testing.F) {
	for _, tt := range tests {
		f.Add(strings.Join(tt.values, "|"), tt.text, uint16(3), uint16(9))
	}
	f.Fuzz(func(t *testing.T, joined, text string, i, j uint16) {
		if len(joined) > 200 || len(text) > 2000 {
			return
		}
		values := strings.FieldsFunc(joined, func(r rune) bool { return r == '|' || r == '\r' || r == '\n' })
		set, want := redact.New(values...), naive(text, values)
		if got := set.String(text); got != want {
			t.Fatalf("values %q: String(%q) = %q, want %q", values, text, got, want)
		}
		a := min(int(i), len(text))
		b := min(a+int(j), len(text))
		if got := written(t, set, text[:a], text[a:b], text[b:]); got != want {
			t.Fatalf("values %q, %q, %q, %q give %q, want %q", values, text[:a], text[a:b], text[b:], got, want)
		}
		pieces := read(t, set, text, func() int { return 1 + a })
		if strings.Contains(want, redact.Mark) != strings.Contains(strings.Join(pieces, ""), redact.Mark) {
			t.Fatalf("values %q, %q gives %q, want %q", values, text, pieces, want)
		}
	})
}

// The time is linear also for a value whose beginning the text repeats.
func BenchmarkWriter(b *testing.B) {
	for name, unit := range map[string]string{"log": "2026-01-01T00:00:00Z building package foo\n", "beginnings": strings.Repeat("a", 999) + "c"} {
		b.Run(name, func(b *testing.B) {
			text := []byte(strings.Repeat(unit, 1<<20/len(unit)))
			w := redact.New(strings.Repeat("a", 1000)+"b", "ghp_0123456789abcdef", "2026 is over").Writer(io.Discard)
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				_, _ = w.Write(text)
			}
		})
	}
}
