package termtext_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/internal/termtext"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// tmux is a server of its own, which shows outputs one after the other.
type tmux struct {
	dir    string
	socket string
	shown  int
}

func startTmux(t *testing.T) *tmux {
	testenv.RequireTools(t, "tmux", "tmux", "stty")
	dir := t.TempDir()
	m := &tmux{dir: dir, socket: filepath.Join(dir, "s")}
	config := "set -g status off\nset -g history-limit 100000\nset -g default-shell /bin/sh\n"
	if err := os.WriteFile(m.dir+"/conf", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	m.run(t, "new-session", "-d", "exec cat >/dev/null")
	t.Cleanup(func() { m.run(t, "kill-server") })
	return m
}

func (m *tmux) run(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "tmux", append([]string{"-u", "-S", m.socket, "-f", m.dir + "/conf"}, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "TMUX=", "TERM=xterm")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("tmux %q: %v\n%s", args, err, out)
	}
	return string(out)
}

// show returns what a person reads in tmux.
func (m *tmux) show(t *testing.T, output string, cols, rows int) string {
	t.Helper()
	m.shown++
	file := filepath.Join(m.dir, fmt.Sprint("output", m.shown))
	if err := os.WriteFile(file, []byte(output), 0o600); err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprint("case", m.shown)
	// After the output comes a question (CSI 5 n), which the terminal answers with
	// four characters when it has shown all before it.
	script := fmt.Sprintf(`stty raw -echo; cat %s; printf '\030\033[5n'; head -c 4 >/dev/null; tmux -S %s wait-for -S %s; exec cat >/dev/null`,
		file, m.socket, name)
	m.run(t, "new-session", "-d", "-s", name, "-x", fmt.Sprint(cols), "-y", fmt.Sprint(rows), script)
	m.run(t, "wait-for", name)
	text := m.run(t, "capture-pane", "-p", "-J", "-S", "-", "-t", name)
	m.run(t, "kill-session", "-t", name)
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.TrimRight(strings.Join(lines, "\n"), "\n")
}

// TestLikeTmux has a real terminal as the judge.
func TestLikeTmux(t *testing.T) {
	t.Parallel()
	m := startTmux(t)
	for _, tt := range tests {
		if tt.unlikeTmux != "" {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(m.show(t, tt.output, tt.cols, tt.rows), termtext.Plain([]byte(tt.output), tt.cols, tt.rows)); diff != "" {
				t.Errorf("%q (-tmux +Plain):\n%s", tt.output, diff)
			}
		})
	}
}

// TestRandomLikeTmux shows both what no program would print.
func TestRandomLikeTmux(t *testing.T) {
	t.Parallel()
	m := startTmux(t)
	r := rand.New(rand.NewPCG(7, 8))
	outputs := 40
	if testenv.Wanted("tmux") {
		outputs = 400
	}
	for i := range outputs {
		cols, rows := 20+r.IntN(40), 4+r.IntN(10)
		output := randomOutput(r, cols, rows, i%2 == 0)
		got, want := termtext.Plain([]byte(output), cols, rows), m.show(t, output, cols, rows)
		if i%2 == 0 {
			got, want = strings.Join(strings.Fields(got), ""), strings.Join(strings.Fields(want), "")
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("%dx%d, %q (-tmux +Plain):\n%s", cols, rows, output, diff)
		}
	}
}

// randomOutput leaves out where tmux is no judge: sequences in the last column;
// wide characters, which it keeps when they lose a half; scrolling below the
// first row, which it keeps and others do not; rows in and out below the bottom
// margin, which others refuse; and CSI 2 J, where it keeps erased rows below the
// text. Where lines wrap, a part of one that is erased, overwritten or moved ends
// it sooner here than in tmux, so only the characters of these outputs count.
func randomOutput(r *rand.Rand, cols, rows int, wrapping bool) string {
	var b strings.Builder
	for range 5 + r.IntN(60) {
		n, col, row := 1+r.IntN(6), 1+r.IntN(cols), 1+r.IntN(rows)
		switch r.IntN(24) {
		case 0, 1, 2, 3:
			if !wrapping {
				b.WriteString("\r")
			}
			b.WriteString(strings.Repeat(string(rune('a'+r.IntN(26))), 1+r.IntN(cols)))
			b.WriteString("\r\n")
		case 4, 5:
			b.WriteString("\r\n")
		case 6:
			fmt.Fprintf(&b, "\re\u0301%dé\r\n", n)
		case 7:
			fmt.Fprintf(&b, "\x1b[%d;%dH", row, col)
		case 8:
			fmt.Fprintf(&b, "\r\x1b[%d%c", n, "ABCD"[r.IntN(4)])
		case 9:
			fmt.Fprintf(&b, "\r\x1b[%dC\x1b[%dP", n, n)
		case 10:
			fmt.Fprintf(&b, "\r\x1b[%dC\x1b[%d@", n, n)
		case 11:
			fmt.Fprintf(&b, "\r\x1b[%dC\x1b[%dX", n, n)
		case 12:
			fmt.Fprintf(&b, "\x1b[r\x1b[%d;1H\x1b[%dL", row, n)
		case 13:
			fmt.Fprintf(&b, "\x1b[r\x1b[%d;1H\x1b[%dM", row, n)
		case 14:
			fmt.Fprintf(&b, "\r\x1b[%dC\x1b[%dK", n, r.IntN(2))
		case 15:
			fmt.Fprintf(&b, "\x1b[%d;%dH\x1b[%dJ", row, 1+n, r.IntN(2))
		case 16:
			fmt.Fprintf(&b, "\r%s%s", strings.Repeat("\t", r.IntN(3)), "tab")
		case 17:
			fmt.Fprintf(&b, "\r\x1b[%dmred\x1b[0m\b\b%d", 30+n, n)
		case 18, 19:
			b.WriteString("\x1b7\r\x1b8")
		case 20:
			fmt.Fprintf(&b, "\x1b[1;%dr", 2+r.IntN(rows-1))
		case 21:
			b.WriteString("\x1b[r")
		case 22:
			fmt.Fprintf(&b, "\x1b[%dG", col)
		case 23:
			if wrapping {
				b.WriteString("\rlong " + strings.Repeat("line ", n*4))
			}
		}
	}
	return b.String()
}
