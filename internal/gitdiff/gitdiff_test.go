package gitdiff_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/gitdiff"
	"github.com/pyro-mcp/pyro/internal/manifest"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// A node is a file, a link or an empty directory.
type node struct {
	Type, Content string
	Exec          bool
}

// A tree has its directories by the paths of its nodes alone.
type tree map[string]node

func text(s string) node   { return node{Type: manifest.File, Content: s} }
func script(s string) node { return node{Type: manifest.File, Content: s, Exec: true} }
func link(s string) node   { return node{Type: manifest.Symlink, Content: s} }

var emptyDir = node{Type: manifest.Directory}

func (t tree) manifest() iter.Seq2[manifest.Entry, error] {
	all := map[string]manifest.Entry{}
	for p, n := range t {
		e := manifest.Entry{Path: p, Type: n.Type, Mode: 0o644, Size: int64(len(n.Content))}
		switch {
		case n.Type == manifest.Symlink:
			e.Mode, e.Target = 0o777, n.Content
		case n.Type == manifest.Directory:
			e.Mode = 0o755
		default:
			e.SHA256 = sha256.Sum256([]byte(n.Content))
			if n.Exec {
				e.Mode = 0o755
			}
		}
		all[p] = e
		for d := path.Dir(p); d != "."; d = path.Dir(d) {
			all[d] = manifest.Entry{Path: d, Type: manifest.Directory, Mode: 0o755}
		}
	}
	return func(yield func(manifest.Entry, error) bool) {
		for _, p := range slices.SortedFunc(maps.Keys(all), manifest.ComparePaths) {
			if !yield(all[p], nil) {
				return
			}
		}
	}
}

func (t tree) open(_ context.Context, p string) (io.ReadCloser, error) {
	n, ok := t[p]
	if !ok || n.Type != manifest.File {
		return nil, api.ErrNotFound
	}
	return io.NopCloser(strings.NewReader(n.Content)), nil
}

func (t tree) write(tb testing.TB, dir string) {
	tb.Helper()
	for p, n := range t {
		full := filepath.Join(dir, p)
		must(tb, os.MkdirAll(filepath.Dir(full), 0o755))
		switch n.Type {
		case manifest.Symlink:
			must(tb, os.Symlink(n.Content, full))
		case manifest.Directory:
			must(tb, os.MkdirAll(full, 0o755))
		default:
			mode := fs.FileMode(0o644)
			if n.Exec {
				mode = 0o755
			}
			must(tb, os.WriteFile(full, []byte(n.Content), mode))
		}
	}
}

// readTree reads what is in dir, without empty directories.
func readTree(tb testing.TB, dir string) tree {
	tb.Helper()
	t := tree{}
	must(tb, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		must(tb, err)
		if d.Type() == fs.ModeSymlink {
			target, err := os.Readlink(p)
			t[rel] = link(target)
			return err
		}
		b, err := os.ReadFile(p)
		must(tb, err)
		fi, err := d.Info()
		t[rel] = node{manifest.File, string(b), fi.Mode()&0o100 != 0}
		return err
	}))
	return t
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func write(tb testing.TB, old, cur tree, opts gitdiff.Options) (string, gitdiff.Result) {
	tb.Helper()
	changes, err := manifest.Compare(manifest.Checked(old.manifest()), manifest.Checked(cur.manifest()))
	must(tb, err)
	var b strings.Builder
	opts.Old, opts.New = old.open, cur.open
	result, err := gitdiff.Write(context.Background(), &b, changes, opts)
	must(tb, err)
	return b.String(), result
}

// checkApplies applies the patch to the old tree and compares with the new one.
func checkApplies(t *testing.T, old, cur tree, opts gitdiff.Options) (string, gitdiff.Result) {
	t.Helper()
	testenv.RequireTools(t, "git", "git")
	patch, result := write(t, old, cur, opts)
	if !utf8.ValidString(patch) {
		t.Errorf("the patch is not valid UTF-8")
	}
	dir := t.TempDir()
	old.write(t, dir)
	if patch != "" {
		cmd := exec.Command("git", "apply", "--binary", "-")
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GIT_CEILING_DIRECTORIES="+filepath.Dir(dir), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
		cmd.Stdin = strings.NewReader(patch)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git apply: %v\n%s\n%.4000s", err, out, patch)
		}
	}
	for _, u := range result.Unpatched {
		if strings.Contains(u.Reason, "in its place") {
			return patch, result
		}
	}
	want := tree{}
	maps.Copy(want, cur)
	maps.DeleteFunc(want, func(_ string, n node) bool { return n.Type == manifest.Directory })
	if diff := cmp.Diff(want, readTree(t, dir)); diff != "" {
		t.Fatalf("after git apply:\n%s\n%.4000s", diff, patch)
	}
	return patch, result
}

func numbered(n int, change map[int]string) string {
	var b strings.Builder
	for i := range n {
		if s, ok := change[i]; ok {
			b.WriteString(s)
			continue
		}
		fmt.Fprintf(&b, "line %d\n", i)
	}
	return b.String()
}

func random(n int) string {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(b)
	return string(b)
}

func TestKinds(t *testing.T) {
	tests := []struct {
		name     string
		old, new tree
		status   []string // of the entries
		contains []string // in the patch
		text     int64
	}{
		{"nothing", tree{"a": text("x\n")}, tree{"a": text("x\n")}, nil, nil, 0},
		{"added", nil, tree{"d/e/f": text("x\ny\n")}, []string{"added"}, []string{"new file mode 100644", "@@ -0,0 +1,2 @@"}, 1},
		{"deleted", tree{"d/e/f": text("x\ny\n")}, nil, []string{"deleted"}, []string{"deleted file mode 100644"}, 1},
		{"modified", tree{"f": text(numbered(100, nil))}, tree{"f": text(numbered(100, map[int]string{3: "", 50: "a\nb\n", 99: "z\n"}))},
			[]string{"modified"}, []string{"@@ -1,7 +1,6 @@"}, 1},
		{"emptied", tree{"f": text("x\n")}, tree{"f": text("")}, []string{"modified"}, []string{"+0,0"}, 1},
		{"filled", tree{"f": text("")}, tree{"f": text("x\n")}, []string{"modified"}, []string{"@@ -0,0 +1,1 @@"}, 1},
		{"empty_added", nil, tree{"f": text("")}, []string{"added"}, []string{"new file mode 100644\nindex"}, 1},
		{"empty_deleted", tree{"f": text("")}, nil, []string{"deleted"}, nil, 1},
		{"newline_lost", tree{"f": text("a\nb\n")}, tree{"f": text("a\nb")}, []string{"modified"}, []string{"\\ No newline at end of file"}, 1},
		{"newline_won", tree{"f": text("a\nb")}, tree{"f": text("a\nb\n")}, []string{"modified"}, []string{"\\ No newline at end of file"}, 1},
		{"newline_never", tree{"f": text("a\nb")}, tree{"f": text("c\nb")}, []string{"modified"}, []string{" b\n\\ No newline"}, 1},
		{"no_newline_literally", tree{"f": text("a\n\\ No newline at end of file\n")}, tree{"f": text("a")}, []string{"modified"}, nil, 1},
		{"crlf", tree{"f": text("a\r\nb\r\n")}, tree{"f": text("a\r\nc\r\nlone\rreturn\n")}, []string{"modified"}, nil, 1},
		{"executable", tree{"f": text("x\n")}, tree{"f": script("x\n")}, []string{"modified"}, []string{"old mode 100644\nnew mode 100755"}, 1},
		{"executable_and_content", tree{"f": script("x\n")}, tree{"f": text("y\n")}, []string{"modified"}, []string{"old mode 100755"}, 1},
		{"executable_added", nil, tree{"f": script("x\n")}, []string{"added"}, []string{"new file mode 100755"}, 1},
		{"link_added", nil, tree{"l": link("/etc/passwd")}, []string{"added"}, []string{"new file mode 120000"}, 1},
		{"link_changed", tree{"l": link("a")}, tree{"l": link("../b")}, []string{"modified"}, []string{"120000"}, 1},
		{"link_deleted", tree{"l": link("a")}, nil, []string{"deleted"}, []string{"deleted file mode 120000"}, 1},
		{"link_odd", tree{"l": link("a")}, tree{"l": link("\xff\xfe\n b")}, []string{"modified"}, []string{"GIT binary patch"}, 0},
		{"file_to_link", tree{"f": text("x\n")}, tree{"f": link("g"), "g": text("")}, []string{"type_changed", "added"}, []string{"deleted file mode 100644", "new file mode 120000"}, 2},
		{"link_to_file", tree{"f": link("g")}, tree{"f": text("x\n")}, []string{"type_changed"}, nil, 1},
		{"file_to_directory", tree{"f": text("x\n")}, tree{"f/g": text("y\n")}, []string{"type_changed", "added"}, nil, 2},
		{"directory_to_file", tree{"f/g": text("y\n"), "f/h/i": text("")}, tree{"f": text("x\n")}, []string{"type_changed", "deleted", "deleted"}, nil, 3},
		{"directory_to_link", tree{"f/g": text("y\n"), "k": text("")}, tree{"f": link("k"), "k": text("")}, []string{"type_changed", "deleted"}, nil, 2},
		{"link_to_directory", tree{"f": link("k"), "k/x": text("")}, tree{"f/x": text("new\n"), "k/x": text("")}, []string{"type_changed", "added"}, nil, 2},
		{"binary_added", nil, tree{"b": text(random(1000))}, []string{"added"}, []string{"GIT binary patch\nliteral 1000\n"}, 0},
		{"binary_modified", tree{"b": text(random(1000))}, tree{"b": script("\x00" + random(5000))}, []string{"modified"}, []string{"GIT binary patch"}, 0},
		{"binary_deleted", tree{"b": text("a\x00b")}, nil, []string{"deleted"}, []string{"literal 0"}, 0},
		{"binary_emptied", tree{"b": text("a\x00b")}, tree{"b": text("")}, []string{"modified"}, []string{"literal 0"}, 0},
		{"binary_to_link", tree{"b": text("a\x00b")}, tree{"b": link("x")}, []string{"type_changed"}, nil, 0},
		{"link_to_binary", tree{"b": link("x")}, tree{"b": text("a\x00b")}, []string{"type_changed"}, nil, 0},
		{"latin1", tree{"f": text("gr\xfcn\n")}, tree{"f": text("gr\xfcner\n")}, []string{"modified"}, []string{"GIT binary patch"}, 0},
		{"utf8", tree{"f": text("grün\n")}, tree{"f": text("grüner ☃\n")}, []string{"modified"}, []string{"+grüner ☃"}, 1},
		{"late_nul", tree{"f": text(numbered(2000, nil))}, tree{"f": text(numbered(2000, nil) + "\x00\n")}, []string{"modified"}, []string{"GIT binary patch"}, 0},
		{"names", tree{
			"with space": text("1\n"), " lead": text("1\n"), "trail ": text("1\n"), "tab\there": text("1\n"), "new\nline": text("1\n"),
			`quo"te`: text("1\n"), `back\slash`: text("1\n"), "ünï☃": text("1\n"), "\xff\x01": text("1\n"), "a/b c/d": text("1\n"), "-dash": text("1\n"), "a b/a b": text("1\n"),
		}, tree{
			"with space": text("2\n"), " lead": text("2\n"), "trail ": script("1\n"), "tab\there": text("2\n"), "new\nline": text("2\n"),
			`quo"te`: text("2\n"), `back\slash`: script("1\n"), "ünï☃": text("2\n"), "\xff\x01": text("2\n"), "a/b c/d": text("2\n"), "-dash": text("2\n"), "a b/a b": script("1\n"),
		}, slices.Repeat([]string{"modified"}, 12), []string{`"b/\303\274n\303\257\342\230\203"`, "--- a/with space\t\n"}, 12},
		{"names_added", nil, tree{"with space": text(""), "new\nline": text("x"), "b/b b/b": text("")}, []string{"added", "added", "added"}, nil, 3},
		{"nested_empty_directory_to_file", tree{"d/e": emptyDir}, tree{"d": text("x\n")}, []string{"type_changed", "deleted"}, nil, 0},
		{"empty_directory_to_file", tree{"d": emptyDir}, tree{"d": text("x\n")}, []string{"type_changed"}, nil, 1},
		{"empty_directories", tree{"gone": emptyDir, "left/f": text("x\n")}, tree{"come": emptyDir, "left": emptyDir}, []string{"added", "deleted", "modified", "deleted"}, nil, 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			patch, result := checkApplies(t, tt.old, tt.new, gitdiff.Options{})
			var status []string
			for _, e := range result.Entries {
				status = append(status, e.Status)
				if own := e.TextPatch; own != nil && !strings.Contains(patch, *own) {
					t.Errorf("the text of %q is not in the patch", e.Path)
				}
			}
			if diff := cmp.Diff(tt.status, status); diff != "" {
				t.Errorf("entries: %s", diff)
			}
			for _, want := range tt.contains {
				if !strings.Contains(patch, want) {
					t.Errorf("no %q in\n%s", want, patch)
				}
			}
			s := result.Summary
			if s.TextPatched != tt.text || s.Total != int64(len(status)) || s.TextPatched+s.NonText != s.Total || s.Added+s.Deleted+s.Modified+s.TypeChanged != s.Total {
				t.Errorf("summary %+v", s)
			}
		})
	}
}

func TestUnpatched(t *testing.T) {
	old := tree{"a": text("x\n"), ".git/HEAD": text("1"), "sub/.git/index": text("1"), "gone": emptyDir}
	cur := tree{
		"a": text("y\n"), ".git/HEAD": text("2"), ".git/new": text("2"), "sub/.git/index": text("2"),
		"empty": emptyDir, "git~1": text("x"), ".git. /x": text("x"), ".gitmodules": link("x"), "ok.git": text(""), ".gitignore": text(""),
	}
	_, result := checkApplies(t, old, func() tree {
		visible := maps.Clone(cur)
		for p := range visible {
			switch p {
			case "git~1", ".git. /x", ".gitmodules":
				delete(visible, p)
			case ".git/HEAD", "sub/.git/index":
				visible[p] = text("1")
			case ".git/new":
				delete(visible, p)
			}
		}
		return visible
	}(), gitdiff.Options{})
	if len(result.Unpatched) != 2 { // empty, gone
		t.Errorf("of the visible ones: %v", result.Unpatched)
	}
	_, result = write(t, old, cur, gitdiff.Options{})
	var got []string
	for _, u := range result.Unpatched {
		got = append(got, u.Path)
	}
	if diff := cmp.Diff([]string{".git", ".git. /x", ".gitmodules", "empty", "git~1", "gone", "sub/.git"}, got); diff != "" {
		t.Error(diff)
	}
	for _, e := range result.Entries {
		if strings.Contains(e.Path, ".git/") {
			t.Errorf("%q is an entry", e.Path)
		}
	}
}

func TestBounds(t *testing.T) {
	old, cur := tree{"f": text(numbered(1000, nil))}, tree{"f": text(numbered(1000, map[int]string{500: "x\n"}))}
	patch, _ := checkApplies(t, old, cur, gitdiff.Options{MaxText: 100})
	if !strings.Contains(patch, "GIT binary patch") {
		t.Errorf("a text above the bound is compared line by line:\n%.500s", patch)
	}
	_, result := write(t, old, cur, gitdiff.Options{MaxEntryPatch: 10})
	if result.Entries[0].TextPatch != nil || result.Summary.TextPatched != 1 {
		t.Errorf("a long text patch: %+v", result)
	}
}

func TestChangedWhileRead(t *testing.T) {
	old, cur := tree{"f": text("1\n")}, tree{"f": text("2\n")}
	changes, err := manifest.Compare(old.manifest(), cur.manifest())
	must(t, err)
	for name, content := range map[string]string{"longer": "22\n", "shorter": "2", "other": "3\n"} {
		t.Run(name, func(t *testing.T) {
			_, err := gitdiff.Write(context.Background(), io.Discard, changes, gitdiff.Options{Old: old.open, New: tree{"f": text(content)}.open})
			if !errors.Is(err, api.ErrBusy) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A line diff must not become quadratic: this takes seconds where it is.
func TestEveryLineChanged(t *testing.T) {
	var a, b strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&a, "old line %d\n", i)
		fmt.Fprintf(&b, "new line %d\n", i)
	}
	begin := time.Now()
	checkApplies(t, tree{"f": text(a.String())}, tree{"f": text(b.String())}, gitdiff.Options{})
	// The same few lines, in another order.
	a.Reset()
	b.Reset()
	for range 100_000 {
		fmt.Fprintf(&a, "%d\n", rand.IntN(10))
		fmt.Fprintf(&b, "%d\n", rand.IntN(10))
	}
	checkApplies(t, tree{"f": text(a.String())}, tree{"f": text(b.String())}, gitdiff.Options{})
	if took := time.Since(begin); took > 60*time.Second {
		t.Errorf("took %v", took)
	}
}

func randomTree(r *rand.Rand) tree {
	t := tree{}
	for range r.IntN(12) {
		t.put(r)
	}
	return t
}

var parts = []string{"a", "b", "c d", "ü", "a\tb", "x.txt", "\xfe", "-"}

// put adds something at a random place, and removes what is in its way.
func (t tree) put(r *rand.Rand) {
	p := parts[r.IntN(len(parts))]
	for r.IntN(2) == 0 {
		p += "/" + parts[r.IntN(len(parts))]
	}
	for d := p; d != "."; d = path.Dir(d) {
		delete(t, d)
	}
	maps.DeleteFunc(t, func(q string, _ node) bool { return strings.HasPrefix(q, p+"/") })
	t[p] = randomNode(r)
}

func randomNode(r *rand.Rand) node {
	switch r.IntN(8) {
	case 0:
		return link(parts[r.IntN(len(parts))] + "/nowhere") // git apply stumbles over a link to itself
	case 1:
		return emptyDir
	case 2:
		b := make([]byte, r.IntN(300))
		for i := range b {
			b[i] = byte(r.IntN(256))
		}
		return node{manifest.File, string(b), r.IntN(2) == 0}
	}
	var b strings.Builder
	for range r.IntN(60) {
		fmt.Fprintf(&b, "%d%s", r.IntN(20), []string{"\n", "\n", "\n", "\r\n"}[r.IntN(4)])
	}
	if r.IntN(4) == 0 {
		b.WriteString("no newline")
	}
	return node{manifest.File, b.String(), r.IntN(4) == 0}
}

// edit changes a text in a few places.
func edit(r *rand.Rand, n node) node {
	lines := strings.SplitAfter(n.Content, "\n")
	for range 1 + r.IntN(3) {
		i := r.IntN(len(lines))
		switch r.IntN(3) {
		case 0:
			lines[i] = fmt.Sprintf("%d\n", r.IntN(20))
		case 1:
			lines = slices.Delete(lines, i, i+1)
		case 2:
			lines = slices.Insert(lines, i, fmt.Sprintf("%d\n", r.IntN(20)))
		}
		if len(lines) == 0 {
			break
		}
	}
	n.Content = strings.Join(lines, "")
	return n
}

func TestRandomTrees(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 20
	}
	for seed := range rounds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(seed), 7))
			old := randomTree(r)
			cur := maps.Clone(old)
			for p, n := range old {
				switch r.IntN(4) {
				case 0:
					delete(cur, p)
				case 1:
					if n.Type == manifest.File {
						cur[p] = edit(r, n)
					}
				}
			}
			for range r.IntN(5) {
				cur.put(r)
			}
			checkApplies(t, old, cur, gitdiff.Options{})
		})
	}
}

func TestStat(t *testing.T) {
	_, result := write(t,
		tree{"f": text(numbered(100, nil)), "gone": text("1\n2\n"), "bin": text("\x00")},
		tree{"f": text(numbered(100, map[int]string{50: "x\ny\n"})), "new ü": text("1\n"), "bin": text("\x00\x01")}, gitdiff.Options{})
	var b bytes.Buffer
	must(t, gitdiff.WriteStat(&b, result.Stats, 80))
	for _, line := range []string{"Bin 1 -> 2 bytes", "|   3 ++-\n", "|   2 --\n", "|   1 +\n", " 4 files changed, 3 insertions(+), 3 deletions(-)\n"} {
		if !strings.Contains(b.String(), line) {
			t.Errorf("no %q in\n%s", line, b.String())
		}
	}
	b.Reset()
	must(t, gitdiff.WriteNames(&b, result.Stats))
	if diff := cmp.Diff("bin\nf\ngone\n\"new \\303\\274\"\n", b.String()); diff != "" {
		t.Error(diff)
	}
	// Long names and many lines stay within the width.
	stats := []gitdiff.Stat{{Path: strings.Repeat("x/", 100) + "y", Added: 5000, Deleted: 1}, {Path: "z", Added: 3}}
	b.Reset()
	must(t, gitdiff.WriteStat(&b, stats, 60))
	for line := range strings.Lines(b.String()) {
		if len(line) > 61 {
			t.Errorf("%d characters: %s", len(line)-1, line)
		}
	}
}

// Git is the judge of quoting.
func TestQuoteAsGit(t *testing.T) {
	testenv.RequireTools(t, "git", "git")
	dir := t.TempDir()
	git := func(args ...string) string {
		cmd := exec.Command("git", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
		out, err := cmd.Output()
		must(t, err)
		return string(out)
	}
	git("init", "-q")
	var want []string
	for c := 1; c < 256; c++ {
		if c == '/' || c == '.' {
			continue
		}
		name := "n" + string([]byte{byte(c)}) + "m"
		must(t, os.WriteFile(filepath.Join(dir, name), nil, 0o644))
		want = append(want, gitdiff.Quote(name))
	}
	got := strings.Split(strings.TrimSuffix(git("ls-files", "--others"), "\n"), "\n")
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(got, want); diff != "" {
		t.Error(diff)
	}
}
