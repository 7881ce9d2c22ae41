package gvisor_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/ext4image"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// on returns the specification of a machine whose disk stands on layers.
func on(t testing.TB, layers ...string) engine.MachineSpec {
	t.Helper()
	spec := newSpec(t)
	spec.Disk, spec.Layers = filepath.Join(spec.Dir, "disk"), layers
	return spec
}

// stop stops a machine politely.
func stop(t testing.TB, m engine.Machine) {
	t.Helper()
	if err := m.Stop(t.Context(), 10*time.Second); err != nil {
		t.Fatal(err)
	}
}

// freeze freezes what is on m's disk.
func freeze(t testing.TB, m engine.Machine) string {
	t.Helper()
	spare := filepath.Join(t.TempDir(), "frozen")
	frozen, err := m.(engine.DiskSnapshotter).SnapshotDisk(t.Context(), spare)
	if err != nil {
		t.Fatal(err)
	}
	if frozen != spare {
		t.Fatalf("froze %s instead of the copy %s", frozen, spare)
	}
	if left, err := os.ReadDir(filepath.Dir(spare)); err != nil || len(left) != 1 {
		t.Errorf("beside the snapshot: %v, %v", left, err)
	}
	fsck(t, frozen)
	return frozen
}

// layerImage writes a layer as package seed does.
func layerImage(t testing.TB, entries ...ext4image.Entry) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "seed.ext4")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w, err := ext4image.New(f, ext4image.Options{SizeBytes: 16 << 20, Time: time.Unix(1_700_000_000, 0)})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		content := "in " + e.Path + "\n"
		if e.Mode&ext4image.ModeFile == ext4image.ModeFile {
			e.Size = int64(len(content))
		}
		e.ModTime = time.Unix(1_700_000_000, 0)
		if err := w.Add(e, strings.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

const regular, directory = ext4image.ModeFile | 0o640, ext4image.ModeDir | 0o750

// Several machines stand on one layer at once, and none of them changes it.
func TestSharedLayer(t *testing.T) {
	e := newEngine(t)
	m := start(t, e, on(t))
	guest(t, m, "mkdir /workspace/d && seq 1000 >/workspace/d/seq && rm /lower/dir/file && sync")
	layer := freeze(t, m)
	var before []byte
	if !rootless() {
		before = fileDigest(t, layer)
	}
	stop(t, m)
	var wg sync.WaitGroup
	for i := range 3 {
		spec := on(t, layer)
		wg.Go(func() {
			m, err := e.Start(t.Context(), spec)
			if err != nil {
				t.Error(err)
				return
			}
			out, err := tryGuest(t.Context(), m, fmt.Sprintf("tail -n 1 /workspace/d/seq; echo %d >>/workspace/d/seq; tail -n 1 /workspace/d/seq; ls /lower/dir; rm -r /workspace/d; ls /workspace", i))
			if want := fmt.Sprintf("1000\n%d\n", i); err != nil || out != want {
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
	if !rootless() && !bytes.Equal(before, fileDigest(t, layer)) {
		t.Error("the layer has changed")
	}
	m = start(t, e, on(t, layer))
	if got := guest(t, m, "tail -n 1 /workspace/d/seq"); got != "1000\n" {
		t.Errorf("afterwards the layer's file ends with %q", got)
	}
	// While it runs, what it stands on can be nobody's disk.
	other := newSpec(t)
	other.Disk = layer
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if m, err := e.Start(ctx, other); !errors.Is(err, api.ErrBusy) {
		if err == nil {
			_ = m.Stop(context.Background(), 0)
		}
		t.Errorf("starting a machine that writes to the layer of another: %v, want ErrBusy", err)
	}
}

// A seed's files are on the disk at once, and the highest layer that has a
// directory gives it its attributes.
func TestSeedLayer(t *testing.T) {
	e := newEngine(t)
	if c := e.Probe(t.Context()); c.SeedLayer == rootless() {
		t.Fatalf("Probe: SeedLayer = %v", c.SeedLayer)
	}
	if rootless() {
		t.Skip("without root no image can be mounted")
	}
	seed := layerImage(t, ext4image.Entry{Path: "/upper", Mode: ext4image.ModeDir | 0o755},
		ext4image.Entry{Path: "/upper/workspace", Mode: ext4image.ModeDir | 0o711, UID: 7},
		ext4image.Entry{Path: "/upper/workspace/f", Mode: regular, UID: 5, GID: 6},
		ext4image.Entry{Path: "/upper/workspace/d", Mode: directory},
		ext4image.Entry{Path: "/upper/workspace/d/g", Mode: regular})
	m := start(t, e, on(t, seed))
	const look = "stat -c '%n %a %u:%g' /workspace /workspace/*; cat /workspace/f; ls /lower/dir; stat -c %a /"
	want := "/workspace 711 7:0\n/workspace/d 750 0:0\n/workspace/f 640 5:6\nin /upper/workspace/f\nfile\n755\n"
	if diff := cmp.Diff(want, guest(t, m, look)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	guest(t, m, "chmod 755 /workspace; rm /workspace/f; sync")
	layer := freeze(t, m)
	stop(t, m)
	m = start(t, e, on(t, seed, layer))
	if got := guest(t, m, "stat -c '%n %a %u:%g' /workspace /workspace/*; cat /workspace/d/g"); got != "/workspace 755 7:0\n/workspace/d 750 0:0\nin /upper/workspace/d/g\n" {
		t.Errorf("on the seed and a layer: %q", got)
	}
}

// A disk may stand on more layers than a workspace has snapshots.
func TestManyLayers(t *testing.T) {
	e := newEngine(t)
	if rootless() {
		t.Skip("the layers of this test are images")
	}
	const count = 130
	var layers []string
	for i := range count {
		layers = append(layers, layerImage(t, ext4image.Entry{Path: fmt.Sprintf("/upper/workspace/%d", i), Mode: regular},
			ext4image.Entry{Path: fmt.Sprintf("/upper/workspace/of-%d", i/100), Mode: regular, UID: uint32(i)}))
	}
	begin := time.Now()
	m := start(t, e, on(t, layers...))
	got := guest(t, m, "cd /workspace; set -- [0-9]*; echo $#; cat 0 64 129; stat -c %u of-0 of-1; echo new >0; cat 0")
	t.Logf("a start on %d layers took %s", count, time.Since(begin))
	want := "130\nin /upper/workspace/0\nin /upper/workspace/64\nin /upper/workspace/129\n99\n129\nnew\n"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	stop(t, m)
	for len(layers) <= 256 {
		layers = append(layers, layers[0])
	}
	if _, err := e.Start(t.Context(), on(t, layers...)); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("starting on %d layers: %v, want ErrExhausted", len(layers), err)
	}
}

func TestLayersRefused(t *testing.T) {
	e := newEngine(t)
	if rootless() {
		t.Skip("the layers of this test are images")
	}
	good := layerImage(t, ext4image.Entry{Path: "/upper/workspace/f", Mode: regular})
	changed := func(change func(b []byte) []byte) string {
		b, err := os.ReadFile(good)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "layer")
		if err := os.WriteFile(path, change(b), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, tt := range []struct {
		name   string
		layers []string
		class  error
	}{
		{"missing", []string{good + ".none"}, os.ErrNotExist},
		{"a directory", []string{t.TempDir()}, api.ErrDamaged},
		{"twice", []string{good, good}, api.ErrInvalid},
		{"no file system", []string{changed(func(b []byte) []byte { return make([]byte, len(b)) })}, api.ErrDamaged},
		{"an empty file", []string{changed(func([]byte) []byte { return nil })}, api.ErrDamaged},
		{"cut off", []string{changed(func(b []byte) []byte { return b[:len(b)/4] })}, api.ErrDamaged},
		{"a journal to recover", []string{good, changed(func(b []byte) []byte { b[1024+0x60] |= 4; return b })}, api.ErrDamaged},
		{"without upper", []string{layerImage(t, ext4image.Entry{Path: "/workspace/f", Mode: regular})}, api.ErrDamaged},
	} {
		t.Run(tt.name, func(t *testing.T) {
			spec := on(t, tt.layers...)
			m, err := e.Start(t.Context(), spec)
			if err == nil {
				_ = m.Stop(context.Background(), 0)
			}
			if !errors.Is(err, tt.class) {
				t.Errorf("%v, want %v", err, tt.class)
			}
			if left := leftovers(spec.ID, spec.Dir); left != "" {
				t.Error(left)
			}
		})
	}
	t.Run("the disk itself", func(t *testing.T) {
		spec := on(t)
		spec.Layers = []string{spec.Disk}
		if _, err := e.Start(t.Context(), spec); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("%v, want ErrInvalid", err)
		}
	})
}

// guestShows prints what a guest sees of its files, but not what a sandbox or
// overlayfs makes up as long as it knows no better: times, of which gVisor has
// its own until a file is changed again by utimes, link counts of files of lower
// layers, sizes of directories.
const guestShows = `cd /; ls -AR lower workspace; for f in lower/* lower/*/* lower/*/*/* workspace workspace/* workspace/*/* workspace/*/*/*; do
	test -e $f || test -h $f || continue
	stat -c '%n %a %u:%g %F' $f
	test -f $f && ! test -h $f && stat -c %s $f && cat $f; done; stat -c %y workspace/d/x 2>/dev/null; true`

// Whatever the guest does to what the layers below gave it, the next machine
// sees it as it was, and so do the disk tools.
func TestEveryLayerCounts(t *testing.T) {
	e := newEngine(t)
	spec := on(t)
	m := start(t, e, spec)
	// Without root, directories that came from below cannot be moved.
	move := "mv"
	if rootless() {
		move = "true"
	}
	for i, change := range []string{
		"mkdir -p /workspace/d/e && echo 1 >/workspace/d/e/f && echo h >/workspace/h1 && ln /workspace/h1 /workspace/h2 && ln -s d/e /workspace/l && " + move + " /lower/dir /lower/moved",
		"echo 2 >>/workspace/d/e/f && rm /workspace/h1 && mkdir /workspace/h1 && rm /workspace/l && chmod 700 /workspace/d && " + move + " /lower/moved /workspace/moved",
		"rm -r /workspace/d && mkdir /workspace/d && echo new >/workspace/d/x && touch -d '2001-02-03 04:05:06.789' /workspace/d/x && " + move + " /workspace/moved /lower/dir",
		"chmod 4755 /workspace/d/x && rm -rf /lower && mkdir /lower && echo again >/lower/dir && rm -r /workspace/h1",
	} {
		guest(t, m, change+" && sync")
		want := guest(t, m, guestShows)
		layer := freeze(t, m)
		if diff := cmp.Diff(want, guest(t, m, guestShows)); diff != "" {
			t.Errorf("change %d: after the snapshot the guest sees (-before +after):\n%s", i, diff)
		}
		stop(t, m)
		spec = on(t, append(spec.Layers, layer)...)
		m = start(t, e, spec)
		if diff := cmp.Diff(want, guest(t, m, guestShows)); diff != "" {
			t.Errorf("change %d: on its snapshot (-want +got):\n%s", i, diff)
		}
		if rootless() {
			continue
		}
		src := workspacedisk.Source{Path: spec.RootImage, Format: workspacedisk.FormatRaw}
		for _, l := range spec.Layers {
			src.Layers = append(src.Layers, workspacedisk.Source{Path: l, Format: workspacedisk.FormatRaw})
		}
		if diff := cmp.Diff(guestFiles(t, m), diskFiles(t, src)); diff != "" {
			t.Errorf("change %d: the disk tools show (-guest +disk):\n%s", i, diff)
		}
	}
	stop(t, m)
}

// guestFiles and diskFiles list /lower and /workspace in one form.
func guestFiles(t *testing.T, m engine.Machine) string {
	t.Helper()
	return guest(t, m, `walk() { for f in "$1"/*; do test -e $f || test -h $f || continue; stat -c '%n %a' $f; test -d $f && ! test -h $f && walk $f; done; true; }; walk /lower; walk /workspace`)
}

func diskFiles(t *testing.T, src workspacedisk.Source) string {
	t.Helper()
	d, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var out strings.Builder
	for _, dir := range []string{"/lower", "/workspace"} {
		if err := d.Walk(t.Context(), dir, func(e workspacedisk.WalkEntry) error {
			_, err := fmt.Fprintf(&out, "%s/%s %o\n", dir, e.Path, e.Mode)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	return out.String()
}

// A disk that is made larger at a later start has the room, on layers as well.
func TestDiskGrows(t *testing.T) {
	e := newEngine(t)
	if rootless() {
		t.Skip("without root the disk is a directory")
	}
	m := start(t, e, on(t))
	guest(t, m, "echo kept >/workspace/f; sync")
	spec := on(t, freeze(t, m))
	stop(t, m)
	m = start(t, e, spec)
	guest(t, m, "echo more >>/workspace/f; sync")
	stop(t, m)
	spec.DiskMiB = 300
	m, err := e.Start(t.Context(), spec)
	if errors.Is(err, api.ErrDenied) {
		// What it could not grow to does not matter to who asks for less.
		spec.DiskMiB = 64
		m = start(t, e, spec)
		if got := guest(t, m, "cat /workspace/f"); got != "kept\nmore\n" {
			t.Errorf("after the refused growth: %q", got)
		}
		stop(t, m)
		testenv.Require(t, "gvisor-grow", false, "this host's root may not grow a file system: "+api.Hint(err))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Stop(context.Background(), 0) })
	got := guest(t, m, "cat /workspace/f; dd if=/dev/zero of=/workspace/big bs=1M count=200 2>/dev/null && sync && stat -c %s /workspace/big")
	if want := fmt.Sprintf("kept\nmore\n%d\n", 200<<20); got != want {
		t.Errorf("on the larger disk: %q, want %q", got, want)
	}
	freeze(t, m)
	stop(t, m)
	fsck(t, spec.Disk)
	if st, err := os.Stat(spec.Disk); err != nil || st.Size() != 300<<20 {
		t.Errorf("the disk: %v, %v", st, err)
	}
	if _, err := os.Stat(filepath.Join(spec.Dir, gvisor.LayerFile)); err == nil {
		t.Error("a second disk was made where the first would be without a place of its own")
	}
}
