package faults_test

import (
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
	for _, tt := range []struct{ name, script string }{
		{"memory", "python3 -c 'x=[]\nwhile True: x.append(bytearray(16<<20))'"},
		{"processes", "python3 -c '\nimport os\nwhile True:\n  try: os.fork()\n  except OSError: pass'"},
		{"disk", "dd if=/dev/urandom of=filler bs=1M 2>/dev/null; rm filler"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			here := *l
			here.T = t
			res := here.run("workspace", "exec", "w", "--timeout-seconds", "20", "--", tt.script)
			if res.code == 125 {
				t.Errorf("the machine did not survive: %s", res)
			}
			if res := here.run("workspace", "exec", "w", "--quiet", "--", "cat kept"); res.stdout != "acknowledged\n" || res.took > within(5*time.Second) {
				t.Errorf("the next command: %s", res)
			}
			if now := here.supervisorOf("w"); now != before {
				t.Errorf("the machine is another one")
			}
			here.check()
		})
	}
}
