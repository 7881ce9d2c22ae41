package faults_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// smallDisk mounts a file system of that size, unmounted with the test.
func smallDisk(t *testing.T, dir, size string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	testenv.Require(t, "root", os.Geteuid() == 0, "only root can mount a small disk")
	err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+size)
	testenv.Require(t, "root", err == nil, "mounting a tmpfs does not work here")
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmounting %s: %v", dir, err)
		}
	})
}

// newSmallLab makes a lab without a bystander whose state directory is on a small
// disk.
func newSmallLab(t *testing.T) (l *lab, disk string) {
	t.Helper()
	dir := t.TempDir()
	disk = filepath.Join(dir, "disk")
	smallDisk(t, disk, "512m")
	l = labIn(t, dir)
	l.state = filepath.Join(disk, "state")
	l.env = append(l.env, "PYRO_STATE_DIR="+l.state)
	t.Cleanup(l.end)
	return l, disk
}

// fill leaves at most left bytes free on the file system of dir, and returns how
// to free them again.
func fill(t *testing.T, dir string, left int64) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// Others write there, too: what is free now may be taken a moment later.
	for at := int64(0); ; {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		n := int64(st.Bavail)*st.Bsize - left
		if n <= 0 {
			break
		}
		if err := unix.Fallocate(int(f.Fd()), 0, at, n); err == nil {
			at += n
		} else if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { os.Remove(path) }) // of a test that failed before
	return func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

// TestHostDiskFull fills the disk of the state directory before and during
// everything that writes there.
func TestHostDiskFull(t *testing.T) {
	thoroughOnly(t)
	l, disk := newSmallLab(t)
	l.create("w")
	// More than pyro gives up where the disk is full.
	l.exec("w", "yes | head -c 16777216 > great; echo acknowledged > kept; sync")
	l.ok("workspace", "snapshot", "create", "w", "first")
	l.create("stopped")
	l.exec("stopped", "echo acknowledged > kept; sync")
	l.ok("workspace", "stop", "stopped")

	for _, left := range []int64{16 << 20, 0} {
		free := fill(t, disk, left)
		for _, args := range [][]string{
			l.createArgs("x"),
			{"workspace", "start", "stopped"},
			{"workspace", "reset", "w"},
			{"workspace", "snapshot", "create", "w", "second"},
		} {
			l.refused("exhausted", args...)
		}
		if left == 0 {
			out := filepath.Join(disk, "out")
			// The machine may have ended for want of room.
			res := l.run("workspace", "export", "w", "great", "--output", out, "--json")
			if res.code == 0 || errorCode(res) != "exhausted" && !strings.Contains(res.stderr, "disk is full") {
				t.Errorf("an export without room: %s", res)
			}
			if found, _ := filepath.Glob(filepath.Join(disk, "*out*")); len(found) > 0 {
				t.Errorf("an export without room left %q", found)
			}
			if found, _ := filepath.Glob(filepath.Join(disk, ".pyro-export-*")); len(found) > 0 {
				t.Errorf("an export without room left %q", found)
			}
		}
		l.ok("workspace", "list")
		if left == 0 {
			// A journal that cannot be written is said so, not a lost command.
			res := l.run("workspace", "exec", "w", "--json", "--", "cat seeded")
			if code := errorCode(res); res.code != 0 && code != "exhausted" && !strings.Contains(res.stderr, "disk is full") {
				t.Errorf("a command while the disk is full: %q, %s", code, res)
			}
		}
		free()
		l.check()
		l.ok("workspace", "start", "w") // an engine may have ended it for want of room
		l.checkKept("w", "acknowledged\n")
	}
	l.ok("workspace", "start", "stopped")
	l.checkKept("stopped", "acknowledged\n")
	l.ok("workspace", "reset", "w", "--snapshot", "first")
	l.checkKept("w", "acknowledged\n")
	l.create("x")

	// What a user does about it: deleting works where hardly anything else does.
	free := fill(t, disk, 1<<20)
	l.ok("workspace", "delete", "x")
	free()
	l.check()
}

// TestMachineEndsOnFullDisk kills a machine where not a byte is left for word of
// it. The reason is kept all the same.
func TestMachineEndsOnFullDisk(t *testing.T) {
	thoroughOnly(t)
	l, disk := newSmallLab(t)
	l.create("w")
	l.exec("w", "echo acknowledged > kept; sync")
	machine := l.victims("w")
	free := fill(t, disk, 0)
	_ = machine["process 0"].Kill(syscall.SIGKILL) // one that has ended for want of room is as good
	l.eventually(within(30*time.Second), "the supervisor has ended", func() bool { return !machine["supervisor"].Alive() })
	free()
	if ws := l.status("w"); ws.State != api.StateStopped || ws.LastError == nil || strings.Contains(*ws.LastError, "supervisor was killed") {
		t.Errorf("a machine that ended while the disk was full: %+v", ws)
	}
	l.check()
	kept(l)
}

func (l *lab) checkKept(name, want string) {
	l.Helper()
	if got := l.exec(name, "cat kept"); got != want {
		l.Errorf("what workspace %s was told to keep holds %q, want %q", name, got, want)
	}
}

// TestHostDiskFillsUp lets a guest write until the host's disk is full. It must
// hear of it, or its machine ends for that reason; what it was told is on its disk
// stays there.
func TestHostDiskFillsUp(t *testing.T) {
	isolated(t)
	l, disk := newSmallLab(t)
	l.create("w")
	l.exec("w", "echo acknowledged > kept; sync")
	free := fill(t, disk, 100<<20)
	// Each file that got its sync is acknowledged by a line.
	res := l.run("workspace", "exec", "w", "--quiet", "--timeout-seconds", "300", "--", `
		for i in $(seq 60); do
			head -c 4194304 /dev/urandom > f$i || exit 9
			sha256sum f$i > f$i.sum && sync f$i f$i.sum && echo $i || exit 9
		done`)
	t.Logf("%d files; %s", strings.Count(res.stdout, "\n"), res.stderr)
	if res.code == 0 {
		t.Errorf("240 MiB went into 100: %s", res)
	}
	acknowledged := strings.Fields(res.stdout)
	if ws := l.status("w"); ws.State == api.StateStopped && (ws.LastError == nil || !strings.Contains(*ws.LastError, "disk is full")) {
		t.Errorf("the machine ended, and not because of the disk: %v", ws.LastError)
	}
	free()
	l.eventually(within(20*time.Second), "the workspace has settled", func() bool {
		state := l.status("w").State
		return state == api.StateStopped || state == api.StateStarted
	})
	l.ok("workspace", "stop", "w")
	l.ok("workspace", "start", "w")
	l.checkKept("w", "acknowledged\n")
	for _, i := range acknowledged {
		if res := l.run("workspace", "exec", "w", "--quiet", "--", "sha256sum --quiet -c f"+i+".sum"); res.code != 0 {
			t.Errorf("file %s was synced and is lost: %s", i, res)
		}
	}
	l.check()
}
