package faults_test

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// TestPowerCut takes the power away at random moments while a guest writes
// records with a checksum each and syncs them. What the guest's file system had
// only in memory is gone; every record that was acknowledged is there.
//
// The state directory is copied while everything that writes to it is halted,
// and the copy takes the place of the original: that is what a host finds, as
// far as its own file system keeps its promises.
func TestPowerCut(t *testing.T) {
	if engineName() == "host" {
		t.Skip("engine host has no file system of its own")
	}
	rounds := 5
	if thorough() {
		rounds = 20
	}
	if engineName() == "qemu" {
		rounds = 8
	}
	dir, err := os.MkdirTemp("", "pyro-faults-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := labIn(t, dir)
	t.Cleanup(l.end)
	l.create("w")
	acknowledged := 0
	for round := range rounds {
		mustStart(l)
		cmd := l.command("workspace", "exec", "w", "--quiet", "--timeout-seconds", "0", "--", "python3", "-c", `
import hashlib, os, sys
n = int(sys.argv[1])
f = open("records", "ab")
while True:
    n += 1
    body = b"%08d" % n + b"x" * 500
    f.write(body + hashlib.sha256(body).hexdigest().encode() + b"\n")
    f.flush()
    os.fsync(f.fileno())
    print(n, flush=True)
`, strconv.Itoa(acknowledged))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		want := acknowledged + 1 + rand.IntN(200)
		lines := bufio.NewScanner(out)
		for acknowledged < want && lines.Scan() {
			if acknowledged, err = strconv.Atoi(lines.Text()); err != nil {
				t.Fatal(err)
			}
		}
		if acknowledged < want {
			t.Fatalf("round %d: the writer ended after record %d", round, acknowledged)
		}
		_, rec := l.machineOf("w")
		for _, id := range rec.Processes {
			_ = id.Kill(syscall.SIGSTOP) // not every one has to live
		}
		_ = rec.Supervisor.Kill(syscall.SIGSTOP)
		_ = cmd.Process.Signal(syscall.SIGSTOP)
		replica := filepath.Join(dir, "replica")
		if out, err := exec.Command("cp", "-a", "--sparse=always", l.state, replica).CombinedOutput(); err != nil && !strings.Contains(string(out), "sock") {
			t.Fatalf("copying the state directory: %v: %s", err, out)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
		l.powerOff(rec)
		l.eventually(within(30*time.Second), "nothing of the machine is left", func() bool {
			return len(loopsOf(l.state)) == 0 && len(processesOf(l.state+"/machines")) == 0
		})
		if err := os.RemoveAll(l.state); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(replica, l.state); err != nil {
			t.Fatal(err)
		}
		if ws := l.status("w"); ws == nil || ws.State != api.StateStopped {
			t.Fatalf("round %d: after a power cut the workspace is %+v", round, ws)
		}
		if round%2 == 1 { // what it begins with can also be a layer that others stand on
			l.ok("workspace", "snapshot", "create", "w", fmt.Sprintf("cut-%d", round))
		}
		mustStart(l)
		got := strings.TrimSpace(l.ok("workspace", "exec", "w", "--quiet", "--timeout-seconds", "600", "--", "python3", "-c", `
import hashlib
n = 0
for line in open("records", "rb"):
    body, digest = line[:508], line[508:-1]
    if len(line) != 573 or hashlib.sha256(body).hexdigest().encode() != digest or int(body[:8]) != n + 1:
        break
    n += 1
print(n)
# What was not acknowledged may be there in part: the next round goes on behind.
f = open("records", "r+b")
f.truncate(n * 573)
`))
		n, err := strconv.Atoi(got)
		if err != nil || n < acknowledged {
			t.Errorf("round %d: record %d was acknowledged, and %s are there", round, acknowledged, got)
		}
		acknowledged = n
		l.check()
	}
}
