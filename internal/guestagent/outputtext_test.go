package guestagent

import (
	"bytes"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/pyro-mcp/pyro/internal/guestagent/ring"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func ringOf(t testing.TB, pieces ...[]byte) *ring.Ring {
	t.Helper()
	r, err := ring.New(&ring.Budget{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	for _, p := range pieces {
		if _, err := r.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// FuzzReadText reads any bytes in pieces of any size, half of them before the
// other half was written, and wants what a single look at all of it gives.
func FuzzReadText(f *testing.F) {
	f.Add([]byte("aé€😀"), uint8(1), uint8(5))
	f.Add([]byte("\xe2\x82"), uint8(1), uint8(1))
	f.Add([]byte("\xe2\x82\xf0\x9f\x98a\xff"), uint8(2), uint8(3))
	f.Fuzz(func(t *testing.T, data []byte, chars, split uint8) {
		half := min(int(split), len(data))
		r := ringOf(t, data[:half])
		var want strings.Builder
		for rest := data; len(rest) > 0; {
			c, n := utf8.DecodeRune(rest)
			want.WriteRune(c)
			rest = rest[n:]
		}
		var got strings.Builder
		cursor := int64(0)
		for step := 0; ; step++ {
			p := readText(r, cursor, int64(chars)+1)
			if p.at != cursor || p.missed != 0 || p.next < cursor || p.chars > int64(chars)+1 || int64(utf8.RuneCountInString(p.text)) != p.chars {
				t.Fatalf("read %+v from %d", p, cursor)
			}
			got.WriteString(p.text)
			cursor = p.next
			if p.chars > 0 {
				continue
			}
			_, _, ended := r.Bounds()
			if ended {
				break
			}
			if half < len(data) {
				_, _ = r.Write(data[half:])
				half = len(data)
			} else {
				r.End()
			}
		}
		if got.String() != want.String() || cursor != int64(len(data)) {
			t.Fatalf("read %q up to %d, want %q", got.String(), cursor, want.String())
		}
	})
}

// What is kept may begin in the middle of a character.
func TestReadTextAfterWhatWasMissed(t *testing.T) {
	const kept = ring.MinCapacity
	text := strings.Repeat("€", kept) // three bytes each
	r := ringOf(t, []byte(text))
	for _, chars := range []int64{1, 7, kept} {
		p := readText(r, 1, chars)
		start, _, _ := r.Bounds()
		if p.at < start || p.at > start+2 || p.missed != p.at-1 || p.text != strings.Repeat("€", int(min(chars, (int64(len(text))-p.at)/3))) {
			t.Errorf("%d characters: at %d, missed %d, %.20q", chars, p.at, p.missed, p.text)
		}
	}
}

// FuzzTail compares the search from the end with a split of all.
func FuzzTail(f *testing.F) {
	f.Add([]byte("a\nb\nc\n"), uint8(2))
	f.Add([]byte("a\nb\nc"), uint8(2))
	f.Add([]byte("\n\n\n"), uint8(1))
	f.Add([]byte(""), uint8(1))
	f.Fuzz(func(t *testing.T, data []byte, lines uint8) {
		// Long lines cross the chunks that the search reads.
		data = bytes.ReplaceAll(data, []byte("L"), bytes.Repeat([]byte("l"), outputChunk))
		if len(data) > ring.MinCapacity {
			data = data[:ring.MinCapacity]
		}
		r := ringOf(t, data)
		all := bytes.SplitAfter(data, []byte("\n"))
		if last := len(all) - 1; len(all[last]) == 0 {
			all = all[:last]
		}
		n := int64(lines)
		want := string(bytes.Join(all[max(0, len(all)-int(n)):], nil))
		got, cut := findTail(r, &n).text(r)
		if got != strings.ToValidUTF8(want, "\uFFFD") || cut {
			t.Fatalf("the last %d lines of %.100q are %.100q, want %.100q (cut %v)", n, data, got, want, cut)
		}
	})
}

func TestTailText(t *testing.T) {
	long := bytes.Repeat([]byte("line of text\n"), 100_000)
	r, err := ring.New(ring.NewBudget())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	_, _ = r.Write(long)
	got, cut := findTail(r, nil).text(r)
	if !cut || len(got) != guestproto.MaxPlainOutput || !strings.HasSuffix(string(long), got) {
		t.Errorf("%d bytes, cut %v", len(got), cut)
	}
	// Replaced bytes make it longer, and it is still bounded.
	bad := ringOf(t, bytes.Repeat([]byte("\xffa"), ring.MinCapacity))
	got, _ = findTail(bad, nil).text(bad)
	if len(got) > guestproto.MaxPlainOutput || !utf8.ValidString(got) || !strings.HasSuffix(got, "\uFFFDa") {
		t.Errorf("%d bytes, %q", len(got), got[:20])
	}
}
