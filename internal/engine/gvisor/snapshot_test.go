package gvisor_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// What the guest wrote before it flushed is in a snapshot, however it flushed,
// and a file that was deleted but is still open is no trouble.
func TestSnapshotHasWhatWasFlushed(t *testing.T) {
	e := newEngine(t)
	m := start(t, e, on(t))
	guest(t, m, `cd /workspace
		seq 100000 >synced; sync synced
		dd if=/dev/zero of=conv bs=64k count=20 conv=fsync 2>/dev/null
		seq 200000 >flushed; mkdir -p a/b; echo deep >a/b/c; sync`)
	busy(t, m, "exec 5>/workspace/gone; seq 100000 >&5; rm /workspace/gone; echo going; sleep 60")
	// Promised to nobody, but what has reached the host is in it, too.
	guest(t, m, "echo late >/workspace/late")
	layer := freeze(t, m)
	stop(t, m)
	m = start(t, e, on(t, layer))
	got := guest(t, m, "cd /workspace; tail -n 1 synced flushed; cat a/b/c late; stat -c %s conv; ls gone 2>&1 | head -c 10")
	if want := "==> synced <==\n100000\n\n==> flushed <==\n200000\ndeep\nlate\n1310720\nls: cannot"; got != want {
		t.Errorf("the snapshot has %q, want %q", got, want)
	}
}

// busy runs a script in the guest that does not end, and returns when it has
// said something.
func busy(t *testing.T, m engine.Machine, script string) {
	t.Helper()
	out, in := io.Pipe()
	go func() {
		// Ends with the machine.
		_, err := guestclient.New(m.DialGuest, guestclient.Options{}).Exec(context.WithoutCancel(t.Context()),
			guestproto.ExecRequest{Command: script}, guestclient.ExecIO{Stdout: in})
		in.CloseWithError(err)
	}()
	if _, err := out.Read(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, out)
}

// A snapshot taken while the guest writes without pause is of one moment: what was
// written after something else is never there without it, and the file system is
// whole.
func TestSnapshotIsOfOneMoment(t *testing.T) {
	e := newEngine(t)
	spec := on(t)
	spec.VCPUCount = 2
	m := start(t, e, spec)
	guest(t, m, `dd if=/dev/zero bs=1M count=40 2>/dev/null | tr '\0' x >/workspace/big; sync`)
	busy(t, m, `cd /workspace
		{ i=0; while :; do i=$((i+1)); echo $i >>a; sync a; echo $i >>b; sync b; test $i != 20 || echo going; done; } &
		while :; do n=$(((n+1)%50)); mkdir -p d/$n; seq 3000 >d/$n/f; mv d/$n/f d/g$n; rm -r d/$n; done`)
	last := 0
	for range 3 {
		layer := freeze(t, m)
		other := start(t, e, on(t, layer))
		var a, b int
		if _, err := fmt.Sscan(guest(t, other, "cd /workspace; tail -n 1 a; tail -n 1 b"), &a, &b); err != nil || a < b || a > b+1 || a <= last {
			t.Errorf("the snapshot has a of round %d and b of round %d, %v; the one before had %d", a, b, err, last)
		}
		last = a
		if got := guest(t, other, "tail -c 3 /workspace/big; stat -c %s /workspace/big"); got != fmt.Sprintf("xxx%d\n", 40<<20) {
			t.Errorf("the large file: %q", got)
		}
		stop(t, other)
	}
}

// What the guest has deleted takes no room in a snapshot.
func TestSnapshotIsSmall(t *testing.T) {
	e := newEngine(t)
	if rootless() {
		t.Skip("without root a snapshot is the files")
	}
	m := start(t, e, on(t))
	guest(t, m, "cd /workspace; dd if=/dev/zero bs=1M count=40 2>/dev/null | tr '\\0' x >big; sync; rm big; echo small >f; sync")
	layer := freeze(t, m)
	var st unix.Stat_t
	if err := unix.Stat(layer, &st); err != nil || st.Blocks*512 > 10<<20 {
		t.Errorf("a snapshot of a small file takes %d bytes, %v", st.Blocks*512, err)
	}
	guest(t, m, "test -s /workspace/f")
}

// A paused machine stays paused, a running one goes on.
func TestSnapshotOfPaused(t *testing.T) {
	e := newEngine(t)
	m := start(t, e, on(t))
	guest(t, m, "echo 1 >/workspace/f; sync")
	p := m.(engine.Pauser)
	if err := p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	layer := freeze(t, m)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if out, err := tryGuest(ctx, m, "true"); err == nil {
		t.Errorf("a paused guest answered %q after the snapshot", out)
	}
	if err := p.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := guest(t, m, "cat /workspace/f"); got != "1\n" {
		t.Errorf("afterwards the guest says %q", got)
	}
	m2 := start(t, e, on(t, layer))
	if got := guest(t, m2, "cat /workspace/f"); got != "1\n" {
		t.Errorf("the snapshot has %q", got)
	}
}

// A snapshot that is given up leaves the machine as it was and nothing else.
func TestSnapshotGivenUp(t *testing.T) {
	e := newEngine(t)
	m := start(t, e, on(t))
	guest(t, m, "echo 1 >/workspace/f; sync")
	for _, after := range []time.Duration{0, time.Millisecond, 10 * time.Millisecond, 40 * time.Millisecond, 60 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		dir := t.TempDir()
		spare := filepath.Join(dir, "spare")
		_, err := m.(engine.DiskSnapshotter).SnapshotDisk(ctx, spare)
		cancel()
		if err == nil {
			t.Logf("complete within %s", after)
			continue
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
			t.Errorf("given up after %s: %v is left, %v", after, left, err)
		}
		if got := guest(t, m, "cat /workspace/f"); got != "1\n" {
			t.Errorf("afterwards the guest says %q", got)
		}
	}
	// Stop does not wait for the copy of a full disk.
	guest(t, m, "dd if=/dev/zero of=/workspace/big bs=1M count=40 2>/dev/null; sync")
	done := make(chan error)
	spare := filepath.Join(t.TempDir(), "spare")
	go func() {
		_, err := m.(engine.DiskSnapshotter).SnapshotDisk(context.WithoutCancel(t.Context()), spare)
		done <- err
	}()
	stop(t, m)
	if err := <-done; err == nil {
		t.Log("the snapshot was complete before the machine ended")
	} else if left, _ := os.ReadDir(filepath.Dir(spare)); !errors.Is(err, api.ErrUnavailable) || len(left) != 0 {
		t.Errorf("the snapshot of a machine that ends: %v; left: %v", err, left)
	}
}

// snapshotsVariable makes supervise take one snapshot after the other, at this
// path and a number.
const snapshotsVariable = "PYRO_TEST_GVISOR_SNAPSHOTS"

// superviseSnapshots is what supervise does then.
func superviseSnapshots(m engine.Machine, path string) int {
	for i := 0; ; i++ {
		fmt.Println("freezing")
		if _, err := m.(engine.DiskSnapshotter).SnapshotDisk(context.Background(), fmt.Sprint(path, i)); err != nil {
			fmt.Println(err)
			return 1
		}
	}
}

// A supervisor killed in the middle of a snapshot takes everything with it, and
// each snapshot is there whole or not at all.
func TestKillSupervisorFreezing(t *testing.T) {
	e := newEngine(t)
	for i := range 9 {
		after := time.Duration(i) * 15 * time.Millisecond
		t.Run(after.String(), func(t *testing.T) {
			spec := on(t)
			spec.Console, spec.Logger = nil, nil
			b, err := json.Marshal(spec)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "snapshot")
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), superviseVariable+"="+string(b), snapshotsVariable+"="+path)
			cmd.Stderr = testWriter{t}
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != "freezing"; {
			}
			time.Sleep(after) // the moment to be killed at, not a wait
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			awaitNot(t, "process ", spec, func() {})
			awaitNot(t, "", spec, e.Reap)
			spare := spec
			spare.Dir = filepath.Dir(path) // its loop devices
			awaitNot(t, "", spare, e.Reap)

			spec.Console, spec.Logger = testWriter{t}, slog.New(slog.NewTextHandler(testWriter{t}, nil))
			m := start(t, e, spec)
			if got := guest(t, m, "cat /workspace/f"); got != "kept\n" {
				t.Errorf("the disk's flushed file reads %q", got)
			}
			for i := 0; ; i++ {
				layer := fmt.Sprint(path, i)
				if _, err := os.Lstat(layer); err != nil {
					t.Logf("%d snapshots", i)
					break
				}
				fsck(t, layer)
				onIt := start(t, e, on(t, layer))
				if got := guest(t, onIt, "cat /workspace/f"); got != "kept\n" {
					t.Errorf("snapshot %d's flushed file reads %q", i, got)
				}
				stop(t, onIt)
			}
			// What a killed one has left of its copy is no trouble to the next.
			if left, _ := filepath.Glob(path + "*" + engine.UnfinishedSuffix); len(left) > 0 {
				t.Logf("left: %v", left)
				if _, err := m.(engine.DiskSnapshotter).SnapshotDisk(t.Context(), left[0][:len(left[0])-len(engine.UnfinishedSuffix)]); err != nil {
					t.Error(err)
				}
				if again, _ := filepath.Glob(path + "*" + engine.UnfinishedSuffix); len(again) > 0 {
					t.Errorf("left after the next snapshot: %v", again)
				}
			}
		})
	}
}
