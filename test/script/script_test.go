// Package script_test runs whole commands as a user would, by the scenarios in
// testdata: on engine host, where that takes seconds, and unchanged on the
// engine that PYRO_TEST_ENGINE names.
package script_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/test/build"
)

var programs string

func TestMain(m *testing.M) { os.Exit(build.Main(m, &programs, raceEnabled)) }

func TestScripts(t *testing.T) {
	engine := os.Getenv("PYRO_TEST_ENGINE")
	cache := ""
	if engine == "" {
		engine = "host"
	} else {
		var err error
		if cache, err = statedir.DefaultCache(os.Getenv); err != nil {
			t.Fatal(err)
		}
		requireEngine(t, engine, cache)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			// Short, because sockets lie below it and their paths are bounded on
			// purpose in one script only.
			e.Setenv("PATH", programs+string(os.PathListSeparator)+e.Getenv("PATH"))
			e.Setenv("PYRO_STATE_DIR", filepath.Join(e.WorkDir, "state"))
			e.Setenv("PYRO_CACHE_DIR", cache)
			if cache == "" {
				e.Setenv("PYRO_CACHE_DIR", filepath.Join(e.WorkDir, "cache"))
			}
			e.Setenv("PYRO_ENGINE", engine)
			// Whatever a script leaves behind when it fails.
			e.Defer(func() {
				cmd := exec.Command(filepath.Join(programs, "pyro"), "workspace", "delete", "--all")
				cmd.Env = append(os.Environ(), "PYRO_STATE_DIR="+e.Getenv("PYRO_STATE_DIR"), "PYRO_CACHE_DIR="+e.Getenv("PYRO_CACHE_DIR"))
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Logf("removing workspaces: %v: %s", err, out)
				}
			})
			return nil
		},
		Condition: func(cond string) (bool, error) {
			// [engine:NAME] holds on that engine, [vm] on those with a kernel
			// of the guest's own, [root] where root runs the test. The others are in project_test.go and image_test.go.
			if name, ok := strings.CutPrefix(cond, "project:"); ok {
				return hasProject(name)
			}
			if name, ok := strings.CutPrefix(cond, "environment:"); ok {
				return hasEnvironment(engine, cache, name)
			}
			if name, ok := strings.CutPrefix(cond, "engine:"); ok {
				return name == engine, nil
			}
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			if cond == "busybox" {
				return hasBusybox()
			}
			if cond == "vm" {
				return engine == "qemu", nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status":   cmdStatus,
			"pyro":     cmdPyro,
			"killpyro": cmdKillPyro,
			"killall":  cmdKillAll,
			"nothing":  cmdNothing,
			"field":    cmdField,
			"peak":     cmdPeak,
			"gone":     cmdGone,
			"shellid":  cmdShellID,
			"canary":   cmdCanary,
			"project":  cmdProject,
			"image":    cmdImage,
		},
	})
}

func requireEngine(t *testing.T, engine, cache string) {
	t.Helper()
	cmd := exec.Command(filepath.Join(programs, "pyro"), "doctor", "--json")
	cmd.Env = append(os.Environ(), "PYRO_CACHE_DIR="+cache, "PYRO_STATE_DIR="+filepath.Join(t.TempDir(), "state"))
	out, err := cmd.Output()
	var report struct {
		Engines []struct {
			Engine    string
			Available bool
			Detail    string
		}
	}
	if json.Unmarshal(out, &report) != nil {
		t.Fatalf("pyro doctor: %v, %s", err, out)
	}
	for _, e := range report.Engines {
		if e.Engine == engine {
			testenv.Require(t, engine, e.Available, e.Detail)
			return
		}
	}
	t.Fatalf("PYRO_TEST_ENGINE=%s: there is no such engine", engine)
}

// statusFile holds the exit status of a script's last pyro command.
const statusFile = "exit-status"

// cmdPyro runs pyro with --allow-host-compat where the command knows it, so
// that the scripts read the same for every engine. Unlike exec it takes any
// exit status; "status N" checks it afterwards, and without such a line it must
// have been 0.
func cmdPyro(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("use status after pyro, not !")
	}
	if !slices.Contains(args, "--no-compat") {
		switch {
		case len(args) > 0 && (args[0] == "run" || args[0] == "prepare" || args[0] == "demo"):
			args = slices.Insert(slices.Clone(args), 1, "--allow-host-compat")
		case len(args) > 1 && args[0] == "workspace" && args[1] == "create":
			args = slices.Insert(slices.Clone(args), 2, "--allow-host-compat")
		}
	}
	args = slices.DeleteFunc(slices.Clone(args), func(a string) bool { return a == "--no-compat" })
	err := ts.Exec("pyro", args...)
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("pyro: %v", err)
	}
	ts.Check(os.WriteFile(ts.MkAbs(statusFile), []byte(strconv.Itoa(code)), 0o600))
}

// cmdStatus checks the exit status of the pyro command before it.
func cmdStatus(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: status N")
	}
	if got := ts.ReadFile(statusFile); got != args[0] {
		ts.Fatalf("exit status %s, want %s", got, args[0])
	}
}

// cmdField checks one field of the JSON document on the last stdout or stderr:
// field stdout error.code invalid.
func cmdField(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: field stdout|stderr PATH REGEXP")
	}
	var v any
	if err := json.Unmarshal([]byte(ts.ReadFile(args[0])), &v); err != nil {
		ts.Fatalf("%s is not one JSON document: %v", args[0], err)
	}
	for name := range strings.SplitSeq(args[1], ".") {
		m, ok := v.(map[string]any)
		if !ok {
			ts.Fatalf("no field %s in %v", name, v)
		}
		if v, ok = m[name]; !ok {
			ts.Fatalf("no field %s", name)
		}
	}
	if got := fmt.Sprint(v); !regexp.MustCompile("^(?s:" + args[2] + ")$").MatchString(got) {
		ts.Fatalf("field %s is %q, want %s", args[1], got, args[2])
	}
}

// running starts pyro run with a command that says "up" and then waits, and
// returns when it has said so.
func running(ts *testscript.TestScript) *exec.Cmd {
	cmd := command(ts, "run", "--allow-host-compat", "--timeout-seconds", "1000", "debian:12", "--", "echo up; sleep 776655")
	out, err := cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(cmd.Start())
	if _, err := out.Read(make([]byte, 3)); err != nil {
		ts.Fatalf("the command did not come up: %v", err)
	}
	return cmd
}

// command returns a pyro command in the script's environment, outside testscript's
// own bookkeeping.
func command(ts *testscript.TestScript, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(programs, "pyro"), args...)
	cmd.Env = os.Environ()
	for _, name := range []string{"PYRO_STATE_DIR", "PYRO_CACHE_DIR", "PYRO_ENGINE"} {
		cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
	}
	return cmd
}

// cmdKillPyro interrupts a running command: killpyro KILL|INT|TERM sends the
// signal to the pyro process alone, waits for its end and keeps its status.
func cmdKillPyro(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: killpyro SIGNAL")
	}
	cmd := running(ts)
	ts.Check(cmd.Process.Signal(map[string]syscall.Signal{"KILL": syscall.SIGKILL, "INT": syscall.SIGINT, "TERM": syscall.SIGTERM}[args[0]]))
	err := cmd.Wait()
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	}
	ts.Check(os.WriteFile(ts.MkAbs(statusFile), []byte(strconv.Itoa(code)), 0o600))
}

// cmdKillAll kills a running command and its supervisor at the same moment, so
// that neither can clean up.
func cmdKillAll(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: killall")
	}
	cmd := running(ts)
	supervisor := child(cmd.Process.Pid)
	if supervisor == 0 {
		ts.Fatalf("the command has no supervisor")
	}
	id, err := hostproc.Identify(supervisor)
	ts.Check(err)
	// Stopped first, so that it cannot react to the death of its caller.
	ts.Check(id.Kill(syscall.SIGSTOP))
	ts.Check(cmd.Process.Kill())
	_ = cmd.Wait()
	// Waited for: until the kernel is done with it, it holds the lock.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	ts.Check(id.KillLadder(ctx, 0))
	if len(leftovers(ts.Getenv("PYRO_STATE_DIR"))) == 0 {
		ts.Fatalf("nothing was left behind, so there is nothing to test")
	}
}

// cmdNothing checks that no machine is left: no directory, and no process that
// was started on behalf of this script's state directory. With "soon" it gives
// a supervisor that has lost its caller up to ten seconds to notice.
func cmdNothing(ts *testscript.TestScript, neg bool, args []string) {
	limit := time.Duration(0)
	if len(args) == 2 && args[1] == "soon" {
		limit = 10 * time.Second
	} else if neg || len(args) != 1 {
		ts.Fatalf("usage: nothing left [soon]")
	}
	state := ts.Getenv("PYRO_STATE_DIR")
	for began := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		left := leftovers(state)
		if len(left) == 0 {
			return
		}
		if time.Since(began) >= limit {
			ts.Fatalf("left behind: %s", strings.Join(left, "; "))
		}
	}
}

// cmdGone waits up to half a minute until there is no workspace of that name.
func cmdGone(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: gone WORKSPACE")
	}
	for began := time.Now(); time.Since(began) < 30*time.Second; time.Sleep(50 * time.Millisecond) {
		var exit *exec.ExitError
		if err := command(ts, "workspace", "status", args[0]).Run(); errors.As(err, &exit) && exit.ExitCode() == 3 {
			return
		}
	}
	ts.Fatalf("workspace %s is still there", args[0])
}

// cmdShellID takes the id that "shell open" printed as $SHELL_ID.
func cmdShellID(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: shellid stdout")
	}
	ts.Setenv("SHELL_ID", strings.TrimSpace(ts.ReadFile(args[0])))
}

// cmdCanary checks that no file of the state directory holds any of the texts,
// by a search of its bytes: disks, logs, snapshots, records, all of it.
func cmdCanary(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: canary TEXT...")
	}
	looked := 0
	ts.Check(filepath.WalkDir(ts.Getenv("PYRO_STATE_DIR"), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		found, err := holds(path, args)
		if found != "" {
			ts.Fatalf("%s holds %q", path, found)
		}
		looked++
		return err
	}))
	if looked == 0 {
		ts.Fatalf("there was nothing to look at")
	}
}

// holds returns the first of the texts that the file holds. Holes are skipped.
func holds(path string, texts []string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	const overlap = 256 // more than any text
	buf := make([]byte, 1<<20+overlap)
	for off := int64(0); ; {
		data, err := syscall.Seek(int(f.Fd()), off, 3) // SEEK_DATA, lseek(2)
		if err != nil {
			return "", nil // no data behind
		}
		off = max(off, data-overlap)
		n, err := f.ReadAt(buf, off)
		for _, t := range texts {
			if strings.Contains(string(buf[:n]), t) {
				return t, nil
			}
		}
		if err != nil {
			return "", nil
		}
		off += int64(n - overlap)
	}
}

// leftovers lists machine directories, and processes that have the state
// directory in their arguments, environment, open files or working directory.
func leftovers(state string) []string {
	var left []string
	dirs, _ := os.ReadDir(filepath.Join(state, "machines"))
	for _, d := range dirs {
		left = append(left, "directory "+d.Name())
	}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		if p == fmt.Sprintf("/proc/%d", os.Getpid()) {
			continue
		}
		if b, err := os.ReadFile(p + "/cmdline"); err == nil && strings.Contains(string(b), state) {
			left = append(left, p+" "+strings.ReplaceAll(string(b), "\x00", " "))
			continue
		}
		fds, _ := filepath.Glob(p + "/fd/*")
		for _, fd := range append(fds, p+"/cwd") {
			if target, err := os.Readlink(fd); err == nil && strings.HasPrefix(target, filepath.Join(state, "machines")+"/") {
				left = append(left, p+" has "+target+" open")
				break
			}
		}
	}
	return left
}

// cmdPeak runs a pyro command under the kernel's accounting and checks that
// neither it nor any process it waited for ever had more than MIB resident:
// peak 64 run …. Output goes nowhere.
func cmdPeak(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: peak MIB ARGUMENTS...")
	}
	limit, err := strconv.Atoi(args[0])
	ts.Check(err)
	if raceEnabled {
		limit *= 10 // the race detector's shadow memory
	}
	args = slices.Insert(slices.Clone(args[1:]), 1, "--allow-host-compat")
	cmd := command(ts, args...)
	out, err := cmd.StdoutPipe()
	ts.Check(err)
	cmd.Stderr = ts.Stderr()
	ts.Check(cmd.Start())
	// Sampled, because what the kernel reports at the end is the largest of a
	// process and all its children, QEMU included.
	var ownPeak, supervisorPeak int
	buf := make([]byte, 1<<20)
	total := int64(0)
	for next := int64(0); ; {
		n, err := out.Read(buf)
		total += int64(n)
		if total >= next {
			next = total + 8<<20
			ownPeak = max(ownPeak, peak(cmd.Process.Pid))
			supervisorPeak = max(supervisorPeak, peak(child(cmd.Process.Pid)))
		}
		if err != nil {
			break
		}
	}
	ts.Check(cmd.Wait())
	ts.Logf("%d bytes; peak of the command %d MiB, of its supervisor %d MiB", total, ownPeak, supervisorPeak)
	if ownPeak > limit || supervisorPeak > limit || ownPeak == 0 || supervisorPeak == 0 {
		ts.Fatalf("peak of the command %d MiB, of its supervisor %d MiB; limit %d", ownPeak, supervisorPeak, limit)
	}
}

// child returns the process that is a child of parent: a pyro command has one,
// its supervisor. 0 for none.
func child(parent int) int {
	statuses, _ := filepath.Glob("/proc/[0-9]*/status")
	for _, s := range statuses {
		b, err := os.ReadFile(s)
		if err == nil && strings.Contains(string(b), fmt.Sprintf("\nPPid:\t%d\n", parent)) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(s)))
			return pid
		}
	}
	return 0
}

// peak returns the most memory in MiB that the process has had resident, 0 if
// it is gone.
func peak(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(b)
	if m == nil {
		return 0
	}
	kib, _ := strconv.Atoi(string(m[1]))
	return kib >> 10
}
