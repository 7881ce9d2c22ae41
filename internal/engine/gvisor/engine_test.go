package gvisor_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
)

func TestGuest(t *testing.T) {
	e := newEngine(t)
	m := start(t, e, newSpec(t))
	for _, tt := range []struct{ name, command, want string }{
		{"hostname", "hostname", "web\n"},
		{"hosts", "cat /etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tweb\n"},
		{"machine id", "{ read id; echo ${#id}; } </etc/machine-id", "32\n"},
		{"root", "id -u", "0\n"},
		{"environment", "cat /lower/dir/file", "from the environment\n"},
		{"change", "touch /lower/dir/new && mv /lower/dir /lower/moved && ls /lower/moved", "file\nnew\n"},
		{"loopback only", "cat /proc/net/dev | { read a; read b; while read dev rest; do echo $dev; done; }", "lo:\n"},
		{"memory", "{ read name kib unit; echo $kib; } </proc/meminfo", "262144\n"},
		{"tmp", "stat -f -c %T /tmp", "tmpfs\n"},
		{"run", "stat -f -c %T /run", "tmpfs\n"},
		{"terminal device", "ls /dev/pts/ptmx /dev/ptmx", "/dev/ptmx\n/dev/pts/ptmx\n"},
		{"no token", "echo $PYRO_AGENT_TOKEN", "\n"},
		{"host's sockets", "touch /run/pyro/host/x", "touch: cannot touch '/run/pyro/host/x': Read-only file system\n"},
		{"agent", "{ echo x >/run/pyro/agent; } 2>/dev/null || echo refused", "refused\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, guest(t, m, tt.command)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestDiskSurvivesStopAndStart(t *testing.T) {
	e := newEngine(t)
	spec := newSpec(t)
	before := fileDigest(t, spec.RootImage)

	m := start(t, e, spec)
	guest(t, m, "echo kept >/workspace/f && rm /lower/dir/file && echo gone >/tmp/f")
	if err := m.Stop(t.Context(), 10*time.Second); err != nil {
		t.Fatal(err)
	}
	exit, err := m.Wait(t.Context())
	if err != nil || !exit.Requested {
		t.Errorf("Wait after Stop = %+v, %v", exit, err)
	}
	fsck(t, filepath.Join(spec.Dir, gvisor.LayerFile))

	m = start(t, e, spec)
	if diff := cmp.Diff("kept\n", guest(t, m, "cat /workspace/f; ls /lower/dir /tmp")[:5]); diff != "" {
		t.Error(diff)
	}
	if got := guest(t, m, "ls /lower/dir/file /tmp/f 2>&1 | cat"); strings.Count(got, "No such file") != 2 {
		t.Errorf("what was removed and what was in memory is there again:\n%s", got)
	}
	if err := m.Stop(t.Context(), 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, fileDigest(t, spec.RootImage)) {
		t.Error("the environment's image has changed")
	}
}

func TestDiskIsBounded(t *testing.T) {
	e := newEngine(t)
	if rootless() {
		t.Skip("without root the disk is a directory")
	}
	spec := newSpec(t)
	spec.DiskMiB = 100 // rounded up to 128
	m := start(t, e, spec)
	got := guest(t, m, "dd if=/dev/zero of=/workspace/big bs=1M count=200 2>&1 | cat")
	if !strings.Contains(got, "No space left on device") {
		t.Errorf("writing 200 MiB to a disk of 128 MiB: %s", got)
	}
	guest(t, m, "rm /workspace/big && echo fits >/workspace/small")
	if err := m.Stop(t.Context(), 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Join(spec.Dir, gvisor.LayerFile)); err != nil || st.Size() != 128<<20 {
		t.Errorf("the layer is %d bytes, %v", st.Size(), err)
	}
}

func TestPause(t *testing.T) {
	e := newEngine(t)
	m := start(t, e, newSpec(t))
	guest(t, m, "true")
	p := m.(engine.Pauser)
	for range 2 { // a second Pause changes nothing
		if err := p.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if out, err := tryGuest(ctx, m, "true"); err == nil {
		t.Errorf("a paused guest answered %q", out)
	}
	if err := p.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := guest(t, m, "cat /lower/dir/file"); got != "from the environment\n" {
		t.Errorf("after Resume the guest said %q", got)
	}
}

func TestStopPaused(t *testing.T) {
	e := newEngine(t)
	spec := newSpec(t)
	m := start(t, e, spec)
	guest(t, m, "echo kept >/workspace/f")
	if err := m.(engine.Pauser).Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := m.Stop(t.Context(), 10*time.Second); err != nil {
		t.Fatal(err)
	}
	m = start(t, e, spec)
	if got := guest(t, m, "cat /workspace/f"); got != "kept\n" {
		t.Errorf("a file written before the pause reads %q after Stop and Start", got)
	}
}

func TestManyAtOnce(t *testing.T) {
	e := newEngine(t)
	var wg sync.WaitGroup
	for i := range 4 {
		spec := newSpec(t)
		spec.ID = fmt.Sprintf("%s-%d", spec.ID, i)
		spec.Dir = filepath.Join(filepath.Dir(spec.Dir), fmt.Sprint(i))
		if err := os.Mkdir(spec.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			m, err := e.Start(t.Context(), spec)
			if err != nil {
				t.Error(err)
				return
			}
			want := fmt.Sprintf("machine %d\n", i)
			out, err := tryGuest(t.Context(), m, fmt.Sprintf("echo machine %d >/workspace/f; cat /workspace/f", i))
			if err != nil || out != want {
				t.Errorf("machine %d said %q, %v", i, out, err)
			}
			if err := m.Stop(t.Context(), 10*time.Second); err != nil {
				t.Error(err)
			}
			if left := leftovers(spec.ID, spec.Dir); left != "" {
				t.Error(left)
			}
		})
	}
	wg.Wait()
}

func TestOneDiskOneMachine(t *testing.T) {
	e := newEngine(t)
	spec := newSpec(t)
	m := start(t, e, spec)
	guest(t, m, "true")
	second := spec
	second.ID += "b"
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := e.Start(ctx, second); !errors.Is(err, api.ErrBusy) {
		t.Errorf("starting a second machine on a disk in use: %v, want ErrBusy", err)
	}
	if left := leftovers(second.ID, filepath.Join(spec.Dir, "none")); left != "" {
		t.Errorf("the refused start left %s", left)
	}
}

func TestStartRefuses(t *testing.T) {
	e := newEngine(t)
	for _, tt := range []struct {
		name   string
		change func(*engine.MachineSpec)
	}{
		{"id with a slash", func(s *engine.MachineSpec) { s.ID = "../x" }},
		{"empty id", func(s *engine.MachineSpec) { s.ID = "" }},
		{"no image", func(s *engine.MachineSpec) { s.RootImage += ".none" }},
		{"no agent", func(s *engine.MachineSpec) { s.AgentPath += ".none" }},
		{"image that is no file system", func(s *engine.MachineSpec) { s.RootImage = s.AgentPath }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec := newSpec(t)
			tt.change(&spec)
			if m, err := e.Start(t.Context(), spec); err == nil {
				_ = m.Stop(context.Background(), 0)
				t.Fatal("Start succeeded")
			}
			if left := leftovers(spec.ID, spec.Dir); left != "" {
				t.Error(left)
			}
		})
	}
}

// The disk of an ephemeral machine is its sandbox's own: as large as was asked
// for, no part of the guest's memory, and with no name on the host.
func TestEphemeralDisk(t *testing.T) {
	spec := newSpec(t)
	spec.Ephemeral, spec.DiskMiB, spec.MemMiB = true, 300, 256
	m := start(t, newEngine(t), spec)
	var blocks, size int64
	if _, err := fmt.Sscan(guest(t, m, "stat -f -c '%b %S' /"), &blocks, &size); err != nil || blocks*size != 300<<20 {
		t.Errorf("a disk of 300 MiB has %d blocks of %d bytes, %v", blocks, size, err)
	}
	// More than fits, and more than the memory.
	if said := guest(t, m, "head -c 400M /dev/urandom 2>&1 >/workspace/big || true"); !strings.Contains(said, "No space left on device") {
		t.Errorf("a full disk says %q", said)
	}
	sum := guest(t, m, "md5sum </workspace/big")
	guest(t, m, "python3 -c 'bytearray(128 << 20)' && test $(stat -c %s /workspace/big) -gt 299000000")
	if again := guest(t, m, "md5sum </workspace/big"); again != sum {
		t.Error("the file has changed")
	}
	if _, err := m.(engine.DiskSnapshotter).SnapshotDisk(t.Context(), filepath.Join(t.TempDir(), "layer")); !errors.Is(err, api.ErrUnsupported) {
		t.Errorf("a snapshot: %v", err)
	}
	err := filepath.WalkDir(spec.Dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrPermission) { // the host's overlay's own
			return nil
		}
		if err == nil && d.Type().IsRegular() {
			st, err := d.Info()
			if err != nil || st.Size() > 1<<20 {
				t.Errorf("%s is there, %d bytes, %v", path, st.Size(), err)
			}
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if err := m.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(spec.Dir); err != nil {
		t.Error(err)
	}
	spec = newSpec(t)
	spec.Ephemeral, spec.Disk = true, filepath.Join(t.TempDir(), "disk")
	if _, err := newEngine(t).Start(t.Context(), spec); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("with a disk that stays: %v", err)
	}
}

// What a guest has deleted is neither in its disk's image, even if it was there
// before, nor in a copy.
func TestDeletedIsGone(t *testing.T) {
	if rootless() {
		t.Skip("the host's file system keeps what it likes")
	}
	spec := newSpec(t)
	disk := filepath.Join(spec.Dir, gvisor.LayerFile)
	m := start(t, newEngine(t), spec)
	holds := func(path, text string) bool {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(b, []byte(text))
	}
	guest(t, m, "echo first-4711 >/workspace/f && sync")
	if !holds(disk, "first-4711") {
		t.Fatal("what was flushed is not in the image")
	}
	guest(t, m, "rm /workspace/f && sync")
	frozen, err := m.(engine.DiskSnapshotter).SnapshotDisk(t.Context(), filepath.Join(t.TempDir(), "layer"))
	if err != nil {
		t.Fatal(err)
	}
	guest(t, m, "echo second-4711 >/workspace/f && sync && rm /workspace/f && sync")
	if err := m.Stop(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{frozen, disk} {
		for _, text := range []string{"first-4711", "second-4711"} {
			if holds(path, text) {
				t.Errorf("%s still holds %q", filepath.Base(path), text)
			}
		}
	}
}

// fsck fails the test unless e2fsck finds the image clean.
func fsck(t testing.TB, image string) {
	t.Helper()
	if rootless() {
		return // a directory
	}
	if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

func fileDigest(t testing.TB, path string) []byte {
	t.Helper()
	out, err := exec.Command("sha256sum", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}
