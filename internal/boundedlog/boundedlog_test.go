package boundedlog_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

func TestFileKeepsTheNewestWithinItsBound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	const bound = 10_000
	l, err := boundedlog.Open(path, bound)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var all bytes.Buffer
	for i := range 5000 {
		line := fmt.Sprintf("line %d\n", i)
		all.WriteString(line)
		if n, err := l.Write([]byte(line)); n != len(line) || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
	}
	old, err := os.ReadFile(path + ".1")
	if err != nil {
		t.Fatal(err)
	}
	now, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	kept := append(old, now...)
	if len(kept) > bound {
		t.Errorf("%d bytes on disk, bound %d", len(kept), bound)
	}
	if !bytes.HasSuffix(all.Bytes(), kept) || len(kept) < bound/2 {
		t.Errorf("what is kept (%d bytes) is not the end of what was written", len(kept))
	}
}

func TestOneWriteLargerThanTheBound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := boundedlog.Open(path, 1000)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	big := bytes.Repeat([]byte("x"), 100_000)
	if _, err := l.Write(append(big, "\nlast words\n"...)); err != nil {
		t.Fatal(err)
	}
	var total int64
	for _, p := range []string{path, path + ".1"} {
		if st, err := os.Stat(p); err == nil {
			total += st.Size()
		}
	}
	if total > 1000 {
		t.Errorf("%d bytes on disk", total)
	}
	if got := l.Tail(1); !cmp.Equal(got, []string{"last words"}) {
		t.Errorf("Tail(1) = %q", got)
	}
}

func TestTailIsPrintable(t *testing.T) {
	l, err := boundedlog.Open(filepath.Join(t.TempDir(), "log"), 1000)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	fmt.Fprint(l, "one\r\n\n\x1b[31mtwo\x1b[0m\nthr\x07ee "+strings.Repeat("é", 300)+"\n")
	want := []string{"two", "three " + strings.Repeat("é", 194) + "…"}
	if diff := cmp.Diff(want, l.Tail(2)); diff != "" {
		t.Error(diff)
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"plain\ttext":                 "plain\ttext",
		"\x1b]52;c;ZXZpbA==\x07after": "after",
		"\x1b]0;title\x1b\\after":     "after",
		"\x1b[2Jgone":                 "gone",
		"\x1bcreset":                  "reset",
		"c1 \u009b31m":                "c1 31m",
		"bad \xff byte":               "bad \uFFFD byte",
		"cut \x1b[":                   "cut ",
		"cut \x1b":                    "cut ",
	} {
		if got := boundedlog.Printable(in); got != want {
			t.Errorf("Printable(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzPrintable(f *testing.F) {
	f.Add("a\x1b[31mb")
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range boundedlog.Printable(s) {
			if r != '\t' && (r < 0x20 || r >= 0x7f && r <= 0x9f) {
				t.Fatalf("Printable(%q) lets %U through", s, r)
			}
		}
	})
}
