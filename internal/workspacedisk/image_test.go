//go:build linux

package workspacedisk_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// tool runs a program of e2fsprogs or qemu-utils and returns its output. Exit
// codes in ok count as success.
func tool(t testing.TB, ok []int, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	out, err := cmd.CombinedOutput()
	if err != nil {
		for _, code := range ok {
			if cmd.ProcessState.ExitCode() == code {
				return string(out)
			}
		}
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// TestMain makes the tools of e2fsprogs findable: Debian keeps them out of an
// ordinary user's PATH.
func TestMain(m *testing.M) {
	testenv.PrivateMounts()
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	os.Exit(m.Run())
}

// needTools skips the test without e2fsprogs.
func needTools(t testing.TB) {
	t.Helper()
	testenv.RequireTools(t, "e2fsprogs", "mke2fs", "e2fsck", "debugfs")
}

// makeImage makes a raw ext4 image of size (as mke2fs takes it, "16M") from the
// tree dir, or an empty one.
func makeImage(t testing.TB, dir, size string, opts ...string) string {
	t.Helper()
	needTools(t)
	img := filepath.Join(t.TempDir(), "disk.ext4")
	args := append([]string{"-q", "-F"}, opts...)
	if dir != "" {
		args = append(args, "-d", dir)
	}
	if !strings.Contains(strings.Join(opts, " "), "-t ") {
		args = append([]string{"-t", "ext4"}, args...)
	}
	tool(t, nil, "mke2fs", append(args, img, size)...)
	return img
}

func openRaw(t testing.TB, img string) *workspacedisk.Disk {
	t.Helper()
	return openSource(t, workspacedisk.Source{Path: img, Format: workspacedisk.FormatRaw})
}

func openSource(t testing.TB, src workspacedisk.Source) *workspacedisk.Disk {
	t.Helper()
	d, err := workspacedisk.Open(context.Background(), src, workspacedisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// writeFile writes a file below dir, with its directories.
func writeFile(t testing.TB, dir, name, content string) {
	t.Helper()
	p := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func symlink(t testing.TB, target, p string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, p); err != nil {
		t.Fatal(err)
	}
}

// sampleTree makes the tree of the product's example.
func sampleTree(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, dir, "workspace/note.txt", "hello from disk\n")
	writeFile(t, dir, "workspace/src/child.txt", "child of src\n")
	symlink(t, "note.txt", filepath.Join(dir, "workspace/link"))
	return dir
}

// oddTree makes a tree of everything that a filesystem can hold and that tools
// get wrong.
func oddTree(t testing.TB) string {
	t.Helper()
	dir := sampleTree(t)
	odd := []string{
		"a b.txt", " lead", "trail ", `q"uote`, "q'uote", "new\nline", "tab\tname", "cr\rname", "<12>", "<2>",
		"!touch PWN", "-p", "#c", `back\slash`, "bad\xff\xfeutf8", "esc\x1b[31m", "$(touch PWN);|`x`", "ünïcödé-文字",
		strings.Repeat("n", 255),
	}
	for i, name := range odd {
		writeFile(t, dir, "odd/"+name, fmt.Sprintf("content %d\n", i))
	}
	writeFile(t, dir, "data/empty", "")
	writeFile(t, dir, "data/tiny", "x")
	for _, n := range []int{59, 60, 61, 100, 150, 200, 1023, 1024, 1025, 4095, 4096, 4097, 50_000, 5_000_000} {
		writeFile(t, dir, fmt.Sprintf("data/size-%d", n), pattern(n))
	}
	for _, n := range []int{1, 58, 59, 60, 61, 120, 300, 1000} {
		symlink(t, pattern(n), filepath.Join(dir, fmt.Sprintf("links/len-%d", n)))
	}
	symlink(t, "/etc/passwd", filepath.Join(dir, "links/absolute"))
	symlink(t, "../../../escape", filepath.Join(dir, "links/up"))
	symlink(t, "bad\xfftarget", filepath.Join(dir, "links/bytes"))
	symlink(t, "loop", filepath.Join(dir, "links/loop"))
	for i := range 3 {
		deep := strings.Repeat(fmt.Sprintf("deep%d/", i), 40)
		writeFile(t, dir, deep+"bottom", "down here")
	}
	for i := range 1500 {
		writeFile(t, dir, fmt.Sprintf("many/file-%04d", i), "")
	}
	if err := os.Mkdir(filepath.Join(dir, "emptydir"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "data/size-4097"), filepath.Join(dir, "data/hardlink")); err != nil {
		t.Fatal(err)
	}
	sparse(t, filepath.Join(dir, "data/sparse"), 3<<20, map[int64]string{0: "start", 1<<20 + 5: "middle", 3<<20 - 3: "end"})
	// xattrs go into the inode and, being large, into a block of their own.
	for i, n := range []int{10, 700} {
		name := filepath.Join(dir, "data/size-1024")
		if err := unix.Setxattr(name, fmt.Sprintf("user.x%d", i), []byte(strings.Repeat("v", n)), 0); err != nil {
			t.Logf("no xattrs on this filesystem: %v", err)
		}
	}
	return dir
}

// sparse makes a file of size bytes that holds only the given pieces.
func sparse(t testing.TB, p string, size int64, pieces map[int64]string) {
	t.Helper()
	f, err := os.Create(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off, s := range pieces {
		if _, err := f.WriteAt([]byte(s), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

// pattern is n bytes of text that does not repeat within a block.
func pattern(n int) string {
	var b strings.Builder
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%d.", i)
	}
	return b.String()[:n]
}

// original is the text of an entry, from its base64 form where there is one.
func original(t testing.TB, text, b64 string) string {
	t.Helper()
	if b64 == "" {
		return text
	}
	raw, err := base64.StdEncoding.DecodeString(b64)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}
