package faults_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// TestStateDir puts the state directory where it cannot be used.
func TestStateDir(t *testing.T) {
	t.Run("a link", func(t *testing.T) {
		l := newLab(t)
		other := filepath.Join(l.dir, "link")
		if err := os.Symlink(l.state, other); err != nil {
			t.Fatal(err)
		}
		res := l.runEnv([]string{"PYRO_STATE_DIR=" + other}, "workspace", "list")
		if res.code == 0 || strings.Contains(res.stdout, "no workspaces") {
			t.Errorf("a link in the place of the state directory: %s", res)
		}
		l.check()
	})
	t.Run("of somebody else", func(t *testing.T) {
		testenv.Require(t, "root", os.Geteuid() == 0, "only root can give a directory away")
		l := newLab(t)
		if err := os.Chown(l.state, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		if res := l.run("workspace", "list"); res.code == 0 || !strings.Contains(res.stderr, l.state) {
			t.Errorf("the state directory of somebody else: %s", res)
		}
		if err := os.Chown(l.state, 0, 0); err != nil {
			t.Fatal(err)
		}
		l.check()
	})
	t.Run("read only", func(t *testing.T) {
		testenv.Require(t, "root", os.Geteuid() == 0, "only root can mount")
		l := newLab(t)
		bind := func(flags uintptr) error {
			if err := unix.Mount(l.state, l.state, "", unix.MS_BIND, ""); err != nil {
				return err
			}
			return unix.Mount("", l.state, "", unix.MS_BIND|unix.MS_REMOUNT|flags, "")
		}
		err := bind(unix.MS_RDONLY)
		testenv.Require(t, "root", err == nil, "bind mounts do not work here")
		res := l.run("workspace", "list")
		if res.code == 0 && !strings.Contains(res.stdout, "bystander") {
			t.Errorf("the workspaces of a read-only state directory were forgotten: %s", res)
		}
		if res.code != 0 && !strings.Contains(res.stderr, "read-only") {
			t.Errorf("the error does not say why: %s", res)
		}
		if res := l.run(l.createArgs("x")...); res.code == 0 || !strings.Contains(res.stderr, "read-only") {
			t.Errorf("making a workspace in a read-only state directory: %s", res)
		}
		if err := unix.Unmount(l.state, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		l.check()
	})
}

// TestDatabaseDamage damages the database in every way that it may be, under the
// eyes of a running machine, and repairs it with pyro's own command.
func TestDatabaseDamage(t *testing.T) {
	db := func(l *lab) string { return filepath.Join(l.state, "state.db") }
	edit := func(l *lab, change func([]byte) []byte) {
		l.Helper()
		// All into one file, as an orderly end leaves it.
		b, err := os.ReadFile(db(l))
		if err != nil {
			l.Fatal(err)
		}
		if err := os.WriteFile(db(l), change(b), 0o600); err != nil {
			l.Fatal(err)
		}
	}
	removeLog := func(l *lab) {
		os.Remove(db(l) + "-wal")
		os.Remove(db(l) + "-shm")
	}
	tests := []struct {
		name   string
		damage func(l *lab)
		// healthy says that nothing of value is damaged.
		healthy bool
	}{
		{"empty", func(l *lab) { removeLog(l); edit(l, func([]byte) []byte { return nil }) }, false},
		{"gone", func(l *lab) { removeLog(l); os.Remove(db(l)) }, false},
		{"half", func(l *lab) { removeLog(l); edit(l, func(b []byte) []byte { return b[:len(b)/2] }) }, false},
		{"first page", func(l *lab) {
			removeLog(l)
			edit(l, func(b []byte) []byte { copy(b[100:], make([]byte, 64)); return b })
		}, false},
		{"all pages but the first", func(l *lab) {
			removeLog(l)
			edit(l, func(b []byte) []byte {
				for at := 4096; at < len(b); at += 4096 {
					copy(b[at:], bytes.Repeat([]byte{0xff}, 64))
				}
				return b
			})
		}, false},
		{"another program's", func(l *lab) { removeLog(l); edit(l, func(b []byte) []byte { copy(b[68:72], "abcd"); return b }) }, false},
		{"not a database", func(l *lab) {
			removeLog(l)
			edit(l, func([]byte) []byte { return bytes.Repeat([]byte("text\n"), 4096) })
		}, false},
		{"log gone", removeLog, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			l.create("w")
			l.exec("w", "echo acknowledged > kept; sync")
			l.ok("workspace", "snapshot", "create", "w", "first")
			l.ok("workspace", "stop", "w")
			tt.damage(l)
			res := l.run("workspace", "list", "--json")
			switch {
			case tt.healthy:
				if res.code != 0 {
					t.Fatal(res)
				}
			case res.code == 0:
				t.Fatalf("a damaged database passed for a good one: %s", res)
			case errorCode(res) != "damaged" || !strings.Contains(res.stderr, "state.db") || !strings.Contains(res.stderr, "doctor --repair"):
				t.Errorf("the error names neither the file nor the repair: %s", res)
			}
			if res := l.run("workspace", "exec", "w", "--", "true"); !tt.healthy && res.code == 0 {
				t.Errorf("a command on a damaged database: %s", res)
			}
			if !l.bystander.Alive() {
				t.Error("a damaged database ended a running machine")
			}
			l.ok("doctor", "--repair")
			l.check()
			kept(l)
			l.ok("workspace", "reset", "w", "--snapshot", "first")
			if got := l.exec("w", "cat kept"); got != "acknowledged\n" {
				t.Errorf("the snapshot holds %q", got)
			}
			l.check()
		})
	}
}

// TestDatabaseNewer leaves a database alone that a later pyro has made.
func TestDatabaseNewer(t *testing.T) {
	l := newLab(t)
	l.ok("workspace", "list")
	path := filepath.Join(l.state, "state.db")
	os.Remove(path + "-wal")
	os.Remove(path + "-shm")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	was := append([]byte(nil), b[60:64]...)
	copy(b[60:64], []byte{0, 0, 0, 99}) // user_version: SQLite's file format, section 1.3
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if res := l.run("workspace", "list", "--json"); errorCode(res) != "unsupported" {
		t.Errorf("a newer database: %s", res)
	}
	copy(b[60:64], was)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	l.check()
}

// TestLocked holds a workspace's lock, as a command does that hangs.
func TestLocked(t *testing.T) {
	l := newLab(t)
	l.create("w")
	cmd := l.command("workspace", "stop", "w")
	cmd.Env = append(cmd.Env, failpoint.Variable+"=stop/gone=stop")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	at, err := hostproc.Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	l.untilHalted(at)
	var wg sync.WaitGroup
	for _, args := range [][]string{{"workspace", "start", "w"}, {"workspace", "delete", "w"}, {"workspace", "reset", "w"}, {"workspace", "update", "w", "--label", "a=b"}} {
		wg.Go(func() {
			began := time.Now()
			l.refused("busy", args...)
			if took := time.Since(began); took > within(5*time.Second) {
				t.Errorf("pyro %v was refused after %v", args, took)
			}
		})
	}
	wg.Wait()
	// Looking waits for nobody.
	began := time.Now()
	if ws := l.status("w"); ws == nil || time.Since(began) > within(5*time.Second) {
		t.Errorf("status of a locked workspace took %v: %+v", time.Since(began), ws)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	l.check()
	if ws := l.status("w"); ws.State != api.StateStopped {
		t.Errorf("the workspace is %s", ws.State)
	}
}
