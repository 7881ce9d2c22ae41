package faults_test

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// openFiles counts what a process has open, -1 if it is gone.
func openFiles(id hostproc.Identity) int {
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", id.PID))
	if err != nil {
		return -1
	}
	return len(fds)
}

// agentFiles counts what the guest agent of workspace w has open, where it is the
// guest's first process.
func agentFiles(l *lab) int {
	l.Helper()
	if engineName() == "host" {
		return 0
	}
	var n int
	if _, err := fmt.Sscan(l.exec("w", "ls /proc/1/fd | wc -l"), &n); err != nil || n == 0 {
		l.Fatalf("the guest agent has %d files open: %v", n, err)
	}
	return n
}

// memory returns a figure of /proc/PID/status in MiB: VmRSS, VmHWM.
func memory(pid int, what string) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, rest, _ := strings.Cut(string(b), what+":")
	line, _, _ := strings.Cut(rest, "\n")
	kib, _ := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(line), "kB")))
	return kib >> 10
}

// TestManyExecs runs fifty commands at once, each with a MiB of output and a
// status of its own; every tenth caller is killed.
func TestManyExecs(t *testing.T) {
	l := newLab(t)
	l.create("w")
	sup := l.supervisorOf("w")
	before, agent := openFiles(sup), agentFiles(l)
	commands := 50
	if engineName() == "qemu" {
		commands = 10
	}
	var wg sync.WaitGroup
	for i := range commands {
		wg.Go(func() {
			cmd := l.command("workspace", "exec", "w", "--quiet", "--timeout-seconds", "600", "--",
				fmt.Sprintf("head -c 1048576 /dev/zero | tr '\\0' x; exit %d", i%100))
			if i%10 == 9 {
				if err := cmd.Start(); err != nil {
					t.Error(err)
					return
				}
				time.AfterFunc(100*time.Millisecond, func() { _ = cmd.Process.Signal(syscall.SIGKILL) })
				_ = cmd.Wait() // killed, or done just before
				return
			}
			if res := finish(l, cmd); res.code != i%100 || len(res.stdout) != 1<<20 {
				res.stdout = fmt.Sprintf("(%d bytes)", len(res.stdout))
				t.Errorf("command %d: %s", i, res)
			}
		})
	}
	wg.Wait()
	l.eventually(within(10*time.Second), "the supervisor has closed its connections", func() bool { return openFiles(sup) <= before+2 })
	l.eventually(within(10*time.Second), "the guest agent has closed its files", func() bool { return agentFiles(l) <= agent })
	if got := memory(sup.PID, "VmHWM"); got > 200 {
		t.Errorf("the supervisor had %d MiB resident", got)
	}
	l.check()
}

// emulated is the size of a GiB's test on an engine that emulates the processor:
// still several times what a process may have resident.
const emulated = 256 << 20

// TestGreatOutput passes a GiB through each process, none of which keeps it.
func TestGreatOutput(t *testing.T) {
	thoroughOnly(t)
	size := int64(1 << 30)
	if engineName() == "qemu" || !thorough() {
		size = emulated
	}
	l := newLab(t)
	l.create("w")
	sup := l.supervisorOf("w")
	for _, stream := range []string{"1", "2"} {
		cmd := l.command("workspace", "exec", "w", "--quiet", "--timeout-seconds", "0", "--", fmt.Sprintf("head -c %d /dev/zero >&%s", size, stream))
		var out io.ReadCloser
		var err error
		if stream == "1" {
			out, err = cmd.StdoutPipe()
		} else {
			out, err = cmd.StderrPipe()
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var got int64
		peak := 0
		for buf := make([]byte, 1<<20); ; {
			n, err := out.Read(buf)
			if got += int64(n); got>>20%16 == 0 {
				peak = max(peak, memory(cmd.Process.Pid, "VmHWM"))
			}
			if err != nil {
				break
			}
		}
		if err := cmd.Wait(); err != nil || got != size {
			t.Errorf("stream %s: %d of %d bytes, %v", stream, got, size, err)
		}
		if peak > 64 || memory(sup.PID, "VmHWM") > 96 {
			t.Errorf("stream %s: the command had %d MiB resident, its supervisor %d", stream, peak, memory(sup.PID, "VmHWM"))
		}
	}
	// A command that never ends, and a caller that has seen enough of it.
	cmd := l.command("workspace", "exec", "w", "--quiet", "--timeout-seconds", "0", "--", "exec yes 776655")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, out, 1<<20); err != nil {
		t.Errorf("the beginning of what never ends: %v", err)
	}
	canceled := time.Now()
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, out)
	_ = cmd.Wait() // interrupted
	if took := time.Since(canceled); took > within(5*time.Second) {
		t.Errorf("a command that was canceled ended after %v", took)
	}
	l.eventually(within(10*time.Second), "what was canceled has ended in the guest", func() bool {
		return l.exec("w", "grep -lsaz '^776655$' /proc/[0-9]*/cmdline || true") == ""
	})
	// A caller that captures gets the beginning and the end, and all is counted.
	var res struct {
		StdoutTruncated bool `json:"stdout_truncated"`
		Stdout          string
	}
	l.json(&res, "workspace", "exec", "w", "--json", "--timeout-seconds", "0", "--", "head -c 16777216 /dev/zero | tr '\\0' x")
	if !res.StdoutTruncated || len(res.Stdout) > 2<<20 {
		t.Errorf("captured %d bytes, truncated: %v", len(res.Stdout), res.StdoutTruncated)
	}
	l.check()
}

// TestGreatFiles takes a great file in and out, and an interrupted sync shows
// nothing.
func TestGreatFiles(t *testing.T) {
	thoroughOnly(t)
	size := int64(1 << 30)
	switch {
	case !thorough():
		size = 32 << 20
	case engineName() == "qemu":
		size = emulated
	}
	l := newLab(t)
	l.create("w")
	dir := filepath.Join(l.dir, "great")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	want := writeNoise(t, filepath.Join(dir, "noise"), size)
	l.ok("workspace", "sync", "push", "w", dir, "--dest", "/workspace/great")
	out := filepath.Join(l.dir, "out")
	l.ok("workspace", "export", "w", "great/noise", "--output", out)
	if got := digest(t, out); got != want {
		t.Errorf("the file came back with digest %x, want %x", got, want)
	}
	// Interrupted half way: what was there stays.
	for i := range 2000 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), []byte(fmt.Sprint(i)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, after := range []time.Duration{5 * time.Millisecond, 50 * time.Millisecond, 200 * time.Millisecond} {
		cmd := l.command("workspace", "sync", "push", "w", dir, "--dest", "/workspace/second")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait() // killed, or done just before
		timer.Stop()
		l.eventually(within(20*time.Second), "all or nothing of a sync is there", func() bool {
			n := strings.TrimSpace(l.exec("w", "ls second 2>/dev/null | wc -l"))
			return n == "0" || n == "2001"
		})
		l.exec("w", "rm -rf second")
	}
	l.ok("workspace", "sync", "push", "w", dir, "--dest", "/workspace/second")
	if got := strings.TrimSpace(l.exec("w", "cat second/1999; ls second | wc -l")); got != "19992001" {
		t.Errorf("the sync after it left %q", got)
	}
	if got := l.exec("w", "ls -A | grep -v -e seeded -e sub -e second -e great || true"); got != "" {
		t.Errorf("interrupted syncs left %q", got)
	}
	l.check()
}

// TestTooGreatFiles is refused what is over every cap, before any of it is sent:
// the file is one great hole.
func TestTooGreatFiles(t *testing.T) {
	thoroughOnly(t)
	l := newLab(t)
	l.create("w")
	dir := filepath.Join(l.dir, "great")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	const size = 65 << 30
	f, err := os.Create(filepath.Join(dir, "hole"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	l.refused(api.Code(api.ErrExhausted), "workspace", "sync", "push", "w", dir, "--dest", "/workspace/pushed")
	l.refused(api.Code(api.ErrExhausted), append(l.createArgs("x"), "--seed-path", dir)...)
	l.exec("w", fmt.Sprintf("truncate -s %d hole", size))
	out := filepath.Join(l.dir, "out")
	l.refused(api.Code(api.ErrExhausted), "workspace", "export", "w", "/workspace", "--output", out)
	if left := append(mustGlob(l, "out"), mustGlob(l, ".pyro-export-*")...); len(left) > 0 {
		t.Errorf("an export that was refused left %q", left)
	}
	if got := l.exec("w", "ls -A; "+listStages); got != "hole\nseeded\nsub\n" {
		t.Errorf("a sync that was refused left %q", got)
	}
	l.check()
}

func writeNoise(t *testing.T, path string, size int64) [32]byte {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Different blocks, without the cost of real randomness.
	block := make([]byte, 1<<20)
	for i := int64(0); i < size; i += int64(len(block)) {
		sum := sha256.Sum256([]byte(strconv.FormatInt(i, 10)))
		copy(block, bytes.Repeat(sum[:], len(block)/len(sum)))
		if _, err := f.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	return digest(t, path)
}

func digest(t *testing.T, path string) (sum [32]byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	copy(sum[:], h.Sum(nil))
	return sum
}

// TestSoak makes, uses and deletes workspaces for a while, four at a time, and
// nothing grows.
func TestSoak(t *testing.T) {
	thoroughOnly(t)
	rounds := 30
	if engineName() == "qemu" {
		rounds = 24
	}
	if thorough() && engineName() != "qemu" {
		rounds = 100
	}
	l := newLab(t)
	round := func(i int) {
		name := fmt.Sprintf("w%d", i)
		if res := l.run(l.createArgs(name)...); res.code != 0 {
			t.Error(res)
			return
		}
		for _, args := range [][]string{
			{"workspace", "exec", name, "--quiet", "--", "echo x > f; cat seeded"},
			{"workspace", "exec", name, "--quiet", "--", "false"},
			{"workspace", "delete", name},
		} {
			if res := l.run(args...); res.code != 0 && args[len(args)-1] != "false" {
				t.Error(res)
			}
		}
	}
	measure := func() (processes, files, loops int, bytes int64) {
		// Without a prune: deleting leaves nothing for it.
		err := filepath.WalkDir(l.state, func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files++
				if fi, err := d.Info(); err == nil {
					bytes += fi.Size()
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return len(processesOf(l.state + "/")), files, len(loopsOf(l.state)), bytes
	}
	for i := range 4 {
		round(i)
	}
	processes, files, loops, size := measure()
	fds := openFiles(l.bystander)
	jobs := make(chan int)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range jobs {
				round(i)
			}
		})
	}
	for i := range rounds {
		jobs <- i
	}
	close(jobs)
	wg.Wait()
	processes2, files2, loops2, size2 := measure()
	if processes2 != processes || files2 != files || loops2 != loops || openFiles(l.bystander) > fds {
		t.Errorf("after %d workspaces %d processes, %d files, %d loop devices, %d descriptors; before %d, %d, %d, %d",
			rounds, processes2, files2, loops2, openFiles(l.bystander), processes, files, loops, fds)
	}
	if size2 > size+4<<20 {
		t.Errorf("after %d workspaces the state directory has %d bytes, before %d", rounds, size2, size)
	}
	l.check()
}
