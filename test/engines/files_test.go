package engines_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/engine/host"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// chosenEngine is the one that PYRO_TEST_ENGINE names, else host.
func chosenEngine(t *testing.T) enginetest.Subject {
	t.Helper()
	switch name := os.Getenv("PYRO_TEST_ENGINE"); name {
	case gvisor.Name:
		e := gvisor.New(gvisor.Options{Runtime: filepath.Join(programs, "pyro-runsc")})
		caps := e.Probe(t.Context())
		testenv.Require(t, name, caps.Available, caps.Detail)
		return enginetest.Subject{Engine: e, Spec: bootable(t)}
	case "qemu":
		e := qemu.New(qemu.Options{Accel: os.Getenv("PYRO_QEMU_ACCEL")})
		caps := e.Probe(t.Context())
		testenv.Require(t, name, caps.Available, caps.Detail)
		return enginetest.Subject{Engine: e, Spec: bootable(t)}
	}
	return enginetest.Subject{Engine: host.New(), Spec: spec()}
}

// manyFiles is a tar of 10 000 files with 100 MB in 100 directories.
func manyFiles(t *testing.T) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	content := make([]byte, 10_000)
	for i := range 10_000 {
		copy(content, fmt.Sprintf("%d\n", i))
		h := &tar.Header{Name: fmt.Sprintf("d%02d/f%d", i/100, i), Mode: 0o644, Size: int64(len(content))}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestFiles puts 10 000 files into a guest, changes them, and removes what lies
// in a frozen layer: overlays do not rename directories of those.
func TestFiles(t *testing.T) {
	s := chosenEngine(t)
	caps := s.Engine.Probe(t.Context())
	stack := enginetest.NewStack(t)
	on := func(m *engine.MachineSpec) {
		m.Disk, m.Layers, m.MemMiB, m.VCPUCount = stack.Disk, slices.Clone(stack.Layers), 1024, 2
	}
	g := enginetest.Boot(t, s, on)
	m := machine{g.Client, time.Duration(max(1, caps.TimeScale))}
	took := func(what string, began time.Time) {
		t.Logf("%s took %v", what, time.Since(began).Round(time.Millisecond))
	}
	archive := manyFiles(t)

	began := time.Now()
	r, err := m.Sync(m.within(t, time.Minute), guestproto.SyncRequest{Destination: "/workspace"}, bytes.NewReader(archive))
	if err != nil || r.EntryCount != 10_000 {
		t.Fatalf("%+v, %v", r, err)
	}
	took("the first sync", began)
	digests := func() map[guestproto.Path]string {
		t.Helper()
		out := make(map[guestproto.Path]string)
		r, err := m.Manifest(m.within(t, time.Minute), "", func(e guestproto.ManifestEntry) error {
			out[e.Path] = e.SHA256
			return nil
		})
		if err != nil || r.ErrorCount > 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		return out
	}
	for range 2 {
		began = time.Now()
		if n := len(digests()); n != 10_100 {
			t.Errorf("the manifest has %d entries", n)
		}
		took("a manifest", began)
	}
	began = time.Now()
	if err := m.Flush(m.within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	took("a flush", began)
	began = time.Now()
	if _, err := m.Sync(m.within(t, time.Minute), guestproto.SyncRequest{Destination: "/workspace"}, bytes.NewReader(archive)); err != nil {
		t.Fatal(err)
	}
	took("a sync over all of it", began)
	before := digests()

	if _, ok := g.Machine.(engine.DiskSnapshotter); ok {
		if err := m.Flush(m.within(t, time.Minute)); err != nil {
			t.Fatal(err)
		}
		frozen := stack.Snapshot(t, g, stack.Disk+".spare")
		if err := g.Stop(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		stack = stack.On(t, frozen...)
		g = enginetest.Boot(t, s, on)
		m.Client = g.Client
		if got := digests(); len(got) != len(before) {
			t.Fatalf("the frozen disk has %d entries, there were %d", len(got), len(before))
		}
	}
	// A directory of the lower layer goes, another becomes a file, a third gets
	// the content of a fourth; then the same again with something that fails.
	var change bytes.Buffer
	w := tar.NewWriter(&change)
	for name, content := range map[string]string{"d01": "a file", "d02/f200": "changed", "new/deep/f": "new"} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(w, content)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	req := guestproto.SyncRequest{Destination: "/workspace", Remove: []guestproto.Path{"d00", "d03/f300"}}
	if _, err := m.Sync(m.within(t, time.Minute), req, bytes.NewReader(change.Bytes())); !errors.Is(err, api.ErrExists) {
		t.Errorf("a file for a directory: %v", err)
	}
	if after := digests(); len(after) != len(before) {
		t.Errorf("a sync that failed left %d entries of %d", len(after), len(before))
	}
	req.ReplaceKinds = true
	began = time.Now()
	r, err = m.Sync(m.within(t, time.Minute), req, bytes.NewReader(change.Bytes()))
	if err != nil || r.RemovedCount != 2 || r.EntryCount != 3 {
		t.Fatalf("%+v, %v", r, err)
	}
	took("removing two directories", began)
	after := digests()
	if n := len(after); n != len(before)-200-2-1+1+3 { // two directories, their files, one file; a file, three new
		t.Errorf("%d entries after, %d before", n, len(before))
	}
	for path := range after {
		if strings.HasPrefix(string(path), "d00") || strings.HasPrefix(string(path), "d01/") {
			t.Errorf("%s is still there", path)
		}
	}
	out, _, _ := m.sh(t, "ls -A / | grep pyro-stage; cat new/deep/f d01 d02/f200; stat -c %a d01", 0)
	if out != "newa filechanged600\n" {
		t.Errorf("the guest sees %q", out)
	}
}
