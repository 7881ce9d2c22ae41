package workspace

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRecorderKeepsBothEnds(t *testing.T) {
	const kept = 2 * keptHalf
	for _, test := range []struct {
		name   string
		writes []string
		want   string
	}{
		{"Nothing", nil, ""},
		{"Short", []string{"a", "b\n"}, "ab\n"},
		{"AsMuchAsIsKept", []string{strings.Repeat("x", kept)}, strings.Repeat("x", kept)},
		{"OneTooMany", []string{strings.Repeat("x", kept), "y"},
			strings.Repeat("x", keptHalf) + "\n[pyro: 1 bytes left out]\n" + strings.Repeat("x", keptHalf-1) + "y"},
		{"LastWriteIsLong", []string{"head", strings.Repeat("m", 3*kept) + "tail"},
			"head" + strings.Repeat("m", keptHalf-4) + fmt.Sprintf("\n[pyro: %d bytes left out]\n", 2*kept+8) + strings.Repeat("m", keptHalf-4) + "tail"},
		{"CharacterCutByTheHead", []string{strings.Repeat("x", keptHalf-1) + "\u20ac", strings.Repeat("y", kept)},
			strings.Repeat("x", keptHalf-1) + fmt.Sprintf("\n[pyro: %d bytes left out]\n", keptHalf+2) + strings.Repeat("y", keptHalf)},
		{"CharacterCutByTheTail", []string{strings.Repeat("x", kept), "\u20ac" + strings.Repeat("y", keptHalf-1)},
			strings.Repeat("x", keptHalf) + fmt.Sprintf("\n[pyro: %d bytes left out]\n", keptHalf+2) + strings.Repeat("y", keptHalf-1)},
		{"NoUTF8", []string{"a\xffb"}, "a\uFFFDb"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "1.stdout")
			r := recorder{file: &journalFile{path: path}}
			total := 0
			for _, w := range test.writes {
				if n, err := r.Write([]byte(w)); n != len(w) || err != nil {
					t.Fatalf("Write = %d, %v", n, err)
				}
				total += len(w)
			}
			if err := r.finish(); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, r.String()); diff != "" {
				t.Errorf("kept (-want +got):\n%.500s", diff)
			}
			if r.n != int64(total) || r.truncated() != (total > kept) {
				t.Errorf("n = %d, truncated = %t after %d bytes", r.n, r.truncated(), total)
			}
			stored, err := os.ReadFile(path)
			if total == 0 {
				if err == nil {
					t.Error("a file for no output")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			mark, _ := r.end()
			if want := min(total, kept) + len(mark); len(stored) != want {
				t.Errorf("the file has %d bytes, want %d", len(stored), want)
			}
		})
	}
}
func TestCommandTextIsReadBack(t *testing.T) {
	for name, argv := range map[string][]string{
		"plain":   {"git", "--version"},
		"spaces":  {"printf", "a b", ""},
		"quotes":  {"printf", `it's`, `"x"`, "$HOME", "`id`"},
		"newline": {"printf", "a\nb", "*", "~"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := exec.Command("sh", "-c", `printf '<%s>' `+commandText(argv)).Output()
			if err != nil {
				t.Fatal(err)
			}
			if want := "<" + strings.Join(argv, "><") + ">"; string(out) != want {
				t.Errorf("%s is read as %q, want %q", commandText(argv), out, want)
			}
		})
	}
	if got := commandText([]string{"echo a | wc"}); got != "echo a | wc" {
		t.Errorf("a single word, which is a shell command already, becomes %q", got)
	}
}
