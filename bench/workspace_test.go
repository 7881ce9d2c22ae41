package bench

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

//page:topic 1 Workspaces
// Times are those of whole commands, because that is what people and agents wait
// for.

// A desk runs pyro with a state directory of its own.
type desk struct {
	b      *testing.B
	engine string
	state  string
}

// newDesk makes a desk for an engine, which must work here with the environments
// cached.
func newDesk(b *testing.B, engine string) *desk {
	b.Helper()
	// Short, because sockets lie below it.
	dir, err := os.MkdirTemp("", "desk")
	check(b, err)
	d := &desk{b: b, engine: engine, state: filepath.Join(dir, "state")}
	b.Cleanup(func() {
		_, _ = d.try(nil, "workspace", "delete", "--all")
		os.RemoveAll(dir)
	})
	if _, err := d.try(nil, "run", "--quiet", "debian:12", "--", "true"); err != nil {
		testenv.Require(b, engine, false, err.Error())
	}
	return d
}

func (d *desk) command(args ...string) *exec.Cmd {
	cmd := exec.Command(program("pyro"), args...)
	cmd.Env = append(os.Environ(), "PYRO_STATE_DIR="+d.state, "PYRO_ENGINE="+d.engine)
	return cmd
}

func (d *desk) try(stdin []byte, args ...string) (string, error) {
	cmd := d.command(args...)
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("pyro %q: %w: %s", args, err, bytes.TrimSpace(exit.Stderr))
	}
	return string(out), err
}

// pyro runs a command and returns its output without the last newline.
func (d *desk) pyro(args ...string) string {
	d.b.Helper()
	out, err := d.try(nil, args...)
	check(d.b, err)
	return strings.TrimSuffix(out, "\n")
}

// timed runs a command and returns how long it took.
func (d *desk) timed(args ...string) time.Duration {
	d.b.Helper()
	began := time.Now()
	d.pyro(args...)
	return time.Since(began)
}

func (d *desk) create(environment string, args ...string) string {
	d.b.Helper()
	return d.pyro(append([]string{"workspace", "create", environment, "--ttl-seconds", "7200", "--id-only", "--quiet"}, args...)...)
}

// plantTree makes a tree of so many files of 10 KiB, in directories of 100. Half
// of each file is random, so that no two trees are the same.
func plantTree(b *testing.B, files int) string {
	b.Helper()
	dir := b.TempDir()
	content := make([]byte, 10<<10)
	for i := range content {
		content[i] = "words in lines\n"[i%15]
	}
	for i := range files {
		for j := 0; j < len(content)/2; j += 40 {
			content[j] = 'a' + byte(rand.N(26))
		}
		path := filepath.Join(dir, strconv.Itoa(i/100), strconv.Itoa(i%100))
		if i%100 == 0 {
			check(b, os.Mkdir(filepath.Dir(path), 0o755))
		}
		check(b, os.WriteFile(path, content, 0o644))
	}
	return dir
}

// seedFiles is how many files a seed has, about 100 MB of them; fewer where
// every file is made by an emulated processor.
var seedFiles = map[string]int{"gvisor": 10_000, "qemu": 1000}

// BenchmarkWorkspaceCreateSeeded creates a workspace from a tree that pyro has
// not seen before, and from one that it has. The reference is an empty workspace
// into which tar is piped: no copy on the host, and so no diff. The tree has
// 10,000 files and 100 MB, with QEMU 1,000 files and 10 MB.
//
//page:row creating a workspace from a tree
func BenchmarkWorkspaceCreateSeeded(b *testing.B) {
	for _, engine := range []string{"gvisor", "qemu"} {
		b.Run(engine, func(b *testing.B) {
			d := newDesk(b, engine)
			tree := plantTree(b, seedFiles[engine])
			round := 0
			theirs := func() time.Duration {
				began := time.Now()
				id := d.create("debian:12")
				tar := exec.Command("tar", "c", "-C", tree, ".")
				into := d.command("workspace", "exec", id, "--quiet", "--stdin", "--timeout-seconds", "0", "--", "tar", "x")
				var err error
				into.Stdin, err = tar.StdoutPipe()
				check(b, err)
				check(b, tar.Start())
				check(b, into.Run())
				check(b, tar.Wait())
				took := time.Since(began)
				d.pyro("workspace", "delete", id)
				return took
			}
			ours := func() time.Duration {
				began := time.Now()
				id := d.create("debian:12", "--seed-path", tree)
				took := time.Since(began)
				d.pyro("workspace", "delete", id)
				return took
			}
			b.Run("new", func(b *testing.B) {
				compare(b, 3, func() time.Duration {
					round++
					check(b, os.WriteFile(filepath.Join(tree, "round"), []byte(strconv.Itoa(round)), 0o644))
					return ours()
				}, theirs)
			})
			b.Run("known", func(b *testing.B) {
				keep := d.create("debian:12", "--seed-path", tree) // a seed lives as long as its workspaces
				defer d.pyro("workspace", "delete", keep)
				compare(b, 3, ours, theirs)
			})
		})
	}
}

// BenchmarkWorkspaceDiff shows 100 changes in such a tree. The reference is git
// diff in the same guest, with an index that it has just refreshed.
//
//page:row diff of 100 changes
func BenchmarkWorkspaceDiff(b *testing.B) {
	for _, engine := range []string{"gvisor", "qemu"} {
		b.Run(engine, func(b *testing.B) {
			d := newDesk(b, engine)
			id := d.create("debian:12", "--seed-path", plantTree(b, seedFiles[engine]))
			git := "export GIT_DIR=/root/git GIT_WORK_TREE=/workspace; git "
			d.pyro("workspace", "exec", id, "--quiet", "--timeout-seconds", "0", "--",
				git+"init -q && git add . && git -c user.name=b -c user.email=b@example.org commit -qm b && for i in $(seq 0 99); do echo changed >>0/$i; done")
			if n := strings.Count(d.pyro("workspace", "diff", id), "diff --git "); n != 100 {
				b.Fatalf("the diff holds %d files", n)
			}
			compare(b, 5, func() time.Duration { return d.timed("workspace", "diff", id) },
				func() time.Duration {
					return d.timed("workspace", "exec", id, "--quiet", "--timeout-seconds", "0", "--", git+"diff HEAD")
				})
		})
	}
}

// BenchmarkWorkspaceEnvironment does what must not depend on the size of the
// environment, with debian:12; the reference is the same with debian:12-base.
//
//page:row a larger environment
func BenchmarkWorkspaceEnvironment(b *testing.B) {
	for _, engine := range []string{"gvisor", "qemu"} {
		b.Run(engine, func(b *testing.B) {
			d := newDesk(b, engine)
			both := func(do func(environment string) time.Duration) (ours, theirs func() time.Duration) {
				return func() time.Duration { return do("debian:12") }, func() time.Duration { return do("debian:12-base") }
			}
			made := map[string]string{}
			for _, e := range []string{"debian:12", "debian:12-base"} {
				made[e] = d.create(e)
			}
			b.Run("create", func(b *testing.B) {
				ours, theirs := both(func(environment string) time.Duration {
					began := time.Now()
					id := d.create(environment)
					took := time.Since(began)
					d.pyro("workspace", "delete", id)
					return took
				})
				compare(b, 5, ours, theirs)
			})
			b.Run("snapshot", func(b *testing.B) {
				ours, theirs := both(func(environment string) time.Duration {
					id := made[environment]
					d.pyro("workspace", "exec", id, "--quiet", "--", "head -c 100k /dev/urandom >f; sync")
					took := d.timed("workspace", "snapshot", "create", id, "s")
					d.pyro("workspace", "snapshot", "delete", id, "s")
					return took
				})
				compare(b, 5, ours, theirs)
			})
			b.Run("reset", func(b *testing.B) {
				ours, theirs := both(func(environment string) time.Duration {
					return d.timed("workspace", "reset", made[environment], "--quiet")
				})
				compare(b, 5, ours, theirs)
			})
		})
	}
}

// BenchmarkWorkspaceList lists 500 workspaces. The reference is the same with
// one.
//
//page:row listing 500 workspaces
func BenchmarkWorkspaceList(b *testing.B) {
	many, one := listed(b, 500), listed(b, 1)
	compare(b, 21, func() time.Duration { return many.timed("workspace", "list", "--json") },
		func() time.Duration { return one.timed("workspace", "list", "--json") })
}

// listed returns a desk that so many stopped workspaces lie on.
func listed(b *testing.B, count int) *desk {
	b.Helper()
	d := &desk{b: b, engine: "host", state: filepath.Join(b.TempDir(), "state")}
	state, err := statedir.Open(d.state)
	check(b, err)
	st, err := store.Open(b.Context(), state.Database(), store.Options{WorkspacesDir: state.WorkspacesDir(), Logger: slog.New(slog.DiscardHandler)})
	check(b, err)
	defer st.Close()
	for i := range count {
		now, name := time.Now().UTC(), "w"+strconv.Itoa(i)
		check(b, st.Create(b.Context(), &store.Workspace{
			Workspace: api.Workspace{
				WorkspaceID: fmt.Sprintf("%012x", i+1), Name: &name, Labels: map[string]string{"n": name, "team": "a"}, Environment: "debian:12",
				State: api.StateStopped, Engine: "gvisor", Isolation: api.IsolationSandboxGVisor, ExecutionMode: "guest", VCPUCount: 1, MemMiB: 1024, DiskMiB: 8192,
				NetworkPolicy: api.NetworkOff, CreatedAt: now, LastActivityAt: now, WorkspacePath: api.WorkspacePath,
				WorkspaceSeed: api.WorkspaceSeed{Mode: api.SeedEmpty, Destination: api.WorkspacePath, Skipped: []api.SkippedEntry{}}, Secrets: []api.SecretInfo{},
			},
			DiskFormat: "ext4", ActiveLayer: fmt.Sprintf("%012x.ext4", i+1), TTL: -1,
		}))
	}
	if n := strings.Count(d.pyro("workspace", "list", "--json"), `"workspace_id"`); n != count {
		b.Fatalf("%d workspaces are listed, want %d", n, count)
	}
	return d
}

// BenchmarkWorkspaceExec runs true in a workspace. The references are a runsc
// exec by hand, a run in a guest of its own, and the same without a guest, on
// engine host.
//
//page:row one command in a workspace, against
func BenchmarkWorkspaceExec(b *testing.B) {
	d := newDesk(b, "gvisor")
	id := d.create("debian:12")
	ours := func() time.Duration { return d.timed("workspace", "exec", id, "--quiet", "--", "true") }
	b.Run("runsc exec", func(b *testing.B) {
		theirs := newGvisorFixture(b).theirs(b, "memory")
		compare(b, 21, ours, timed(theirs, "true"))
	})
	b.Run("pyro run", func(b *testing.B) {
		compare(b, 9, ours, func() time.Duration { return d.timed("run", "--quiet", "debian:12", "--", "true") })
	})
	b.Run("no guest", func(b *testing.B) {
		h := newHostDesk(b)
		id := h.create("debian:12", "--allow-host-compat")
		compare(b, 21, ours, func() time.Duration { return h.timed("workspace", "exec", id, "--quiet", "--", "true") })
	})
}

func newHostDesk(b *testing.B) *desk {
	b.Helper()
	dir, err := os.MkdirTemp("", "desk")
	check(b, err)
	d := &desk{b: b, engine: "host", state: filepath.Join(dir, "state")}
	b.Cleanup(func() {
		_, _ = d.try(nil, "workspace", "delete", "--all")
		os.RemoveAll(dir)
	})
	return d
}

// idle is for how long BenchmarkWorkspaceIdle watches.
const idle = 30 * time.Second

// BenchmarkWorkspaceIdle watches what a started workspace costs while nothing
// happens in it: the supervisor beside the rest of the machine, which is the
// reference.
//
//page:row 30 s of doing nothing
func BenchmarkWorkspaceIdle(b *testing.B) {
	for _, engine := range []string{"gvisor", "qemu"} {
		b.Run(engine, func(b *testing.B) {
			d := newDesk(b, engine)
			id := d.create("debian:12")
			d.pyro("workspace", "exec", id, "--quiet", "--", "true")
			supervisor, machine := processesOf(b, id)
			for range b.N {
				before, beside := used(supervisor), used(machine...)
				time.Sleep(idle)
				after, besides := used(supervisor), used(machine...)
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(after.mib, "pyro-memory-MiB")
				b.ReportMetric(ms(after.cpu-before.cpu), "pyro-processor-ms")
				b.ReportMetric(besides.mib, "reference-memory-MiB")
				b.ReportMetric(ms(besides.cpu-beside.cpu), "reference-processor-ms")
			}
		})
	}
}

// processesOf returns the supervisor of a workspace's machine, and its
// descendants.
func processesOf(b *testing.B, id string) (supervisor int, others []int) {
	b.Helper()
	parents := map[int]int{}
	paths, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range paths {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		stat, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		parents[pid], _ = strconv.Atoi(fields[1])
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		if words := strings.Split(string(cmdline), "\x00"); len(words) > 1 && words[1] == "supervise" && strings.HasPrefix(words[0], programs) && strings.Contains(string(cmdline)+openPaths(pid), id) {
			supervisor = pid
		}
	}
	if supervisor == 0 {
		b.Fatalf("workspace %s has no supervisor", id)
	}
	for pid := range parents {
		for p := parents[pid]; p != 0; p = parents[p] {
			if p == supervisor {
				others = append(others, pid)
				break
			}
		}
	}
	return supervisor, others
}

// openPaths returns the paths of a process's open files.
func openPaths(pid int) string {
	var all strings.Builder
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, fd := range fds {
		target, _ := os.Readlink(fd)
		all.WriteString(target + "\n")
	}
	return all.String()
}

type usage struct {
	mib float64
	cpu time.Duration
}

// used returns the memory that processes have to themselves, shared pages in
// parts, and the processor time that they have had.
func used(pids ...int) usage {
	var u usage
	for _, pid := range pids {
		rollup, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		for line := range strings.Lines(string(rollup)) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "Pss:" {
				kib, _ := strconv.Atoi(f[1])
				u.mib += float64(kib) / 1024
			}
		}
		// In nanoseconds, of each thread.
		threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		for _, path := range threads {
			stat, _ := os.ReadFile(path)
			if f := strings.Fields(string(stat)); len(f) > 0 {
				ns, _ := strconv.ParseInt(f[0], 10, 64)
				u.cpu += time.Duration(ns)
			}
		}
	}
	return u
}
