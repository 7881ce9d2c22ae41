package faults_test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// victims are the processes of a machine that a test kills.
func (l *lab) victims(name string) map[string]hostproc.Identity {
	l.Helper()
	_, rec := l.machineOf(name)
	out := map[string]hostproc.Identity{"supervisor": *rec.Supervisor}
	for i, id := range rec.Processes {
		if id.Alive() {
			out[fmt.Sprintf("process %d", i)] = id
		}
	}
	return out
}

// activities are what a machine may be doing when one of its processes is killed.
// Each starts a command and returns when that has begun; nil means idle.
var activities = map[string]func(l *lab) *exec.Cmd{
	"idle": func(*lab) *exec.Cmd { return nil },
	"exec": func(l *lab) *exec.Cmd {
		cmd := l.command("workspace", "exec", "w", "--timeout-seconds", "600", "--", "echo begun; sleep 776655")
		out, err := cmd.StdoutPipe()
		if err != nil {
			l.Fatal(err)
		}
		l.begin(cmd)
		if _, err := io.ReadFull(out, make([]byte, len("begun\n"))); err != nil {
			l.Fatalf("the command did not begin: %v", err)
		}
		return cmd
	},
	"sync": func(l *lab) *exec.Cmd {
		// A pipe in the place of an archive: the sync lasts as long as we like.
		fifo := filepath.Join(l.dir, "fifo")
		_ = os.Remove(fifo)
		cmd := l.command("workspace", "sync", "push", "w", l.bigTree(), "--dest", "/workspace/pushed")
		l.begin(cmd)
		l.eventually(within(30*time.Second), "the sync is in the guest", func() bool {
			res := l.run("workspace", "exec", "w", "--quiet", "--", "ls -A /workspace | grep -v -e kept -e seeded -e sub")
			return res.code == 0 || processEnded(cmd)
		})
		return cmd
	},
	"export": func(l *lab) *exec.Cmd {
		cmd := l.command("workspace", "export", "w", "/workspace", "--output", filepath.Join(l.dir, "out"))
		l.begin(cmd)
		l.eventually(within(30*time.Second), "the export has begun", func() bool {
			stages, _ := filepath.Glob(filepath.Join(l.dir, ".pyro-export-*", "tree", "*"))
			return len(stages) > 0 || processEnded(cmd)
		})
		return cmd
	},
}

// begin starts cmd, and ends it with the test.
func (l *lab) begin(cmd *exec.Cmd) {
	l.Helper()
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { _ = cmd.Process.Kill() })
}

// processEnded looks whether a command has ended, without reaping it.
func processEnded(cmd *exec.Cmd) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
	return err != nil || strings.Contains(string(b), ") Z ")
}

// bigTree makes a directory that takes a moment to copy.
func (l *lab) bigTree() string {
	l.Helper()
	dir := filepath.Join(l.dir, "big")
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		l.Fatal(err)
	}
	for i := range 200 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), make([]byte, 1<<20), 0o644); err != nil {
			l.Fatal(err)
		}
	}
	return dir
}

// TestKill kills each process of a machine, whatever the machine is doing.
func TestKill(t *testing.T) {
	for activity, begin := range activities {
		t.Run(activity, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.create("w")
			l.exec("w", "echo acknowledged > kept; sync")
			if activity == "export" {
				l.exec("w", "dd if=/dev/zero of=big bs=1M count=200 2>/dev/null; sync")
			}
			for name := range l.victims("w") {
				t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
					here := *l
					here.T = t
					here.killDuring(activity, begin, name)
				})
			}
		})
	}
}

func (l *lab) killDuring(activity string, begin func(*lab) *exec.Cmd, victim string) {
	id, ok := l.victims("w")[victim]
	if !ok {
		l.Skip("this run of the machine has no such process")
	}
	cmd := begin(l)
	killed := time.Now()
	if err := id.Kill(syscall.SIGKILL); err != nil {
		l.Fatal(err)
	}
	if cmd != nil {
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			took := time.Since(killed)
			stderr := cmd.Stderr.(*strings.Builder).String()
			if took > within(3*time.Second) {
				l.Errorf("%s: the command took %v to notice", activity, took)
			}
			if activity == "exec" && (err == nil || cmd.ProcessState.ExitCode() != 125 || !strings.Contains(stderr, "stopped meanwhile: ") || !strings.Contains(stderr, "hint:")) {
				l.Errorf("%s: %v, %q", activity, err, stderr)
			}
		case <-time.After(within(30 * time.Second)):
			l.Fatalf("%s does not end", activity)
		}
	}
	l.eventually(within(5*time.Second), "the workspace is stopped", func() bool { return l.status("w").State == api.StateStopped })
	if ws := l.status("w"); ws.LastError == nil || *ws.LastError == "" {
		l.Errorf("nothing says why the workspace is stopped: %+v", ws)
	}
	for _, pattern := range []string{".pyro-export-*", "out"} {
		if left, _ := filepath.Glob(filepath.Join(l.dir, pattern)); len(left) > 0 && activity == "export" && cmd.ProcessState.ExitCode() != 0 {
			l.Errorf("a broken export left %q", left)
		}
	}
	os.RemoveAll(filepath.Join(l.dir, "out"))
	l.check()
	kept(l)
	if got := l.exec("w", "ls -A | grep -v -e kept -e seeded -e sub -e big -e pushed || true"); got != "" {
		l.Errorf("left in the workspace: %q", got)
	}
	if activity == "sync" {
		if got := l.exec("w", "ls pushed 2>/dev/null | wc -l"); got != "0\n" && got != "200\n" {
			l.Errorf("half a sync appeared: %s files", got)
		}
		l.exec("w", "rm -rf pushed")
	}
	l.check()
}

// TestStop stops machines that do not answer.
func TestStopFrozen(t *testing.T) {
	thoroughOnly(t)
	l := newLab(t)
	l.create("w")
	l.exec("w", "echo acknowledged > kept; sync")
	for name := range l.victims("w") {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			here := *l
			here.T = t
			id, ok := here.victims("w")[name]
			if !ok {
				t.Skip("this run of the machine has no such process")
			}
			if err := id.Kill(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			if began := time.Now(); here.status("w") == nil || time.Since(began) > 2*time.Second {
				t.Errorf("status of a frozen machine took %v", time.Since(began))
			}
			// Not every process of a sandbox has a part in a command.
			needed := name == "supervisor" || engineName() == "qemu"
			if res := here.run("workspace", "exec", "w", "--timeout-seconds", "1", "--", "true"); needed && res.code == 0 || res.took > within(40*time.Second) {
				t.Errorf("a command in a frozen machine: %s", res)
			}
			if res := here.run("workspace", "stop", "w"); res.code != 0 || res.took > within(15*time.Second) {
				t.Errorf("stopping it: %s", res)
			}
			if id.Alive() {
				t.Error("the frozen process outlived the stop")
			}
			here.check()
			kept(&here)
		})
	}
}
