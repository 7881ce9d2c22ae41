package faults_test

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// isolated skips what would hit the host itself.
func isolated(t *testing.T) {
	if engineName() == "host" {
		t.Skip("engine host has no guest of its own to break")
	}
}

// TestGuestDies lets the guest's root break the guest.
func TestGuestDies(t *testing.T) {
	isolated(t)
	tests := []struct {
		name, script string
		kernel       bool // needs a kernel of the guest's own
		reason       string
	}{
		{"agent", "kill -SEGV 1; kill -ABRT 1; sleep 600", false, ""},
		{"kernel panic", "echo c > /proc/sysrq-trigger; sleep 600", true, "panic"},
		{"power off", "echo o > /proc/sysrq-trigger; sleep 600", true, ""},
		{"reboot", "echo b > /proc/sysrq-trigger; sleep 600", true, ""},
	}
	l := newLab(t)
	l.create("w")
	l.exec("w", "echo acknowledged > kept; sync")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.kernel && engineName() != "qemu" {
				t.Skip("the guest has no kernel of its own")
			}
			here := *l
			here.T = t
			mustStart(&here)
			res := here.run("workspace", "exec", "w", "--timeout-seconds", "60", "--", tt.script)
			if tt.name == "agent" && engineName() == "qemu" && res.code == 124 {
				// Linux protects pid 1 from signals without a handler.
				t.Skip("the guest's kernel kept its first process alive")
			}
			if res.code != 125 || res.took > within(3*time.Second) {
				t.Errorf("the command that killed its guest: %s", res)
			}
			ws := here.status("w")
			if ws.State != api.StateStopped {
				t.Errorf("the workspace is %s", ws.State)
			}
			if tt.reason != "" && (ws.LastError == nil || !strings.Contains(*ws.LastError, tt.reason)) {
				t.Errorf("the reason %v does not say %q", ws.LastError, tt.reason)
			}
			here.check()
			kept(&here)
		})
	}
}

// TestGuestExhausted lets a guest run out of what it has. The machine survives.
func TestGuestExhausted(t *testing.T) {
	isolated(t)
	l := newLab(t)
	l.create("w")
	l.exec("w", "echo acknowledged > kept; sync")
	before := l.supervisorOf("w")
	// However busy the guest is: it answers.
	survived := func(l *lab) {
		l.Helper()
		l.checkKept("w", "acknowledged\n")
		if now := l.supervisorOf("w"); now != before {
			l.Error("the machine is another one")
		}
		l.check()
	}
	t.Run("memory", func(t *testing.T) {
		here := *l
		here.T = t
		var res api.ExecResult
		out := here.run("workspace", "exec", "w", "--json", "--timeout-seconds", "600", "--", "exec python3 -c 'x=[]\nwhile True: x.append(bytearray(16<<20))'")
		if err := json.Unmarshal([]byte(out.stdout), &res); err != nil || res.ExitCode != 137 || !res.OOMKilled {
			t.Errorf("a command that takes all memory: %v, %s", err, out)
		}
		survived(&here)
	})
	t.Run("disk", func(t *testing.T) {
		here := *l
		here.T = t
		res := here.run("workspace", "exec", "w", "--timeout-seconds", "20", "--", "dd if=/dev/urandom of=filler bs=1M 2>/dev/null; rm filler")
		if res.code == 125 {
			t.Errorf("the machine did not survive: %s", res)
		}
		survived(&here)
	})
	for _, user := range []string{"nobody", "root"} {
		t.Run("processes of "+user, func(t *testing.T) {
			here := *l
			here.T = t
			mustStart(&here)
			before = here.supervisorOf("w")
			cmd := here.command("workspace", "exec", "w", "--user", user, "--quiet", "--timeout-seconds", "600", "--", `exec python3 -c '
import os
while True:
  try: os.fork()
  except OSError: os.write(1, b"full\n")'`)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cmd.Process.Kill() })
			if _, err := io.ReadFull(out, make([]byte, len("full\n"))); err != nil {
				t.Fatalf("the fork bomb never came to its bound: %v", err)
			}
			go func() { _, _ = io.Copy(io.Discard, out) }()
			survived(&here)
			if engineName() == "qemu" {
				// A machine's clock would say more of this host than of the guest.
				var ran, waited int64
				said := here.exec("w", "i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done; read ran waited rest < /proc/$$/schedstat; echo $ran $waited")
				if _, err := fmt.Sscan(said, &ran, &waited); err != nil || waited > 10*ran {
					t.Errorf("beside a fork bomb a command ran and waited for %q ns, %v", said, err)
				}
			}
			if res := here.run("workspace", "stop", "w"); res.code != 0 || res.took > within(15*time.Second) {
				t.Errorf("stopping a machine with a fork bomb: %s", res)
			}
			_ = cmd.Wait() // it was ended
			kept(&here)
			here.check()
		})
	}
}
