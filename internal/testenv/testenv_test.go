package testenv_test

import (
	"os/exec"
	"runtime"
	"testing"

	"github.com/pyro-mcp/pyro/internal/testenv"
)

// recorder stands in for the test that lacks something.
type recorder struct {
	testing.TB
	verdict string
}

func (r *recorder) Helper() {}
func (r *recorder) Fatalf(string, ...any) {
	r.verdict = "failed"
	runtime.Goexit()
}
func (r *recorder) Skipf(string, ...any) {
	r.verdict = "skipped"
	runtime.Goexit()
}

func TestRequire(t *testing.T) {
	tests := []struct {
		name, list string
		ok         bool
		want       string
	}{
		{"present", "qemu", true, "ran"},
		{"absent", "", false, "skipped"},
		{"absent but required", "e2fsprogs,qemu", false, "failed"},
		{"absent and another required", "e2fsprogs, qemux", false, "skipped"},
		{"absent and all required", "all", false, "failed"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv(testenv.Variable, tt.list)
			r := &recorder{verdict: "ran"}
			done := make(chan struct{})
			go func() {
				defer close(done)
				testenv.Require(r, "qemu", tt.ok, "not here")
			}()
			<-done
			if r.verdict != tt.want {
				t.Errorf("the test %s, want it %s", r.verdict, tt.want)
			}
		})
	}
}

func TestRequireTools(t *testing.T) {
	if _, err := exec.LookPath("no-such-tool-anywhere"); err == nil {
		t.Fatal("the made-up tool exists")
	}
	t.Setenv(testenv.Variable, "")
	r := &recorder{verdict: "ran"}
	done := make(chan struct{})
	go func() {
		defer close(done)
		testenv.RequireTools(r, "tools", "no-such-tool-anywhere")
	}()
	<-done
	if r.verdict != "skipped" {
		t.Errorf("the test %s, want it skipped", r.verdict)
	}
}
