package trees_test

import (
	"bytes"
	_ "embed"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/pyro-mcp/pyro/api"
)

// The files that a messy repository ignores.
const ignoredFiles = 10_000

// longName is as long as a name may be: NAME_MAX of limits.h.
var longName = strings.Repeat("n", 255)

// makeMess makes a Git checkout with everything in it that a checkout can have,
// and returns it. Beside it lie a submodule's origin and a worktree of it.
func makeMess(t *testing.T) (repo, worktree string) {
	t.Helper()
	top := t.TempDir()
	repo = filepath.Join(top, "repo")
	write := func(name, content string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(repo, name)
		check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		check(t, os.WriteFile(path, []byte(content), 0o600))
		check(t, os.Chmod(path, mode))
	}
	random := rand.New(rand.NewPCG(1, 2))
	binary := make([]byte, 300_000)
	for i := range binary {
		binary[i] = byte(random.Uint32())
	}
	var long strings.Builder
	for i := range 10_000 {
		fmt.Fprintf(&long, "line %d\n", i)
	}
	for name, content := range map[string]string{
		"plain.txt": "one\ntwo\nthree\n", "no-newline": "no newline", "empty": "", "crlf.txt": "a\r\nb\r\nc\r\n", "mixed": "a\r\nb\nc\r",
		"binary": string(binary), "long.txt": long.String(), "latin1": "caf\xe9\n", "nul": "a\x00b\n", "bom.txt": "\ufeffx\n",
		"with space": "x\n", "-rf": "x\n", "--help": "x\n", "new\nline": "x\n", "tab\tname": "x\n", `back\slash`: "x\n", `quo"te`: "x\n",
		"inv\xff\xfealid": "x\n", "dir\xff/x": "x\n", "esc\x1b[2J": "x\n", "ünïcode": "x\n", "e\u0301": "x\n", "a b/c d": "x\n", longName: "x\n", ".hidden/.more": "x\n",
		"Case": "upper\n", "case": "lower\n", "only-spaces/   ": "x\n", "glob*[a]?": "x\n", "trailing.": "x\n", "a/b": "x\n", "a.b": "x\n", "a-b": "x\n",
		strings.Repeat("deep/", 60) + "leaf": "x\n", "+++ b/odd": "--- a/odd\n+++ b/odd\n@@ -1 +1 @@\n-a\n+b\n", "patchy": "diff --git a/x b/x\n",
		".gitignore": "/ignored/\n*.o\n",
	} {
		write(name, content, 0o644)
	}
	write("run.sh", "#!/bin/sh\necho ran\n", 0o755)
	write("secret", "0600\n", 0o600)
	write("read-only", "0444\n", 0o444)
	write("no-rights", "0000\n", 0)
	write("group", "0070\n", 0o670)
	for name, target := range map[string]string{
		"link": "plain.txt", "broken": "nowhere", "absolute": "/etc/passwd", "up": "../../..", "loop": "loop", "loop-a": "loop-b", "loop-b": "loop-a",
		"dirlink": "a", "odd-target": "new\nline", "invalid-target": "inv\xff\xfealid", "a/back": "../plain.txt",
	} {
		check(t, os.Symlink(target, filepath.Join(repo, name)))
	}
	check(t, os.Link(filepath.Join(repo, "plain.txt"), filepath.Join(repo, "hard")))
	check(t, os.MkdirAll(filepath.Join(repo, "hollow/inner"), 0o755))

	// Another repository inside, which is none of Git's submodules.
	check(t, os.MkdirAll(filepath.Join(repo, "nested"), 0o755))
	git(t, filepath.Join(repo, "nested"), nil, "init", "-q")
	write("nested/file", "nested\n", 0o644)
	git(t, filepath.Join(repo, "nested"), nil, "add", ".")
	git(t, filepath.Join(repo, "nested"), nil, "commit", "-qm", "nested")

	other := filepath.Join(top, "other")
	check(t, os.Mkdir(other, 0o755))
	git(t, other, nil, "init", "-q")
	check(t, os.WriteFile(filepath.Join(other, "lib.c"), []byte("int lib;\n"), 0o600))
	git(t, other, nil, "add", ".")
	git(t, other, nil, "commit", "-qm", "lib")

	git(t, repo, nil, "init", "-q")
	git(t, repo, nil, "submodule", "--quiet", "add", other, "sub")
	git(t, repo, nil, "add", "-A", "--", ".", ":!nested")
	git(t, repo, nil, "commit", "-qm", "a mess")
	worktree = filepath.Join(top, "worktree")
	git(t, repo, nil, "worktree", "add", "-q", worktree)

	// What is not committed.
	write("untracked", "x\n", 0o644)
	for i := range ignoredFiles {
		write(fmt.Sprintf("ignored/%d/%d", i%100, i), "junk\n", 0o644)
	}
	write("built.o", "junk\n", 0o644)
	check(t, syscall.Mkfifo(filepath.Join(repo, "fifo"), 0o644))
	// By a short relative name: the paths of sockets are bounded.
	check(t, os.Mkdir(filepath.Join(repo, "run"), 0o755))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(shortcut(t, repo), "run/socket")})
	check(t, err)
	l.SetUnlinkOnClose(false)
	check(t, l.Close())
	return repo, worktree
}

// shortcut returns a short path to dir.
func shortcut(t *testing.T, dir string) string {
	t.Helper()
	tmp, err := os.MkdirTemp("", "s")
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(tmp) })
	link := filepath.Join(tmp, "d")
	check(t, os.Symlink(dir, link))
	return link
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

//go:embed testdata/edit.py
var editScript string

func TestMessyRepository(t *testing.T) {
	u := newUser(t)
	repo, worktree := makeMess(t)
	id := u.create("--seed-path", repo)

	var ws api.Workspace
	u.decode(&ws, "workspace", "status", id)
	seed := ws.WorkspaceSeed
	if seed.Mode != api.SeedGit || seed.OriginRef == nil || !strings.HasSuffix(*seed.OriginRef, "+dirty") {
		t.Errorf("the seed is of mode %s and ref %v, want a changed checkout", seed.Mode, seed.OriginRef)
	}
	wantSkipped := map[string]bool{"fifo": true, "run/socket": true}
	for _, s := range seed.Skipped {
		if !wantSkipped[s.Path] {
			t.Errorf("%q was left out: %s", s.Path, s.Reason)
		}
		delete(wantSkipped, s.Path)
	}
	if len(wantSkipped) > 0 {
		t.Errorf("not reported as left out: %v", wantSkipped)
	}

	// All that Git does not ignore is there, unchanged.
	want := tree{}
	for name, what := range onHost(t, repo) {
		switch {
		case name == "ignored" || strings.HasPrefix(name, "ignored/") || name == "built.o":
		case inGit(name):
		default:
			want[name] = what
		}
	}
	got := u.inside(id)
	for name := range union(want, got) {
		if want[name] != got[name] && !inGit(name) {
			t.Errorf("%q is %q in the checkout, %q in the workspace", name, want[name], got[name])
		}
	}
	if len(want) < 100 {
		t.Fatalf("there are %d entries only", len(want))
	}
	if d := u.checkDiff(id, "", u.copyOut(id)); d.Changed {
		t.Errorf("an untouched workspace differs: %+v", d.Entries)
	}
	// Git in the workspace thinks the same of it as on the host.
	if inside, outside := u.pyro("workspace", "exec", "--quiet", "--timeout-seconds", "120", id, "--", "git", "status", "--porcelain"), git(t, repo, nil, "status", "--porcelain"); string(inside) != outside {
		t.Errorf("git status in the workspace:\n%s\non the host:\n%s", inside, outside)
	}
	u.pyro("workspace", "exec", "--quiet", "--timeout-seconds", "120", id, "--", "git", "-C", "sub", "log", "-1", "--format=%s")
	u.checkExport(id)

	t.Run("edited", func(t *testing.T) {
		u := u.in(t)
		base := u.copyOut(id)
		u.python(id, editScript, "1")
		first := u.checkDiff(id, "", base)
		if first.Summary.Total < 40 {
			t.Errorf("%d changes only", first.Summary.Total)
		}
		u.checkExport(id)

		u.pyro("workspace", "snapshot", "create", id, "one")
		one := u.inside(id)
		base = u.copyOut(id)
		u.python(id, editScript, "2")
		u.checkDiff(id, "one", base)
		u.pyro("workspace", "reset", id, "--snapshot", "one", "--quiet")
		if now := u.inside(id); !same(one, now) {
			t.Error("the reset workspace is not the snapshot")
		}
		var again api.Diff
		u.decode(&again, "workspace", "diff", id)
		if again.Patch != first.Patch {
			t.Error("the diff after the reset is another than before")
		}
		u.pyro("workspace", "stop", id)
		u.pyro("workspace", "start", id, "--quiet")
		if now := u.inside(id); !same(one, now) {
			t.Error("the workspace is another after stop and start")
		}
	})

	t.Run("synced", func(t *testing.T) {
		u := u.in(t)
		other := u.create()
		var res api.SyncResult
		u.decode(&res, "workspace", "sync", "push", other, repo)
		now := u.inside(other)
		for name := range union(want, now) {
			if want[name] != now[name] && !inGit(name) {
				t.Errorf("%q is %q in the checkout, %q after the sync", name, want[name], now[name])
			}
		}
		u.pyro("workspace", "delete", other)
	})

	t.Run("worktree", func(t *testing.T) {
		u := u.in(t)
		other := u.create("--seed-path", worktree)
		out := u.pyro("workspace", "exec", "--quiet", "--timeout-seconds", "120", other, "--", "git status --porcelain; git log -1 --format=%s; git branch --show-current")
		if want := "a mess\nworktree\n"; !bytes.HasSuffix(out, []byte(want)) {
			t.Errorf("git in the workspace says %q, want …%q", out, want)
		}
		u.pyro("workspace", "delete", other)
	})
}

// TestUnreadable seeds as somebody who may not read all of it.
func TestUnreadable(t *testing.T) {
	if engine() != "host" {
		t.Skip("the seed is made on the host, the same for every engine")
	}
	u := newUser(t)
	dir := t.TempDir()
	for _, name := range []string{"open", "closed", "locked/in"} {
		path := filepath.Join(dir, name)
		check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		check(t, os.WriteFile(path, []byte("x"), 0o644))
	}
	check(t, os.Chmod(filepath.Join(dir, "closed"), 0))
	check(t, os.Chmod(filepath.Join(dir, "locked"), 0))
	t.Cleanup(func() { _ = os.Chmod(filepath.Join(dir, "locked"), 0o700) })
	if os.Getuid() == 0 {
		u.credential = &syscall.Credential{Uid: 65534, Gid: 65534}
		for _, v := range u.env {
			if p, ok := strings.CutPrefix(v, "PYRO_STATE_DIR="); ok && strings.Contains(p, "trees") {
				check(t, os.Chown(filepath.Dir(p), 65534, 65534))
			}
		}
		for _, d := range []string{programs, filepath.Dir(dir), dir} {
			check(t, os.Chmod(d, 0o755))
		}
	}
	id := u.create("--seed-path", dir)
	var ws api.Workspace
	u.decode(&ws, "workspace", "status", id)
	if n := ws.WorkspaceSeed.SkippedCount; n != 2 {
		t.Errorf("%d entries were left out, want 2: %+v", n, ws.WorkspaceSeed.Skipped)
	}
	for _, s := range ws.WorkspaceSeed.Skipped {
		if s.Path != "closed" && s.Path != "locked" || !strings.Contains(s.Reason, "permission denied") {
			t.Errorf("left out %q: %s", s.Path, s.Reason)
		}
	}
	if got := u.inside(id); got["open"] == "" || got["closed"] != "" {
		t.Errorf("the workspace holds %v", got)
	}
}

// in returns the user within a subtest.
func (u *user) in(t *testing.T) *user {
	v := *u
	v.t = t
	return &v
}

func same(a, b tree) bool {
	for name := range union(a, b) {
		if a[name] != b[name] {
			return false
		}
	}
	return true
}
