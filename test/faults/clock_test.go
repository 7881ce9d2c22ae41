package faults_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/store"
)

// year is a jump of the wall clock that no time to live survives.
const year = 365 * 24 * time.Hour

// TestClockJumps sets the wall clock by moving what was written down by it:
// nobody can tell the difference.
func TestClockJumps(t *testing.T) {
	thoroughOnly(t)
	l := newLab(t)
	for _, tt := range []struct {
		name string
		jump time.Duration
	}{{"an hour ahead", time.Hour}, {"a year ahead", year}, {"an hour back", -time.Hour}, {"a year back", -year}} {
		t.Run(tt.name, func(t *testing.T) {
			here := *l
			here.T = t
			here.create("lasting")
			here.create("ending")
			here.ok("workspace", "update", "lasting", "--ttl-seconds", "600")
			here.ok("workspace", "update", "ending", "--ttl-seconds", "3")
			for _, name := range []string{"lasting", "ending"} {
				here.changeRecord(name, func(ws *store.Workspace) {
					at := ws.ExpiresAt.Add(-tt.jump)
					ws.ExpiresAt = &at
				})
			}
			if ws := here.status("lasting"); ws == nil || ws.State != api.StateStarted {
				t.Fatalf("a clock that was set ended a workspace: %+v", ws)
			}
			here.eventually(within(20*time.Second), "the other one's time is over", func() bool { return here.status("ending") == nil })
			here.check()
			here.ok("workspace", "delete", "lasting")
		})
	}
}

// TestSuspend halts everything of a machine and a command in it for a while, as a
// host that sleeps does. Both go on, the guest's clock is right, and what was to
// end meanwhile ends.
func TestSuspend(t *testing.T) {
	thoroughOnly(t)
	l := newLab(t)
	l.create("w")
	l.exec("w", "echo acknowledged > kept; sync")
	l.ok("workspace", "update", "w", "--ttl-seconds", "3600")
	l.create("ending")
	cmd := l.command("workspace", "exec", "w", "--stdin", "--quiet", "--timeout-seconds", "600", "--", "echo begun; read line; echo $line")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	if _, err := io.ReadFull(out, make([]byte, len("begun\n"))); err != nil {
		t.Fatalf("the command did not begin: %v", err)
	}
	caller, err := hostproc.Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	halted := []hostproc.Identity{caller}
	for _, name := range []string{"w", "ending", "bystander"} {
		_, rec := l.machineOf(name)
		halted = append(append(halted, *rec.Supervisor), rec.Processes...)
	}
	const asleep = 5 * time.Second
	l.ok("workspace", "update", "ending", "--ttl-seconds", fmt.Sprint(asleep.Seconds()))
	for _, id := range halted {
		_ = id.Kill(syscall.SIGSTOP) // not every one has to live
	}
	time.Sleep(asleep)
	for _, id := range halted {
		_ = id.Kill(syscall.SIGCONT)
	}
	from := time.Now()
	var guest int64
	if _, err := fmt.Sscan(l.exec("w", "date +%s"), &guest); err != nil {
		t.Fatal(err)
	}
	if clock, to := time.Unix(guest, 0), time.Now(); clock.Before(from.Add(-5*time.Second)) || clock.After(to.Add(5*time.Second)) {
		t.Errorf("between %v and %v the guest's clock says %v", from, to, clock)
	}
	if _, err := io.WriteString(in, "went on\n"); err != nil {
		t.Error(err)
	}
	rest, _ := io.ReadAll(out)
	if err := cmd.Wait(); err != nil || string(rest) != "went on\n" {
		t.Errorf("the command that was halted: %v, %q", err, rest)
	}
	l.eventually(within(20*time.Second), "the other one's time is over", func() bool { return l.status("ending") == nil })
	l.checkKept("w", "acknowledged\n")
	l.check()
}

// TestReboot makes what a host finds after a reboot: no process, no socket,
// other boot id, and the old pids given to strangers.
func TestReboot(t *testing.T) {
	l := newLab(t)
	l.create("w")
	l.exec("w", "echo acknowledged > kept; sync")
	l.ok("workspace", "update", "w", "--ttl-seconds", "3600")
	stranger := exec.Command("sleep", "776655")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stranger.Process.Kill(); _ = stranger.Wait() })
	strangerID, err := hostproc.Identify(stranger.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	const lastBoot = "00000000-0000-4000-8000-000000000000"
	for _, name := range []string{"w", "bystander"} {
		dir, rec := l.machineOf(name)
		l.powerOff(rec)
		var raw map[string]any
		if err := statedir.ReadJSON(dir.RecordFile(), &raw); err != nil {
			t.Fatal(err)
		}
		old := strangerID
		old.BootID = lastBoot
		raw["supervisor"], raw["processes"] = old, []hostproc.Identity{old}
		if err := statedir.WriteJSON(dir.RecordFile(), raw); err != nil {
			t.Fatal(err)
		}
		os.Remove(dir.ControlSocket())
		os.Remove(dir.GuestSocket())
		l.changeRecord(name, func(ws *store.Workspace) {
			if ws.BootID != "" {
				// The time since boot begins anew.
				ws.BootID, ws.ExpiresBoot = lastBoot, 1
			}
		})
	}
	l.bystander = hostproc.Identity{}
	for _, ws := range l.list() {
		if ws.State != api.StateStopped {
			t.Errorf("after a reboot workspace %s is %s", ws.WorkspaceID, ws.State)
		}
	}
	l.check()
	kept(l)
	l.ok("workspace", "start", "bystander")
	if got := l.exec("bystander", "cat mark"); got != "untouched\n" {
		t.Errorf("the bystander's file holds %q", got)
	}
	l.check()
	if !strangerID.Alive() {
		t.Error("a process that has the number of one from before the reboot was killed")
	}
}

// powerOff kills everything of a machine at the same moment, as far as anybody
// can tell: halted first, nothing reacts to the death of another.
func (l *lab) powerOff(rec machineRecord) {
	l.Helper()
	all := append([]hostproc.Identity{*rec.Supervisor}, rec.Processes...)
	for _, id := range all {
		_ = id.Kill(syscall.SIGSTOP) // may have ended by itself
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, id := range all {
		if err := id.KillLadder(ctx, 0); err != nil {
			l.Fatal(err)
		}
	}
}

// changeRecord changes a workspace's record behind pyro's back.
func (l *lab) changeRecord(name string, change func(*store.Workspace)) {
	l.Helper()
	d, err := statedir.Open(l.state)
	if err != nil {
		l.Fatal(err)
	}
	ctx := context.Background()
	st, err := store.Open(ctx, d.Database(), store.Options{WorkspacesDir: d.WorkspacesDir()})
	if err != nil {
		l.Fatal(err)
	}
	defer st.Close()
	ws, err := st.Find(ctx, name)
	if err != nil {
		l.Fatal(err)
	}
	if _, err := st.Update(ctx, ws.WorkspaceID, func(ws *store.Workspace) error { change(ws); return nil }); err != nil {
		l.Fatal(err)
	}
}

// shiftExpiry moves a workspace's end by both clocks.
func shiftExpiry(l *lab, name string, seconds int) {
	l.Helper()
	by := time.Duration(seconds) * time.Second
	l.changeRecord(name, func(ws *store.Workspace) {
		at := ws.ExpiresAt.Add(by)
		ws.ExpiresAt = &at
		ws.ExpiresBoot += int64(by)
	})
}
