package bench

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

//page:topic 5 QEMU: snapshots and layers of the disk

// onDisk starts a machine on a disk, this process being its supervisor, and
// waits for its guest.
func (f *fixture) onDisk(b *testing.B, disk string, layers []string) (*guest, engine.Machine) {
	m, err := f.engine.Start(b.Context(), engine.MachineSpec{
		ID: "bench", Dir: b.TempDir(), RootImage: f.image.Path, Kernel: f.kernel.Kernel, Disk: disk, Layers: layers,
		VCPUCount: 1, MemMiB: 512, AgentPath: program("pyro-agent"), Console: io.Discard, Logger: slog.New(slog.DiscardHandler),
	})
	check(b, err)
	g := &guest{guestclient.New(m.DialGuest, guestclient.Options{}), func() { check(b, m.Stop(b.Context(), 0)) }}
	_, err = g.client.Hello(b.Context())
	check(b, err)
	return g, m
}

// write puts a MiB on the guest's disk.
func (g *guest) write(b *testing.B, name string) {
	b.Helper()
	reply, err := g.client.Exec(b.Context(), guestproto.ExecRequest{Command: "head -c 1048576 /dev/urandom > " + name + " && sync " + name}, guestclient.ExecIO{})
	check(b, err)
	if reply.ExitCode != 0 {
		b.Fatalf("writing in the guest: exit code %d", reply.ExitCode)
	}
}

// BenchmarkQEMUSnapshotDisk freezes the disk of a running machine. The reference
// is the same machine started by hand, told on its monitor to do the same by
// itself, with paths: no confinement, nothing flushed to the host's disk.
//
//page:row freezing a running disk
func BenchmarkQEMUSnapshotDisk(b *testing.B) {
	f := newFixture(b)
	dir := b.TempDir()
	ours, m := f.onDisk(b, filepath.Join(dir, "disk"), nil)
	defer ours.end()
	monitor := filepath.Join(dir, "qmp")
	theirs := f.byHand(b, "-qmp", "unix:"+monitor+",server=on,wait=off")
	defer theirs.end()
	conn, err := net.Dial("unix", monitor)
	check(b, err)
	defer conn.Close()
	answers := bufio.NewReader(conn)
	tell(b, conn, answers, "qmp_capabilities", nil)
	n := 0
	compare(b, 15, func() time.Duration {
		n++
		ours.write(b, "f")
		began := time.Now()
		_, err := m.(engine.DiskSnapshotter).SnapshotDisk(b.Context(), filepath.Join(dir, fmt.Sprint("ours", n)))
		check(b, err)
		return time.Since(began)
	}, func() time.Duration {
		n++
		theirs.write(b, "f")
		began := time.Now()
		tell(b, conn, answers, "blockdev-snapshot-sync", map[string]any{
			"device": "virtio0", "snapshot-file": filepath.Join(dir, fmt.Sprint("theirs", n)), "format": "qcow2",
		})
		return time.Since(began)
	})
}

// tell runs one command of QEMU's machine protocol.
func tell(b *testing.B, w io.Writer, answers *bufio.Reader, command string, args map[string]any) {
	b.Helper()
	if args == nil {
		args = map[string]any{}
	}
	check(b, json.NewEncoder(w).Encode(map[string]any{"execute": command, "arguments": args}))
	for {
		line, err := answers.ReadBytes('\n')
		check(b, err)
		var a struct {
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		check(b, json.Unmarshal(line, &a))
		if a.Error != nil {
			b.Fatalf("%s: %s", command, a.Error)
		}
		if a.Return != nil {
			return
		}
	}
}

// BenchmarkQEMUStartOnLayers starts a machine on twenty layers with a MiB in
// each, up to its agent's first answer. The reference is a start on the image.
//
//page:row start on twenty layers
func BenchmarkQEMUStartOnLayers(b *testing.B) {
	f := newFixture(b)
	dir := b.TempDir()
	g, m := f.onDisk(b, filepath.Join(dir, "disk"), nil)
	var layers []string
	for i := range 20 {
		g.write(b, fmt.Sprint("file", i))
		layer, err := m.(engine.DiskSnapshotter).SnapshotDisk(b.Context(), filepath.Join(dir, fmt.Sprint(i)))
		check(b, err)
		layers = append(layers, layer)
	}
	g.end()
	start := func(layers []string) func() time.Duration {
		return func() time.Duration {
			began := time.Now()
			g, _ := f.onDisk(b, "", layers)
			defer g.end()
			return time.Since(began)
		}
	}
	compare(b, 7, start(layers), start(nil))
}
