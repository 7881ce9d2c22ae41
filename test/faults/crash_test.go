package faults_test

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/test/build"
)

// A crash is an operation that is cut off at each of its failpoints.
type crash struct {
	// points are the operations, by the first half of the failpoints' names.
	points []string
	// supervised says that the failpoint is in the supervisor, which inherits
	// it from the command that starts the workspace.
	supervised bool
	// unmade says that the workspace does not exist before.
	unmade bool
	// memory says that the engine must be able to save a machine's memory.
	memory bool
	// prepare brings the workspace "w", which has been created, to where args
	// can run.
	prepare func(l *lab)
	// args is the command that is killed.
	args func(l *lab) []string
	// after sees what has become of the workspace, with whether the files are
	// to be those of before ("kept" holds what was acknowledged).
	after func(l *lab)
}

// crashes are all operations of workspaces that take more than one step.
var crashes = map[string]crash{
	"create": {
		points: []string{"create", "spawn"}, unmade: true,
		args: func(l *lab) []string { return l.createArgs("w") },
	},
	"create supervisor": {
		points: []string{"supervise"}, unmade: true, supervised: true,
		args: func(l *lab) []string { return l.createArgs("w") },
	},
	"start": {
		points:  []string{"start", "spawn"},
		prepare: func(l *lab) { l.ok("workspace", "stop", "w") },
		args:    func(*lab) []string { return []string{"workspace", "start", "w"} },
		after:   kept,
	},
	"start supervisor": {
		points: []string{"supervise"}, supervised: true,
		prepare: func(l *lab) { l.ok("workspace", "stop", "w") },
		args:    func(*lab) []string { return []string{"workspace", "start", "w"} },
		after:   kept,
	},
	"stop": {
		points: []string{"stop"},
		args:   func(*lab) []string { return []string{"workspace", "stop", "w"} },
		after:  kept,
	},
	"stop supervisor": {
		points: []string{"supervise-end"}, supervised: true,
		args:  func(*lab) []string { return []string{"workspace", "stop", "w"} },
		after: kept,
	},
	"delete": {
		points: []string{"delete"},
		args:   func(*lab) []string { return []string{"workspace", "delete", "w"} },
		after: func(l *lab) {
			if ws := l.status("w"); ws != nil {
				l.Errorf("a deletion that had begun was taken back: %+v", ws)
			}
		},
	},
	"reset": {
		points:  []string{"reset", "spawn"},
		prepare: func(l *lab) { l.exec("w", "echo edited > seeded") },
		args:    func(*lab) []string { return []string{"workspace", "reset", "w"} },
		after:   keptOrReset,
	},
	"reset supervisor": {
		points: []string{"supervise"}, supervised: true,
		prepare: func(l *lab) { l.exec("w", "echo edited > seeded") },
		args:    func(*lab) []string { return []string{"workspace", "reset", "w"} },
		after:   keptOrReset,
	},
	"snapshot": {
		points:  []string{"snapshot"},
		prepare: firstSnapshot,
		args:    func(*lab) []string { return []string{"workspace", "snapshot", "create", "w", "second"} },
		after:   snapshotsWork,
	},
	"snapshot supervisor": {
		points: []string{"supervise-snapshot"}, supervised: true,
		prepare: firstSnapshot,
		args:    func(*lab) []string { return []string{"workspace", "snapshot", "create", "w", "second"} },
		after:   snapshotsWork,
	},
	"snapshot of a stopped workspace": {
		points:  []string{"snapshot-stopped"},
		prepare: func(l *lab) { firstSnapshot(l); l.ok("workspace", "stop", "w") },
		args:    func(*lab) []string { return []string{"workspace", "snapshot", "create", "w", "second"} },
		after:   snapshotsWork,
	},
	"snapshot delete": {
		points: []string{"snapshot-delete", "compact", "merge"},
		prepare: func(l *lab) {
			firstSnapshot(l)
			if engineName() != "host" {
				l.ok("workspace", "stop", "w") // so that the disk stands on it
			}
			l.ok("workspace", "snapshot", "create", "w", "second")
			mustStart(l)
			l.exec("w", "echo later > later; sync")
			l.ok("workspace", "stop", "w")
		},
		args: func(*lab) []string { return []string{"workspace", "snapshot", "delete", "w", "second"} },
		after: func(l *lab) {
			mustStart(l)
			if got := l.exec("w", "cat later"); got != "later\n" {
				l.Errorf("what stood on the deleted snapshot holds %q", got)
			}
			snapshotsWork(l)
		},
	},
	"snapshot with memory": {
		points: []string{"snapshot"}, memory: true,
		prepare: firstSnapshot,
		args:    func(*lab) []string { return []string{"workspace", "snapshot", "create", "w", "second", "--memory"} },
		after:   snapshotsWork,
	},
	"snapshot with memory supervisor": {
		points: []string{"supervise-snapshot", "supervise-save"}, supervised: true, memory: true,
		prepare: firstSnapshot,
		args:    func(*lab) []string { return []string{"workspace", "snapshot", "create", "w", "second", "--memory"} },
		after:   snapshotsWork,
	},
	"fork with memory": {
		points: []string{"fork", "snapshot", "spawn"}, memory: true,
		args: func(*lab) []string {
			return []string{"workspace", "fork", "w", "--memory", "--name", "child"}
		},
		after: forked,
	},
	"fork of a memory": {
		points: []string{"spawn"}, memory: true,
		prepare: func(l *lab) { markMemory(l); l.ok("workspace", "snapshot", "create", "w", "full", "--memory") },
		args: func(*lab) []string {
			return []string{"workspace", "fork", "w", "--snapshot", "full", "--name", "child"}
		},
		after: func(l *lab) {
			forked(l)
			l.ok("workspace", "fork", "w", "--snapshot", "full", "--name", "child")
			if got := l.exec("child", "cat kept /dev/shm/running"); got != "acknowledged\nrunning\n" {
				l.Errorf("a fork after it holds %q", got)
			}
			forked(l)
		},
	},
	"fork": {
		points: []string{"fork"},
		args:   func(*lab) []string { return []string{"workspace", "fork", "w", "--count", "2", "--name", "child"} },
		after:  forked,
	},
	"reset to a memory": {
		points: []string{"reset", "spawn"}, memory: true,
		prepare: func(l *lab) {
			l.exec("w", "echo saved > /dev/shm/running")
			l.ok("workspace", "snapshot", "create", "w", "full", "--memory")
			l.exec("w", "echo more >> kept; sync")
		},
		args: func(*lab) []string { return []string{"workspace", "reset", "w", "--snapshot", "full"} },
		after: func(l *lab) {
			mustStart(l)
			got := l.exec("w", "cat kept /dev/shm/running 2>/dev/null; true")
			if got != "acknowledged\nmore\n" && got != "acknowledged\nmore\nsaved\n" && got != "acknowledged\n" && got != "acknowledged\nsaved\n" {
				l.Errorf("a reset that was cut off left %q", got)
			}
			l.ok("workspace", "reset", "w", "--snapshot", "full")
			if got := l.exec("w", "cat kept /dev/shm/running"); got != "acknowledged\nsaved\n" {
				l.Errorf("a reset after it left %q", got)
			}
		},
	},
	"pause to disk": {
		points: []string{"pause"}, memory: true,
		prepare: markMemory,
		args:    func(*lab) []string { return []string{"workspace", "pause", "w", "--to-disk"} },
		after:   memoryKept,
	},
	"pause to disk supervisor": {
		points: []string{"supervise-snapshot", "supervise-save"}, supervised: true, memory: true,
		args:  func(*lab) []string { return []string{"workspace", "pause", "w", "--to-disk"} },
		after: kept,
	},
	"wake": {
		points: []string{"wake", "spawn"}, memory: true,
		prepare: fallAsleep,
		args:    func(*lab) []string { return []string{"workspace", "exec", "w", "--", "true"} },
		after:   memoryKept,
	},
	"wake supervisor": {
		points: []string{"supervise"}, supervised: true, memory: true,
		prepare: fallAsleep,
		args:    func(*lab) []string { return []string{"workspace", "exec", "w", "--", "true"} },
		after:   memoryKept,
	},
	"export": {
		points: []string{"export", "download"},
		args: func(l *lab) []string {
			return []string{"workspace", "export", "w", "/workspace", "--output", filepath.Join(l.dir, "out")}
		},
		after: func(l *lab) {
			defer os.RemoveAll(filepath.Join(l.dir, "out"))
			if _, err := os.Lstat(filepath.Join(l.dir, "out")); err == nil {
				if b, err := os.ReadFile(filepath.Join(l.dir, "out", "kept")); string(b) != "acknowledged\n" {
					l.Errorf("half an export appeared at its output: %q, %v", b, err)
				}
			}
			kept(l)
			// Whatever it has left goes with the next one to the same place.
			again := filepath.Join(l.dir, "again")
			defer os.RemoveAll(again)
			l.ok("workspace", "export", "w", "/workspace", "--output", again)
			if left, _ := filepath.Glob(filepath.Join(l.dir, ".pyro-export-*")); len(left) > 0 {
				l.Errorf("an export after it leaves %q", left)
			}
		},
	},
	"sync": {
		points: []string{"sync", "upload"},
		args: func(l *lab) []string {
			return []string{"workspace", "sync", "push", "w", filepath.Join(l.dir, "seed"), "--dest", "/workspace/pushed"}
		},
		after: kept,
	},
	"patch": {
		points:  []string{"patch"},
		prepare: func(l *lab) { writePatch(l) },
		args: func(l *lab) []string {
			return []string{"workspace", "patch", "apply", "w", "--patch-file", filepath.Join(l.dir, "patch")}
		},
		after: func(l *lab) {
			kept(l)
			if got := l.exec("w", "cat seeded; cat added 2>/dev/null || true"); got != "from the seed\n" && got != "patched\nnew\n" {
				l.Errorf("half a patch was applied: %q", got)
			}
		},
	},
	"exec": {
		points: []string{"exec"},
		args:   func(*lab) []string { return []string{"workspace", "exec", "w", "--", "echo output"} },
		after: func(l *lab) {
			kept(l)
			var logs api.WorkspaceLogs
			l.json(&logs, "workspace", "logs", "w", "--json")
			for _, e := range logs.Entries {
				if e.State == api.CommandRunning {
					l.Errorf("a command whose caller was killed is said to run: %+v", e)
				}
			}
		},
	},
	"expire": {
		points: []string{"expire"},
		prepare: func(l *lab) {
			l.ok("workspace", "stop", "w")
			l.ok("workspace", "update", "w", "--ttl-seconds", "1")
			shiftExpiry(l, "w", -2)
		},
		args: func(*lab) []string { return []string{"workspace", "list"} },
		after: func(l *lab) {
			if ws := l.status("w"); ws != nil {
				l.Errorf("an expired workspace is still there: %+v", ws)
			}
		},
	},
	"prune": {
		points: []string{"prune"},
		prepare: func(l *lab) {
			// Something to do: a workspace that never came to be.
			l.runEnv([]string{failpoint.Variable + "=create/described"}, l.createArgs("never")...)
		},
		args:  func(*lab) []string { return []string{"workspace", "prune"} },
		after: kept,
	},
}

// elsewhere names failpoints that an engine never reaches, and why.
var elsewhere = map[string][]string{
	// No second layer under a directory, and nobody looks into one that is stopped.
	"host": {"snapshot-stopped/switched", "compact/begun", "compact/merged", "compact/recorded", "merge/copied", "merge/united", "merge/made"},
	// A snapshot needs no copy of the files.
	"gvisor": {"snapshot/spooled"},
	// QEMU merges into the upper layer.
	"qemu": {"snapshot/spooled", "merge/copied", "merge/united", "merge/made"},
}

// quick are the operations that every go test ./... goes through.
var quick = []string{"create supervisor", "delete", "snapshot delete", "export", "exec", "expire"}

func TestCrash(t *testing.T) {
	points := failpoints(t)
	for name, c := range crashes {
		t.Run(name, func(t *testing.T) {
			if !slices.Contains(quick, name) {
				thoroughOnly(t)
			}
			t.Parallel()
			l := newLab(t)
			if c.memory {
				l.needMemory()
			}
			for _, point := range points {
				if op, _, _ := strings.Cut(point, "/"); !slices.Contains(c.points, op) || slices.Contains(elsewhere[engineName()], point) {
					continue
				}
				ok := t.Run(strings.ReplaceAll(point, "/", "-"), func(t *testing.T) {
					here := *l
					here.T = t
					here.crash(c, point)
				})
				if !ok {
					return // what it left disturbs the next ones
				}
			}
		})
	}
}

func (l *lab) crash(c crash, point string) {
	armed := []string{failpoint.Variable + "=" + point}
	// A supervisor that is to die at its end is armed when it begins.
	fromBirth := c.supervised && !strings.HasPrefix(point, "supervise/")
	if !c.unmade {
		l.create("w")
		l.exec("w", "echo acknowledged > kept; sync")
		if c.prepare != nil {
			c.prepare(l)
		}
		if fromBirth {
			l.ok("workspace", "stop", "w")
			if res := l.runEnv(armed, "workspace", "start", "w"); res.code != 0 {
				l.Fatal(res)
			}
		}
	}
	if fromBirth {
		armed = nil
	}
	res := l.runEnv(armed, c.args(l)...)
	if !c.supervised && res.signal != syscall.SIGKILL {
		l.Fatalf("failpoint %s was never reached: %s", point, res)
	}
	if c.supervised && point != "supervise/reported" && res.code == 0 && !strings.HasPrefix(point, "supervise-end/") {
		l.Fatalf("failpoint %s was never reached: %s", point, res)
	}
	l.check()
	if c.unmade {
		if ws := l.status("w"); ws == nil {
			l.create("w") // the name is free
		}
		mustStart(l)
		l.exec("w", "echo acknowledged > kept; sync")
		kept(l)
	}
	if c.after != nil {
		c.after(l)
	}
	l.check()
	l.run("workspace", "delete", "w")
	if res := l.run("workspace", "delete", "w"); res.code != exitNotFound {
		l.Errorf("deleting it once more: %s", res)
	}
	l.check()
}

// templateSteps are the operations of a first start that leaves a template.
var templateSteps = []string{"template", "install"}

// TestCrashTemplate kills the supervisor of a first start between any two steps of
// leaving a template for the next one. That is there or not: the next start is as
// good as ever, and those after it are warm.
func TestCrashTemplate(t *testing.T) {
	if engineName() != "qemu" {
		t.Skip("no other engine has templates")
	}
	points := failpoints(t)
	l := newLab(t)
	user, err := statedir.DefaultCache(os.Getenv)
	if err != nil {
		t.Fatal(err)
	}
	templates, err := artifact.Open(artifact.Options{Dir: filepath.Join(user, "templates"), Noun: "template"})
	if err != nil {
		t.Fatal(err)
	}
	// A shape of machine that nobody else has.
	const memMiB = "391"
	forget := func() {
		t.Helper()
		refs, err := templates.Refs()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range refs {
			if strings.Contains(r.Name, "-"+memMiB+"MiB-") {
				if err := templates.Forget(r.Name); err != nil {
					t.Fatal(err)
				}
			}
		}
		if _, err := templates.Prune(t.Context(), nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	defer forget()
	for _, point := range points {
		if op, _, _ := strings.Cut(point, "/"); !slices.Contains(templateSteps, op) {
			continue
		}
		t.Run(strings.ReplaceAll(point, "/", "-"), func(t *testing.T) {
			here := *l
			l := &here
			l.T = t
			forget()
			create := func(name string) []string { return append(l.createArgs(name), "--mem-mib", memMiB) }
			// The template may come into its place when the workspace is started.
			l.runEnv([]string{failpoint.Variable + "=" + point}, create("w")...)
			l.eventually(within(30*time.Second), "the supervisor has died at "+point, func() bool {
				ws := l.status("w")
				return ws == nil || ws.State == api.StateStopped
			})
			l.check()
			l.run("workspace", "delete", "w")
			for _, name := range []string{"next", "third"} {
				l.ok(create(name)...)
				if got := l.exec(name, "cat seeded"); got != "from the seed\n" {
					l.Errorf("%s holds %q", name, got)
				}
				l.ok("workspace", "stop", name) // and has left its template
			}
			dir, _ := l.machineOf("third")
			if b, err := os.ReadFile(dir.SupervisorLog()); !strings.Contains(string(b), "warm=true") {
				l.Errorf("the third start was not warm: %s, %v", b, err)
			}
			if left, _ := filepath.Glob(filepath.Join(templates.Dir(), "build", "*-"+memMiB+"MiB-*", "*")); len(left) > 0 {
				l.Errorf("the template's building has left %q", left)
			}
			l.ok("workspace", "delete", "next")
			l.ok("workspace", "delete", "third")
			l.check()
		})
	}
}

// mustStart starts the workspace, if it does not run.
func mustStart(l *lab) {
	l.Helper()
	l.ok("workspace", "start", "w", "--quiet")
}

// kept checks what was acknowledged before the fault.
func kept(l *lab) {
	l.Helper()
	mustStart(l)
	if got := l.exec("w", "cat kept"); got != "acknowledged\n" {
		l.Errorf("an acknowledged file holds %q", got)
	}
}

// markMemory leaves something in the memory of the workspace.
func markMemory(l *lab) { l.exec("w", "echo running > /dev/shm/running") }

func fallAsleep(l *lab) {
	markMemory(l)
	l.ok("workspace", "pause", "w", "--to-disk")
}

// memoryKept is kept also for what markMemory left.
func memoryKept(l *lab) {
	l.Helper()
	if got := l.exec("w", "cat kept /dev/shm/running"); got != "acknowledged\nrunning\n" {
		l.Errorf("files and memory hold %q", got)
	}
}

// forked is kept also for the forks of the workspace that there are, and deletes
// them.
func forked(l *lab) {
	l.Helper()
	kept(l)
	for _, ws := range l.list() {
		if ws.Name == nil || !strings.HasPrefix(*ws.Name, "child") {
			continue
		}
		l.ok("workspace", "start", *ws.Name, "--quiet")
		if got := l.exec(*ws.Name, "cat kept"); got != "acknowledged\n" {
			l.Errorf("an acknowledged file holds %q in a fork", got)
		}
		l.ok("workspace", "delete", *ws.Name)
	}
	if got := l.ok("workspace", "snapshot", "list", "w"); strings.Contains(got, "fork-") {
		l.Errorf("a fork has left a snapshot: %s", got)
	}
	l.check()
}

// keptOrReset checks that a reset was done or not, and nothing between.
func keptOrReset(l *lab) {
	l.Helper()
	mustStart(l)
	got := l.exec("w", "cat kept seeded 2>&1 | head -c 100; ls sub")
	if got != "acknowledged\nedited\nother\n" && !strings.HasSuffix(got, "kept: No such file or directory\nfrom the seed\nother\n") {
		l.Errorf("a reset that was cut off left %q", got)
	}
	l.ok("workspace", "reset", "w")
	if got := l.exec("w", "ls; cat seeded"); got != "seeded\nsub\nfrom the seed\n" {
		l.Errorf("a reset after it left %q", got)
	}
}

func firstSnapshot(l *lab) {
	l.ok("workspace", "snapshot", "create", "w", "first")
	l.exec("w", "echo more >> kept; sync")
}

// snapshotsWork checks the workspace's files and every snapshot that is listed.
func snapshotsWork(l *lab) {
	l.Helper()
	mustStart(l)
	if got := l.exec("w", "cat kept"); got != "acknowledged\nmore\n" {
		l.Errorf("an acknowledged file holds %q", got)
	}
	var list struct{ Snapshots []api.Snapshot }
	l.json(&list, "workspace", "snapshot", "list", "w", "--json")
	want := map[string]string{"first": "acknowledged\n", "second": "acknowledged\nmore\n"}
	var names []string
	for _, s := range list.Snapshots {
		names = append(names, s.SnapshotName)
		content, ok := want[s.SnapshotName]
		if !ok {
			continue
		}
		l.ok("workspace", "reset", "w", "--snapshot", s.SnapshotName)
		if got := l.exec("w", "cat kept"); got != content {
			l.Errorf("snapshot %s holds %q, want %q", s.SnapshotName, got, content)
		}
	}
	if !slices.Contains(names, "first") || !slices.Contains(names, api.BaselineSnapshot) {
		l.Errorf("snapshots %q; an acknowledged one is missing", names)
	}
	if !slices.Contains(names, "second") {
		l.ok("workspace", "snapshot", "create", "w", "second")
	}
}

func writePatch(l *lab) {
	text := "--- a/seeded\n+++ b/seeded\n@@ -1 +1 @@\n-from the seed\n+patched\n--- /dev/null\n+++ b/added\n@@ -0,0 +1 @@\n+new\n"
	if err := os.WriteFile(filepath.Join(l.dir, "patch"), []byte(text), 0o600); err != nil {
		l.Fatal(err)
	}
}

// failpoints finds the name of every failpoint in the sources, and makes sure
// that some operation goes there.
func failpoints(t *testing.T) []string {
	t.Helper()
	known := map[string]bool{}
	for _, op := range templateSteps {
		known[op] = true
	}
	for _, c := range crashes {
		for _, p := range c.points {
			known[p] = true
		}
	}
	hit := regexp.MustCompile(`failpoint\.Hit\("([a-z-]+)/([a-z-]+)"\)`)
	var points []string
	err := filepath.WalkDir("../../internal", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range hit.FindAllStringSubmatch(string(b), -1) {
			point := m[1] + "/" + m[2]
			if !known[m[1]] {
				t.Errorf("%s: no operation of this test comes to failpoint %s", path, point)
			}
			if !slices.Contains(points, point) {
				points = append(points, point)
			} else if !strings.Contains(path, "/engine/") { // where engines do the same step
				t.Errorf("%s: a second failpoint %s", path, point)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(points) < 40 {
		t.Fatalf("only %d failpoints found", len(points))
	}
	return points
}

// TestReleaseHasNoFailpoints looks for the variable that arms failpoints in a
// build without the tag, and for proof in the one with it.
func TestReleaseHasNoFailpoints(t *testing.T) {
	release := t.TempDir()
	if err := build.Programs(release, false); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]bool{release: false, programs: true} {
		b, err := os.ReadFile(filepath.Join(dir, "pyro"))
		if err != nil {
			t.Fatal(err)
		}
		if got := bytes.Contains(b, []byte(failpoint.Variable)); got != want {
			t.Errorf("%s names %s: %v, want %v", dir, failpoint.Variable, got, want)
		}
	}
}
