package guestagent

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// errStopped is how a test stops a switcher as a crash would: nothing is undone.
var errStopped = errors.New("stopped by the test")

// syncTree is a workspace with something of every kind that a sync replaces,
// merges, removes or leaves alone.
func syncTree(t *testing.T, root string) {
	t.Helper()
	ws := filepath.Join(root, "workspace")
	for name, content := range map[string]string{
		"keep": "kept", "change": "old", "remove": "gone", "merge/keep": "kept", "merge/change": "old",
		"tree/a": "1", "tree/deep/b": "2", "tree/deep/er/c": "3", "dir-to-file/x": "x", "file-to-dir": "f",
		"replaced/old": "o",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(ws, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(ws, name), []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("keep", filepath.Join(ws, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(ws, "tree", "deep"), 0o711); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		for _, name := range []string{"tree", "tree/deep", "tree/deep/b"} {
			if err := os.Chown(filepath.Join(ws, name), 1234, 5678); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func syncArchive(t *testing.T) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	when := time.Unix(1_000_000_000, 0)
	for _, e := range []struct {
		name, content, target string
		mode                  int64
	}{
		{"change", "new", "", 0o600},
		{"merge/", "", "", 0o700},
		{"merge/change", "new", "", 0o644},
		{"merge/add", "new", "", 0o644},
		{"added/x/y", "new", "", 0o644},
		{"link", "", "elsewhere", 0},
		{"dir-to-file", "now a file", "", 0o644},
		{"file-to-dir/in", "now a directory", "", 0o644},
		{"replaced/new", "new", "", 0o644},
	} {
		h := &tar.Header{Name: e.name, Mode: e.mode, Size: int64(len(e.content)), Typeflag: tar.TypeReg, ModTime: when}
		switch {
		case strings.HasSuffix(e.name, "/"):
			h.Typeflag = tar.TypeDir
		case e.target != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.target
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

var syncRequest = guestproto.SyncRequest{
	Destination:  "/workspace",
	Remove:       []guestproto.Path{"remove", "tree", "tree/a", "missing", "keep/below", "replaced"},
	ReplaceKinds: true,
}

// snapshot describes everything below dir.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := make(map[string]string)
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		text := fi.Mode().String()
		if st := fi.Sys().(*syscall.Stat_t); int(st.Uid) != os.Geteuid() {
			text += fmt.Sprintf(" of %d:%d", st.Uid, st.Gid)
		}
		switch {
		case fi.Mode().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text += " " + fi.ModTime().Format(time.RFC3339Nano) + " " + string(b)
		case fi.Mode()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(p)
			text += " " + target
		}
		out[rel] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// newSwitch unpacks the archive into a stage of a fresh workspace.
func newSwitch(t *testing.T, root string) (*switcher, *syncPlan) {
	t.Helper()
	s, err := NewServer(Config{Root: root, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.openPlace(syncRequest.Destination)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	w, _, err := s.unpack(context.Background(), p, bytes.NewReader(syncArchive(t)))
	if err != nil {
		t.Fatal(err)
	}
	plan, err := w.plan(&syncRequest)
	if err != nil {
		t.Fatal(err)
	}
	if plan.removed != 4 {
		t.Errorf("the plan removes %d paths", plan.removed)
	}
	return w, plan
}

// takeApartAll lets no directory be renamed, as overlayfs does with those of a
// lower layer, by planning their removal as those of their content.
func takeApartAll(w *switcher, plan *syncPlan) func() error {
	return func() error {
		w.backups = plan.backups
		var err error
		if w.journal, err = newJournal(w.stage.root); err != nil {
			return err
		}
		if err := w.record(plan.gone); err != nil {
			return err
		}
		apart := func(c *change) error {
			d, err := w.workspace.directory(string(c.Path))
			if err != nil {
				return w.make(c)
			}
			d.release()
			return w.takeApart(c)
		}
		for i := range plan.gone {
			if err := apart(&plan.gone[i]); err != nil {
				return err
			}
		}
		plan.gone = nil
		if err := w.record(plan.put); err != nil {
			return err
		}
		for i := range plan.put {
			if err := w.make(&plan.put[i]); err != nil {
				return err
			}
		}
		return w.step()
	}
}

// TestStopAfterEveryStep is a guest that dies in the middle of a sync: the next
// agent finds the workspace as it was before, or as it is after, and leaves no
// stage. It also dies in the middle of going back, at each of its steps.
func TestStopAfterEveryStep(t *testing.T) {
	for _, apart := range []bool{false, true} {
		t.Run(fmt.Sprintf("apart=%v", apart), func(t *testing.T) {
			for stop := 0; ; stop++ {
				root := t.TempDir()
				syncTree(t, root)
				before := snapshot(t, root)
				w, plan := newSwitch(t, root)
				steps := 0
				w.beforeStep = func() error {
					if steps++; steps > stop {
						return errStopped
					}
					return nil
				}
				execute := func() error { return w.execute(plan) }
				if apart {
					execute = takeApartAll(w, plan)
				}
				err := execute()
				if err != nil && !errors.Is(err, errStopped) {
					t.Fatalf("step %d: %v", stop, err)
				}
				if err == nil {
					if stop < 15 {
						t.Fatalf("only %d steps", stop)
					}
					if !apart {
						checkSynced(t, root)
					}
					return
				}
				w.stage.root, w.stage.parent = nil, nil
				w.close()
				// An agent that dies while it goes back, ever later.
				for died := stop % 7; died < stop+2; died += 5 {
					recoverStopped(t, root, died)
				}
				recoverStages(root, slog.New(slog.DiscardHandler))
				if d := cmp.Diff(before, snapshot(t, root)); d != "" {
					t.Fatalf("stopped at step %d, the next agent leaves (-before +after):\n%s", stop, d)
				}
			}
		})
	}
}

// recoverStopped goes back, but stops after so many steps.
func recoverStopped(t *testing.T, root string, steps int) {
	t.Helper()
	top, err := os.OpenRoot(root)
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	names, err := stagesIn(top, ".")
	if err != nil || len(names) != 1 {
		t.Fatalf("stages %q, %v", names, err)
	}
	stageRoot, err := top.OpenRoot(names[0])
	if err != nil {
		t.Fatal(err)
	}
	defer stageRoot.Close()
	w := &switcher{stage: &stage{root: stageRoot}}
	w.beforeStep = func() error {
		if steps--; steps < 0 {
			return errStopped
		}
		return nil
	}
	f, err := stageRoot.Open(stageJournal)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w.log = readJournal(f)
	workspace, err := directoryOf(top, "workspace")
	if err != nil {
		t.Fatal(err)
	}
	defer workspace.release()
	if err := w.open(workspace); err != nil {
		t.Fatal(err)
	}
	defer w.close()
	if err := w.undo(); err != nil && !errors.Is(err, errStopped) {
		t.Fatal(err)
	}
}

func checkSynced(t *testing.T, root string) {
	t.Helper()
	recoverStages(root, slog.New(slog.DiscardHandler)) // a done journal is not undone
	got := snapshot(t, root)
	for name, text := range got {
		mode, content, _ := strings.Cut(text, " ")
		if mode[0] == '-' {
			_, content, _ = strings.Cut(content, " ")
		}
		got[name] = mode + " " + content
	}
	want := map[string]string{
		".": got["."], "workspace": "drwxr-xr-x ", "workspace/keep": "-rw-r----- kept", "workspace/change": "-rw------- new",
		"workspace/merge": "drwx------ ", "workspace/merge/keep": "-rw-r----- kept", "workspace/merge/change": "-rw-r--r-- new",
		"workspace/merge/add": "-rw-r--r-- new", "workspace/added": "drwxr-xr-x ", "workspace/added/x": "drwxr-xr-x ",
		"workspace/added/x/y": "-rw-r--r-- new", "workspace/link": "Lrwxrwxrwx elsewhere", "workspace/dir-to-file": "-rw-r--r-- now a file",
		"workspace/file-to-dir": "drwxr-xr-x ", "workspace/file-to-dir/in": "-rw-r--r-- now a directory",
		"workspace/replaced": "drwxr-xr-x ", "workspace/replaced/new": "-rw-r--r-- new",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("after the sync (-want +got):\n%s", d)
	}
	for _, name := range []string{"change", "merge"} {
		if fi, err := os.Stat(filepath.Join(root, "workspace", name)); err != nil || fi.ModTime().Unix() != 1_000_000_000 {
			t.Errorf("%s has the time %v, %v", name, fi.ModTime(), err)
		}
	}
}

// TestGuestTakesTheName is a process of the guest that makes a file in the
// middle of a sync which adds one of that name: neither is lost.
func TestGuestTakesTheName(t *testing.T) {
	root := t.TempDir()
	syncTree(t, root)
	w, plan := newSwitch(t, root)
	theirs := filepath.Join(root, "workspace", "merge", "add")
	w.beforeStep = func() error {
		w.beforeStep = nil
		return os.WriteFile(theirs, []byte("theirs"), 0o644)
	}
	before := snapshot(t, filepath.Join(root, "workspace"))
	if err := w.execute(plan); !errors.Is(err, api.ErrExists) {
		t.Errorf("error %v", err)
	}
	if err := w.rollBack(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(theirs); err != nil || string(b) != "theirs" {
		t.Errorf("their file holds %q, %v", b, err)
	}
	if err := os.Remove(theirs); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, snapshot(t, filepath.Join(root, "workspace"))); d != "" {
		t.Error(d)
	}
}

// TestGuestRemovesWhatCame is a process of the guest that removes a new file
// before the sync goes back, and an agent that dies while it does: the old file
// is not taken for the new one.
func TestGuestRemovesWhatCame(t *testing.T) {
	root := t.TempDir()
	syncTree(t, root)
	before := snapshot(t, root)
	w, plan := newSwitch(t, root)
	w.beforeStep = nil
	last := plan.put[len(plan.put)-1]
	plan.put = append(plan.put, change{Kind: changeIn, Path: "nowhere"}) // fails
	if err := w.execute(plan); err == nil {
		t.Fatal("no error")
	}
	for _, name := range []string{"change", "link", string(last.Path)} {
		if err := os.RemoveAll(filepath.Join(root, "workspace", name)); err != nil {
			t.Fatal(err)
		}
	}
	w.close()
	recoverStopped(t, root, 1000)
	recoverStages(root, slog.New(slog.DiscardHandler))
	if d := cmp.Diff(before, snapshot(t, root)); d != "" {
		t.Error(d)
	}
}

// FuzzJournal reads what somebody else may have written.
func FuzzJournal(f *testing.F) {
	f.Add([]byte(`{"kind":"out","path":"a/b","backup":3}` + "\n"))
	f.Add([]byte(`{"kind":"in","path":"../a"}` + "\n" + `{"kind":"in","path":"/a"}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, c := range readJournal(bytes.NewReader(data)) {
			if !filepath.IsLocal(string(c.Path)) || c.Backup < 0 {
				t.Errorf("accepted %+v", c)
			}
		}
	})
}
