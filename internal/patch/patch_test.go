package patch_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/gitdiff"
	"github.com/pyro-mcp/pyro/internal/manifest"
	"github.com/pyro-mcp/pyro/internal/patch"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// A node is a file (mode 0644 or 0755) or a link.
type node struct {
	Content    string
	Exec, Link bool
}

// A tree holds files and links by path; directories are those on the way.
type tree map[string]node

func (t tree) Read(_ context.Context, name string) (patch.File, error) {
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if _, ok := t[dir]; ok {
			return patch.File{}, api.ErrNotFound
		}
	}
	n, ok := t[name]
	switch {
	case ok && n.Link:
		return patch.File{Type: manifest.Symlink, Mode: 0o777, Content: []byte(n.Content)}, nil
	case ok && n.Exec:
		return patch.File{Type: manifest.File, Mode: 0o755, Content: []byte(n.Content)}, nil
	case ok:
		return patch.File{Type: manifest.File, Mode: 0o644, Content: []byte(n.Content)}, nil
	}
	if names, _ := t.List(context.Background(), name); len(names) > 0 {
		return patch.File{Type: manifest.Directory, Mode: 0o755}, nil
	}
	return patch.File{}, api.ErrNotFound
}

func (t tree) List(_ context.Context, dir string) ([]string, error) {
	names := map[string]bool{}
	for p := range t {
		if rest, ok := strings.CutPrefix(p, dir+"/"); ok {
			name, _, _ := strings.Cut(rest, "/")
			names[name] = true
		}
	}
	return slices.Collect(maps.Keys(names)), nil
}

// with carries a result out.
func (t tree) with(tb testing.TB, r patch.Result) tree {
	tb.Helper()
	out := tree{}
	maps.Copy(out, t)
	for _, name := range r.Remove {
		if _, ok := out[name]; !ok {
			tb.Errorf("removes %q, which is not there", name)
		}
		delete(out, name)
	}
	for _, f := range r.Write {
		out[f.Path] = node{string(f.Content), f.Type == manifest.File && f.Mode&0o100 != 0, f.Type == manifest.Symlink}
	}
	for p := range out {
		for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
			if _, ok := out[dir]; ok {
				tb.Errorf("%q lies below the file %q", p, dir)
			}
		}
	}
	return out
}

func apply(t tree, text string) (patch.Result, error) {
	p, err := patch.Parse([]byte(text))
	if err != nil {
		return patch.Result{}, err
	}
	return p.Apply(context.Background(), t)
}

func lines(from, to int) string {
	var b strings.Builder
	for i := from; i <= to; i++ {
		fmt.Fprintf(&b, "%d\n", i)
	}
	return b.String()
}

func TestApply(t *testing.T) {
	ten := tree{"f": {Content: lines(1, 10)}}
	changed := tree{"f": {Content: lines(1, 4) + "five\n" + lines(6, 10)}}
	const hunk = "@@ -3,5 +3,5 @@ func\n 3\n 4\n-5\n+five\n 6\n 7\n"
	tests := []struct {
		name  string
		old   tree
		patch string
		want  tree
	}{
		{"git", ten, "diff --git a/f b/f\nindex 1..2 100644\n--- a/f\n+++ b/f\n" + hunk, changed},
		{"plain", ten, "--- f\t2020-01-01 00:00:00\n+++ f\t2021-01-01 00:00:00\n" + hunk, changed},
		{"plain_with_prefix", ten, "--- a/f\n+++ b/f\n" + hunk, changed},
		{"two_directories", ten, "diff -ru old/f new/f\n--- old/f\n+++ new/f\n" + hunk, changed},
		{"orig", ten, "--- f.orig\n+++ f\n" + hunk, changed},
		{"no_prefix", ten, "diff --git f f\n--- f\n+++ f\n" + hunk, changed},
		{"mnemonic_prefix", ten, "diff --git i/f w/f\n--- i/f\n+++ w/f\n" + hunk, changed},
		{"directory_a", tree{"a/f": ten["f"]}, "--- a/a/f\n+++ b/a/f\n" + hunk, tree{"a/f": changed["f"]}},
		{"mail", ten, "From 123 Mon Sep 17\nSubject: x\n\n- a list\n+ more\n---\n f | 2 +-\n\ndiff --git a/f b/f\n--- a/f\n+++ b/f\n" + hunk + "-- \n2.39.5\n\n", changed},
		{"wrong_line_number", ten, "--- a/f\n+++ b/f\n@@ -30,5 +31,5 @@\n 3\n 4\n-5\n+five\n 6\n 7\n", changed},
		{"no_last_newline_of_patch", ten, "--- a/f\n+++ b/f\n" + strings.TrimSuffix(hunk, "\n"), changed},
		{"space_cut_from_empty_line", tree{"f": {Content: "a\n\nb\n"}}, "--- a/f\n+++ b/f\n@@ -1,3 +1,3 @@\n-a\n+A\n\n b\n", tree{"f": {Content: "A\n\nb\n"}}},
		{"crlf_file", tree{"f": {Content: "a\r\nb\r\n"}}, "--- a/f\n+++ b/f\n@@ -1,2 +1,2 @@\n-a\r\n+c\r\n b\r\n", tree{"f": {Content: "c\r\nb\r\n"}}},
		{"no_trailing_context", ten, "--- a/f\n+++ b/f\n@@ -3,3 +3,3 @@\n 3\n 4\n-5\n+five\n", changed},
		{"two_hunks_shifted", tree{"f": {Content: "new\n" + lines(1, 30)}},
			"--- a/f\n+++ b/f\n@@ -2,3 +2,2 @@\n 2\n-3\n 4\n@@ -20,3 +19,4 @@\n 20\n 21\n+x\n 22\n",
			tree{"f": {Content: "new\n" + lines(1, 2) + lines(4, 21) + "x\n" + lines(22, 30)}}},
		{"alike_places_shifted", tree{"f": {Content: "new\nnew\nA\nB\n" + strings.Repeat("s\n", 20)}},
			"--- a/f\n+++ b/f\n@@ -1,2 +1,3 @@\n A\n+x\n B\n@@ -8,4 +9,5 @@\n s\n s\n+here\n s\n s\n",
			tree{"f": {Content: "new\nnew\nA\nx\nB\n" + strings.Repeat("s\n", 7) + "here\n" + strings.Repeat("s\n", 13)}}},
		{"newline_added", tree{"f": {Content: "a"}}, "--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n\\ No newline at end of file\n+a\n", tree{"f": {Content: "a\n"}}},
		{"newline_removed", tree{"f": {Content: "a\n"}}, "--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n+a\n\\ No newline at end of file\n", tree{"f": {Content: "a"}}},
		{"added", ten, "--- /dev/null\n+++ b/d/new\n@@ -0,0 +1,2 @@\n+x\n+y\n", tree{"f": ten["f"], "d/new": {Content: "x\ny\n"}}},
		{"added_executable", nil, "diff --git a/x b/x\nnew file mode 100755\n--- /dev/null\n+++ b/x\n@@ -0,0 +1 @@\n+x\n", tree{"x": {Content: "x\n", Exec: true}}},
		{"added_empty", nil, "diff --git a/d/x y b/d/x y\nnew file mode 100644\nindex 0000000..e69de29\n", tree{"d/x y": {}}},
		{"deleted", ten, "--- a/f\n+++ /dev/null\n@@ -1,10 +0,0 @@\n-" + strings.ReplaceAll(lines(1, 9), "\n", "\n-") + "10\n", tree{}},
		{"deleted_empty", tree{"e": {}}, "diff --git a/e b/e\ndeleted file mode 100644\nindex e69de29..0000000\n", tree{}},
		{"mode", ten, "diff --git a/f b/f\nold mode 100644\nnew mode 100755\n", tree{"f": {Content: lines(1, 10), Exec: true}}},
		{"renamed", ten, "diff --git a/f b/d/g h\nsimilarity index 100%\nrename from f\nrename to d/g h\n", tree{"d/g h": ten["f"]}},
		{"renamed_and_changed", ten, "diff --git a/f b/g\nsimilarity index 80%\nrename from f\nrename to g\n--- a/f\n+++ b/g\n" + hunk, tree{"g": changed["f"]}},
		{"copied", ten, "diff --git a/f b/g\nsimilarity index 80%\ncopy from f\ncopy to g\n--- a/f\n+++ b/g\n" + hunk, tree{"f": ten["f"], "g": changed["f"]}},
		{"swapped", tree{"a": {Content: "1"}, "b": {Content: "2"}},
			"diff --git a/a b/b\nsimilarity index 100%\nrename from a\nrename to b\ndiff --git a/b b/a\nsimilarity index 100%\nrename from b\nrename to a\n",
			tree{"a": {Content: "2"}, "b": {Content: "1"}}},
		{"quoted", tree{"t\tab \"ü\\": {Content: "1\n"}}, "diff --git \"a/t\\tab \\\"\\303\\274\\\\\" \"b/t\\tab \\\"\\303\\274\\\\\"\n--- \"a/t\\tab \\\"\\303\\274\\\\\"\n+++ \"b/t\\tab \\\"\\303\\274\\\\\"\n@@ -1 +1 @@\n-1\n+2\n", tree{"t\tab \"ü\\": {Content: "2\n"}}},
		{"link", tree{"l": {Content: "x", Link: true}}, "diff --git a/l b/l\nindex 1..2 120000\n--- a/l\n+++ b/l\n@@ -1 +1 @@\n-x\n\\ No newline at end of file\n+y\n\\ No newline at end of file\n", tree{"l": {Content: "y", Link: true}}},
		{"file_to_link", tree{"l": {Content: "x\n"}}, "diff --git a/l b/l\ndeleted file mode 100644\n--- a/l\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\ndiff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+y\n\\ No newline at end of file\n", tree{"l": {Content: "y", Link: true}}},
		{"same_file_twice", ten, "--- a/f\n+++ b/f\n" + hunk + "--- a/f\n+++ b/f\n@@ -4,3 +4,3 @@\n 4\n-five\n+5\n 6\n", ten},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := apply(tt.old, tt.patch)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, tt.old.with(t, r)); diff != "" && len(tt.want)+len(tt.old.with(t, r)) > 0 {
				t.Error(diff)
			}
			s := r.Summary
			if s.Total != int64(len(r.Entries)) || s.Added+s.Deleted+s.Modified+s.Renamed != s.Total || s.Total == 0 {
				t.Errorf("summary %+v of %+v", s, r.Entries)
			}
		})
	}
}

func TestRefused(t *testing.T) {
	ten := tree{"f": {Content: lines(1, 10)}, "d/x": {Content: "1\n"}, "l": {Content: "d", Link: true}}
	const hunk = "@@ -3,5 +3,5 @@\n 3\n 4\n-5\n+five\n 6\n 7\n"
	add := func(name string) string { return "--- /dev/null\n+++ " + name + "\n@@ -0,0 +1 @@\n+x\n" }
	tests := []struct {
		name, patch string
		class       error
		says        []string
	}{
		{"nothing", "hello\n", api.ErrInvalid, []string{"changes no file"}},
		{"empty", "", api.ErrInvalid, []string{"changes no file"}},
		{"outside", add("b/../x"), api.ErrDenied, []string{"line 1", "leaves the workspace"}},
		{"far_outside", add("b/a/../../../etc/x"), api.ErrDenied, nil},
		{"absolute", add("/etc/x"), api.ErrDenied, []string{"absolute"}},
		{"absolute_git", "diff --git a//etc/x b//etc/x\nnew file mode 100644\n", api.ErrDenied, nil},
		{"renamed_outside", "diff --git a/f b/g\nrename from f\nrename to ../g\n", api.ErrDenied, nil},
		{"git_own", add("b/.git/hooks/pre-commit"), api.ErrDenied, []string{"Git's own"}},
		{"git_own_below", add("b/sub/.GIT/config"), api.ErrDenied, nil},
		{"nul", "diff --git \"a/x\\000y\" \"b/x\\000y\"\nnew file mode 100644\n", api.ErrDenied, nil},
		{"behind_link", add("b/l/x"), api.ErrDenied, []string{`"l/x" lies behind the symbolic link "l"`}},
		{"below_file", add("b/f/x"), api.ErrInvalid, []string{`below "f"`}},
		{"exists", add("b/f"), api.ErrInvalid, []string{"already"}},
		{"over_directory", add("b/d"), api.ErrInvalid, []string{"directory"}},
		{"missing", "--- a/g\n+++ b/g\n" + hunk, api.ErrInvalid, []string{`there is no file "g"`}},
		{"of_a_directory", "--- a/d\n+++ b/d\n" + hunk, api.ErrInvalid, []string{`"d" is a directory`}},
		{"of_a_link", "--- a/l\n+++ b/l\n@@ -1 +1 @@\n-d\n+e\n", api.ErrInvalid, []string{"symlink"}},
		{"wrong_line", "--- a/f\n+++ b/f\n" + hunk + "@@ -8,3 +8,3 @@\n 8\n-NINE\n+nine\n 10\n", api.ErrInvalid,
			[]string{`hunk 2 of "f" (line 10 of the patch)`, `line 9 of the file is "9\n"`, `expects "NINE\n"`}},
		{"past_the_end", "--- a/f\n+++ b/f\n@@ -9,3 +9,4 @@\n 9\n 10\n+x\n 11\n", api.ErrInvalid, []string{"ends after line 10", `"11\n"`}},
		{"line_endings", "--- a/f\n+++ b/f\n@@ -3,3 +3,3 @@\n 3\r\n-4\r\n+four\r\n 5\r\n", api.ErrInvalid, []string{`ends with "\n"`, `"\r\n"`}},
		{"ambiguous", "--- a/f\n+++ b/f\n@@ -20 +20,2 @@\n-1\n+one\n+x\n--- a/t\n+++ b/t\n@@ -1 +1 @@\n-x\n+y\n", api.ErrInvalid, nil},
		{"too_few_lines", "--- a/f\n+++ b/f\n@@ -3,6 +3,5 @@\n 3\n 4\n-5\n+five\n 6\n 7\n", api.ErrInvalid, []string{"line 10", "1 old and 0 new lines missing"}},
		{"too_many_lines", "--- a/f\n+++ b/f\n@@ -3,4 +3,4 @@\n 3\n 4\n-5\n+five\n 6\n 7\n", api.ErrInvalid, []string{"line 9", "more lines than its header"}},
		{"too_many_added", "--- a/f\n+++ b/f\n@@ -3,2 +3,3 @@\n 3\n+x\n+y\n 4\n", api.ErrInvalid, []string{"more lines"}},
		{"garbage_in_hunk", "--- a/f\n+++ b/f\n@@ -3,5 +3,5 @@\n 3\nfour\n", api.ErrInvalid, []string{`found "four"`}},
		{"bad_header", "--- a/f\n+++ b/f\n@@ -3,5 @@\n 3\n", api.ErrInvalid, []string{"no proper header"}},
		{"hunk_without_file", hunk, api.ErrInvalid, []string{"hunk without a file"}},
		{"delete_leaves_lines", "--- a/f\n+++ /dev/null\n@@ -1,2 +0,0 @@\n-1\n-2\n", api.ErrInvalid, []string{"more in it"}},
		{"binary_without_content", "diff --git a/b b/b\nindex 1..2 100644\nBinary files a/b and b/b differ\n", api.ErrUnsupported, []string{"binary"}},
		{"submodule", "diff --git a/s b/s\nnew file mode 160000\n--- /dev/null\n+++ b/s\n@@ -0,0 +1 @@\n+Subproject commit 1\n", api.ErrUnsupported, []string{"submodule"}},
		{"mode_unknown", "diff --git a/f b/f\nold mode 100644\nnew mode 060000\n", api.ErrInvalid, nil},
		{"nothing_changed", "diff --git a/f b/f\nindex 1..2 100644\n", api.ErrInvalid, []string{"nothing of"}},
		{"rename_mixed_up", "diff --git a/f b/g\nrename from f\nrename to g\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n", api.ErrInvalid, []string{"renamed"}},
		{"link_with_nul", "diff --git a/k b/k\nnew file mode 120000\n--- /dev/null\n+++ b/k\n@@ -0,0 +1 @@\n+a\x00b\n\\ No newline at end of file\n", api.ErrInvalid, nil},
		{"insert_into_file_as_new", "--- a/f\n+++ b/f\n@@ -0,0 +1 @@\n+x\n", api.ErrInvalid, []string{"made for an empty file"}},
		{"bad_base85", "diff --git a/b b/b\nnew file mode 100644\nGIT binary patch\nliteral 1\nAab\n\n", api.ErrInvalid, []string{"base85"}},
		{"binary_bomb", "diff --git a/b b/b\nnew file mode 100644\nGIT binary patch\nliteral 99999999999\nAab\n\n", api.ErrExhausted, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := apply(ten, tt.patch)
			if !errors.Is(err, tt.class) {
				t.Fatalf("got %v", err)
			}
			for _, s := range tt.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("no %q in: %v", s, err)
				}
			}
		})
	}
}

func TestLimits(t *testing.T) {
	if _, err := patch.Parse(make([]byte, patch.MaxPatchBytes+1)); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("a long patch: %v", err)
	}
	var b strings.Builder
	for i := range patch.MaxFiles + 1 {
		fmt.Fprintf(&b, "diff --git a/%d b/%d\nnew file mode 100644\n", i, i)
	}
	if _, err := patch.Parse([]byte(b.String())); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("many files: %v", err)
	}
	// Hunks that nearly fit everywhere must not take forever.
	same := strings.Repeat("x\n", 1_000_000)
	_, err := apply(tree{"f": {Content: same}}, "--- a/f\n+++ b/f\n@@ -500000,5001 +500000,5000 @@\n"+strings.Repeat(" x\n", 4999)+"-y\n z\n")
	if !errors.Is(err, api.ErrExhausted) {
		t.Errorf("a slow search: %v", err)
	}
}

func TestPaths(t *testing.T) {
	p, err := patch.Parse([]byte("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\ndiff --git a/f b/g\nrename from f\nrename to g\n"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"f", "g", "x"}, p.Paths()); diff != "" {
		t.Error(diff)
	}
}

var parts = []string{"a", "b", "c d", "ü", "a\tb", "x\\", "\xfe", "-", `"`}

func randomTree(r *rand.Rand, t tree) tree {
	t = maps.Clone(t)
	for range r.IntN(8) {
		p := parts[r.IntN(len(parts))]
		for r.IntN(2) == 0 {
			p += "/" + parts[r.IntN(len(parts))]
		}
		for d := p; d != "."; d = path.Dir(d) {
			delete(t, d)
		}
		maps.DeleteFunc(t, func(q string, _ node) bool { return strings.HasPrefix(q, p+"/") })
		n := node{Content: "target"}
		switch r.IntN(6) {
		case 0:
			n.Link = true
		case 1:
			n.Content = strings.Repeat("\x00\xff binary", r.IntN(100))
		default:
			n.Exec = r.IntN(3) == 0
			n.Content = strings.Repeat(lines(r.IntN(5), 5+r.IntN(30)), 1+r.IntN(2))
			if r.IntN(4) == 0 {
				n.Content = strings.TrimSuffix(n.Content, "\n")
			}
		}
		t[p] = n
	}
	for _, p := range slices.Sorted(maps.Keys(t)) {
		n := t[p]
		switch {
		case r.IntN(5) == 0:
			delete(t, p)
		case r.IntN(3) == 0 && !n.Link && !strings.Contains(n.Content, "\x00"):
			all := strings.SplitAfter(n.Content, "\n")
			for range r.IntN(4) {
				all[r.IntN(len(all))] += fmt.Sprintf("%d\n", r.IntN(9))
			}
			n.Content = strings.Join(all, "")
			t[p] = n
		}
	}
	return t
}

func (t tree) write(tb testing.TB, dir string) {
	tb.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	for p, n := range t {
		full := filepath.Join(dir, p)
		err := os.MkdirAll(filepath.Dir(full), 0o755)
		if n.Link {
			err = errors.Join(err, os.Symlink(n.Content, full))
		} else {
			mode := fs.FileMode(0o644)
			if n.Exec {
				mode = 0o755
			}
			err = errors.Join(err, os.WriteFile(full, []byte(n.Content), mode))
		}
		if err != nil {
			tb.Fatal(err)
		}
	}
}

// Git writes the patches, with renames, copies and deltas.
func TestPatchesOfGit(t *testing.T) {
	testenv.RequireTools(t, "git", "git")
	for seed := range 12 {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(seed), 3))
			old := randomTree(r, tree{"k": {Content: lines(1, 40)}, "bin": {Content: "\x00" + lines(1, 500)}})
			cur := randomTree(r, old)
			if n, ok := cur["k"]; ok {
				cur["moved"] = n
				delete(cur, "k")
			}
			if n, ok := cur["bin"]; ok {
				cur["bin"] = node{Content: "\x00" + lines(2, 510), Exec: n.Exec}
			}
			dir := t.TempDir()
			old.write(t, filepath.Join(dir, "old"))
			cur.write(t, filepath.Join(dir, "new"))
			git := func(args ...string) string {
				cmd := exec.Command("git", args...)
				cmd.Dir = dir
				cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
				out, err := cmd.Output()
				if err != nil {
					t.Fatalf("git %v: %v", args, err)
				}
				return string(out)
			}
			git("init", "-q")
			git("--work-tree=old", "add", "-A")
			before := strings.TrimSpace(git("write-tree"))
			git("--work-tree=new", "add", "-A")
			after := strings.TrimSpace(git("write-tree"))
			text := git("diff", "--binary", "-M", "-C", "--find-copies-harder", before, after)
			if text == "" {
				return
			}
			result, err := apply(old, text)
			if err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			if diff := cmp.Diff(cur, old.with(t, result)); diff != "" {
				t.Errorf("%s\n%s", diff, text)
			}
		})
	}
}

func FuzzUnquote(f *testing.F) {
	for _, p := range parts {
		f.Add(p)
	}
	f.Add("\x00\x7f\r\n")
	f.Fuzz(func(t *testing.T, name string) {
		if q := gitdiff.Quote(name); strings.HasPrefix(q, `"`) {
			got, rest, err := patch.Unquote(q + " x")
			if err != nil || got != name || rest != " x" {
				t.Errorf("%q became %q, %q, %v", name, got, rest, err)
			}
		} else if q != name {
			t.Errorf("%q became %q", name, q)
		}
		_, _, _ = patch.Unquote(name)
		_, _, _ = patch.Unquote(`"` + name)
	})
}

func FuzzApply(f *testing.F) {
	old := tree{"f": {Content: lines(1, 10)}, "d/x": {Content: "1\n"}, "l": {Content: "d", Link: true}}
	f.Add("diff --git a/f b/f\nold mode 100644\nnew mode 100755\n--- a/f\n+++ b/f\n@@ -3,5 +3,5 @@\n 3\n 4\n-5\n+five\n 6\n 7\n")
	f.Add("diff --git a/f b/g\nrename from f\nrename to g\ndiff --git a/d/x b/d\nnew file mode 120000\n--- /dev/null\n+++ b/d\n@@ -0,0 +1 @@\n+d\n\\ No newline at end of file\n")
	f.Add("diff --git a/d/x b/d/x\nindex 1..2\nGIT binary patch\nliteral 0\nHcmV?d00001\n\ndelta 3\nKcmZqRVqyRQ03ZMW\n\n--- a/f\n+++ /dev/null\n@@ -1 +0,0 @@\n-1\n")
	f.Fuzz(func(t *testing.T, text string) {
		r, err := apply(old, text)
		if err != nil {
			if code := api.Code(err); code == "internal" {
				t.Errorf("an error without class: %v", err)
			}
			return
		}
		for _, w := range r.Write {
			if !filepath.IsLocal(w.Path) || strings.Contains(w.Path, ".git/") {
				t.Errorf("writes %q", w.Path)
			}
		}
		old.with(t, r)
	})
}
