package store_test

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/store"
)

// list opens the database and lists it, as a command does.
func (p place) list(t testing.TB) ([]string, error) {
	t.Helper()
	s, err := store.Open(t.Context(), p.path, p.opts)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	all, err := s.List(t.Context())
	return ids(all), err
}

// three makes a database with three workspaces, a snapshot, a journal and a
// history, and closes it.
func three(t testing.TB) place {
	t.Helper()
	p := newPlace(t)
	s := p.open(t)
	for i, id := range []string{"a", "b", "c"} {
		w := workspace(id, "name-"+id)
		w.LastActivityAt = start.Add(-time.Duration(i) * time.Hour)
		w.Environment = strings.Repeat("long ", 500) // several pages
		mustCreate(t, s, w)
	}
	if err := s.PutSnapshot(t.Context(), "b", store.Snapshot{Snapshot: api.Snapshot{SnapshotName: "one", CreatedAt: start}, Layer: "l"}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Update(t.Context(), "b", func(w *store.Workspace) error { w.State = api.StateStopped; return nil }, store.Event{Kind: "stopped"}); err != nil {
		t.Fatal(err)
	}
	journal(t, s, "b")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p place) exec(t testing.TB, statement string) {
	t.Helper()
	db, err := sql.Open("sqlite", p.path)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec(statement); err != nil {
		t.Fatal(err)
	}
}

func rewrite(t testing.TB, path string, change func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, change(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Whatever happens to the database, the answer is never "no workspaces", and
// Repair brings them back.
func TestDamage(t *testing.T) {
	for _, test := range []struct {
		name   string
		damage func(t *testing.T, p place)
		// salvaged says that the journal comes back as well.
		salvaged bool
		text     string
	}{
		{"ZeroLength", func(t *testing.T, p place) { must(t, os.Truncate(p.path, 0)) }, false, "is empty, but there are workspaces"},
		{"Missing", func(t *testing.T, p place) { must(t, os.Remove(p.path)) }, false, "is empty, but there are workspaces"},
		{"WithoutTables", func(t *testing.T, p place) {
			must(t, os.Remove(p.path))
			p.exec(t, "CREATE TABLE t (a); DROP TABLE t")
		}, false, "is empty, but there are workspaces"},
		{"Half", func(t *testing.T, p place) {
			rewrite(t, p.path, func(b []byte) []byte { return b[:len(b)/2] })
		}, false, "damaged"},
		{"FlippedBytes", func(t *testing.T, p place) {
			rewrite(t, p.path, func(b []byte) []byte {
				for i := range 64 {
					b[4096+i] ^= 0xff
				}
				return b
			})
		}, true, "damaged"},
		{"FlippedHeader", func(t *testing.T, p place) {
			rewrite(t, p.path, func(b []byte) []byte { b[0] ^= 1; return b })
		}, false, "not a database"},
		{"AnotherFile", func(t *testing.T, p place) {
			must(t, os.WriteFile(p.path, []byte(strings.Repeat("not SQLite\n", 1000)), 0o600))
		}, false, "not a database"},
		{"AnotherApplication", func(t *testing.T, p place) { p.exec(t, "PRAGMA application_id=7") }, true, "not one of pyro's"},
		{"ImpossibleForm", func(t *testing.T, p place) { p.exec(t, "PRAGMA user_version=-1") }, true, "form -1"},
		{"RecordIsNoRecord", func(t *testing.T, p place) { p.exec(t, "UPDATE workspaces SET record = '{' WHERE id = 'b'") }, true, "reading the record"},
		{"ForgotOne", func(t *testing.T, p place) { p.exec(t, "PRAGMA foreign_keys=0; DELETE FROM workspaces WHERE id = 'c'") }, true, "does not know workspace c"},
		{"Directory", func(t *testing.T, p place) {
			must(t, os.Remove(p.path))
			must(t, os.Mkdir(p.path, 0o700))
		}, false, "no regular file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := three(t)
			before := tree(t, p.opts.WorkspacesDir)
			test.damage(t, p)
			got, err := p.list(t)
			if !errors.Is(err, api.ErrDamaged) {
				t.Fatalf("listed %v, %v; want ErrDamaged", got, err)
			}
			if !strings.Contains(err.Error(), test.text) || (!strings.Contains(err.Error(), p.path) && test.name != "RecordIsNoRecord") {
				t.Errorf("error %q lacks %q or the path", err, test.text)
			}
			if !strings.Contains(api.Hint(err), "pyro doctor --repair") {
				t.Errorf("hint %q", api.Hint(err))
			}
			if d := cmp.Diff(before, tree(t, p.opts.WorkspacesDir)); d != "" {
				t.Errorf("the workspaces' files changed:\n%s", d)
			}

			r, err := store.Repair(t.Context(), p.path, p.opts)
			if err != nil {
				t.Fatal(err)
			}
			if r.Healthy || r.Workspaces != 3 || len(r.Skipped) != 0 {
				t.Errorf("repaired: %+v", r)
			}
			if want := (test.name != "Missing"); (r.MovedTo != "") != want {
				t.Errorf("moved aside: %q", r.MovedTo)
			} else if _, err := os.Lstat(r.MovedTo); want && err != nil {
				t.Error(err)
			}
			got, err = p.list(t)
			if d := cmp.Diff([]string{"a", "b", "c"}, got); err != nil || r.Workspaces == 3 && len(got) != 3 {
				t.Fatalf("after the repair: %v\n%s", err, d)
			}
			s := p.open(t)
			sn, err := s.Snapshot(t.Context(), "b", "one")
			if err != nil || sn.Layer != "l" {
				t.Errorf("snapshot %v, %v", sn, err)
			}
			if w, err := s.Get(t.Context(), "b"); err != nil || w.State != api.StateStopped || *w.Name != "name-b" {
				t.Errorf("workspace b is %+v, %v", w, err)
			}
			if test.salvaged {
				if r.Commands != 1 || r.Events != 1 {
					t.Errorf("salvaged %d commands, %d events", r.Commands, r.Events)
				}
				n, err := s.BeginCommand(t.Context(), "b", api.CommandRecord{StartedAt: start}, hostproc.Identity{})
				if err != nil || n != 2 {
					t.Errorf("the next command is number %d, %v", n, err)
				}
			}
			must(t, s.Close())
			if r, err := store.Repair(t.Context(), p.path, p.opts); err != nil || !r.Healthy || r.Workspaces != 3 {
				t.Errorf("a second repair: %+v, %v", r, err)
			}
		})
	}
}

// tree lists the files below dir with their content.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		out[path] = string(b)
		return err
	})
	must(t, err)
	return out
}

// A flip anywhere is found, harmless, or at worst leaves a record that differs
// from its copy; it never loses a workspace without an error.
func TestFlippedBytesAnywhereNeverHideAWorkspace(t *testing.T) {
	p := three(t)
	good, err := os.ReadFile(p.path)
	must(t, err)
	damaged, readable := 0, 0
	for at := 100; at < len(good); at += 997 {
		bad := append([]byte(nil), good...)
		for i := at; i < min(at+64, len(bad)); i++ {
			bad[i] ^= 0xff
		}
		must(t, os.WriteFile(p.path, bad, 0o600))
		got, err := p.list(t)
		switch {
		case errors.Is(err, api.ErrDamaged):
			damaged++
		case err == nil && len(got) == 3:
			readable++
		default:
			t.Errorf("flipped at %d: %v, %v", at, got, err)
		}
		for _, suffix := range []string{"-wal", "-shm"} {
			os.Remove(p.path + suffix)
		}
	}
	if damaged == 0 || readable == 0 {
		t.Errorf("%d damaged, %d readable: the flips do not reach anything", damaged, readable)
	}
}

func TestNewerFormIsLeftAlone(t *testing.T) {
	p := three(t)
	p.exec(t, "PRAGMA user_version=99")
	before, err := os.ReadFile(p.path)
	must(t, err)
	_, listErr := p.list(t)
	_, repairErr := store.Repair(t.Context(), p.path, p.opts)
	for _, err := range []error{listErr, repairErr} {
		if !errors.Is(err, api.ErrUnsupported) || !strings.Contains(err.Error(), "form 99") || api.Hint(err) == "" {
			t.Errorf("error %v", err)
		}
	}
	if after, err := os.ReadFile(p.path); err != nil || string(after) != string(before) {
		t.Errorf("the file changed, %v", err)
	}
}

func TestMigration(t *testing.T) {
	p := three(t)
	s := p.open(t) // an older pyro that still runs
	defer store.AddMigration("ALTER TABLE workspaces ADD COLUMN extra TEXT; UPDATE workspaces SET extra = 'x' || name")()
	opts := p.opts
	opts.BusyTimeout = 20 * time.Millisecond
	if _, err := store.Open(t.Context(), p.path, opts); !errors.Is(err, api.ErrBusy) {
		t.Errorf("while an older pyro has it open: %v", err)
	}
	must(t, s.Close())
	if got, err := p.list(t); err != nil || len(got) != 3 {
		t.Fatalf("after the migration: %v, %v", got, err)
	}
	backups, err := filepath.Glob(p.path + ".v1-*.backup")
	if err != nil || len(backups) != 1 {
		t.Fatalf("backups %v, %v", backups, err)
	}
	if st, err := os.Stat(backups[0]); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("backup: %v, %v", st.Mode(), err)
	}
	old := place{backups[0], store.Options{}}
	old.exec(t, "SELECT name FROM workspaces")
	if got, err := p.list(t); err != nil || len(got) != 3 {
		t.Errorf("second time: %v, %v", got, err)
	}
	if backups, _ := filepath.Glob(p.path + ".v1-*.backup"); len(backups) != 1 {
		t.Errorf("a second backup was made: %v", backups)
	}

	// A migration that fails half way changes nothing.
	defer store.AddMigration("ALTER TABLE workspaces ADD COLUMN more TEXT; SELECT nonsense FROM nowhere")()
	if _, err := p.list(t); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("from form %d to %d", store.Forms()-1, store.Forms())) {
		t.Errorf("a failing migration: %v", err)
	}
	p.exec(t, "ALTER TABLE workspaces ADD COLUMN more TEXT")
}

func TestCopiesFollowTheRecords(t *testing.T) {
	p := three(t)
	for _, id := range []string{"a", "b"} {
		var got struct {
			Workspace struct {
				ID    string `json:"workspace_id"`
				State string `json:"state"`
			} `json:"workspace"`
			Snapshots []api.Snapshot `json:"snapshots"`
		}
		path := filepath.Join(p.dir(id), "workspace.json")
		b, err := os.ReadFile(path)
		must(t, err)
		must(t, json.Unmarshal(b, &got))
		wantState, wantSnapshots := map[string]string{"a": "starting", "b": "stopped"}[id], map[string]int{"b": 1}[id]
		if got.Workspace.ID != id || got.Workspace.State != wantState || len(got.Snapshots) != wantSnapshots {
			t.Errorf("%s has %+v", path, got)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", path, st.Mode(), err)
		}
	}
}

// A workspace without a copy is not lost from a sound database, and a directory
// without a copy is no workspace.
func TestRepairSkipsWhatIsNoWorkspace(t *testing.T) {
	p := three(t)
	must(t, os.Mkdir(p.dir("half-made"), 0o700))
	must(t, os.WriteFile(filepath.Join(p.dir("c"), "workspace.json"), []byte(`{"workspace":{"workspace_id":"../a"}}`), 0o600))
	// b's copy is older than a change of names.
	rewrite(t, filepath.Join(p.dir("b"), "workspace.json"), func(b []byte) []byte {
		return []byte(strings.ReplaceAll(string(b), "name-b", "name-a"))
	})
	must(t, os.MkdirAll(filepath.Join(p.dir("a"), "commands"), 0o700))
	must(t, os.WriteFile(filepath.Join(p.dir("a"), "commands", "41.stdout"), nil, 0o600))
	if got, err := p.list(t); err != nil || len(got) != 3 {
		t.Fatalf("listed %v, %v", got, err)
	}
	must(t, os.Remove(p.path))
	r, err := store.Repair(t.Context(), p.path, p.opts)
	if err != nil || r.Workspaces != 2 || len(r.Skipped) != 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	if moved, _ := filepath.Glob(filepath.Join(p.dir("c"), "workspace.json.damaged-*")); len(moved) != 1 {
		t.Errorf("the unusable copy was moved to %v", moved)
	}
	s := p.open(t)
	// The output of command 41 is still there: its number is taken.
	if n, err := s.BeginCommand(t.Context(), "a", api.CommandRecord{StartedAt: start}, hostproc.Identity{}); err != nil || n != 42 {
		t.Errorf("the next command is number %d, %v", n, err)
	}
	opts := p.opts
	opts.BusyTimeout = time.Millisecond
	if _, err := store.Repair(t.Context(), p.path, opts); !errors.Is(err, api.ErrBusy) {
		t.Errorf("repairing what is open: %v", err)
	}
}

// TestOpenWhileOthersCreate opens the database while workspaces come and go, which
// looks at moments as if it did not know one.
func TestOpenWhileOthersCreate(t *testing.T) {
	p := newPlace(t)
	s := p.open(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	var all sync.WaitGroup
	for writer := range 4 {
		all.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				id := fmt.Sprintf("w%d-%d", writer, i)
				if err := os.Mkdir(p.dir(id), 0o700); err != nil {
					t.Error(err)
					return
				}
				err := s.Create(t.Context(), workspace(id, ""))
				if err == nil && i%2 == 0 {
					err = s.Delete(t.Context(), id)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for ctx.Err() == nil {
		other, err := store.Open(t.Context(), p.path, p.opts)
		if err != nil {
			t.Error(err)
			break
		}
		other.Close()
	}
	all.Wait()
}
