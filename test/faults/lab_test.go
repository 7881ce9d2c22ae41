// Package faults_test breaks pyro on purpose, as docs/testing.md describes: it
// kills its processes between any two steps, fills its disk, damages its files,
// and races it against itself. After every fault the same invariants must hold
// (check), and nothing that was acknowledged may be lost. It drives the real
// programs, on engine host or on the one that PYRO_TEST_ENGINE names.
package faults_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/test/build"
)

// programs is the directory of a pyro with failpoints.
var programs string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "pyro-programs-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if err := build.Programs(dir, false, "failpoints"); err != nil {
			panic(err)
		}
		programs = dir
		return m.Run()
	}())
}

// engineName is the engine that the tests run on.
func engineName() string {
	if name := os.Getenv("PYRO_TEST_ENGINE"); name != "" {
		return name
	}
	return "host"
}

// within stretches a time limit for what a guest does: the one place where slow
// engines and busy machines are allowed for.
func within(limit time.Duration) time.Duration {
	if engineName() == "qemu" {
		return 8 * limit
	}
	return 2 * limit
}

// thorough says that PYRO_TEST_REQUIRE lists "faults": all cases are wanted, at
// full size.
func thorough() bool { return testenv.Wanted("faults") }

// thoroughOnly skips what would keep a plain go test ./... for longer than a
// minute together. Whoever names an engine has the time.
func thoroughOnly(t *testing.T) {
	t.Helper()
	if !thorough() && os.Getenv("PYRO_TEST_ENGINE") == "" {
		t.Skip("takes long: make test-faults runs it")
	}
}

// A lab is a state directory with a workspace in it, the bystander, that no fault
// in another one may touch.
type lab struct {
	*testing.T
	dir, state string
	env        []string
	// bystander is the supervisor of the workspace of that name.
	bystander hostproc.Identity
}

// newLab makes a lab, which goes with the test. What a fault of pyro has left in
// it then is an error.
func newLab(t *testing.T) *lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "pyro-faults-")
	if err != nil {
		t.Fatal(err)
	}
	l := labIn(t, dir)
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Cleanup(l.end)
	l.create("bystander")
	l.ok("workspace", "exec", "bystander", "--", "echo untouched > mark; sync")
	l.bystander = l.supervisorOf("bystander")
	return l
}

// labIn makes a lab without a bystander in dir, which must be empty.
func labIn(t *testing.T, dir string) *lab {
	t.Helper()
	l := &lab{T: t, dir: dir, state: filepath.Join(dir, "state")}
	cache := filepath.Join(dir, "cache")
	if name := engineName(); name != "host" {
		var err error
		if cache, err = statedir.DefaultCache(os.Getenv); err != nil {
			t.Fatal(err)
		}
	}
	l.env = append(os.Environ(),
		"PATH="+programs+string(os.PathListSeparator)+os.Getenv("PATH"),
		"PYRO_STATE_DIR="+l.state, "PYRO_CACHE_DIR="+cache, "PYRO_ENGINE="+engineName())
	requireEngine(l)
	seed := filepath.Join(dir, "seed")
	if err := os.MkdirAll(filepath.Join(seed, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"seeded": "from the seed\n", "sub/other": "another\n"} {
		if err := os.WriteFile(filepath.Join(seed, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// checkedEngines holds what requireEngine has found out.
var checkedEngines = map[string]api.EngineReport{}

func requireEngine(l *lab) {
	l.Helper()
	name := engineName()
	if name == "host" {
		return
	}
	if len(checkedEngines) == 0 {
		var report api.DoctorReport
		l.json(&report, "doctor", "--json")
		for _, e := range report.Engines {
			checkedEngines[e.Engine] = e
		}
	}
	testenv.Require(l, name, checkedEngines[name].Available, checkedEngines[name].Detail)
}

// end deletes everything and looks whether anything of the lab is left.
func (l *lab) end() {
	l.Helper()
	if _, err := os.Stat(l.state); err != nil {
		return
	}
	if l.Failed() {
		l.dump()
	}
	if res := l.run("workspace", "delete", "--all"); res.code != 0 {
		l.Errorf("deleting all workspaces: %s", res)
	}
	if left := processesOf(l.state + "/"); len(left) > 0 {
		l.Errorf("processes are left: %s", strings.Join(left, "; "))
		for _, p := range left {
			var pid int
			if _, err := fmt.Sscanf(p, "%d", &pid); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
	// The kernel gives a loop device back when it has written what it holds.
	var loops []string
	for began := time.Now(); time.Since(began) < within(20*time.Second); time.Sleep(100 * time.Millisecond) {
		if loops = loopsOf(l.state); len(loops) == 0 {
			return
		}
	}
	l.Errorf("loop devices are left: %s", strings.Join(loops, "; "))
}

// dump shows what the machines of a failed test have logged.
func (l *lab) dump() {
	logs, _ := filepath.Glob(filepath.Join(l.state, "machines", "*", "*.log"))
	for _, path := range logs {
		b, _ := os.ReadFile(path)
		l.Logf("%s:\n%s", path, b[max(0, len(b)-2000):])
	}
}

// A result is how a command ended.
type result struct {
	args           []string
	code           int // -1 if a signal ended it
	signal         syscall.Signal
	stdout, stderr string
	took           time.Duration
}

func (r result) String() string {
	how := fmt.Sprintf("exit status %d", r.code)
	if r.code < 0 {
		how = r.signal.String()
	}
	return fmt.Sprintf("pyro %s: %s after %v\n%s%s", strings.Join(r.args, " "), how, r.took.Round(time.Millisecond), r.stdout, r.stderr)
}

// command returns a pyro command of the lab.
func (l *lab) command(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(programs, "pyro"), args...)
	cmd.Env = l.env
	cmd.Dir = l.dir
	return cmd
}

// run runs a command to its end, whatever that is.
func (l *lab) run(args ...string) result { return l.runEnv(nil, args...) }

// runEnv is run with more variables.
func (l *lab) runEnv(env []string, args ...string) result {
	l.Helper()
	cmd := l.command(args...)
	cmd.Env = append(cmd.Env[:len(cmd.Env):len(cmd.Env)], env...)
	return finish(l, cmd)
}

// finish runs cmd to its end.
func finish(l *lab, cmd *exec.Cmd) result {
	l.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// A process that outlives the command must not keep us from its end.
	cmd.WaitDelay = 2 * time.Second
	began := time.Now()
	err := cmd.Run()
	r := result{args: cmd.Args[1:], took: time.Since(began), stdout: stdout.String(), stderr: stderr.String()}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			r.signal = ws.Signal()
		}
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		l.Errorf("pyro: %v", err)
		r.code = -1
	}
	return r
}

// ok runs a command that must succeed, and returns its standard output.
func (l *lab) ok(args ...string) string {
	l.Helper()
	res := l.run(args...)
	if res.code != 0 {
		l.Fatal(res)
	}
	return res.stdout
}

// json runs a command that must succeed and decodes the document it prints.
func (l *lab) json(v any, args ...string) {
	l.Helper()
	if err := json.Unmarshal([]byte(l.ok(args...)), v); err != nil {
		l.Fatalf("pyro %s: %v", strings.Join(args, " "), err)
	}
}

// refused runs a command that must fail with the class of that code.
func (l *lab) refused(code string, args ...string) {
	l.Helper()
	res := l.run(append(args, "--json")...)
	if got := errorCode(res); got != code {
		l.Errorf("error code %q, want %q: %s", got, code, res)
	}
}

// errorCode returns the class of a command's error, "" if it told none.
func errorCode(res result) string {
	var doc struct{ Error struct{ Code string } }
	if json.Unmarshal([]byte(res.stderr), &doc) != nil {
		return ""
	}
	return doc.Error.Code
}

// createArgs is the command that makes a workspace.
func (l *lab) createArgs(name string) []string {
	return []string{"workspace", "create", "debian:12", "--allow-host-compat", "--name", name,
		"--seed-path", filepath.Join(l.dir, "seed"), "--ttl-seconds", "0", "--mem-mib", "384"}
}

func (l *lab) create(name string) {
	l.Helper()
	l.ok(l.createArgs(name)...)
}

// exec runs a shell command in a workspace and returns what it wrote.
func (l *lab) exec(name, script string) string {
	l.Helper()
	return l.ok("workspace", "exec", name, "--quiet", "--timeout-seconds", "600", "--", script)
}

func (l *lab) list() []api.Workspace {
	l.Helper()
	var list struct{ Workspaces []api.Workspace }
	l.json(&list, "workspace", "list", "--json")
	return list.Workspaces
}

// status returns a workspace, nil if there is none of that name.
func (l *lab) status(name string) *api.Workspace {
	l.Helper()
	res := l.run("workspace", "status", name, "--json")
	if res.code == exitNotFound {
		return nil
	}
	ws := new(api.Workspace)
	if err := json.Unmarshal([]byte(res.stdout), ws); err != nil {
		l.Fatalf("%v: %s", err, res)
	}
	return ws
}

// exitNotFound is the status of a command that names what is not there; see
// docs/errors.md.
const exitNotFound = 3

// machineRecord is what the tests read of a machine's record.
type machineRecord struct {
	Supervisor *hostproc.Identity
	Processes  []hostproc.Identity
}

func (l *lab) machineOf(name string) (statedir.Machine, machineRecord) {
	l.Helper()
	ws := l.status(name)
	if ws == nil {
		l.Fatalf("there is no workspace %q", name)
	}
	d, err := statedir.Open(l.state)
	if err != nil {
		l.Fatal(err)
	}
	dir := d.Machine(ws.WorkspaceID)
	var rec machineRecord
	if err := statedir.ReadJSON(dir.RecordFile(), &rec); err != nil {
		l.Fatal(err)
	}
	return dir, rec
}

func (l *lab) supervisorOf(name string) hostproc.Identity {
	l.Helper()
	_, rec := l.machineOf(name)
	if rec.Supervisor == nil {
		l.Fatalf("workspace %q has no supervisor", name)
	}
	return *rec.Supervisor
}

// eventually waits for what happens by itself, up to limit.
func (l *lab) eventually(limit time.Duration, what string, happened func() bool) {
	l.Helper()
	for began := time.Now(); !happened(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > limit {
			l.Fatalf("after %v still not: %s", limit, what)
		}
	}
}

// untilHalted waits until a process has come to the failpoint that halts it.
func (l *lab) untilHalted(id hostproc.Identity) {
	l.Helper()
	l.eventually(within(30*time.Second), "the process halts", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", id.PID))
		if err != nil || bytes.Contains(b, []byte(") Z ")) {
			l.Fatal("the process ended before the failpoint that halts it")
		}
		return bytes.Contains(b, []byte(") T "))
	})
}
