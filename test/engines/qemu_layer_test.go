package engines_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// qemuSubject skips the test unless it is meant to run on QEMU.
func qemuSubject(t *testing.T) (*qemu.Engine, enginetest.Subject) {
	t.Helper()
	if os.Getenv("PYRO_TEST_ENGINE") != qemu.Name {
		t.Skip("runs with PYRO_TEST_ENGINE=qemu")
	}
	e := qemu.New(qemu.Options{Accel: os.Getenv("PYRO_QEMU_ACCEL")})
	caps := e.Probe(t.Context())
	testenv.Require(t, "qemu", caps.Available, caps.Detail)
	return e, enginetest.Subject{Engine: e, Spec: bootable(t)}
}

// qcow2Chain is what the disk tools open for layers on the image.
func qcow2Chain(image string, layers ...string) workspacedisk.Source {
	src := workspacedisk.Source{Path: image, Format: workspacedisk.FormatRaw}
	for _, path := range layers {
		below := src
		src = workspacedisk.Source{Path: path, Format: workspacedisk.FormatQcow2, Backing: &below}
	}
	return src
}

// TestFrozenDiskOfARunningMachine reads what was frozen while the machine goes on.
func TestFrozenDiskOfARunningMachine(t *testing.T) {
	_, subject := qemuSubject(t)
	image := subject.Spec.RootImage
	stack := enginetest.NewStack(t)
	var id string
	g := enginetest.Boot(t, subject, func(s *engine.MachineSpec) { s.Disk, id = stack.Disk, s.ID })
	want := manifest(t, g)
	guestRuns(t, g, "sync")
	began := time.Now()
	frozen := stack.Snapshot(t, g, enginetest.NewStack(t).Disk)
	t.Logf("the snapshot took %v", time.Since(began))
	guestRuns(t, g, "rm -r /workspace/many && echo later > /workspace/fresh && sync")

	d, err := workspacedisk.Open(t.Context(), qcow2Chain(image, frozen...), workspacedisk.Options{HideRuntime: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if diff := cmp.Diff(want, digests(t, d)); diff != "" {
		t.Errorf("files (-guest +frozen):\n%s", diff)
	}
	live := qcow2Chain(image, append(slices.Clone(stack.Layers), stack.Disk)...)
	if d, err := workspacedisk.Open(t.Context(), live, workspacedisk.Options{}); !errors.Is(err, api.ErrBusy) {
		if err == nil {
			d.Close()
		}
		t.Errorf("opening the disk that the machine writes: %v", err)
	}
	for name, wrong := range map[string]enginetest.Stack{
		"the same disk":              stack,
		"a layer that is not frozen": stack.On(t, append(slices.Clone(stack.Layers), stack.Disk)...),
	} {
		spec := subject.Spec
		spec.ID, spec.Dir, spec.Layers, spec.Disk = "second", t.TempDir(), wrong.Layers, wrong.Disk
		spec.Console, spec.Logger = io.Discard, slog.New(slog.DiscardHandler)
		m, err := subject.Engine.Start(t.Context(), spec)
		if err == nil {
			_ = m.Stop(t.Context(), 0)
		}
		if !errors.Is(err, api.ErrBusy) || api.Hint(err) == "" {
			t.Errorf("starting another machine on %s: %v (hint %q), want ErrBusy with a hint", name, err, api.Hint(err))
		}
	}
	if w := writableFiles(t, g.PIDs()[0], id); !slices.Equal(w, []string{stack.Disk}) {
		t.Errorf("QEMU can write %v, want %s only", w, stack.Disk)
	}
	guestRuns(t, g, "test ! -e /workspace/many && grep -q later /workspace/fresh")
}

// writableFiles are the regular files that the process of a machine has open for
// writing, but for the machine's own memory.
func writableFiles(t *testing.T, pid int, id string) (paths []string) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		path, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if err != nil || !strings.HasPrefix(path, "/") || strings.HasPrefix(path, "/dev/") || path == "/memfd:pyro-"+id+" (deleted)" {
			continue
		}
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd.Name()))
		if err != nil {
			t.Fatal(err)
		}
		var pos int64
		var flags int
		if _, err := fmt.Sscanf(string(info), "pos: %d\nflags: %o", &pos, &flags); err != nil {
			t.Fatalf("%s: %v", info, err)
		}
		if flags&unix.O_ACCMODE != os.O_RDONLY && !slices.Contains(paths, path) {
			paths = append(paths, path)
		}
	}
	return paths
}

// TestDeepChain starts a machine on 130 layers, freezes it there, and takes
// layers out.
func TestDeepChain(t *testing.T) {
	e, subject := qemuSubject(t)
	const depth = 130
	image := subject.Spec.RootImage
	st, err := os.Stat(image)
	if err != nil {
		t.Fatal(err)
	}
	stack := enginetest.NewStack(t)
	dir := t.TempDir()
	for i := range depth {
		path := filepath.Join(dir, fmt.Sprint(i))
		out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, fmt.Sprint(st.Size())).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		stack.Layers = append(stack.Layers, path)
	}
	sizeMiB := int(st.Size()>>20) + 1024
	on := func(s *engine.MachineSpec) { s.Layers, s.Disk, s.DiskMiB = stack.Layers, stack.Disk, sizeMiB }
	began := time.Now()
	g := enginetest.Boot(t, subject, on)
	t.Logf("the start on %d layers took %v", depth, time.Since(began))
	for i := range 4 {
		guestRuns(t, g, fmt.Sprintf("echo %d > /workspace/file%d; cp -r /etc /workspace/etc%d; echo %d > /workspace/last; sync", i, i, i, i))
		if i < 3 {
			stack.Snapshot(t, g, filepath.Join(dir, fmt.Sprintf("frozen%d", i)))
		}
	}
	const sums = "cd /workspace && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum && df --output=size -m / | tail -1"
	want := guestRuns(t, g, sums)
	var size int
	if _, err := fmt.Sscan(want[strings.LastIndex(strings.TrimSpace(want), "\n")+1:], &size); err != nil || size < sizeMiB*9/10 {
		t.Errorf("the disk has %d MiB, want about %d", size, sizeMiB)
	}
	chain := append(slices.Clone(stack.Layers), stack.Disk)
	if _, err := e.MergeLayer(t.Context(), chain, len(chain)-2, image, ""); !errors.Is(err, api.ErrBusy) {
		t.Errorf("merging into the disk of a running machine: %v, want ErrBusy", err)
	}
	if err := g.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}

	// The layers that hold something go one by one into what is above them, the
	// last one into the disk.
	for len(chain) > depth+1 {
		i := depth
		began := time.Now()
		if _, err := e.MergeLayer(t.Context(), chain, i, image, ""); err != nil {
			t.Fatal(err)
		}
		t.Logf("merging a layer took %v", time.Since(began))
		if err := os.Remove(chain[i]); err != nil {
			t.Fatal(err)
		}
		chain = slices.Delete(chain, i, i+1)
	}
	stack.Layers, stack.Disk = chain[:len(chain)-1], chain[len(chain)-1]
	again := enginetest.Boot(t, subject, on)
	if diff := cmp.Diff(want, guestRuns(t, again, sums)); diff != "" {
		t.Errorf("after merging (-before +after):\n%s", diff)
	}
}

// TestSnapshotThatQEMURefuses gives QEMU a spare that it cannot use: all of it is
// taken back, and the next snapshot works.
func TestSnapshotThatQEMURefuses(t *testing.T) {
	_, subject := qemuSubject(t)
	// qemu-img, and as long as a certain file is there, one that makes garbage.
	dir := t.TempDir()
	tool, broken := filepath.Join(dir, "qemu-img"), filepath.Join(dir, "broken")
	script := fmt.Sprintf("#!/bin/sh\nset -e\nqemu-img \"$@\"\ntest ! -e %s || for f; do case $f in *.new) echo garbage > $f;; esac; done\n", broken)
	if err := os.WriteFile(tool, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	subject.Engine = qemu.New(qemu.Options{Accel: os.Getenv("PYRO_QEMU_ACCEL"), ImgTool: tool})
	stack := enginetest.NewStack(t)
	var id string
	g := enginetest.Boot(t, subject, func(s *engine.MachineSpec) { s.Disk, id = stack.Disk, s.ID })
	for round := range 3 {
		if err := os.WriteFile(broken, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		spare := enginetest.NewStack(t).Disk
		_, err := g.Machine.(engine.DiskSnapshotter).SnapshotDisk(t.Context(), spare)
		if err == nil || !strings.Contains(err.Error(), "QEMU refuses blockdev-add") {
			t.Fatalf("SnapshotDisk with garbage at the spare: %v", err)
		}
		if left, err := os.ReadDir(filepath.Dir(spare)); err != nil || len(left) != 0 {
			t.Errorf("a refused snapshot leaves %v, %v", left, err)
		}
		if w := writableFiles(t, g.PIDs()[0], id); !slices.Equal(w, []string{stack.Disk}) {
			t.Errorf("after a refused snapshot QEMU can write %v, want %s only", w, stack.Disk)
		}
		if err := os.Remove(broken); err != nil {
			t.Fatal(err)
		}
		guestRuns(t, g, fmt.Sprintf("echo %d > /workspace/file%d && sync", round, round))
		stack.Snapshot(t, g, enginetest.NewStack(t).Disk)
	}
	if err := g.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	d, err := workspacedisk.Open(t.Context(), qcow2Chain(subject.Spec.RootImage, append(stack.Layers, stack.Disk)...), workspacedisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for round := range 3 {
		if r, err := d.Read(t.Context(), fmt.Sprintf("/workspace/file%d", round), 10); err != nil || r.Content != fmt.Sprintln(round) {
			t.Errorf("file of round %d: %+v, %v", round, r, err)
		}
	}
}

// TestKilledAtAnyMomentOfASnapshot kills QEMU around every step of a snapshot,
// its guest still booting: there is a disk that opens, and no spare unless it is
// in use.
func TestKilledAtAnyMomentOfASnapshot(t *testing.T) {
	_, subject := qemuSubject(t)
	spec := subject.Spec
	const rounds = 40
	succeeded := 0
	var whole time.Duration // of the first, which is let be
	for round := range rounds {
		stack := enginetest.NewStack(t)
		spec.ID, spec.Dir, spec.Disk = fmt.Sprintf("k%d", round), t.TempDir(), stack.Disk
		spec.Console, spec.Logger = io.Discard, slog.New(slog.DiscardHandler)
		m, err := subject.Engine.Start(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		id, err := hostproc.Identify(m.PIDs()[0])
		if err != nil {
			t.Fatal(err)
		}
		killed := make(chan error)
		snapped := make(chan struct{})
		go func() {
			if round == 0 {
				<-snapped
			} else {
				time.Sleep(whole * 3 / 2 * time.Duration(round) / rounds) // the moment is what is tried out
			}
			killed <- id.Kill(9)
		}()
		spare := enginetest.NewStack(t).Disk
		began := time.Now()
		frozen, snapErr := m.(engine.DiskSnapshotter).SnapshotDisk(t.Context(), spare)
		close(snapped)
		if round == 0 {
			whole = time.Since(began)
		}
		if err := <-killed; err != nil {
			t.Fatal(err)
		}
		if err := m.Stop(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		layers := []string{stack.Disk}
		if snapErr == nil {
			succeeded++
			layers = []string{frozen, spare}
		} else if left, err := os.ReadDir(filepath.Dir(spare)); err != nil || len(left) != 0 {
			t.Errorf("round %d: %v leaves %v, %v", round, snapErr, left, err)
		}
		d, err := workspacedisk.Open(t.Context(), qcow2Chain(spec.RootImage, layers...), workspacedisk.Options{})
		if err != nil {
			t.Fatalf("round %d, snapshot %v: %v", round, snapErr, err)
		}
		if _, err := d.List(t.Context(), "/", false); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		d.Close()
	}
	t.Logf("%d of %d snapshots succeeded; one takes %v", succeeded, rounds, whole)
	if succeeded == 0 {
		t.Error("not even the one that was let be succeeded")
	}
}

// guestRuns runs a shell command, which must succeed, and returns its stdout.
func guestRuns(t *testing.T, g *enginetest.Guest, command string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var out, errOut bytes.Buffer
	reply, err := g.Client.Exec(ctx, guestproto.ExecRequest{Command: command}, guestclient.ExecIO{Stdout: &out, Stderr: &errOut})
	if err != nil || reply.ExitCode != 0 {
		t.Fatalf("%s: exit code %d, %v\n%s", command, reply.ExitCode, err, errOut.String())
	}
	return out.String()
}
