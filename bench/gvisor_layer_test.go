package bench

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

//page:topic 3 gVisor: snapshots and layers of the disk

// onDisk starts a sandbox on a disk and returns when its first command has ended.
func (f *gvisorFixture) onDisk(b *testing.B, disk string, layers []string) (machine engine.Machine, sh func(script string)) {
	b.Helper()
	m, err := f.engine.Start(b.Context(), engine.MachineSpec{
		ID: "bench" + strconv.FormatInt(time.Now().UnixNano(), 36), Dir: b.TempDir(), RootImage: f.image, Disk: disk, Layers: layers,
		VCPUCount: 2, MemMiB: 1024, DiskMiB: 4096, AgentPath: program("pyro-agent"), Hostname: "bench",
		Console: io.Discard, Logger: slog.New(slog.DiscardHandler),
	})
	check(b, err)
	client := guestclient.New(m.DialGuest, guestclient.Options{Patience: 10 * time.Minute})
	sh = func(script string) {
		r, err := client.ExecPlain(b.Context(), guestproto.ExecRequest{Command: script, Cwd: "/workspace"})
		check(b, err)
		if r.ExitCode != 0 {
			b.Fatalf("%s: exit code %d: %s", script, r.ExitCode, r.Stderr)
		}
	}
	sh("true")
	return m, sh
}

// BenchmarkGvisorSnapshotDisk freezes the disk of a running sandbox with so much
// on it. The reference is a copy of the disk's image by cp and sync, which keeps
// nobody from writing meanwhile and is not recovered.
//
//page:row freezing a running disk
func BenchmarkGvisorSnapshotDisk(b *testing.B) {
	for _, mib := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("%dMiB", mib), func(b *testing.B) {
			f := newGvisorFixture(b)
			dir := b.TempDir()
			disk := filepath.Join(dir, "disk")
			m, sh := f.onDisk(b, disk, nil)
			defer func() { check(b, m.Stop(b.Context(), 0)) }()
			sh(fmt.Sprintf("head -c %dM /dev/urandom >big", mib))
			copied := func(name string, copy func(path string)) func() time.Duration {
				return func() time.Duration {
					sh("head -c 100k /dev/urandom >f; sync")
					path := filepath.Join(dir, name)
					defer os.Remove(path)
					began := time.Now()
					copy(path)
					return time.Since(began)
				}
			}
			compare(b, 5, copied("ours", func(path string) {
				_, err := m.(engine.DiskSnapshotter).SnapshotDisk(b.Context(), path)
				check(b, err)
			}), copied("theirs", func(path string) {
				check(b, exec.Command("cp", disk, path).Run())
				check(b, exec.Command("sync", path).Run())
			}))
		})
	}
}

// BenchmarkGvisorStartOnLayers starts a sandbox on so many layers with a MiB in
// each, up to the end of its first command. The reference is a start on the image.
//
//page:row start on layers
func BenchmarkGvisorStartOnLayers(b *testing.B) {
	for _, count := range []int{20, 130} {
		b.Run(strconv.Itoa(count), func(b *testing.B) {
			f := newGvisorFixture(b)
			dir := b.TempDir()
			var layers []string
			for i := range count {
				m, sh := f.onDisk(b, filepath.Join(dir, "disk"+strconv.Itoa(i)), layers)
				sh(fmt.Sprintf("head -c 1M /dev/urandom >%d; sync", i))
				layer, err := m.(engine.DiskSnapshotter).SnapshotDisk(b.Context(), filepath.Join(dir, strconv.Itoa(i)))
				check(b, err)
				check(b, m.Stop(b.Context(), 0))
				check(b, os.Remove(filepath.Join(dir, "disk"+strconv.Itoa(i))))
				layers = append(layers, layer)
			}
			start := func(layers []string) func() time.Duration {
				return func() time.Duration {
					began := time.Now()
					m, _ := f.onDisk(b, "", layers)
					defer func() { check(b, m.Stop(b.Context(), 0)) }()
					return time.Since(began)
				}
			}
			compare(b, 7, start(layers), start(nil))
		})
	}
}
