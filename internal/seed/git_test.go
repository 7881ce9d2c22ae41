package seed_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/seed"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

func git(tb testing.TB, dir string, args ...string) string {
	tb.Helper()
	cmd := exec.Command("git", append([]string{"-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "protocol.file.allow=always", "-c", "init.defaultBranch=main"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_CEILING_DIRECTORIES="+filepath.Dir(dir))
	out, err := cmd.CombinedOutput()
	if err != nil {
		tb.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// newCheckout makes a repository with one commit.
func newCheckout(tb testing.TB, files map[string]string) string {
	tb.Helper()
	testenv.RequireTools(tb, "git", "git")
	tb.Setenv("HOME", tb.TempDir()) // whose ignore file is nobody's
	tb.Setenv("XDG_CONFIG_HOME", "")
	dir := filepath.Join(tb.TempDir(), "repo")
	git(tb, filepath.Dir(dir), "init", "-q", dir)
	write(tb, dir, files)
	git(tb, dir, "add", "-A")
	git(tb, dir, "commit", "-qm", "first")
	return dir
}

var project = map[string]string{
	".gitignore": "*.o\n/build/\nnode_modules\n!keep.o\n", "main.c": "int main;\n", "keep.o": "kept", "src/a.c": "a\n", "src/l": "->a.c",
}

var litter = map[string]string{
	"main.o": "obj", "build/out": "1", "src/node_modules/x/y": "1", "src/b.o": "1", "only/c.o": "1", "new.txt": "untracked", "void/": "", "deep/void/": "",
}

func TestCheckout(t *testing.T) {
	dir := newCheckout(t, project)
	commit := git(t, dir, "rev-parse", "HEAD")
	store := newStore(t)
	clean := build(t, store, seed.Source{Path: dir})
	if clean.Info.Mode != api.SeedGit || *clean.Info.OriginKind != "git" || *clean.Info.OriginRef != commit {
		t.Errorf("%+v", clean.Info)
	}
	write(t, dir, litter)
	s := build(t, store, seed.Source{Path: dir})
	if *s.Info.OriginRef != commit+"+dirty" {
		t.Errorf("origin %q", *s.Info.OriginRef)
	}
	want := []string{".gitignore", "deep/", "deep/void/", "keep.o", "main.c", "new.txt", "src/", "src/a.c", "src/l->a.c", "void/"}
	if diff := cmp.Diff(want, without(paths(t, s), ".git/")); diff != "" {
		t.Error(diff)
	}
	all := build(t, store, seed.Source{Path: dir, IncludeIgnored: true})
	for _, p := range []string{"main.o", "build/out", "src/node_modules/x/y", "only/c.o"} {
		found := false
		for _, q := range paths(t, all) {
			found = found || q == p
		}
		if !found {
			t.Errorf("%q is not among all", p)
		}
	}
	// In the guest, git sees what it sees here.
	out := unpack(t, s)
	if diff := cmp.Diff(git(t, dir, "status", "--porcelain"), git(t, out, "status", "--porcelain")); diff != "" {
		t.Error(diff)
	}
	if got := git(t, out, "log", "--format=%H"); got != commit {
		t.Errorf("log %q", got)
	}
}

func TestBelowTheTop(t *testing.T) {
	dir := newCheckout(t, project)
	write(t, dir, litter)
	s := build(t, newStore(t), seed.Source{Path: filepath.Join(dir, "src")})
	if diff := cmp.Diff([]string{"a.c", "l->a.c"}, paths(t, s)); diff != "" {
		t.Error(diff)
	}
	// Nothing below src differs from the commit.
	if s.Info.Mode != api.SeedGit || *s.Info.OriginRef != git(t, dir, "rev-parse", "HEAD") {
		t.Errorf("%+v", s.Info)
	}
	// What is itself ignored is no part of the checkout.
	s = build(t, newStore(t), seed.Source{Path: filepath.Join(dir, "build")})
	if diff := cmp.Diff([]string{"out"}, paths(t, s)); diff != "" || s.Info.Mode != api.SeedDirectory {
		t.Errorf("mode %s: %s", s.Info.Mode, diff)
	}
}

// A checkout around the seed that somebody else has made, as anybody can in
// /tmp, has no say.
func TestBelowSomebodyElsesCheckout(t *testing.T) {
	testenv.Require(t, "root", os.Geteuid() == 0, "only root can give files away")
	dir := newCheckout(t, map[string]string{".gitignore": "*.c\n"})
	write(t, dir, map[string]string{"mine/a.c": "1"})
	must(t, os.Chown(filepath.Join(dir, ".git"), 65534, 65534))
	s := build(t, newStore(t), seed.Source{Path: filepath.Join(dir, "mine")})
	if diff := cmp.Diff([]string{"a.c"}, paths(t, s)); diff != "" || s.Info.Mode != api.SeedDirectory {
		t.Errorf("mode %s: %s", s.Info.Mode, diff)
	}
}

func TestNestedCheckouts(t *testing.T) {
	library := newCheckout(t, map[string]string{".gitignore": "*.tmp\n", "lib.c": "1\n"})
	dir := newCheckout(t, project)
	git(t, dir, "submodule", "add", "-q", library, "sub")
	git(t, dir, "commit", "-qm", "sub")
	git(t, filepath.Dir(dir), "clone", "-q", library, filepath.Join(dir, "nested"))
	write(t, dir, map[string]string{"sub/x.tmp": "1", "sub/x.o": "1", "nested/x.tmp": "1", "nested/x.o": "1", "x.tmp": "1"})
	s := build(t, newStore(t), seed.Source{Path: dir})
	got := without(paths(t, s), ".git/")
	got = without(without(got, "nested/.git/"), "src/")
	want := []string{".gitignore", ".gitmodules", "keep.o", "main.c", "nested/", "nested/.gitignore", "nested/lib.c", "nested/x.o",
		"sub/", "sub/.git", "sub/.gitignore", "sub/lib.c", "sub/x.o", "x.tmp"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	out := unpack(t, s)
	for _, sub := range []string{"", "sub", "nested"} {
		if diff := cmp.Diff(git(t, filepath.Join(dir, sub), "status", "--porcelain"), git(t, filepath.Join(out, sub), "status", "--porcelain")); diff != "" {
			t.Errorf("%s: %s", sub, diff)
		}
	}

	// A submodule by itself brings its own history.
	s = build(t, newStore(t), seed.Source{Path: filepath.Join(dir, "sub")})
	out = unpack(t, s)
	if got, want := git(t, out, "log", "--format=%H"), git(t, library, "log", "--format=%H"); got != want {
		t.Errorf("log %q", got)
	}
	if got := git(t, out, "status", "--porcelain"); got != "?? x.o" {
		t.Errorf("status %q", got)
	}
}

func TestWorktree(t *testing.T) {
	main := newCheckout(t, project)
	tree := filepath.Join(filepath.Dir(main), "tree")
	git(t, main, "worktree", "add", "-q", "-b", "topic", tree)
	write(t, tree, map[string]string{"topic.c": "1\n", "main.o": "ignored", "main.c": "changed\n"})
	git(t, tree, "add", "topic.c")
	git(t, tree, "commit", "-qm", "second")
	write(t, tree, map[string]string{"staged": "1"})
	git(t, tree, "add", "staged")
	s := build(t, newStore(t), seed.Source{Path: tree})
	if *s.Info.OriginRef != git(t, tree, "rev-parse", "HEAD")+"+dirty" {
		t.Errorf("%+v", s.Info)
	}
	out := unpack(t, s)
	for _, args := range [][]string{{"status", "--porcelain"}, {"log", "--format=%H"}, {"branch", "--show-current"}, {"stash", "list"}, {"reflog"}} {
		if diff := cmp.Diff(git(t, tree, args...), git(t, out, args...)); diff != "" {
			t.Errorf("git %v: %s", args, diff)
		}
	}
	if _, err := os.Lstat(filepath.Join(out, "main.o")); err == nil {
		t.Error("an ignored file is there")
	}
	git(t, out, "fsck", "--strict")
}

// A checkout can ask git for programs to run in many ways; none is run, not
// even once, by whatever is done with it.
func TestHostileCheckout(t *testing.T) {
	dir := newCheckout(t, map[string]string{"f": "1\n", ".gitattributes": "* filter=evil diff=evil merge=evil\n", "sub/x": "1"})
	marker := filepath.Join(t.TempDir(), "PWN")
	run := "touch " + marker
	for key, value := range map[string]string{
		"core.fsmonitor": run, "core.hooksPath": filepath.Join(dir, "hooks"), "filter.evil.clean": run + "; cat", "filter.evil.smudge": run + "; cat",
		"filter.evil.required": "true", "diff.evil.textconv": run, "diff.external": run, "core.sshCommand": run, "core.pager": run, "pager.status": run,
		"core.askPass": run, "credential.helper": "!" + run, "alias.status": "!" + run, "core.editor": run, "gpg.program": run,
	} {
		git(t, dir, "config", key, value)
	}
	for _, hook := range []string{"post-index-change", "fsmonitor-watchman", "pre-commit", "post-checkout"} {
		for _, hooks := range []string{"hooks", ".git/hooks"} {
			write(t, dir, map[string]string{hooks + "/" + hook: "#!/bin/sh\n" + run + "\n"})
			must(t, os.Chmod(filepath.Join(dir, hooks, hook), 0o755))
		}
	}
	write(t, dir, map[string]string{"f": "2\n", "$(" + run + ");`" + run + "`": "x"}) // differs: git has to look at the content
	s := build(t, newStore(t), seed.Source{Path: dir})
	if s.Info.OriginRef == nil || !strings.HasSuffix(*s.Info.OriginRef, "+dirty") || s.Info.SkippedCount != 0 {
		t.Errorf("%+v", s.Info)
	}
	build(t, newStore(t), seed.Source{Path: filepath.Join(dir, "sub")})
	if _, err := os.Lstat(marker); err == nil {
		t.Error("a program of the checkout ran")
	}
	// The test would notice one.
	cmd := exec.Command("git", "status")
	cmd.Dir = dir
	_ = cmd.Run()
	if _, err := os.Lstat(marker); err != nil {
		t.Error("git itself runs none of the programs: the test proves nothing")
	}
}

// A partial clone fetches objects that it lacks, by any program it likes.
func TestHostilePartialClone(t *testing.T) {
	dir := newCheckout(t, project)
	marker := filepath.Join(t.TempDir(), "PWN")
	tree := git(t, dir, "rev-parse", "HEAD^{tree}")
	for key, value := range map[string]string{
		"core.repositoryFormatVersion": "1", "extensions.partialClone": "origin", "protocol.allow": "always", "protocol.ext.allow": "always",
		"remote.origin.url": "ext::touch " + marker, "remote.origin.promisor": "true",
	} {
		git(t, dir, "config", key, value)
	}
	must(t, os.Remove(filepath.Join(dir, ".git/objects", tree[:2], tree[2:])))
	must(t, os.Remove(filepath.Join(dir, ".git/index")))
	build(t, newStore(t), seed.Source{Path: dir})
	if _, err := os.Lstat(marker); err == nil {
		t.Error("a program of the checkout ran")
	}
	cmd := exec.Command("git", "status")
	cmd.Dir = dir
	_ = cmd.Run()
	if _, err := os.Lstat(marker); err != nil {
		t.Error("git itself does not run the program: the test proves nothing")
	}
}

// A .git file may name any directory of the host; none comes along that does
// not name the checkout in turn.
func TestGitFileToElsewhere(t *testing.T) {
	secret := newCheckout(t, map[string]string{"secret": "1"})
	for name, target := range map[string]string{"repository": filepath.Join(secret, ".git"), "directory": secret, "relative": "../../../../../../" + secret, "nothing": ""} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, map[string]string{"f": "1", ".git": "gitdir: " + target + "\n", "d/.git": "gitdir: " + target + "\n", "d/g": "1"})
			s := build(t, newStore(t), seed.Source{Path: dir})
			if diff := cmp.Diff([]string{"d/", "d/g", "f"}, paths(t, s)); diff != "" {
				t.Error(diff)
			}
			if s.Info.SkippedCount < 2 {
				t.Errorf("not reported: %v", s.Info.Skipped)
			}
		})
	}
}

func TestMessyCheckouts(t *testing.T) {
	dir := newCheckout(t, project)
	t.Run("no_commit", func(t *testing.T) {
		empty := filepath.Join(t.TempDir(), "empty")
		git(t, filepath.Dir(empty), "init", "-q", empty)
		write(t, empty, map[string]string{"f": "1"})
		s := build(t, newStore(t), seed.Source{Path: empty})
		if s.Info.Mode != api.SeedGit || s.Info.OriginRef != nil || s.Info.SkippedCount != 0 {
			t.Errorf("%+v", s.Info)
		}
	})
	t.Run("broken_repository", func(t *testing.T) {
		broken := t.TempDir()
		write(t, broken, map[string]string{".git/junk": "1", "f": "1"})
		s := build(t, newStore(t), seed.Source{Path: broken})
		if diff := cmp.Diff([]string{".git/", ".git/junk", "f"}, paths(t, s)); diff != "" {
			t.Error(diff)
		}
		if s.Info.SkippedCount != 1 || !strings.Contains(s.Info.Skipped[0].Reason, "git cannot read this checkout") {
			t.Errorf("%v", s.Info.Skipped)
		}
	})
	t.Run("no_git_on_the_host", func(t *testing.T) {
		write(t, dir, litter)
		t.Setenv("PATH", t.TempDir())
		s := build(t, newStore(t), seed.Source{Path: dir})
		if s.Info.SkippedCount != 1 || !strings.Contains(s.Info.Skipped[0].Reason, "git is not installed") {
			t.Errorf("%v", s.Info.Skipped)
		}
	})
	t.Run("odd_files", func(t *testing.T) {
		must(t, unix.Mkfifo(filepath.Join(dir, "pipe"), 0o644))
		write(t, dir, map[string]string{"\xff.txt": "1", "new\nline": "1"})
		must(t, os.Remove(filepath.Join(dir, "main.c"))) // tracked and gone
		s := build(t, newStore(t), seed.Source{Path: dir})
		if diff := cmp.Diff([]string{".gitignore", "deep/", "deep/void/", "keep.o", "new\nline", "new.txt", "src/", "src/a.c", "src/l->a.c", "void/", "\xff.txt"}, without(paths(t, s), ".git/")); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("seed_path_is_a_link", func(t *testing.T) {
		l := filepath.Join(t.TempDir(), "l")
		must(t, os.Symlink(dir, l))
		s, err := newStore(t).Build(context.Background(), seed.Source{Path: l}, nil)
		must(t, err)
		defer s.Close()
		if s.Info.Mode != api.SeedGit {
			t.Errorf("mode %s", s.Info.Mode)
		}
	})
}
