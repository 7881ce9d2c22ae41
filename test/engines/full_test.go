package engines_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/supervisor"
	"github.com/pyro-mcp/pyro/test/netns"
)

// fullSubject is the engine that PYRO_TEST_ENGINE names, if its machines can be
// saved with their memory.
func fullSubject(t *testing.T) enginetest.Subject {
	t.Helper()
	switch os.Getenv("PYRO_TEST_ENGINE") {
	case "qemu":
		_, s := warmSubject(t)
		return s
	case gvisor.Name:
		return gvisorSubject(t)
	}
	t.Skip("runs with PYRO_TEST_ENGINE=qemu or gvisor")
	return enginetest.Subject{}
}

// TestFullSnapshot copies a machine while a service of it counts and a file has
// not reached its disk.
func TestFullSnapshot(t *testing.T) {
	s := fullSubject(t)
	dir := t.TempDir()
	disk, spare, memory := filepath.Join(dir, "disk"), filepath.Join(dir, "spare"), filepath.Join(dir, "memory")
	g := enginetest.Boot(t, s, func(m *engine.MachineSpec) { m.Disk, m.Hostname = disk, "original" })
	service, err := g.Client.StartService(t.Context(), guestproto.StartService{
		ServiceName: "counter", Command: "i=0; while :; do i=$((i+1)); echo $i > /run/count; cat /proc/sys/kernel/random/uuid > /workspace/uuid-$i; sleep 0.05; done",
	})
	if err != nil {
		t.Fatal(err)
	}
	guestRuns(t, g, "head -c 5000000 /dev/urandom > /workspace/file; cat /workspace/file | md5sum > /run/sum; head -c 32 /dev/urandom > /run/private")
	before := identity(t, g)
	at := count(t, g)
	standStill(t, g)
	began := time.Now()
	frozen, err := g.Machine.(engine.FullSnapshotter).SnapshotFull(t.Context(), spare, memory)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(memory)
	if err != nil || st.Mode().Perm()&0o077 != 0 || frozen != disk && frozen != spare {
		t.Fatalf("the snapshot: %v %v, frozen %s", st, err, frozen)
	}
	t.Logf("the snapshot took %v", time.Since(began))

	copies := map[string]*enginetest.Guest{"original": g}
	ids := map[string]map[string]string{"original": identity(t, g)}
	for _, name := range []string{"copy-1", "copy-2"} {
		began := time.Now()
		c := enginetest.Boot(t, s, func(m *engine.MachineSpec) {
			m.Layers, m.Disk, m.Memory, m.Hostname = []string{frozen}, filepath.Join(dir, name), memory, name
		})
		t.Logf("%s answers after %v", name, time.Since(began))
		copies[name], ids[name] = c, identity(t, c)
		if now, err := c.Client.StatusService(t.Context(), "counter"); err != nil || now.PID == nil || *now.PID != *service.PID || now.State != service.State {
			t.Errorf("the service in %s: %+v, %v; want that of before, %+v", name, now, err, service)
		}
		if d := skew(t, c); d > maxSkew {
			t.Errorf("the clock of %s is wrong by %v", name, d)
		}
	}
	for name, c := range copies {
		first := count(t, c)
		if first < at {
			t.Errorf("%s counts %d after %d", name, first, at)
		}
		for end := time.Now().Add(30 * time.Second); count(t, c) <= first; {
			if time.Now().After(end) {
				t.Fatalf("%s does not count on from %d", name, first)
			}
		}
		guestRuns(t, c, "md5sum < /workspace/file | cmp - /run/sum && test -s /run/private")
		guestRuns(t, c, "echo "+name+" > /workspace/mine && sync")
		for other, id := range ids {
			for what, value := range id {
				if other != name && ids[name][what] == value {
					t.Errorf("%s and %s have the same %s", name, other, what)
				}
			}
		}
	}
	for _, what := range []string{"hello", "boot id", "machine id", "hostname"} {
		if before[what] != ids["original"][what] {
			t.Errorf("being saved has changed the %s", what)
		}
	}
	for name, c := range copies {
		if got := strings.TrimSpace(guestRuns(t, c, "cat /workspace/mine")); got != name {
			t.Errorf("%s has the file of %s", name, got)
		}
	}
	if _, err := g.Machine.(engine.FullSnapshotter).SnapshotFull(t.Context(), filepath.Join(dir, "spare-2"), memory); !errors.Is(err, api.ErrExists) {
		t.Errorf("saving to a file that is there: %v, want ErrExists", err)
	}
}

func count(t *testing.T, g *enginetest.Guest) int {
	t.Helper()
	// The file is empty for a moment whenever it is written.
	for {
		if n, err := strconv.Atoi(strings.TrimSpace(guestRuns(t, g, "cat /run/count"))); err == nil {
			return n
		}
	}
}

// standStill suspends the guest for a while in which its service would count.
func standStill(t *testing.T, g *enginetest.Guest) {
	t.Helper()
	err := g.Client.Suspend(t.Context())
	if errors.Is(err, api.ErrUnsupported) {
		return // its copies need nothing before they may run
	}
	if err != nil {
		t.Fatal(err)
	}
	uuids := func() int {
		t.Helper()
		list, err := g.Client.ListFiles(t.Context(), "/workspace", false, func(guestproto.FileEntry) error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		return int(list.EntryCount)
	}
	before := uuids()
	<-time.After(2 * time.Second) // nothing is to happen
	if after := uuids(); after != before {
		t.Errorf("a suspended guest has made %d files", after-before)
	}
	r := guestproto.Resume{TimeNS: time.Now().UnixNano(), Entropy: make([]byte, guestproto.MinEntropy)}
	if err := g.Client.Resume(t.Context(), r); err != nil {
		t.Fatal(err)
	}
}

// TestSaveConnected saves a machine with connections in both directions: they go
// on, with every byte, and a copy has a network of its own.
func TestSaveConnected(t *testing.T) {
	e := isolating(t)
	outside := netns.New(t)
	echo := outside.Echo(t)
	p, m := supervised(t, e, api.NetworkEgressPublishing, outside)
	service := func(name, command string) {
		t.Helper()
		if _, err := m.StartService(t.Context(), guestproto.StartService{ServiceName: name, Command: command}); err != nil {
			t.Fatal(err)
		}
	}
	service("echo", echoes)
	service("caller", `exec python3 -c '
import os, socket, time
n = made = 0
while True:
    try:
        s = socket.create_connection(("`+strings.Replace(echo.String(), ":", `", `, 1)+`), 5)
        s.settimeout(30)
        f = s.makefile("rwb")
        made += 1
        open("/run/made", "w").write(str(made))
        while True:
            n += 1
            f.write(b"%d\n" % n); f.flush()
            line = f.readline()
            if not line: raise OSError("end")
            assert int(line) == n
            open("/run/called.new", "w").write(str(n)); os.rename("/run/called.new", "/run/called")
    except OSError as e: print(e, flush=True); time.sleep(0.05)'`)
	called := func(m machine) int {
		t.Helper()
		for deadline := m.within(t, time.Minute); ; {
			out, _, _ := m.sh(t, "cat /run/called 2>/dev/null", 0)
			if n, err := strconv.Atoi(out); err == nil {
				return n
			}
			if deadline.Err() != nil {
				t.Fatal("the guest does not reach the outside")
			}
		}
	}
	dial := func(p *supervisor.Process) net.Conn {
		t.Helper()
		port, err := p.Publish(t.Context(), supervisor.PublishedPort{GuestPort: 7000})
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(5 * time.Minute))
		return c
	}
	called(m) // both are up
	c := dial(p)
	sent, got := sha256.New(), sha256.New()
	stop, sending, receiving := make(chan struct{}), make(chan error, 1), make(chan error, 1)
	go func() {
		random := rand.NewChaCha8([32]byte{})
		for block := make([]byte, 64<<10); ; {
			select {
			case <-stop:
				sending <- c.(*net.TCPConn).CloseWrite()
				return
			default:
			}
			_, _ = random.Read(block)
			sent.Write(block)
			if _, err := c.Write(block); err != nil {
				sending <- err
				return
			}
		}
	}()
	go func() {
		_, err := io.Copy(got, c)
		receiving <- err
	}()
	var frozen, memory string
	for range 3 {
		before := called(m)
		dir := t.TempDir()
		var err error
		memory = filepath.Join(dir, "memory")
		if frozen, err = p.Snapshot(t.Context(), filepath.Join(dir, "spare"), memory); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		for deadline := m.within(t, 10*time.Second); called(m) <= before+10; {
			if deadline.Err() != nil {
				t.Fatal("the connection to the outside stands still")
			}
		}
		t.Logf("the guest reached the outside again after %v", time.Since(began))
		if e.Name() == "qemu" {
			break // the next one would stand on this one's disk
		}
	}
	// gVisor saves no network device, so connections out of the guest are made anew
	// there. None may hang.
	if made, _, _ := m.sh(t, "cat /run/made", 0); e.Name() == "qemu" && made != "1" {
		t.Errorf("the connection to the outside was made %s times", made)
	} else {
		t.Logf("the connection to the outside was made %s times", made)
	}
	close(stop)
	if err := errors.Join(<-sending, <-receiving); err != nil {
		t.Errorf("the connection from outside: %v", err)
	}
	if !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Error("over the connection from outside came other bytes than were sent")
	}

	p2, m2 := supervised(t, e, api.NetworkEgressPublishing, outside, func(s *engine.MachineSpec) {
		s.ID, s.Memory, s.Layers = "copy", memory, []string{frozen}
	})
	c = dial(p2)
	if _, err := io.WriteString(c, "hello"); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 5)
	if _, err := io.ReadFull(c, answer); err != nil || string(answer) != "hello" {
		t.Errorf("the copy's service answers %q, %v", answer, err)
	}
	if out, errs, _ := m2.sh(t, "set -- "+echo.String()+"; "+connects, 0); out != "reached "+echo.String()+"\n" {
		t.Errorf("in the copy: %q, %s", out, errs)
	}
}

// TestSaveHostile saves sandboxes whose guests have seen to it that they cannot
// be saved: that is an error, and nothing else happens to them.
func TestSaveHostile(t *testing.T) {
	s := gvisorSubject(t)
	disk := filepath.Join(t.TempDir(), "disk")
	g := enginetest.Boot(t, s, func(m *engine.MachineSpec) { m.Disk, m.MemMiB, m.DiskMiB = disk, 256, 2048 })
	save := func() (memory, frozen string, err error) {
		dir := t.TempDir()
		memory = filepath.Join(dir, "memory")
		frozen, err = g.Machine.(engine.FullSnapshotter).SnapshotFull(t.Context(), filepath.Join(dir, "spare"), memory)
		if left, _ := os.ReadDir(dir); err != nil && len(left) != 0 {
			t.Errorf("a failed snapshot leaves %v", left)
		}
		return memory, frozen, err
	}
	goesOn := func(after string) {
		t.Helper()
		if got := guestRuns(t, g, "echo on"); got != "on\n" {
			t.Errorf("after %s the guest says %q", after, got)
		}
	}
	for name, tt := range map[string]struct {
		hold string
		want error
		text string
	}{
		"network device": {`import fcntl, struct
f = open("/dev/net/tun", "r+b", 0)
fcntl.ioctl(f, 0x400454ca, struct.pack("16sH", b"tun7", 0x1001))`, api.ErrUnavailable, "/dev/net/tun does not support save"},
		"deleted file": {`import os
f = open("/workspace/big", "wb"); os.unlink("/workspace/big")
for i in range(400): f.write(b"x" * (1 << 20))
f.flush()`, api.ErrExhausted, "deleted"},
		// Many are opened, and forty thousand files are more than most sandboxes may.
		"open files": {`import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
files = []
try:
    for i in range(40000): files.append(open("/workspace/f%d" % (i % 7000), "w"))
except OSError: pass`, nil, ""},
		"a connection to the host": {`import socket, threading, time
# Nobody else may have one; this tries whenever somebody listens.
def tries():
    while True:
        s = socket.socket(socket.AF_UNIX)
        try: s.connect("/run/pyro/host/agent.sock"); kept.append(s)
        except OSError: time.sleep(0.001)
kept = []
threading.Thread(target=tries, daemon=True).start()`, nil, ""},
	} {
		_, err := g.Client.StartService(t.Context(), guestproto.StartService{
			ServiceName: strings.ReplaceAll(name, " ", "-"), Command: "exec python3 -c '" + tt.hold + `
open("/run/holding", "w"); time = __import__("time"); time.sleep(1000)'`,
			Readiness: &guestproto.Readiness{Type: "file", Path: "/run/holding"}, ReadyTimeoutSeconds: 60,
		})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			began := time.Now()
			_, _, err = save()
			t.Logf("%s: %v (%s) after %v", name, err, api.Hint(err), time.Since(began))
			if tt.want != nil && (!errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text)) {
				t.Errorf("%s: %v, want %v", name, err, tt.want)
			}
			goesOn(name)
		}
		if _, err := g.Client.StopService(t.Context(), strings.ReplaceAll(name, " ", "-"), 0); err != nil {
			t.Fatal(err)
		}
		guestRuns(t, g, "rm -rf /run/holding /workspace/*; sync")
	}
	memory, frozen, err := save()
	if err != nil {
		t.Fatalf("when all is over: %v", err)
	}
	c := enginetest.Boot(t, s, func(m *engine.MachineSpec) {
		m.Disk, m.MemMiB, m.DiskMiB, m.Memory, m.Layers = filepath.Join(t.TempDir(), "disk"), 256, 2048, memory, []string{frozen}
	})
	if got := guestRuns(t, c, "echo on"); got != "on\n" {
		t.Errorf("the copy says %q", got)
	}
}
