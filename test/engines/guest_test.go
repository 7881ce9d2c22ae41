package engines_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// TestGuestAgent looks at what the guest agent makes of a bare kernel and an
// image, and that a workload cannot take it down. All in one machine.
func TestGuestAgent(t *testing.T) {
	if os.Getenv("PYRO_TEST_ENGINE") != "qemu" {
		t.Skip("runs with PYRO_TEST_ENGINE=qemu")
	}
	e := qemu.New(qemu.Options{Accel: os.Getenv("PYRO_QEMU_ACCEL")})
	caps := e.Probe(t.Context())
	testenv.Require(t, "qemu", caps.Available, caps.Detail)
	const diskMiB = 8 << 10
	g := enginetest.Boot(t, enginetest.Subject{Engine: e, Spec: bootable(t)}, func(s *engine.MachineSpec) { s.DiskMiB = diskMiB })
	m := machine{g.Client, time.Duration(max(1, caps.TimeScale))}

	t.Run("System", func(t *testing.T) {
		for command, want := range map[string]string{
			"hostname":                       "pyro-test\n",
			"cat /proc/1/comm":               "init\n",
			"pwd":                            "/workspace\n",
			"stat -fc %T /run /tmp /dev/shm": "tmpfs\ntmpfs\ntmpfs\n",
			"stat -fc %T /sys/fs/cgroup":     "cgroup2fs\n",
			"stat -fc %T /":                  "ext2/ext3\n",
			"stat -Lc %a /dev/pts/ptmx":      "666\n",
			"grep -c 'devpts.*gid=5,mode=620' /proc/mounts": "1\n",
			"stat -c %a /tmp":                                    "1777\n",
			"wc -c < /etc/machine-id":                            "33\n",
			"stat -fc %T /etc/machine-id":                        "tmpfs\n",
			"getent hosts pyro-test | cut -d' ' -f1":             "127.0.1.1\n",
			"cat /sys/class/net/lo/operstate; ls /sys/class/net": "unknown\nlo\n",
			"python3 -c \"import socket;s=socket.create_server(('127.0.0.1',0));socket.create_connection(s.getsockname());print('loop')\"": "loop\n",
			"ls -d /init /modules /newroot 2>/dev/null; true":       "",
			"ulimit -Sn; ulimit -Hn":                                "1024\n1048576\n",
			"cat /proc/self/cgroup | cut -d- -f1":                   "0::/workload/exec\n",
			"cat /proc/1/cgroup":                                    "0::/\n",
			"test -s /etc/resolv.conf && echo yes":                  "yes\n",
			"script -qec 'tty' /dev/null | tr -d '\\r' | cut -c1-9": "/dev/pts/\n",
		} {
			if out, errs, _ := m.sh(t, command, 0); out != want {
				t.Errorf("%s\ngives %q, want %q; stderr %q", command, out, want, errs)
			}
		}
		out, _, _ := m.sh(t, "df --output=size -m / | tail -1", 0)
		if n, _ := strconv.Atoi(strings.TrimSpace(out)); n < diskMiB*9/10 {
			t.Errorf("the root disk has %d MiB after growing to %d", n, diskMiB)
		}
	})
	t.Run("LeavesNothing", func(t *testing.T) {
		for _, command := range []string{
			`sleep 999 & sleep 999`,
			`setsid sleep 999 & sleep 999`,
			`nohup sleep 999 >/dev/null 2>&1 & sleep 999`,
			`(setsid sh -c 'sleep 999 & sleep 999' &); sleep 999`,
			`(env -i setsid sleep 999 &); sleep 999`,
			`trap '' TERM; sleep 999; sleep 999`,
		} {
			_, _, r := m.sh(t, command, 2)
			if !r.TimedOut || r.ExitCode != 124 {
				t.Errorf("%s: %+v", command, r)
			}
			if out, _, _ := m.sh(t, "pgrep -a sleep; true", 0); out != "" {
				t.Errorf("%s leaves:\n%s", command, out)
			}
		}
	})
	t.Run("OutOfMemory", func(t *testing.T) {
		_, _, r := m.sh(t, "exec tail /dev/zero", 0)
		if r.ExitCode != 137 || !r.OOMKilled {
			t.Errorf("a command that takes all memory: %+v", r)
		}
		m.alive(t)
	})
	t.Run("ForkBomb", func(t *testing.T) {
		ended := make(chan guestproto.ExecReply, 1)
		started := make(chan struct{})
		go func() {
			r, err := m.Exec(m.within(t, 2*time.Minute), guestproto.ExecRequest{Argv: []string{"bash", "-c", "b() { b | b & }; b; sleep 999"}, TimeoutSeconds: 20},
				guestclient.ExecIO{Started: func(int) { close(started) }})
			if err != nil {
				t.Error(err)
			}
			ended <- r
		}()
		<-started
		began := time.Now()
		m.alive(t)
		t.Logf("another command during the bomb took %v", time.Since(began))
		<-ended
		if out, _, _ := m.sh(t, "pgrep -c bash; true", 0); out != "0\n" {
			t.Errorf("%s processes of the bomb are left", out)
		}
	})
	t.Run("Orphans", func(t *testing.T) {
		m.sh(t, "i=0; while [ $i -lt 2000 ]; do (true &); i=$((i+1)); done", 0)
		if out, _, _ := m.sh(t, "grep -l '^State:.Z' /proc/[0-9]*/status; true", 0); out != "" {
			t.Errorf("zombies: %s", out)
		}
	})
	t.Run("Exact", func(t *testing.T) {
		wrong := make(chan string, 200)
		done := make(chan struct{})
		for i := range 10 {
			go func() {
				defer func() { done <- struct{}{} }()
				for j := range 20 {
					want := (i + j) % 2
					r, err := m.ExecPlain(m.within(t, time.Minute), guestproto.ExecRequest{Argv: []string{[]string{"true", "false"}[want]}})
					if err != nil || r.ExitCode != want {
						wrong <- fmt.Sprint(r, err)
					}
				}
			}()
		}
		for range 10 {
			<-done
		}
		close(wrong)
		for w := range wrong {
			t.Error(w)
		}
	})
	t.Run("LargeStream", func(t *testing.T) {
		const size = 300 << 20
		var n int64
		began := time.Now()
		r, err := m.Exec(m.within(t, time.Minute), guestproto.ExecRequest{Argv: []string{"head", "-c", strconv.Itoa(size), "/dev/zero"}},
			guestclient.ExecIO{Stdout: writerFunc(func(p []byte) (int, error) { n += int64(len(p)); return len(p), nil })})
		if err != nil || r.ExitCode != 0 || n != size {
			t.Errorf("%d bytes came, %+v, %v", n, r, err)
		}
		out, _, _ := m.sh(t, "grep VmHWM /proc/1/status", 0)
		kib, _ := strconv.Atoi(strings.Fields(out + " x x")[1])
		t.Logf("%.0f MB/s, the agent's largest size is %d KiB", float64(size)/1e6/time.Since(began).Seconds(), kib)
		if kib > 64<<10 {
			t.Errorf("the agent took %d KiB", kib)
		}
	})
	t.Run("Archives", func(t *testing.T) {
		m.sh(t, "mkdir -p a/b && head -c 5000000 /dev/urandom > a/b/f && ln -s b/f a/l && chmod 755 a/b/f", 0)
		want, _, _ := m.sh(t, "sha256sum < a/b/f; readlink a/l; stat -c %a a/b/f", 0)
		var tar bytes.Buffer
		if _, err := m.ExportArchive(m.within(t, time.Minute), "/workspace/a", &tar); err != nil {
			t.Fatal(err)
		}
		var plain bytes.Buffer
		if _, err := m.ExportArchivePlain(m.within(t, time.Minute), "/workspace/a", &plain); err != nil {
			t.Fatal(err)
		}
		if sha256.Sum256(tar.Bytes()) != sha256.Sum256(plain.Bytes()) {
			t.Error("the two forms give different archives")
		}
		if _, err := m.UploadArchive(m.within(t, time.Minute), "/workspace/a2", bytes.NewReader(tar.Bytes())); err != nil {
			t.Fatal(err)
		}
		got, _, _ := m.sh(t, "cd a2; sha256sum < b/f; readlink l; stat -c %a b/f", 0)
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

var _ io.Writer = writerFunc(nil)

type machine struct {
	*guestclient.Client
	scale time.Duration
}

func (m machine) within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d*m.scale)
	t.Cleanup(cancel)
	return ctx
}

func (m machine) sh(t *testing.T, command string, limit float64) (stdout, stderr string, r guestproto.ExecReply) {
	t.Helper()
	var out, errs bytes.Buffer
	r, err := m.Exec(m.within(t, time.Minute), guestproto.ExecRequest{Command: command, TimeoutSeconds: limit},
		guestclient.ExecIO{Stdout: &out, Stderr: &errs})
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return out.String(), errs.String(), r
}

// alive wants the agent to run another command.
func (m machine) alive(t *testing.T) {
	t.Helper()
	if _, _, r := m.sh(t, "true", 0); r.ExitCode != 0 {
		t.Errorf("the guest agent gives %+v for true", r)
	}
}
