package workspace

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

// The text of a command is what a shell reads as the same words.
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

func TestCaptureIsBounded(t *testing.T) {
	var c capture
	for range 3 {
		if n, err := c.Write(bytes.Repeat([]byte("é"), maxCapture/4)); n != maxCapture/2 || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
	}
	if len(c.String()) != maxCapture || !c.truncated {
		t.Errorf("kept %d bytes, truncated %v", len(c.String()), c.truncated)
	}
	// A character that the bound cuts in two is left out; a wrong byte is shown.
	c = capture{}
	_, _ = c.Write(append(bytes.Repeat([]byte("x"), maxCapture-1), "éy"...))
	if got := c.String(); len(got) != maxCapture-1 || strings.Contains(got, "\uFFFD") {
		t.Errorf("%d bytes, ending in %q", len(got), got[len(got)-3:])
	}
	c = capture{}
	_, _ = c.Write([]byte("a\xffb"))
	if got := c.String(); got != "a\uFFFDb" || c.truncated {
		t.Errorf("got %q", got)
	}
	var out bytes.Buffer
	c = capture{to: &out}
	_, _ = c.Write([]byte("live"))
	if out.String() != "live" || c.String() != "" {
		t.Errorf("passed on %q, kept %q", out.String(), c.String())
	}
}
