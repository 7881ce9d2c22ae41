package faults_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/failpoint"
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

// An activity is what a machine may be doing when one of its processes is killed.
// The zero activity is none.
type activity struct {
	// point is where the command args, or the supervisor if supervised is set,
	// is halted, so that it is in the middle of its work.
	point      string
	supervised bool
	// memory says that the engine must be able to save a machine's memory.
	memory bool
	args   func(l *lab) []string
	// begun looks from another command whether the guest is in the middle of it,
	// too.
	begun func(l *lab) bool
	// done sees what has become of the workspace, with whether the command says
	// that it has done its work.
	done func(l *lab, ok bool)
}

var activities = map[string]activity{
	"idle": {},
	"exec": {
		args: func(*lab) []string {
			return []string{"workspace", "exec", "w", "--timeout-seconds", "600", "--", "echo begun; sleep 776655"}
		},
		done: mustFail,
	},
	"sync": {
		point: "upload/sent",
		args: func(l *lab) []string {
			return []string{"workspace", "sync", "push", "w", l.greatTree(), "--dest", "/workspace/pushed"}
		},
		begun: func(l *lab) bool { return l.exec("w", listStages) != "" },
		done: func(l *lab, ok bool) {
			mustFail(l, ok)
			if got := l.exec("w", "ls -A; "+listStages); got != "kept\nseeded\nsub\n" {
				l.Errorf("left in the workspace: %q", got)
			}
		},
	},
	"export": {
		point: "download/received",
		args: func(l *lab) []string {
			l.exec("w", "yes | head -c 16777216 > great; sync")
			return []string{"workspace", "export", "w", "/workspace", "--output", filepath.Join(l.dir, "out")}
		},
		// One who takes nothing more holds up nobody else.
		begun: func(l *lab) bool { return l.exec("w", "echo answered") == "answered\n" },
		done: func(l *lab, ok bool) {
			mustFail(l, ok)
			for _, pattern := range []string{".pyro-export-*", "out"} {
				if left := mustGlob(l, pattern); len(left) > 0 {
					l.Errorf("a broken export left %q", left)
				}
			}
		},
	},
	"snapshot": {
		point: "supervise-snapshot/flushed", supervised: true,
		args: func(*lab) []string { return []string{"workspace", "snapshot", "create", "w", "during"} },
		done: snapshotOrNot,
	},
	"snapshot with memory": {
		point: "supervise-save/still", supervised: true, memory: true,
		args: func(*lab) []string { return []string{"workspace", "snapshot", "create", "w", "during", "--memory"} },
		done: snapshotOrNot,
	},
	"reset": {
		point: "reset/booted",
		args:  func(*lab) []string { return []string{"workspace", "reset", "w"} },
		done: func(l *lab, ok bool) {
			if got := l.exec("w", "ls -A; cat kept 2>/dev/null || true"); got != "seeded\nsub\n" && (ok || got != "kept\nseeded\nsub\nacknowledged\n") {
				l.Errorf("a reset that ended in success (%v) left %q", ok, got)
			}
			l.exec("w", "echo acknowledged > kept; sync")
		},
	},
}

// listStages lists the directories in which the guest gathers a sync.
const listStages = "ls -d .pyro-stage-* ../.pyro-stage-* 2>/dev/null || true"

func mustFail(l *lab, ok bool) {
	l.Helper()
	if ok {
		l.Error("the command says that it has done its work")
	}
	kept(l)
}

// snapshotOrNot checks that there is a snapshot that works, or none.
func snapshotOrNot(l *lab, ok bool) {
	l.Helper()
	kept(l)
	var list struct{ Snapshots []api.Snapshot }
	l.json(&list, "workspace", "snapshot", "list", "w", "--json")
	made := slices.ContainsFunc(list.Snapshots, func(s api.Snapshot) bool { return s.SnapshotName == "during" })
	if ok && !made {
		l.Error("the command says that it has made a snapshot, and there is none")
	}
	if !made {
		return
	}
	l.ok("workspace", "reset", "w", "--snapshot", "during")
	kept(l)
	l.ok("workspace", "reset", "w")
	l.exec("w", "echo acknowledged > kept; sync")
	l.ok("workspace", "snapshot", "delete", "w", "during")
}

// begin starts the activity's command and returns when it is in the middle of
// its work. goOn lets what was halted go on, if it is still there.
func (l *lab) begin(a activity) (cmd *exec.Cmd, stderr *bytes.Buffer, goOn func()) {
	l.Helper()
	var armed []string
	if a.point != "" {
		armed = []string{failpoint.Variable + "=" + a.point + "=stop"}
	}
	if a.supervised {
		l.ok("workspace", "stop", "w")
		if res := l.runEnv(armed, "workspace", "start", "w"); res.code != 0 {
			l.Fatal(res)
		}
		armed = nil
	}
	stderr = new(bytes.Buffer)
	cmd = l.command(a.args(l)...)
	cmd.Env = append(cmd.Env[:len(cmd.Env):len(cmd.Env)], armed...)
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { _ = cmd.Process.Kill() })
	if a.point == "" {
		if _, err := io.ReadFull(out, make([]byte, len("begun\n"))); err != nil {
			l.Fatalf("the command did not begin: %v", err)
		}
		return cmd, stderr, func() {}
	}
	at, err := hostproc.Identify(cmd.Process.Pid)
	if err != nil {
		l.Fatal(err)
	}
	if a.supervised {
		at = l.supervisorOf("w")
	}
	goOn = func() { _ = at.Kill(syscall.SIGCONT) } // it may be what was killed
	l.Cleanup(goOn)
	l.untilHalted(at)
	if a.begun != nil {
		l.eventually(within(30*time.Second), "the guest is in the middle of it", func() bool { return a.begun(l) })
	}
	return cmd, stderr, goOn
}

// greatTree makes a directory that is more than all the buffers between a command
// and a guest take.
func (l *lab) greatTree() string {
	l.Helper()
	dir := filepath.Join(l.dir, "great")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		l.Fatal(err)
	}
	for i := range 16 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), make([]byte, 1<<20), 0o644); err != nil {
			l.Fatal(err)
		}
	}
	return dir
}

// quickKills are the activities that every go test ./... kills machines in.
var quickKills = []string{"idle", "exec", "sync", "export"}

// TestKill kills each process of a machine, whatever the machine is doing.
func TestKill(t *testing.T) {
	for name, a := range activities {
		t.Run(name, func(t *testing.T) {
			if !slices.Contains(quickKills, name) {
				thoroughOnly(t)
			}
			t.Parallel()
			l := newLab(t)
			if a.memory {
				l.needMemory()
			}
			l.create("w")
			l.exec("w", "echo acknowledged > kept; sync")
			for victim := range l.victims("w") {
				t.Run(strings.ReplaceAll(victim, " ", "-"), func(t *testing.T) {
					here := *l
					here.T = t
					here.killDuring(a, victim)
				})
			}
		})
	}
}

func (l *lab) killDuring(a activity, victim string) {
	var cmd *exec.Cmd
	var stderr *bytes.Buffer
	goOn := func() {}
	if a.args != nil {
		cmd, stderr, goOn = l.begin(a)
	}
	id, ok := l.victims("w")[victim]
	if !ok {
		l.Skip("this run of the machine has no such process")
	}
	if err := id.Kill(syscall.SIGKILL); err != nil {
		l.Fatal(err)
	}
	killed := time.Now()
	goOn()
	if cmd != nil {
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			if took := time.Since(killed); took > within(3*time.Second) {
				l.Errorf("the command took %v to notice", took)
			}
			if said := stderr.String(); err != nil && (!strings.Contains(said, "stopped meanwhile: ") || !strings.Contains(said, "hint:")) {
				l.Errorf("%v, %q", err, said)
			}
		case <-time.After(within(30 * time.Second)):
			l.Fatal("the command does not end")
		}
	}
	l.eventually(within(5*time.Second), "the workspace is stopped", func() bool { return l.status("w").State == api.StateStopped })
	if ws := l.status("w"); ws.LastError == nil || *ws.LastError == "" {
		l.Errorf("nothing says why the workspace is stopped: %+v", ws)
	}
	l.check()
	mustStart(l)
	if a.done != nil {
		a.done(l, cmd.ProcessState.Success())
	} else {
		kept(l)
	}
	l.check()
}

// TestStopFrozen stops machines that do not answer.
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
			if began := time.Now(); here.status("w") == nil || time.Since(began) > within(5*time.Second) {
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
