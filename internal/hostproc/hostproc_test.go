package hostproc_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// sleeper starts a process that is reaped as soon as it ends.
func sleeper(t *testing.T) hostproc.Identity {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	id, err := hostproc.Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	reaped := make(chan struct{})
	go func() { _ = cmd.Wait(); close(reaped) }()
	t.Cleanup(func() { _ = cmd.Process.Kill(); <-reaped })
	return id
}

// A record whose pid now belongs to somebody else must not hit them.
func TestKillSparesStrangers(t *testing.T) {
	id := sleeper(t)
	for name, stranger := range map[string]hostproc.Identity{
		"OtherStartTime": {PID: id.PID, StartTime: id.StartTime + 1, BootID: id.BootID},
		"OtherBoot":      {PID: id.PID, StartTime: id.StartTime, BootID: "another"},
	} {
		if err := stranger.Kill(unix.SIGKILL); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if stranger.Alive() {
			t.Errorf("%s: counts as alive", name)
		}
		if !id.Alive() {
			t.Fatalf("%s: the sleeper was killed", name)
		}
	}
	for _, pid := range []int{1, 0, -1, -id.PID} {
		if err := (hostproc.Identity{PID: pid, BootID: id.BootID}).Kill(unix.SIGKILL); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("pid %d: %v, want ErrInvalid", pid, err)
		}
	}
}

func TestKillLadder(t *testing.T) {
	id := sleeper(t)
	if err := id.KillLadder(t.Context(), 5*time.Second); err != nil {
		t.Fatal(err)
	}
	if id.Alive() {
		t.Error("still alive")
	}
	if err := id.KillLadder(t.Context(), time.Second); err != nil {
		t.Errorf("second time: %v", err)
	}
}

func TestKillLadderEndsWithKill(t *testing.T) {
	cmd := exec.Command("sh", "-c", `trap "" TERM; echo ready; while :; do sleep 1000; done`)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	id, err := hostproc.Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	go cmd.Wait()
	if err := id.KillLadder(t.Context(), 100*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if id.Alive() {
		t.Error("survived")
	}
}

func TestWaitGoneHonoursItsContext(t *testing.T) {
	id := sleeper(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := id.WaitGone(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("WaitGone = %v", err)
	}
}

func TestIdentifyNobody(t *testing.T) {
	id := sleeper(t)
	if err := id.KillLadder(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if id.Alive() {
		t.Error("still alive")
	}
	if got, err := hostproc.Identify(id.PID); err == nil && got == id && got.Alive() || err != nil && !errors.Is(err, api.ErrNotFound) {
		t.Errorf("Identify of a dead process: %+v, %v", got, err)
	}
}

// The lock belongs to the open file: a child that inherited it keeps it.
func TestLockPassesToChildren(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	lock, err := hostproc.TryLock(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hostproc.TryLock(path); !errors.Is(err, api.ErrBusy) {
		t.Errorf("second TryLock: %v, want ErrBusy", err)
	}
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.ExtraFiles = append(cmd.ExtraFiles, lock.File())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if err := lock.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := hostproc.TryLock(path); !errors.Is(err, api.ErrBusy) {
		t.Errorf("TryLock while a child holds it: %v, want ErrBusy", err)
	}
	in.Close()
	_ = cmd.Wait()
	again, err := hostproc.TryLock(path)
	if err != nil {
		t.Fatalf("TryLock after the child ended: %v", err)
	}
	again.Close()
}

// A lock on a file that its last holder has removed keeps nobody out: who waited
// for it gets one on the file that is there then.
func TestLockOfRemovedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	for range 2000 {
		first, err := hostproc.TryLock(path)
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan *hostproc.Lock)
		go func() {
			for {
				l, err := hostproc.TryLock(path)
				if err == nil {
					got <- l
					return
				}
				if !errors.Is(err, api.ErrBusy) {
					t.Error(err)
				}
			}
		}()
		if err := errors.Join(os.Remove(path), first.Close()); err != nil {
			t.Fatal(err)
		}
		second := <-got
		if l, err := hostproc.TryLock(path); !errors.Is(err, api.ErrBusy) {
			l.Close()
			t.Fatalf("beside the lock that somebody has: %v, want ErrBusy", err)
		}
		second.Close()
	}
}
