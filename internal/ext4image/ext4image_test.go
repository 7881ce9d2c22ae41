package ext4image_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

var testTime = time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)

// newImage returns a writer and the image's file.
func newImage(t testing.TB, size int64) (*ext4image.Writer, *os.File) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	w, err := ext4image.New(f, ext4image.Options{
		SizeBytes: size, UUID: [16]byte{1, 2, 3}, Label: "test", Time: testTime,
	})
	if err != nil {
		t.Fatal(err)
	}
	return w, f
}

func add(t testing.TB, w *ext4image.Writer, path string, mode uint16, content string) {
	t.Helper()
	e := ext4image.Entry{Path: path, Mode: mode, ModTime: testTime, Size: int64(len(content))}
	if err := w.Add(e, strings.NewReader(content)); err != nil {
		t.Fatalf("adding %s: %v", path, err)
	}
}

func finish(t testing.TB, w *ext4image.Writer) {
	t.Helper()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// check has e2fsck judge the image; it must not find anything to say.
func check(t testing.TB, f *os.File) {
	t.Helper()
	testenv.RequireTools(t, "e2fsprogs", "e2fsck", "debugfs")
	out, err := exec.Command("e2fsck", "-fn", f.Name()).CombinedOutput()
	if err != nil || strings.Contains(string(out), "?") {
		t.Fatalf("e2fsck is not content (%v):\n%s", err, out)
	}
}

// debugfs asks e2fsprogs what is in the image.
func debugfs(t testing.TB, f *os.File, request string) string {
	t.Helper()
	cmd := exec.Command("debugfs", "-R", request, f.Name())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("debugfs %s: %v\n%s", request, err, stderr.String())
	}
	return string(out)
}

const file, dir = ext4image.ModeFile | 0o644, ext4image.ModeDir | 0o755

func TestSizes(t *testing.T) {
	for _, tt := range []struct {
		name   string
		size   int64
		groups int
	}{
		{"one group", 1, 1},
		{"two groups", 129 << 20, 2},
		{"a second flexible group", 17 * 128 << 20, 17},
		{"eight GiB", 8 << 30, 64},
		{"a second block of descriptors", 129 * 128 << 20, 129},
		{"many flexible groups", 40 << 30, 320},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, f := newImage(t, tt.size)
			add(t, w, "etc/hello", file, "hello\n")
			finish(t, w)
			fi, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			if want := int64(tt.groups) * 128 << 20; fi.Size() != want {
				t.Errorf("the image has %d bytes, want %d", fi.Size(), want)
			}
			check(t, f)
			if got := debugfs(t, f, "cat /etc/hello"); got != "hello\n" {
				t.Errorf("the file holds %q", got)
			}
		})
	}
}

func TestEntries(t *testing.T) {
	w, f := newImage(t, 256<<20)
	longTarget := strings.Repeat("x/", 40) + "end"
	add(t, w, "/", ext4image.ModeDir|0o750, "")
	add(t, w, "./a/b/../c"[:5], dir, "")
	add(t, w, "a/b/file", file|0o4000, strings.Repeat("data", 5000))
	add(t, w, "empty", file, "")
	for _, e := range []ext4image.Entry{
		{Path: "fast", Mode: ext4image.ModeSymlink | 0o777, Target: strings.Repeat("f", 59)},
		{Path: "slow", Mode: ext4image.ModeSymlink | 0o777, Target: strings.Repeat("s", 60)},
		{Path: "longer", Mode: ext4image.ModeSymlink | 0o777, Target: longTarget},
		{Path: "dev/null", Mode: ext4image.ModeChar | 0o666, Major: 1, Minor: 3},
		{Path: "dev/big", Mode: ext4image.ModeBlock | 0o600, Major: 259, Minor: 70000},
		{Path: "fifo", Mode: ext4image.ModeFIFO | 0o600},
		{Path: "socket", Mode: ext4image.ModeSocket | 0o600},
		{Path: "ids", Mode: file, UID: 100000, GID: 4000000000},
		{Path: "caps", Mode: file, Xattrs: map[string][]byte{"security.capability": []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")}},
		{Path: "xattrs", Mode: file, Xattrs: map[string][]byte{
			"user.long": bytes.Repeat([]byte("v"), 300), "user.b": []byte("2"), "user.a": []byte("1"), "trusted.t": []byte("3"),
			"system.posix_acl_access": []byte("left out"),
		}},
		{Path: "old", Mode: file, ModTime: time.Unix(-1<<31, 0)},
		{Path: "future", Mode: file, ModTime: time.Date(2400, 1, 1, 0, 0, 0, 0, time.UTC)},
	} {
		if e.ModTime.IsZero() {
			e.ModTime = testTime
		}
		if err := w.Add(e, strings.NewReader("")); err != nil {
			t.Fatalf("adding %s: %v", e.Path, err)
		}
	}
	if err := w.Link("hard", "a/b/file"); err != nil {
		t.Fatal(err)
	}
	finish(t, w)
	check(t, f)
	for _, tt := range []struct{ request, want string }{
		{"stat /", "Mode:  0750"},
		{"stat /a/b/file", "Mode:  04644"},
		{"stat /a/b/file", "Links: 2"},
		{"stat /hard", "Size: 20000"},
		{"stat /fast", `Fast link dest: "` + strings.Repeat("f", 59) + `"`},
		{"cat /slow", strings.Repeat("s", 60)},
		{"cat /longer", longTarget},
		{"stat /dev/null", "Device major/minor number: 01:03"},
		{"stat /dev/big", "Device major/minor number: 259:70000"},
		{"stat /ids", "User: 100000   Group: -294967296"}, // it prints them signed
		{"ea_list /caps", "security.capability (20)"},
		{"ea_list /xattrs", "user.long (300)"},
		{"ea_list /xattrs", "trusted.t (1)"},
		{"stat /old", "1901"},
		{"stat /future", "2400"},
		{"stat /a/b/file", "mtime: 0x695735a5:00000960"}, // 600 ns, shifted by two bits
	} {
		if got := debugfs(t, f, tt.request); !strings.Contains(got, tt.want) {
			t.Errorf("debugfs %s does not say %q:\n%s", tt.request, tt.want, got)
		}
	}
	if got := debugfs(t, f, "ea_list /xattrs"); strings.Contains(got, "posix_acl") {
		t.Errorf("an ACL came through unconverted:\n%s", got)
	}
}

// TestContent writes files around every boundary and reads them back.
func TestContent(t *testing.T) {
	testenv.RequireTools(t, "e2fsprogs", "e2fsck", "debugfs")
	w, f := newImage(t, 512<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	want := map[string][32]byte{}
	for i, size := range []int{1, 4095, 4096, 4097, 1 << 20, 1<<20 + 1, 40 << 20, 150 << 20} {
		content := make([]byte, size)
		for j := 0; j < size; j += 997 { // with blocks of zeros in the bigger ones
			if j>>14%3 != 0 {
				content[j] = byte(rng.Uint32())
			}
		}
		name := fmt.Sprintf("f%d", i)
		want[name] = sha256.Sum256(content)
		if err := w.Add(ext4image.Entry{Path: name, Mode: file, ModTime: testTime, Size: int64(size)}, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
	}
	finish(t, w)
	check(t, f)
	for name, sum := range want {
		if got := sha256.Sum256([]byte(debugfs(t, f, "cat /"+name))); got != sum {
			t.Errorf("%s came back different", name)
		}
	}
}

func TestManyFilesAndLargeDirectories(t *testing.T) {
	w, f := newImage(t, 512<<20)
	const n = 6000
	for i := range n {
		add(t, w, fmt.Sprintf("dir/%04d-%s", i, strings.Repeat("n", i%240)), file, "x")
		if i%3 == 0 {
			add(t, w, fmt.Sprintf("sub/%d/%d", i%97, i), file, "")
		}
	}
	finish(t, w)
	check(t, f)
	if got := strings.Count(debugfs(t, f, "ls -p /dir"), "\n/"); got < n {
		t.Errorf("the directory lists %d entries, want %d and more", got, n)
	}
}

func TestReplace(t *testing.T) {
	w, f := newImage(t, 128<<20)
	add(t, w, "f", file, "old")
	add(t, w, "f", file, "new")
	add(t, w, "d/x/y", file, "below")
	add(t, w, "d", file, "was a directory")
	add(t, w, "keep/inside", file, "1")
	add(t, w, "keep", ext4image.ModeDir|0o700, "")
	add(t, w, "a", file, "linked")
	for _, l := range []string{"b", "c"} {
		if err := w.Link(l, "a"); err != nil {
			t.Fatal(err)
		}
	}
	add(t, w, "a", file, "no longer linked")
	if err := w.Link("b", "c"); err != nil { // onto another name of the same file
		t.Fatal(err)
	}
	add(t, w, "nest/x", file, "nested")
	if err := w.Link("nest", "nest/x"); err != nil { // in the place of its own directory
		t.Fatal(err)
	}
	add(t, w, "gone/deep/er", file, "")
	if err := w.Remove("gone"); err != nil {
		t.Fatal(err)
	}
	if err := w.Remove("never/was"); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{"gone": false, "gone/deep/er": false, "keep/inside": true, "d": true, "d/x": false} {
		if w.Exists(path) != want {
			t.Errorf("Exists(%q) = %v", path, !want)
		}
	}
	finish(t, w)
	check(t, f)
	for path, want := range map[string]string{"f": "new", "d": "was a directory", "keep/inside": "1", "a": "no longer linked", "b": "linked", "c": "linked", "nest": "nested"} {
		if got := debugfs(t, f, "cat /"+path); got != want {
			t.Errorf("%s holds %q, want %q", path, got, want)
		}
	}
	if got := debugfs(t, f, "stat /b"); !strings.Contains(got, "Links: 2") {
		t.Errorf("b should have two links:\n%s", got)
	}
}

// TestRoomIsUsedAgain fills the disk over and over with one file.
func TestRoomIsUsedAgain(t *testing.T) {
	w, f := newImage(t, 128<<20)
	for i := range 5 {
		content := bytes.Repeat([]byte{byte('a' + i), 0, 0, 0}, 10<<20)
		clear(content[8<<20 : 16<<20]) // zeros, where something else has been
		if err := w.Add(ext4image.Entry{Path: "f", Mode: file, ModTime: testTime, Size: int64(len(content))}, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		if i == 4 {
			defer func() {
				if got := debugfs(t, f, "cat /f"); got != string(content) {
					t.Error("the file came back different")
				}
			}()
		}
	}
	finish(t, w)
	check(t, f)
}

func TestLinksInParentsStayInside(t *testing.T) {
	w, f := newImage(t, 128<<20)
	for path, target := range map[string]string{"lib": "usr/lib", "deep/abs": "/usr", "up": "../../../../usr", "usr/self": "..", "loop1": "loop2", "loop2": "loop1"} {
		if err := w.Add(ext4image.Entry{Path: path, Mode: ext4image.ModeSymlink | 0o777, Target: target, ModTime: testTime}, nil); err != nil {
			t.Fatal(err)
		}
	}
	add(t, w, "lib/one", file, "1")
	add(t, w, "deep/abs/two", file, "2")
	add(t, w, "up/three", file, "3")
	add(t, w, "usr/self/four", file, "4")
	if err := w.Add(ext4image.Entry{Path: "loop1/x", Mode: file}, nil); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("a loop of links gave %v", err)
	}
	finish(t, w)
	check(t, f)
	for path, want := range map[string]string{"usr/lib/one": "1", "usr/two": "2", "usr/three": "3", "four": "4"} {
		if got := debugfs(t, f, "cat /"+path); got != want {
			t.Errorf("%s holds %q, want %q", path, got, want)
		}
	}
}

func TestRefusals(t *testing.T) {
	for _, tt := range []struct {
		name  string
		entry ext4image.Entry
		class error
	}{
		{"dot-dot", ext4image.Entry{Path: "a/../../etc/passwd", Mode: file}, api.ErrInvalid},
		{"NUL", ext4image.Entry{Path: "a\x00b", Mode: file}, api.ErrInvalid},
		{"long name", ext4image.Entry{Path: strings.Repeat("n", 256), Mode: file}, api.ErrInvalid},
		{"long path", ext4image.Entry{Path: strings.Repeat("n/", 3000), Mode: file}, api.ErrInvalid},
		{"file as the root", ext4image.Entry{Path: "/", Mode: file}, api.ErrInvalid},
		{"file as a directory", ext4image.Entry{Path: "file/below", Mode: file}, api.ErrInvalid},
		{"lost+found", ext4image.Entry{Path: "lost+found", Mode: file}, api.ErrInvalid},
		{"no type", ext4image.Entry{Path: "x", Mode: 0o644}, api.ErrInvalid},
		{"empty target", ext4image.Entry{Path: "x", Mode: ext4image.ModeSymlink}, api.ErrInvalid},
		{"long target", ext4image.Entry{Path: "x", Mode: ext4image.ModeSymlink, Target: strings.Repeat("t", 4096)}, api.ErrInvalid},
		{"negative size", ext4image.Entry{Path: "x", Mode: file, Size: -1}, api.ErrInvalid},
		{"too large", ext4image.Entry{Path: "x", Mode: file, Size: 1 << 40}, api.ErrExhausted},
		{"short content", ext4image.Entry{Path: "x", Mode: file, Size: 10}, io.ErrUnexpectedEOF},
		{"much in attributes", ext4image.Entry{Path: "x", Mode: file, Xattrs: map[string][]byte{"user.x": make([]byte, 5000)}}, api.ErrExhausted},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, _ := newImage(t, 128<<20)
			add(t, w, "file", file, "")
			if err := w.Add(tt.entry, strings.NewReader("short")); !errors.Is(err, tt.class) {
				t.Errorf("got the error %v, want one of class %q", err, tt.class)
			}
		})
	}
}

// TestClampAfter: what a build wrote itself gets the age of its newest source,
// so that the time of the build leaves no trace.
func TestClampAfter(t *testing.T) {
	var images [2][]byte
	for i := range images {
		path := filepath.Join(t.TempDir(), "image")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		built := testTime.Add(time.Duration(i) * time.Hour)
		w, err := ext4image.New(f, ext4image.Options{SizeBytes: 128 << 20, Time: built, ClampAfter: built})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range []ext4image.Entry{
			{Path: "source", Mode: file, ModTime: testTime.Add(-time.Hour)},
			{Path: "older", Mode: file, ModTime: testTime.Add(-2 * time.Hour)},
			{Path: "made", Mode: file, ModTime: built.Add(time.Second)},
			{Path: "/", Mode: dir, ModTime: built.Add(time.Second)},
		} {
			if err := w.Add(e, nil); err != nil {
				t.Fatal(err)
			}
		}
		finish(t, w)
		f.Close()
		if images[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Error("two builds at different times differ")
	}
}

// TestEnlarge has e2fsprogs use the room that is kept for an enlargement.
func TestEnlarge(t *testing.T) {
	testenv.RequireTools(t, "e2fsprogs", "e2fsck", "resize2fs", "debugfs")
	w, f := newImage(t, 256<<20)
	add(t, w, "etc/hello", file, "hello\n")
	finish(t, w)
	if err := f.Truncate(20 << 30); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("resize2fs", "-f", f.Name()).CombinedOutput(); err != nil {
		t.Fatalf("resize2fs: %v\n%s", err, out)
	}
	check(t, f)
	if got := debugfs(t, f, "stats"); !strings.Contains(got, "5242880") {
		t.Errorf("the file system has not the 5242880 blocks of 20 GiB:\n%.2000s", got)
	}
}
