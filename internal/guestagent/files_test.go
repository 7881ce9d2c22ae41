package guestagent_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func (a *agent) path(elem ...string) string {
	return filepath.Join(append([]string{a.root, "workspace"}, elem...)...)
}

func (a *agent) put(t testing.TB, name, content string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(a.path(name)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.path(name), []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(a.path(name), mode); err != nil {
		t.Fatal(err)
	}
}

func digest(content string) string {
	sum := sha256.Sum256([]byte(content))
	return hex.EncodeToString(sum[:])
}

func (a *agent) manifest(t testing.TB, path string) ([]guestproto.ManifestEntry, guestproto.ManifestResult) {
	t.Helper()
	var out []guestproto.ManifestEntry
	r, err := a.Manifest(testContext(t), path, func(e guestproto.ManifestEntry) error {
		out = append(out, e)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out, r
}

// oddTree makes a tree with everything a manifest has to tell apart.
func (a *agent) oddTree(t testing.TB) {
	a.put(t, "a/c", "sea", 0o640)
	a.put(t, "a-b", "dash", 0o644)
	a.put(t, "empty", "", 0o755)
	a.put(t, "new\nline", "nl", 0o644)
	a.put(t, "\xff\xfe", "not utf-8", 0o600)
	a.put(t, strings.Repeat("n", 255), "long", 0o644)
	a.put(t, "$(touch x);`id`", "shell", 0o644)
	for name, target := range map[string]string{"link": "a/c", "dangling": "../../\xffnowhere", "up": "/etc"} {
		if err := os.Symlink(target, a.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(a.path("dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(a.path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(a.path("a", "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestManifest(t *testing.T) {
	a := startAgent(t)
	a.oddTree(t)
	got, r := a.manifest(t, "")
	file := func(path string, mode uint32, content string) guestproto.ManifestEntry {
		return guestproto.ManifestEntry{Path: guestproto.Path(path), Type: "file", Mode: mode, Size: int64(len(content)), SHA256: digest(content)}
	}
	link := func(path, target string) guestproto.ManifestEntry {
		return guestproto.ManifestEntry{Path: guestproto.Path(path), Type: "symlink", Mode: 0o777, Size: int64(len(target)), Target: guestproto.Path(target)}
	}
	want := []guestproto.ManifestEntry{
		file("$(touch x);`id`", 0o644, "shell"),
		{Path: "a", Type: "directory", Mode: 0o755},
		file("a/c", 0o640, "sea"),
		file("a-b", 0o644, "dash"),
		link("dangling", "../../\xffnowhere"),
		{Path: "dir", Type: "directory", Mode: 0o700},
		file("empty", 0o755, ""),
		link("link", "a/c"),
		file("new\nline", 0o644, "nl"),
		file(strings.Repeat("n", 255), 0o644, "long"),
		link("up", "/etc"),
		file("\xff\xfe", 0o600, "not utf-8"),
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("entries (-want +got):\n%s", d)
	}
	if d := cmp.Diff(guestproto.ManifestResult{EntryCount: 12, ByteCount: 27, SkippedCount: 2}, r); d != "" {
		t.Errorf("counts (-want +got):\n%s", d)
	}
	t.Run("of a directory", func(t *testing.T) {
		got, _ := a.manifest(t, "/workspace/a")
		if d := cmp.Diff([]guestproto.ManifestEntry{file("c", 0o640, "sea")}, got); d != "" {
			t.Error(d)
		}
	})
}

func TestListFiles(t *testing.T) {
	a := startAgent(t)
	a.oddTree(t)
	list := func(path string, recursive bool) []guestproto.Path {
		var out []guestproto.Path
		if _, err := a.ListFiles(testContext(t), path, recursive, func(e guestproto.FileEntry) error {
			out = append(out, e.Path)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return out
	}
	long := guestproto.Path("/workspace/" + strings.Repeat("n", 255))
	for _, tt := range []struct {
		name, path string
		recursive  bool
		want       []guestproto.Path
	}{
		{"flat", "/workspace", false, []guestproto.Path{"/workspace/$(touch x);`id`", "/workspace/a", "/workspace/a-b",
			"/workspace/dangling", "/workspace/dir", "/workspace/empty", "/workspace/link", "/workspace/new\nline", long, "/workspace/up", "/workspace/\xff\xfe"}},
		{"recursive", ".", true, []guestproto.Path{"/workspace/$(touch x);`id`", "/workspace/a", "/workspace/a-b", "/workspace/a/c",
			"/workspace/dangling", "/workspace/dir", "/workspace/empty", "/workspace/link", "/workspace/new\nline", long, "/workspace/up", "/workspace/\xff\xfe"}},
		{"file", "a/c", true, []guestproto.Path{"/workspace/a/c"}},
		{"link", "up", true, []guestproto.Path{"/workspace/up"}},
		{"empty directory", "dir", true, nil},
		{"special", "fifo", true, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, list(tt.path, tt.recursive)); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestStagesAreHidden shows no stage, and takes nothing else for one.
func TestStagesAreHidden(t *testing.T) {
	a := startAgent(t)
	stage := ".pyro-stage-0123456789abcdef0123456789abcdef"
	a.put(t, stage+"/f", "x", 0o644)
	a.put(t, ".pyro-stage-mine", "x", 0o644)
	a.put(t, "d/"+stage, "x", 0o644)
	entries, _ := a.manifest(t, "")
	var listed []guestproto.Path
	if _, err := a.ListFiles(testContext(t), ".", true, func(e guestproto.FileEntry) error {
		listed = append(listed, e.Path[len("/workspace/"):])
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	var walked []guestproto.Path
	for _, e := range entries {
		walked = append(walked, e.Path)
	}
	want := []guestproto.Path{".pyro-stage-mine", "d", guestproto.Path("d/" + stage)}
	if d := cmp.Diff(want, walked); d != "" {
		t.Errorf("the manifest: %s", d)
	}
	if d := cmp.Diff(want, listed); d != "" {
		t.Errorf("the listing: %s", d)
	}
	if _, err := a.WriteFile(testContext(t), guestproto.WriteFileRequest{Path: guestproto.Path(stage)}, strings.NewReader("x")); !errors.Is(err, api.ErrDenied) {
		t.Errorf("writing to its name: %v", err)
	}
}

// TestPathsStayInTheWorkspace asks every file tool for what is not its own.
func TestPathsStayInTheWorkspace(t *testing.T) {
	a := startAgent(t)
	a.put(t, "f", "x", 0o644)
	if err := os.WriteFile(filepath.Join(a.root, "secret"), []byte("s"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"up": "..", "abs": a.root, "file": "../secret"} {
		if err := os.Symlink(target, a.path(name)); err != nil {
			t.Fatal(err)
		}
	}
	none := func(guestproto.FileEntry) error { return nil }
	tools := map[string]func(path string) error{
		"manifest": func(p string) error {
			_, err := a.Manifest(testContext(t), p, func(guestproto.ManifestEntry) error { return nil })
			return err
		},
		"list": func(p string) error { _, err := a.ListFiles(testContext(t), p, true, none); return err },
		"read": func(p string) error {
			_, err := a.ReadFile(testContext(t), p, 0, 10, &bytes.Buffer{})
			return err
		},
		"write": func(p string) error {
			_, err := a.WriteFile(testContext(t), guestproto.WriteFileRequest{Path: guestproto.Path(p)}, strings.NewReader("bad"))
			return err
		},
	}
	for name, tool := range tools {
		for _, path := range []string{"/etc/passwd", "../secret", "/workspace/../secret", "/workspacex/y", "up/secret", "abs/secret"} {
			t.Run(name+"/"+path, func(t *testing.T) {
				if err := tool(path); !errors.Is(err, api.ErrDenied) || !strings.Contains(err.Error(), "leaves /workspace") {
					t.Errorf("error %v", err)
				}
			})
		}
	}
	if err := tools["read"]("file"); !errors.Is(err, api.ErrDenied) {
		t.Errorf("reading through a link: %v", err)
	}
	if err := tools["write"]("file"); !errors.Is(err, api.ErrInvalid) || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("writing through a link: %v", err)
	}
	if b, _ := os.ReadFile(filepath.Join(a.root, "secret")); string(b) != "s" {
		t.Errorf("the file outside holds %q", b)
	}
	if left, _ := filepath.Glob(filepath.Join(a.root, ".pyro-stage-*")); len(left) > 0 {
		t.Errorf("stages stay: %q", left)
	}
}

func TestReadFile(t *testing.T) {
	a := startAgent(t)
	a.put(t, "f", "0123456789", 0o644)
	if err := os.Symlink("f", a.path("link")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(a.path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, path  string
		offset, max int64
		want        string
		truncated   bool
		wantErr     string
		class       error
	}{
		{"all", "f", 0, 100, "0123456789", false, "", nil},
		{"exactly", "/workspace/f", 0, 10, "0123456789", false, "", nil},
		{"start", "f", 0, 4, "0123", true, "", nil},
		{"middle", "f", 4, 4, "4567", true, "", nil},
		{"end", "f", 8, 4, "89", false, "", nil},
		{"behind", "f", 100, 4, "", false, "", nil},
		{"link", "link", 0, 4, "0123", true, "", nil},
		{"nothing", "f", 0, 0, "", false, "max_bytes must be positive", api.ErrInvalid},
		{"negative", "f", 0, -1, "", false, "max_bytes must be positive", api.ErrInvalid},
		{"negative offset", "f", -1, 5, "", false, "offset must not be negative", api.ErrInvalid},
		{"directory", ".", 0, 5, "", false, "regular files", api.ErrInvalid},
		{"fifo", "fifo", 0, 5, "", false, "regular files", api.ErrInvalid},
		{"missing", "none", 0, 5, "", false, "no such file", api.ErrNotFound},
		{"below a file", "f/g", 0, 5, "", false, "not a directory", api.ErrInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			r, err := a.ReadFile(testContext(t), tt.path, tt.offset, tt.max, &out)
			if tt.class != nil {
				if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.wantErr) {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil || out.String() != tt.want || r.SizeBytes != 10 || r.Truncated != tt.truncated {
				t.Errorf("%q, %+v, %v", out.String(), r, err)
			}
		})
	}
}

func TestWriteFile(t *testing.T) {
	a := startAgent(t)
	write := func(path string, mode uint32, content string) (guestproto.WriteFileReply, error) {
		return a.WriteFile(testContext(t), guestproto.WriteFileRequest{Path: guestproto.Path(path), Mode: mode}, strings.NewReader(content))
	}
	check := func(t *testing.T, path string, mode os.FileMode, content string) {
		t.Helper()
		b, err := os.ReadFile(a.path(path))
		fi, _ := os.Stat(a.path(path))
		if err != nil || string(b) != content || fi.Mode() != mode {
			t.Errorf("%q holds %q with mode %v, %v", path, b, fi.Mode(), err)
		}
	}
	r, err := write("d/e/new", 0, "one")
	if d := cmp.Diff(guestproto.WriteFileReply{Path: "/workspace/d/e/new", BytesWritten: 3, Created: true}, r); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	check(t, "d/e/new", 0o644, "one")
	if _, err := write("script", 0o755, "run"); err != nil {
		t.Error(err)
	}
	check(t, "script", 0o755, "run")
	large := strings.Repeat("0123456789abcdef", 1<<16)
	if r, err := write("script", 0o600, large); err != nil || r.Created {
		t.Errorf("writing it again: %+v, %v", r, err)
	}
	check(t, "script", 0o755, large)
	if _, err := write("bad\xffname\n", 0, "odd"); err != nil {
		t.Error(err)
	}
	check(t, "bad\xffname\n", 0o644, "odd")
	for _, path := range []string{".", "d", "d/e"} {
		if _, err := write(path, 0, "x"); !errors.Is(err, api.ErrInvalid) || !strings.Contains(err.Error(), "regular files") {
			t.Errorf("writing to %s: %v", path, err)
		}
	}
	if _, err := write("script/below", 0, "x"); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("writing below a file: %v", err)
	}
	if err := a.Flush(testContext(t)); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(a.root, ".pyro-stage-*")); len(left) > 0 {
		t.Errorf("stages stay: %q", left)
	}
}
