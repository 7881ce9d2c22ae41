package store_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/store"
)

// place is where a test's database lies.
type place struct {
	path string
	opts store.Options
}

func newPlace(t testing.TB) place {
	t.Helper()
	dir := t.TempDir()
	p := place{filepath.Join(dir, "state.db"), store.Options{WorkspacesDir: filepath.Join(dir, "workspaces")}}
	if err := os.Mkdir(p.opts.WorkspacesDir, 0o700); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p place) open(t testing.TB) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), p.path, p.opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// dir is the directory of a workspace.
func (p place) dir(id string) string { return filepath.Join(p.opts.WorkspacesDir, id) }

var start = time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)

func workspace(id, name string) *store.Workspace {
	w := &store.Workspace{Workspace: api.Workspace{
		WorkspaceID: id, Environment: "debian:12", State: api.StateStarting, Labels: map[string]string{"a": "b"},
		CreatedAt: start, LastActivityAt: start, VCPUCount: 1, MemMiB: 1024,
	}, ActiveLayer: id + "-a.qcow2", Layers: []string{"base.qcow2"}, SeedDigest: "seed-" + id, EnvironmentDigest: "env"}
	if name != "" {
		w.Name = &name
	}
	return w
}

func mustCreate(t testing.TB, s *store.Store, w *store.Workspace) {
	t.Helper()
	if err := s.Create(t.Context(), w); err != nil {
		t.Fatal(err)
	}
}

func ids(all []*store.Workspace) []string {
	var out []string
	for _, w := range all {
		out = append(out, w.WorkspaceID)
	}
	return out
}

func TestRecordsSurviveReopening(t *testing.T) {
	p := newPlace(t)
	s := p.open(t)
	expires := start.Add(time.Hour)
	want := workspace("ws-1", "web")
	want.ExpiresAt, want.TTL, want.ExpiresBoot, want.BootID = &expires, time.Hour, 1<<60, "boot"
	mustCreate(t, s, want)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := p.open(t).Get(t.Context(), "ws-1")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("record (-want +got):\n%s", d)
	}
}

func TestFind(t *testing.T) {
	s := newPlace(t).open(t)
	// The name of one is the beginning of another's id.
	for id, name := range map[string]string{"abc1": "web", "abd2": "abc", "xyz": ""} {
		mustCreate(t, s, workspace(id, name))
	}
	for _, test := range []struct {
		name, ref, want string
		class           error
	}{
		{"ID", "abc1", "abc1", nil},
		{"Prefix", "abd", "abd2", nil},
		{"OneLetter", "x", "xyz", nil},
		{"Name", "web", "abc1", nil},
		{"NameBeforePrefix", "abc", "abd2", nil},
		{"Ambiguous", "ab", "", api.ErrInvalid},
		{"Empty", "", "", api.ErrInvalid},
		{"None", "q", "", api.ErrNotFound},
		{"NotAPattern", "%", "", api.ErrNotFound},
		{"PrefixOfName", "we", "", api.ErrNotFound},
	} {
		t.Run(test.name, func(t *testing.T) {
			w, err := s.Find(t.Context(), test.ref)
			if !errors.Is(err, test.class) {
				t.Fatalf("error %v, want %v", err, test.class)
			}
			if err != nil {
				if api.Hint(err) == "" {
					t.Errorf("%v has no hint", err)
				}
				if test.ref == "ab" && err.Error() != `"ab" may mean any of the workspaces abc1 (web), abd2 (abc)` {
					t.Errorf("candidates: %v", err)
				}
			} else if w.WorkspaceID != test.want {
				t.Errorf("found %s, want %s", w.WorkspaceID, test.want)
			}
		})
	}
}

func TestListShowsNewestActivityFirst(t *testing.T) {
	s := newPlace(t).open(t)
	for _, id := range []string{"a", "b", "c"} {
		mustCreate(t, s, workspace(id, ""))
	}
	if err := s.Touch(t.Context(), "b", start.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	// An earlier time does not turn the clock back.
	if err := s.Touch(t.Context(), "b", start.Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	all, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"b", "a", "c"}, ids(all)); d != "" {
		t.Error(d)
	}
	if at := all[0].LastActivityAt; !at.Equal(start.Add(time.Minute)) {
		t.Errorf("activity at %v", at)
	}
	if err := s.Touch(t.Context(), "d", start); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("touching what is not there: %v", err)
	}
}

func TestNamesAreUnique(t *testing.T) {
	s := newPlace(t).open(t)
	mustCreate(t, s, workspace("a", "web"))
	mustCreate(t, s, workspace("b", ""))
	mustCreate(t, s, workspace("c", ""))
	if err := s.Create(t.Context(), workspace("d", "web")); !errors.Is(err, api.ErrExists) {
		t.Errorf("creating with a taken name: %v", err)
	}
	if err := s.Create(t.Context(), workspace("a", "")); !errors.Is(err, api.ErrExists) {
		t.Errorf("creating with a taken id: %v", err)
	}
	name := "web"
	rename := func(w *store.Workspace) error { w.Name = &name; return nil }
	if _, err := s.Update(t.Context(), "b", rename); !errors.Is(err, api.ErrExists) {
		t.Errorf("renaming to a taken name: %v", err)
	}
	if _, err := s.Update(t.Context(), "a", rename); err != nil {
		t.Errorf("keeping the name: %v", err)
	}
	if err := s.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context(), "b", rename); err != nil {
		t.Errorf("taking the name of a deleted one: %v", err)
	}
}

func TestUpdateIsAllOrNothing(t *testing.T) {
	s := newPlace(t).open(t)
	mustCreate(t, s, workspace("a", ""))
	boom := errors.New("boom")
	_, err := s.Update(t.Context(), "a", func(w *store.Workspace) error { w.State = api.StateFailed; return boom }, store.Event{Kind: "fail"})
	if err != boom {
		t.Fatalf("change's error came back as %v", err)
	}
	// Events that cannot be written take the change back.
	bad := store.Event{Kind: "bad", Detail: map[string]any{"f": func() {}}}
	if _, err := s.Update(t.Context(), "a", func(w *store.Workspace) error { w.State = api.StateFailed; return nil }, store.Event{Kind: "good"}, bad); err == nil {
		t.Error("an event that is no JSON was accepted")
	}
	w, err := s.Get(t.Context(), "a")
	if err != nil || w.State != api.StateStarting {
		t.Fatalf("state %v, %v", w.State, err)
	}
	w, err = s.Update(t.Context(), "a", func(w *store.Workspace) error {
		w.State, w.HistoryStart = api.StateStarted, w.LastEvent
		w.LastEvent = 40 // is not a change's to make
		return nil
	}, store.Event{Kind: "started", Detail: map[string]any{"n": 1.0}})
	if err != nil || w.State != api.StateStarted || w.LastEvent != 1 {
		t.Fatalf("%+v, %v", w, err)
	}
	if err := s.AppendEvent(t.Context(), "a", "sync", nil); err != nil {
		t.Fatal(err)
	}
	events, err := s.Events(t.Context(), "a", 0)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range events {
		got = append(got, fmt.Sprintf("%d %s %v", e.Sequence, e.Kind, e.Detail))
		if time.Since(e.At) > time.Minute {
			t.Errorf("event at %v", e.At)
		}
	}
	if d := cmp.Diff([]string{"1 started map[n:1]", "2 sync map[]"}, got); d != "" {
		t.Error(d)
	}
	if events, _ = s.Events(t.Context(), "a", 1); len(events) != 1 {
		t.Errorf("after 1 come %v", events)
	}
	if events, _ = s.Events(t.Context(), "a", 0, "sync", "other"); len(events) != 1 || events[0].Kind != "sync" {
		t.Errorf("of kind sync there are %v", events)
	}
	if err := s.AppendEvent(t.Context(), "b", "sync", nil); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("an event of nobody: %v", err)
	}
}

func TestJournal(t *testing.T) {
	s := newPlace(t).open(t)
	ctx := t.Context()
	mustCreate(t, s, workspace("a", ""))
	mustCreate(t, s, workspace("b", ""))
	owner := hostproc.Identity{PID: 12, StartTime: 34, BootID: "boot"}
	begin := func(id string) int64 {
		t.Helper()
		n, err := s.BeginCommand(ctx, id, api.CommandRecord{Command: "make", Cwd: "/workspace", StartedAt: start.Add(time.Hour), Stdout: "no"}, owner)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if a, b, c := begin("a"), begin("a"), begin("b"); a != 1 || b != 2 || c != 1 {
		t.Fatalf("sequences %d, %d, %d", a, b, c)
	}
	seven := 7
	result := store.CommandResult{State: "exited", EndedAt: start.Add(2 * time.Hour), ExitCode: &seven, DurationMS: 5, StdoutBytes: 3, StderrTruncated: true}
	if err := s.FinishCommand(ctx, "a", 1, result); err != nil {
		t.Fatal(err)
	}
	if err := s.FinishCommand(ctx, "a", 1, store.CommandResult{State: "interrupted", EndedAt: start}); !errors.Is(err, api.ErrState) {
		t.Errorf("a second end: %v", err)
	}
	if err := s.FinishCommand(ctx, "a", 9, result); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("the end of nothing: %v", err)
	}
	if _, err := s.BeginCommand(ctx, "c", api.CommandRecord{}, owner); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("a command of nobody: %v", err)
	}
	ended := start.Add(2 * time.Hour)
	got, err := s.Commands(ctx, "a", store.CommandQuery{})
	if err != nil {
		t.Fatal(err)
	}
	want := []api.CommandRecord{
		{WorkspaceID: "a", Sequence: 1, Command: "make", Cwd: "/workspace", State: "exited", StartedAt: start.Add(time.Hour), EndedAt: &ended,
			ExitCode: &seven, DurationMS: 5, StdoutBytes: 3, StderrTruncated: true},
		{WorkspaceID: "a", Sequence: 2, Command: "make", Cwd: "/workspace", State: "running", StartedAt: start.Add(time.Hour)},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	w, err := s.Get(ctx, "a")
	if err != nil || w.CommandCount != 2 || w.LastCommand != 2 || !w.LastActivityAt.Equal(ended) {
		t.Errorf("%d commands, last %d, activity %v, %v", w.CommandCount, w.LastCommand, w.LastActivityAt, err)
	}
	for name, test := range map[string]struct {
		q    store.CommandQuery
		want []int64
	}{
		"After":    {store.CommandQuery{After: 1}, []int64{2}},
		"Limit":    {store.CommandQuery{Limit: 1}, []int64{1}},
		"Newest":   {store.CommandQuery{Limit: 1, NewestFirst: true}, []int64{2}},
		"Sequence": {store.CommandQuery{Sequence: 2}, []int64{2}},
		"None":     {store.CommandQuery{Sequence: 3}, nil},
	} {
		got, err := s.Commands(ctx, "a", test.q)
		var numbers []int64
		for _, c := range got {
			numbers = append(numbers, c.Sequence)
		}
		if d := cmp.Diff(test.want, numbers); d != "" || err != nil {
			t.Errorf("%s: %s%v", name, d, err)
		}
	}
	running, err := s.RunningCommands(ctx, "a")
	if err != nil || len(running) != 1 || running[0].Sequence != 2 || running[0].Owner != owner {
		t.Errorf("running: %+v, %v", running, err)
	}
	if running, _ = s.RunningCommands(ctx, ""); len(running) != 2 {
		t.Errorf("running anywhere: %+v", running)
	}
	if err := s.ClearCommands(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(ctx, "a", func(w *store.Workspace) error { w.CommandCount, w.LastCommand = 0, 0; return nil }); err != nil {
		t.Fatal(err)
	}
	if n := begin("a"); n != 3 {
		t.Errorf("after clearing the journal a command got number %d", n)
	}
	if w, _ := s.Get(ctx, "a"); w.CommandCount != 1 {
		t.Errorf("after clearing there are %d commands", w.CommandCount)
	}
}

func TestSnapshots(t *testing.T) {
	s := newPlace(t).open(t)
	ctx := t.Context()
	w := workspace("a", "")
	w.PendingLayer = "pending.qcow2"
	mustCreate(t, s, w)
	put := func(name string, at time.Time) error {
		return s.PutSnapshot(ctx, "a", store.Snapshot{Snapshot: api.Snapshot{SnapshotName: name, Kind: api.SnapshotDisk, CreatedAt: at, Deletable: true},
			Layer: name + ".qcow2", Chain: []string{"chain.qcow2"}, SeedDigest: "seed-" + name})
	}
	for name, at := range map[string]time.Time{"late": start.Add(time.Hour), "early": start} {
		if err := put(name, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := put("late", start); !errors.Is(err, api.ErrExists) {
		t.Errorf("a second one of the name: %v", err)
	}
	if err := s.PutSnapshot(ctx, "b", store.Snapshot{}); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("a snapshot of nobody: %v", err)
	}
	all, err := s.Snapshots(ctx, "a")
	if err != nil || len(all) != 2 || all[0].SnapshotName != "early" || all[1].Layer != "late.qcow2" || all[0].WorkspaceID != "a" {
		t.Errorf("snapshots %v, %v", all, err)
	}
	one, err := s.Snapshot(ctx, "a", "late")
	if err != nil || one.Chain[0] != "chain.qcow2" {
		t.Errorf("snapshot %v, %v", one, err)
	}
	refs, err := s.References(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := &store.References{
		Layers:       map[string]bool{"a-a.qcow2": true, "base.qcow2": true, "pending.qcow2": true, "late.qcow2": true, "early.qcow2": true, "chain.qcow2": true},
		Seeds:        map[string]bool{"seed-a": true, "seed-late": true, "seed-early": true},
		Environments: map[string]bool{"env": true},
	}
	if d := cmp.Diff(want, refs); d != "" {
		t.Error(d)
	}
	if err := s.DeleteSnapshot(ctx, "a", "late"); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{s.DeleteSnapshot(ctx, "a", "late"), func() error { _, err := s.Snapshot(ctx, "a", "late"); return err }()} {
		if !errors.Is(err, api.ErrNotFound) {
			t.Errorf("a deleted one: %v", err)
		}
	}
}

func TestMergeLayers(t *testing.T) {
	s := newPlace(t).open(t)
	ctx := t.Context()
	for _, id := range []string{"a", "fork"} {
		w := workspace(id, "")
		w.Layers, w.ActiveLayer = []string{"one", "two", "three"}, id+"-disk"
		mustCreate(t, s, w)
	}
	for name, layers := range map[string][]string{"at-two": {"one", "two"}, "branch": {"one", "two", "other"}, "at-one": {"one"}, "empty": {""}} {
		last := len(layers) - 1
		if err := s.PutSnapshot(ctx, "a", store.Snapshot{Snapshot: api.Snapshot{SnapshotName: name, CreatedAt: start}, Chain: layers[:last], Layer: layers[last]}); err != nil {
			t.Fatal(err)
		}
	}
	others, err := s.LayersOfOthers(ctx, "fork")
	if err != nil || !others["other"] || !others["a-disk"] || others["fork-disk"] {
		t.Errorf("the layers of others: %v, %v", others, err)
	}
	if others, err = s.LayersOfOthers(ctx, "a"); err != nil || others["other"] || others["a-disk"] || !others["two"] {
		t.Errorf("the layers of others: %v, %v", others, err)
	}
	for _, m := range [][3]string{{"one", "two", "new"}, {"three", "a-disk", "a-disk"}, {"one", "three", "not one on the other"}} {
		if err := s.MergeLayers(ctx, "a", m[0], m[1], m[2]); err != nil {
			t.Fatal(err)
		}
	}
	got := map[string][]string{}
	for _, id := range []string{"a", "fork"} {
		w, err := s.Get(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		got[id] = append(w.Layers, w.ActiveLayer)
	}
	snapshots, err := s.Snapshots(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	for _, sn := range snapshots {
		got[sn.SnapshotName] = append(sn.Chain, sn.Layer)
	}
	want := map[string][]string{
		"a": {"new", "a-disk"}, "fork": {"one", "two", "three", "fork-disk"},
		"at-two": {"new"}, "branch": {"new", "other"}, "at-one": {"one"}, "empty": {""},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestDeleteTakesEverythingAlong(t *testing.T) {
	p := newPlace(t)
	s := p.open(t)
	ctx := t.Context()
	fill := func() {
		t.Helper()
		mustCreate(t, s, workspace("a", "web"))
		if _, err := s.BeginCommand(ctx, "a", api.CommandRecord{StartedAt: start}, hostproc.Identity{}); err != nil {
			t.Fatal(err)
		}
		if err := s.PutSnapshot(ctx, "a", store.Snapshot{Snapshot: api.Snapshot{SnapshotName: "x"}}); err != nil {
			t.Fatal(err)
		}
		if err := s.AppendEvent(ctx, "a", "k", nil); err != nil {
			t.Fatal(err)
		}
	}
	fill()
	if err := s.Delete(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(ctx, "a"); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("deleting twice: %v", err)
	}
	if _, err := os.Stat(filepath.Join(p.dir("a"), "workspace.json")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the copy of the record is still there: %v", err)
	}
	fill() // nothing of the old one is in the way
	if events, _ := s.Events(ctx, "a", 0); len(events) != 1 {
		t.Errorf("history %v", events)
	}
}

// SQLite waits for the disk where a loss of power must not take anything back.
func TestSynchronous(t *testing.T) {
	s := newPlace(t).open(t)
	// The numbers are those of PRAGMA synchronous: 1 is NORMAL, 2 is FULL.
	for _, want := range []int{2, 1, 2} {
		if got, err := store.Synchronous(t.Context(), s, want == 2); err != nil || got != want {
			t.Errorf("synchronous is %d, %v; want %d", got, err, want)
		}
	}
}

func TestCanceledCallerChangesNothing(t *testing.T) {
	s := newPlace(t).open(t)
	mustCreate(t, s, workspace("a", ""))
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.Update(ctx, "a", func(w *store.Workspace) error { w.State = api.StateFailed; cancel(); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled update: %v", err)
	}
	if w, err := s.Get(t.Context(), "a"); err != nil || w.State != api.StateStarting {
		t.Errorf("state %v, %v", w.State, err)
	}
}
