package process

import (
	"os"
	"os/exec"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseStat(t *testing.T) {
	const rest = " S 10 20 30 34816 40 4194304 1 2 3 4 5 6 7 8 20 0 1 0 777 1000 2000"
	want := entry{pid: 5, parent: 10, group: 20, session: 30, started: 777, state: 'S'}
	tests := []struct {
		name, stat string
		ok         bool
	}{
		{"plain", "5 (sh)" + rest, true},
		{"blanks", "5 (a b c)" + rest, true},
		{"parentheses", "5 (x) R 1 1 1 1)" + rest, true},
		{"newline", "5 (a\nb)" + rest, true},
		{"cut", "5 (sh) S 10 20", false},
		{"empty", "", false},
		{"no number", "5 (sh) S x 20 30 34816 40 4194304 1 2 3 4 5 6 7 8 20 0 1 0 777 1000", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := parseStat(5, tt.stat)
			if ok != tt.ok {
				t.Fatalf("ok is %v", ok)
			}
			if ok {
				if d := cmp.Diff(want, got, cmp.AllowUnexported(entry{})); d != "" {
					t.Error(d)
				}
			}
		})
	}
}

func TestReadEntry(t *testing.T) {
	e, ok := readEntry(os.Getpid())
	if !ok || e.parent != os.Getppid() || e.dead() || e.started == 0 {
		t.Errorf("this process is %+v, %v", e, ok)
	}
}

func TestHasEnviron(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "MARK=abc", "LAST=x"}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	for variable, want := range map[string]bool{"MARK=abc": true, "LAST=x": true, "MARK=ab": false, "ARK=abc": false, "MARK=abcd": false} {
		if got := hasEnviron(cmd.Process.Pid, variable); got != want {
			t.Errorf("%s: %v", variable, got)
		}
	}
}

// TestSignalEntry spares a process that has another's number.
func TestSignalEntry(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	e, ok := readEntry(cmd.Process.Pid)
	if !ok {
		t.Fatal("the process is not there")
	}
	other := e
	other.started--
	signalEntry(other, 9)
	if now, ok := readEntry(e.pid); !ok || now.dead() {
		t.Error("a stranger was killed")
	}
	signalEntry(e, 9)
	_ = cmd.Wait()
	if cmd.ProcessState.String() != "signal: killed" {
		t.Errorf("the process ended with %s", cmd.ProcessState)
	}
}
