package enginetest

import (
	"bufio"
	"context"
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
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// A Stack is a machine's disk as its caller keeps book of it: the writable
// layer and those that it stands on.
type Stack struct {
	Layers []string // lowest first
	Disk   string
}

// NewStack returns a disk without layers that does not exist yet.
func NewStack(t *testing.T) Stack {
	return Stack{Disk: filepath.Join(t.TempDir(), "disk")}
}

// On returns a new disk that stands on layers.
func (s Stack) On(t *testing.T, layers ...string) Stack {
	return Stack{Layers: layers, Disk: NewStack(t).Disk}
}

// spec is for [Boot].
func (s Stack) spec(m *engine.MachineSpec) { m.Layers, m.Disk = slices.Clone(s.Layers), s.Disk }

// Snapshot freezes what g's disk holds and returns the layers that make up the
// frozen state. s becomes what g writes to now.
func (s *Stack) Snapshot(t *testing.T, g *Guest, spare string) (frozen []string) {
	t.Helper()
	layer, err := g.Machine.(engine.DiskSnapshotter).SnapshotDisk(g.within(t, 20*time.Second), spare)
	if err != nil {
		t.Fatalf("SnapshotDisk: %v", err)
	}
	return s.froze(t, layer, spare)
}

// Save is Snapshot with g's memory as of the same instant.
func (s *Stack) Save(t *testing.T, g *Guest, spare, memory string) (frozen []string) {
	t.Helper()
	layer, err := g.Machine.(engine.FullSnapshotter).SnapshotFull(g.within(t, 60*time.Second), spare, memory)
	if err != nil {
		t.Fatalf("SnapshotFull: %v", err)
	}
	if _, err := os.Lstat(memory); err != nil {
		t.Fatalf("after SnapshotFull: %v", err)
	}
	return s.froze(t, layer, spare)
}

// froze keeps book of what a snapshot has made.
func (s *Stack) froze(t *testing.T, layer, spare string) (frozen []string) {
	t.Helper()
	for _, path := range []string{s.Disk, spare} {
		if _, err := os.Lstat(path); err != nil {
			t.Fatalf("after the snapshot: %v", err)
		}
	}
	frozen = append(slices.Clone(s.Layers), layer)
	switch layer {
	case s.Disk:
		s.Layers, s.Disk = frozen, spare
	case spare:
	default:
		t.Fatalf("the snapshot froze %s, which is neither the disk nor the spare", layer)
	}
	return frozen
}

// bootFreezable boots a machine on a disk of its own, and skips the test if
// its engine cannot freeze a running disk.
func bootFreezable(t *testing.T, s Subject) (*Guest, Stack) {
	t.Helper()
	stack := NewStack(t)
	g := Boot(t, s, stack.spec)
	if _, ok := g.Machine.(engine.DiskSnapshotter); !ok {
		t.Skipf("engine %s does not freeze a running disk", s.Engine.Name())
	}
	return g, stack
}

// put writes a file in the guest so that it is on its disk.
func (g *Guest) put(t *testing.T, name, content string) {
	t.Helper()
	g.sh(t, fmt.Sprintf("printf '%%s' '%s' > %s && sync %s .", content, name, name))
}

// files returns the guest's files with a name like pattern, as "NAME=CONTENT"
// words.
func (g *Guest) files(t *testing.T, pattern string) string {
	t.Helper()
	return strings.TrimSpace(g.sh(t, `for f in `+pattern+`; do test -e "$f" && printf '%s=%s ' "$f" "$(cat "$f")"; done; true`))
}

func (g *Guest) wantFiles(t *testing.T, pattern, want string) {
	t.Helper()
	if got := g.files(t, pattern); got != want {
		t.Errorf("the guest sees %q, want %q", got, want)
	}
}

// end stops the machine, its disk flushed first.
func (g *Guest) end(t *testing.T) {
	t.Helper()
	if err := g.Client.Shutdown(g.within(t, 10*time.Second), time.Second); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Wait(g.within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := g.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
}

func testDiskElsewhere(t *testing.T, s Subject) {
	stack := NewStack(t)
	g := Boot(t, s, stack.spec)
	g.put(t, "note", "kept")
	g.end(t)
	if _, err := os.Lstat(stack.Disk); err != nil {
		t.Fatal(err)
	}
	again := Boot(t, s, stack.spec)
	again.wantFiles(t, "note", "note=kept")
}

func testSnapshotDisk(t *testing.T, s Subject) {
	g, stack := bootFreezable(t, s)
	g.put(t, "old", "1")
	g.put(t, "changed", "before")
	frozen := stack.Snapshot(t, g, NewStack(t).Disk)
	g.put(t, "new", "1")
	g.put(t, "changed", "after")
	g.sh(t, "rm old && sync .")

	// Beside the first machine, which goes on.
	otherStack := stack.On(t, frozen...)
	other := Boot(t, s, otherStack.spec)
	other.wantFiles(t, "changed new old", "changed=before old=1")
	other.put(t, "theirs", "1")
	g.wantFiles(t, "changed new old theirs", "changed=after new=1")
	other.end(t)
	g.end(t)

	again := Boot(t, s, stack.spec)
	again.wantFiles(t, "changed new old theirs", "changed=after new=1")
	again.end(t)
	otherAgain := Boot(t, s, otherStack.spec)
	otherAgain.wantFiles(t, "changed new old theirs", "changed=before old=1 theirs=1")
}

// snapshots is how many a machine takes in a row.
const snapshots = 20

func testManySnapshots(t *testing.T, s Subject) {
	g, stack := bootFreezable(t, s)
	dir := t.TempDir()
	var states [][]string
	var want []string
	for i := range snapshots {
		g.put(t, "count", fmt.Sprint(i))
		g.put(t, fmt.Sprintf("file%02d", i), fmt.Sprint(i))
		want = append(want, fmt.Sprintf("file%02d=%d", i, i))
		states = append(states, stack.Snapshot(t, g, filepath.Join(dir, fmt.Sprint(i))))
	}
	g.wantFiles(t, "file*", strings.Join(want, " "))
	g.end(t)
	for _, i := range []int{0, snapshots - 1} {
		on := Boot(t, s, stack.On(t, states[i]...).spec)
		on.wantFiles(t, "count file*", fmt.Sprintf("count=%d %s", i, strings.Join(want[:i+1], " ")))
		on.end(t)
	}
	again := Boot(t, s, stack.spec)
	again.wantFiles(t, "count file*", fmt.Sprintf("count=%d %s", snapshots-1, strings.Join(want, " ")))
}

// records is what the writer of testSnapshotWhileWriting runs: it appends one
// record after the other and says the number of each that is on the disk. A
// record says what it has to be, all of it.
const records = `i=0
while :; do
	i=$((i+1))
	printf '%08d:%0300d:%08d\n' $i $i $i >> records && sync records && echo $i || exit 1
done`

func record(i int) string { return fmt.Sprintf("%08d:%0300d:%08d", i, i, i) }

// startWriter runs the writer in g. until returns when it has said that a record
// of at least that number is on the disk, with the last it has; last is sent the
// last one ever when the machine has ended.
func startWriter(t *testing.T, g *Guest) (until func(least int) int, last chan int) {
	t.Helper()
	said := make(chan int)
	last = make(chan int, 1)
	out, in := io.Pipe()
	go func() {
		n := 0
		for sc := bufio.NewScanner(out); sc.Scan(); {
			if _, err := fmt.Sscan(sc.Text(), &n); err != nil {
				t.Errorf("the writer says %q", sc.Text())
			}
			select {
			case said <- n:
			default:
			}
		}
		last <- n
	}()
	go func() {
		// Ends with the machine.
		_, err := g.Client.Exec(context.WithoutCancel(t.Context()), guestproto.ExecRequest{Command: records}, guestclient.ExecIO{Stdout: in})
		in.CloseWithError(err)
	}()
	return func(least int) (n int) {
		t.Helper()
		deadline := g.within(t, 20*time.Second)
		for n < least {
			select {
			case n = <-said:
			case <-deadline.Done():
				t.Fatalf("the writer is at record %d, want %d", n, least)
			}
		}
		return n
	}, last
}

func testSnapshotWhileWriting(t *testing.T, s Subject) {
	g, stack := bootFreezable(t, s)
	until, last := startWriter(t, g)
	before := until(20)
	frozen := stack.Snapshot(t, g, NewStack(t).Disk)
	until(until(before+1) + 20)
	if err := g.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	all := <-last

	t.Logf("%d records before the snapshot, %d in all", before, all)
	on := Boot(t, s, stack.On(t, frozen...).spec)
	wantRecords(t, on, before)
	on.end(t)
	again := Boot(t, s, stack.spec)
	wantRecords(t, again, all)
}

// saves is how often a machine is saved in a row, where somebody has asked for
// all that there is.
const saves = 100

// testSaveWhileWriting saves a machine again and again while it writes records for
// a caller, and starts a copy of each: what was acknowledged before is in every
// one, whole, and the machine writes on undisturbed.
func testSaveWhileWriting(t *testing.T, s Subject) {
	g, stack := bootFreezable(t, s)
	if _, ok := g.Machine.(engine.FullSnapshotter); !ok {
		t.Skipf("engine %s does not save a machine's memory", s.Engine.Name())
	}
	rounds := 3
	if testenv.Wanted("faults") {
		rounds = saves
	}
	until, last := startWriter(t, g)
	n := 0
	for range rounds {
		n = until(n + 20)
		dir := t.TempDir()
		memory := filepath.Join(dir, "memory")
		frozen := stack.Save(t, g, filepath.Join(dir, "spare"), memory)
		on := stack.On(t, frozen...)
		c := Boot(t, s, func(m *engine.MachineSpec) { on.spec(m); m.Memory = memory })
		wantRecords(t, c, n)
		if err := errors.Join(c.Stop(t.Context(), 0), os.RemoveAll(on.Disk), os.RemoveAll(memory)); err != nil {
			t.Fatal(err)
		}
	}
	until(n + 20)
	if err := g.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	all := <-last
	t.Logf("%d records in all", all)
	wantRecords(t, Boot(t, s, stack.spec), all)
}

// wantRecords wants the first n records whole, and after them none that is
// whole but wrong.
func wantRecords(t *testing.T, g *Guest, n int) {
	t.Helper()
	lines := strings.Split(g.sh(t, "cat records"), "\n")
	lines = lines[:len(lines)-1] // what follows the last newline is no record yet
	if len(lines) < n {
		t.Fatalf("%d records are left of %d that were on the disk", len(lines), n)
	}
	for i, line := range lines[:n] {
		if line != record(i+1) {
			t.Fatalf("record %d is %q", i+1, line)
		}
	}
}

func testSnapshotRefused(t *testing.T, s Subject) {
	g, stack := bootFreezable(t, s)
	g.put(t, "first", "1")
	taken := filepath.Join(t.TempDir(), "taken")
	if err := os.WriteFile(taken, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	nowhere := filepath.Join(t.TempDir(), "nowhere", "disk")
	for spare, class := range map[string]error{taken: api.ErrExists, nowhere: os.ErrNotExist} {
		frozen, err := g.Machine.(engine.DiskSnapshotter).SnapshotDisk(g.within(t, 20*time.Second), spare)
		if !errors.Is(err, class) {
			t.Errorf("SnapshotDisk to %s: froze %q, %v; want %v", spare, frozen, err, class)
		}
	}
	if b, err := os.ReadFile(taken); err != nil || string(b) != "mine" {
		t.Errorf("the file at the refused spare: %q, %v", b, err)
	}
	if left, err := os.ReadDir(filepath.Dir(taken)); err != nil || len(left) != 1 {
		t.Errorf("a refused snapshot leaves %v, %v", left, err)
	}
	g.put(t, "second", "2")
	frozen := stack.Snapshot(t, g, NewStack(t).Disk)
	g.put(t, "third", "3")
	g.end(t)
	on := Boot(t, s, stack.On(t, frozen...).spec)
	on.wantFiles(t, "first second third", "first=1 second=2")
	on.end(t)
	again := Boot(t, s, stack.spec)
	again.wantFiles(t, "first second third", "first=1 second=2 third=3")
}

func testSnapshotThenKilled(t *testing.T, s Subject) {
	g, stack := bootFreezable(t, s)
	g.put(t, "old", "1")
	frozen := stack.Snapshot(t, g, NewStack(t).Disk)
	id, err := hostproc.Identify(g.PIDs()[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Kill(9); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Wait(g.within(t, 5*time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := g.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	spare := NewStack(t).Disk
	if _, err := g.Machine.(engine.DiskSnapshotter).SnapshotDisk(g.within(t, 20*time.Second), spare); !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("SnapshotDisk of a machine that is gone: %v, want ErrUnavailable", err)
	}
	if _, err := os.Lstat(spare); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("at the spare of a machine that is gone: %v", err)
	}
	again := Boot(t, s, stack.spec)
	again.wantFiles(t, "old", "old=1")
	on := Boot(t, s, stack.On(t, frozen...).spec)
	on.wantFiles(t, "old", "old=1")
}

// testKilledWhileFreezing kills machines at moments around a snapshot. It may
// succeed or not; either way nothing that was on the disk is lost.
func testKilledWhileFreezing(t *testing.T, s Subject) {
	g, stack := bootFreezable(t, s)
	const rounds = 6
	var want []string
	for round := range rounds {
		if round > 0 {
			g = Boot(t, s, stack.spec)
			g.wantFiles(t, "file*", strings.Join(want, " "))
		}
		g.put(t, fmt.Sprintf("file%d", round), "1")
		want = append(want, fmt.Sprintf("file%d=1", round))
		id, err := hostproc.Identify(g.PIDs()[0])
		if err != nil {
			t.Fatal(err)
		}
		killed := make(chan error)
		go func() {
			time.Sleep(time.Duration(round) * 3 * time.Millisecond) // the moment is what is tried out
			killed <- id.Kill(9)
		}()
		spare := NewStack(t).Disk
		frozen, err := g.Machine.(engine.DiskSnapshotter).SnapshotDisk(g.within(t, 20*time.Second), spare)
		t.Logf("killed after %d ms: %v", round*3, err)
		if err := <-killed; err != nil {
			t.Fatal(err)
		}
		if _, err := g.Wait(g.within(t, 5*time.Second)); err != nil {
			t.Fatal(err)
		}
		if err := g.Stop(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		switch {
		case err != nil:
			if !errors.Is(err, api.ErrUnavailable) {
				t.Errorf("SnapshotDisk of a machine that is being killed: %v, want ErrUnavailable", err)
			}
			if left, err := os.ReadDir(filepath.Dir(spare)); err != nil || len(left) != 0 {
				t.Errorf("a snapshot that failed leaves %v, %v", left, err)
			}
		case frozen == stack.Disk:
			stack = Stack{Layers: append(slices.Clone(stack.Layers), frozen), Disk: spare}
		default:
			on := Boot(t, s, stack.On(t, append(slices.Clone(stack.Layers), frozen)...).spec)
			on.wantFiles(t, "file*", strings.Join(want, " "))
			on.end(t)
		}
	}
	g = Boot(t, s, stack.spec)
	g.wantFiles(t, "file*", strings.Join(want, " "))
}

// testMergeLayer takes the layers out from under a stopped machine's disk.
func testMergeLayer(t *testing.T, s Subject) {
	merger, ok := s.Engine.(engine.LayerMerger)
	if !ok {
		t.Skipf("engine %s does not merge layers", s.Engine.Name())
	}
	var chain []string
	for i := range 3 {
		stack := NewStack(t).On(t, chain...)
		g := Boot(t, s, stack.spec)
		g.put(t, fmt.Sprintf("file%d", i), fmt.Sprint(i))
		g.put(t, "changed", fmt.Sprint(i))
		if i == 0 {
			g.put(t, "gone", "1")
		} else {
			g.sh(t, "rm -f gone && sync .")
		}
		g.end(t)
		chain = append(chain, stack.Disk)
	}
	spare := NewStack(t).Disk
	for _, i := range []int{-1, 2, 3} {
		if _, err := merger.MergeLayer(t.Context(), chain, i, s.Spec.RootImage, spare); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("merging layer %d of 3: %v, want ErrInvalid", i, err)
		}
	}
	for _, i := range []int{1, 0} {
		spare := NewStack(t).Disk
		merged, err := merger.MergeLayer(t.Context(), chain, i, s.Spec.RootImage, spare)
		if err != nil {
			t.Fatal(err)
		}
		want := 0
		if merged == spare {
			want = 1
		} else if merged != chain[i+1] {
			t.Fatalf("the merged layer is %s, which is neither the upper one nor the spare", merged)
		}
		if left, err := os.ReadDir(filepath.Dir(spare)); err != nil || len(left) != want {
			t.Errorf("at the spare: %v, %v", left, err)
		}
		gone := []string{chain[i]}
		if merged == spare {
			gone = append(gone, chain[i+1])
		}
		chain = slices.Replace(chain, i, i+2, merged)
		for _, path := range gone {
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
		}
		last := len(chain) - 1
		g := Boot(t, s, Stack{Layers: chain[:last], Disk: chain[last]}.spec)
		g.wantFiles(t, "changed file* gone", "changed=2 file0=0 file1=1 file2=2")
		g.end(t)
	}
}

// testMergeInUse wants a layer that a machine writes to left alone.
func testMergeInUse(t *testing.T, s Subject) {
	merger, ok := s.Engine.(engine.LayerMerger)
	if !ok {
		t.Skipf("engine %s does not merge layers", s.Engine.Name())
	}
	if s.Engine.Name() == engine.HostName {
		t.Skip("there is nothing to move")
	}
	lower := NewStack(t)
	g := Boot(t, s, lower.spec)
	g.put(t, "below", "1")
	g.end(t)
	stack := lower.On(t, lower.Disk)
	g = Boot(t, s, stack.spec)
	g.put(t, "file", "1")
	spare := NewStack(t).Disk
	if _, err := merger.MergeLayer(t.Context(), []string{lower.Disk, stack.Disk}, 0, s.Spec.RootImage, spare); !errors.Is(err, api.ErrBusy) || api.Hint(err) == "" {
		t.Errorf("merging into the disk of a running machine: %v (hint %q), want ErrBusy with a hint", err, api.Hint(err))
	}
	if left, err := os.ReadDir(filepath.Dir(spare)); err != nil || len(left) > 0 {
		t.Errorf("at the spare: %v, %v", left, err)
	}
	g.wantFiles(t, "below file", "below=1 file=1")
	g.end(t)
	again := Boot(t, s, stack.spec)
	again.wantFiles(t, "below file", "below=1 file=1")
}
