package gvisor_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// superviseVariable makes the test binary the supervisor of one machine: its
// value is the MachineSpec as JSON.
const superviseVariable = "PYRO_TEST_GVISOR_SUPERVISE"

// supervise starts the machine, writes to a file in the guest, says so, and
// stays until it is killed.
func supervise() int {
	var spec engine.MachineSpec
	if err := json.Unmarshal([]byte(os.Getenv(superviseVariable)), &spec); err != nil {
		fmt.Println(err)
		return 1
	}
	spec.Console, spec.Logger = os.Stderr, slog.Default()
	fmt.Println("starting")
	m, err := gvisor.New(gvisor.Options{}).Start(context.Background(), spec)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("started")
	if _, err := tryGuest(context.Background(), m, "echo kept >/workspace/f; sync; (while :; do echo more >>/workspace/g; done) >/dev/null 2>&1 &"); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("running")
	if path := os.Getenv(snapshotsVariable); path != "" {
		return superviseSnapshots(m, path)
	}
	for {
		if _, err := tryGuest(context.Background(), m, "seq 1000 >/workspace/h"); err != nil {
			return 1
		}
	}
}

// A supervisor killed at any moment takes everything with it but an empty
// cgroup, which the next start removes, and leaves a disk that is whole.
func TestKillSupervisor(t *testing.T) {
	e := newEngine(t)
	for _, tt := range []struct {
		at    string
		after time.Duration
	}{
		{"starting", 0}, {"starting", 5 * time.Millisecond}, {"starting", 10 * time.Millisecond}, {"starting", 15 * time.Millisecond}, {"starting", 20 * time.Millisecond}, {"starting", 30 * time.Millisecond},
		{"started", 0}, {"started", 5 * time.Millisecond}, {"started", 20 * time.Millisecond},
		{"started", 40 * time.Millisecond}, {"started", 60 * time.Millisecond}, {"started", 80 * time.Millisecond},
		{"started", 100 * time.Millisecond}, {"running", 0}, {"running", 200 * time.Millisecond},
	} {
		t.Run(fmt.Sprintf("%s+%s", tt.at, tt.after), func(t *testing.T) {
			spec := newSpec(t)
			spec.Console, spec.Logger = nil, nil
			b, err := json.Marshal(spec)
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), superviseVariable+"="+string(b))
			cmd.Stderr = testWriter{t}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != tt.at; {
			}
			time.Sleep(tt.after) // the moment to be killed at, not a wait
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			// The processes go by themselves, before anybody clears up.
			awaitNot(t, "process ", spec, func() {})
			awaitNot(t, "", spec, e.Reap)

			if t.Failed() {
				return
			}

			// The same disk serves at once, and what was flushed is there.
			spec.Console, spec.Logger = testWriter{t}, slog.New(slog.NewTextHandler(testWriter{t}, nil))
			m := start(t, e, spec)
			if got := guest(t, m, "cat /workspace/f || true"); tt.at == "running" && got != "kept\n" {
				t.Errorf("the flushed file reads %q", got)
			}
			if err := m.Stop(t.Context(), 10*time.Second); err != nil {
				t.Fatal(err)
			}
			fsck(t, filepath.Join(spec.Dir, gvisor.LayerFile))
		})
	}
}

// awaitNot waits until nothing whose description begins with what is left of the
// machine, calling help in between. No event tells when the kernel has taken
// down the processes of a process that was killed.
func awaitNot(t *testing.T, what string, spec engine.MachineSpec, help func()) {
	t.Helper()
	left := ""
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		help()
		left = leftovers(spec.ID, spec.Dir)
		if !slices.ContainsFunc(strings.Split(left, "\n"), func(l string) bool { return l != "" && strings.HasPrefix(l, what) }) {
			return
		}
	}
	t.Errorf("still there after ten seconds:\n%s", left)
}

// Whichever of a machine's processes is killed, the machine ends, says so and
// leaves nothing.
func TestKillProcess(t *testing.T) {
	e := newEngine(t)
	for _, who := range []string{"runsc run", "gofer", "sandbox", "guest agent"} {
		t.Run(who, func(t *testing.T) {
			spec := newSpec(t)
			m := start(t, e, spec)
			guest(t, m, "echo kept >/workspace/f; sync")
			if who == "guest agent" {
				// The first process of a pid namespace cannot be killed from
				// inside by KILL; gVisor lets it die of a fault signal.
				_, _ = tryGuest(t.Context(), m, "kill -SEGV 1; kill -KILL 1; sleep 5")
			} else {
				pid := findProcess(t, m, who)
				if err := unix.Kill(pid, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			exit, err := m.Wait(ctx)
			if err != nil {
				t.Fatalf("the machine did not end: %v", err)
			}
			if exit.Requested || exit.Reason == "" {
				t.Errorf("exit = %+v", exit)
			}
			if left := leftovers(spec.ID, spec.Dir); left != "" {
				t.Error(left)
			}
			if _, err := m.DialGuest(ctx); err == nil {
				t.Error("DialGuest of a dead machine succeeded")
			}
			if err := m.Stop(ctx, time.Second); err != nil {
				t.Errorf("Stop of a dead machine: %v", err)
			}
			m = start(t, e, spec)
			if got := guest(t, m, "cat /workspace/f"); got != "kept\n" {
				t.Errorf("the flushed file reads %q", got)
			}
		})
	}
}

func findProcess(t *testing.T, m engine.Machine, who string) int {
	t.Helper()
	for _, pid := range m.PIDs() {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			t.Fatal(err)
		}
		args := strings.Split(string(b), "\x00")
		for _, arg := range args {
			if who == "runsc run" && arg == "run" || who == "gofer" && arg == "gofer" || who == "sandbox" && arg == "boot" {
				return pid
			}
		}
	}
	t.Fatalf("none of %v is the %s", m.PIDs(), who)
	return 0
}

// A sandbox that hangs (here: that is stopped) is ended all the same.
func TestStopHung(t *testing.T) {
	e := newEngine(t)
	m := start(t, e, newSpec(t))
	guest(t, m, "true")
	for _, pid := range m.PIDs() {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	if err := m.Stop(t.Context(), 500*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("Stop took %s", took)
	}
}

// A guest that takes more memory than it has loses the process that took it,
// not its machine, and the caller hears why.
func TestMemoryHog(t *testing.T) {
	e := newEngine(t)
	if !limited(e.Probe(t.Context()).Facts) {
		t.Skip("this host has no cgroups to limit with")
	}
	m := start(t, e, newSpec(t))
	client := guestclient.New(m.DialGuest, guestclient.Options{})
	for range 3 {
		// Looks for the last line of an endless one.
		r, err := client.ExecPlain(t.Context(), guestproto.ExecRequest{Command: "tail /dev/zero"})
		if err != nil {
			t.Fatal(err)
		}
		if !r.OOMKilled || r.ExitCode != 128+int(unix.SIGKILL) {
			t.Errorf("taking all memory = %+v", r)
		}
	}
	if r, err := client.ExecPlain(t.Context(), guestproto.ExecRequest{Command: "echo alive"}); err != nil || r.Stdout != "alive\n" {
		t.Errorf("afterwards the guest says %+v, %v", r, err)
	}
}

// A machine of one processor takes no more than one, however many of its
// processes want one.
func TestProcessorIsBounded(t *testing.T) {
	e := newEngine(t)
	if !limited(e.Probe(t.Context()).Facts) {
		t.Skip("this host has no cgroups to limit with")
	}
	m := start(t, e, newSpec(t))
	guest(t, m, "true")
	before := cpuTime(t, m)
	begin := time.Now()
	_, err := guestclient.New(m.DialGuest, guestclient.Options{}).ExecPlain(t.Context(),
		guestproto.ExecRequest{Command: "for i in 1 2 3 4; do while :; do :; done & done; wait", TimeoutSeconds: 2})
	if err != nil {
		t.Fatal(err)
	}
	used, wall := cpuTime(t, m)-before, time.Since(begin)
	if used > wall*5/4 {
		t.Errorf("one processor was used for %s in %s", used, wall)
	}
}

// cpuTime is the processor time of the processes in a machine's cgroup and of
// those that they have reaped.
func cpuTime(t *testing.T, m engine.Machine) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", m.PIDs()[0]))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if !strings.HasPrefix(f[2], "/pyro-") {
			continue
		}
		procs, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", f[1], f[2], "cgroup.procs"))
		if err != nil {
			t.Fatal(err)
		}
		var ticks int64
		for _, pid := range strings.Fields(string(procs)) {
			stat, _ := os.ReadFile("/proc/" + pid + "/stat")
			times := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
			for i := 11; i < min(15, len(times)); i++ { // utime to cstime, proc_pid_stat(5)
				n, err := strconv.ParseInt(times[i], 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				ticks += n
			}
		}
		return time.Duration(ticks) * (time.Second / 100)
	}
	t.Fatal("the machine has no cgroup")
	return 0
}

// A fork bomb ends with its command, and the guest is none the worse for it.
func TestForkBomb(t *testing.T) {
	e := newEngine(t)
	if !limited(e.Probe(t.Context()).Facts) {
		t.Skip("this host has no cgroups to limit with")
	}
	m := start(t, e, newSpec(t))
	r, err := guestclient.New(m.DialGuest, guestclient.Options{}).ExecPlain(t.Context(),
		guestproto.ExecRequest{Command: "bomb() { bomb | bomb & }; bomb; sleep 60", TimeoutSeconds: 2})
	if err != nil || !r.TimedOut {
		t.Fatalf("the bomb ended with %+v, %v", r, err)
	}
	// The guest agent and the shell that counts.
	if got := guest(t, m, "set -- /proc/[0-9]*; echo $#"); got != "2\n" {
		t.Errorf("afterwards %s processes run", got)
	}
}

// One system call that fills more memory than the machine has leaves nobody
// time to act: the host ends the machine, which says so.
func TestMemoryBurst(t *testing.T) {
	e := newEngine(t)
	if !limited(e.Probe(t.Context()).Facts) {
		t.Skip("this host has no cgroups to limit with")
	}
	m := start(t, e, newSpec(t))
	if out, err := tryGuest(t.Context(), m, "dd if=/dev/zero of=/dev/null bs=2000M count=1"); err == nil {
		t.Fatalf("taking 2000 MiB of 256 ended with %s", out)
	}
	exit, err := m.Wait(t.Context())
	if err != nil || !strings.Contains(exit.Reason, "memory") {
		t.Errorf("the machine's end = %+v, %v", exit, err)
	}
}

func limited(facts []api.Fact) bool {
	for _, f := range facts {
		if f.Name == "limits" {
			return f.OK
		}
	}
	return false
}
