//go:build linux

package workspacedisk_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// mount mounts an image that this test made, and unmounts it at the end or when
// the returned function is called. It takes root.
func mount(t testing.TB, img string, opts ...string) (dir string, unmount func()) {
	t.Helper()
	testenv.Require(t, "loopmount", os.Geteuid() == 0, "mounting an image takes root")
	dir = t.TempDir()
	args := []string{"-t", "ext4", "-o", strings.Join(append([]string{"loop"}, opts...), ","), img, dir}
	if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
		testenv.Require(t, "loopmount", false, fmt.Sprintf("mount: %v: %s", err, out))
	}
	mounted := true
	unmount = func() {
		if mounted {
			tool(t, nil, "umount", dir)
			mounted = false
		}
	}
	t.Cleanup(unmount)
	return dir, unmount
}

// TestKernelWritten reads what a kernel wrote: an index that grew, fragmented
// and unwritten extents, truncated and deleted files.
func TestKernelWritten(t *testing.T) {
	needTools(t)
	for _, opts := range [][]string{{"-b", "4096"}, {"-b", "1024"}, {"-b", "1024", "-O", "^extents,^64bit,^metadata_csum"}, {"-O", "inline_data", "-I", "512"}} {
		t.Run(strings.Join(opts, " "), func(t *testing.T) {
			img := makeImage(t, sampleTree(t), "192M", opts...)
			dir, unmount := mount(t, img)
			count := 10_000
			if opts[1] == "4096" {
				count = 100_000
			}
			kernelWrites(t, dir, count)
			want := hostTree(t, dir)
			delete(want, "/lost+found")
			unmount()
			for p := range want {
				if strings.HasPrefix(p, "/big/") { // checked below
					delete(want, p)
				}
			}
			requireIndex(t, img)
			checkLarge(t, img, count)
			compareTree(t, want, openRaw(t, img))
		})
	}
}

// kernelWrites fills a mounted filesystem, with count entries in /big.
func kernelWrites(t testing.TB, dir string, count int) {
	t.Helper()
	writeFile(t, dir, "first-0", "one inode for all")
	if err := os.Mkdir(filepath.Join(dir, "big"), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range count {
		first := filepath.Join(dir, fmt.Sprintf("first-%d", i/50_000)) // an inode can have 65,000 links
		if i%50_000 == 0 {
			writeFile(t, dir, filepath.Base(first), "one inode for all")
		}
		if err := os.Link(first, filepath.Join(dir, "big", fmt.Sprintf("a rather long name %06d", i))); err != nil {
			t.Fatal(err)
		}
	}
	for name, n := range map[string]int{"in-inode": 40, "in-xattr": 150, "later-a-block": 100} {
		writeFile(t, dir, "small/"+name, pattern(n))
	}
	writeFile(t, dir, "small/later-a-block", pattern(3000))
	// Two files written by turns, synced each time, lie in many extents.
	a, b := create(t, dir, "frag-a"), create(t, dir, "frag-b")
	defer a.Close()
	defer b.Close()
	for i := range 800 {
		for _, f := range []*os.File{a, b} {
			if _, err := f.WriteAt([]byte(pattern(4096)), int64(i)*8192); err != nil {
				t.Fatal(err)
			}
			if i%10 == 0 {
				if err := unix.Fdatasync(int(f.Fd())); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	// Preallocated and partly written: unwritten extents read as zeros even
	// where the disk holds old bytes.
	old := create(t, dir, "old")
	if _, err := old.Write(bytes.Repeat([]byte("OLD BYTES"), 1_000_000)); err != nil {
		t.Fatal(err)
	}
	if err := old.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(old.Name()); err != nil {
		t.Fatal(err)
	}
	old.Close()
	unix.Sync()
	pre := create(t, dir, "preallocated")
	defer pre.Close()
	if err := unix.Fallocate(int(pre.Fd()), 0, 0, 9<<20); err != nil && err != unix.EOPNOTSUPP { // no extents, no fallocate
		t.Fatal(err)
	}
	for _, at := range []int64{0, 1<<20 + 17, 8 << 20} {
		if _, err := pre.WriteAt([]byte("written"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Truncate(1<<20 + 5); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
}

// create makes a file. The caller closes it before unmounting.
func create(t testing.TB, dir, name string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// crash copies the image of a mounted filesystem, as a power cut would leave
// it: fsynced changes are in the journal only.
func crash(t testing.TB, img string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "crashed.ext4")
	in, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	f, err := os.Create(out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(f, in); err != nil {
		t.Fatal(err)
	}
	if h := tool(t, nil, "dumpe2fs", "-h", out); !strings.Contains(h, "needs_recovery") {
		t.Fatalf("the copy does not need recovery: %s", h)
	}
	return out
}

// TestDirtyJournal reads images of filesystems that were not unmounted. The
// judge is e2fsck: after it replayed the journal of a copy, every block must
// be what ours read before.
func TestDirtyJournal(t *testing.T) {
	needTools(t)
	layouts := []struct {
		name string
		mkfs []string
		opts []string
	}{
		{"default", nil, nil},
		{"1k blocks", []string{"-b", "1024"}, nil},
		{"no checksums", []string{"-O", "^metadata_csum"}, nil},
		{"no 64bit", []string{"-O", "^64bit,^metadata_csum"}, nil},
		{"all data in the journal", nil, []string{"data=journal"}},
		{"ext3 layout", []string{"-b", "1024", "-O", "^extents,^64bit,^metadata_csum,^flex_bg"}, nil},
		{"small journal that wraps", []string{"-b", "1024", "-J", "size=1"}, nil},
	}
	for _, tt := range layouts {
		t.Run(tt.name, func(t *testing.T) {
			img := makeImage(t, sampleTree(t), "64M", tt.mkfs...)
			dir, unmount := mount(t, img, tt.opts...)
			journalWrites(t, dir, len(tt.mkfs) == 4)
			want := hostTree(t, dir)
			delete(want, "/lost+found")
			crashed := crash(t, img)
			unmount()

			judged := workspacedisk.ReplayedBlocks(t, crashed)
			judge := filepath.Join(t.TempDir(), "judge.ext4")
			tool(t, nil, "cp", crashed, judge)
			tool(t, []int{1}, "e2fsck", "-p", "-E", "journal_only", judge)
			data, err := os.ReadFile(judge)
			if err != nil {
				t.Fatal(err)
			}
			if len(judged) < 3 {
				t.Errorf("the journal changed only %d blocks", len(judged))
			}
			for off, ours := range judged {
				if off == 0 || off == 1024 { // the superblock: e2fsck clears its flag
					continue
				}
				if !bytes.Equal(ours, data[off:off+int64(len(ours))]) {
					t.Errorf("the block at byte %d differs from e2fsck's", off)
				}
			}

			d := openRaw(t, crashed)
			if !d.Replayed() {
				t.Fatal("the journal was not replayed")
			}
			compareTree(t, want, d)

			// The export is what e2fsck makes of it, and nothing of it is stale.
			out := filepath.Join(t.TempDir(), "out.ext4")
			if _, err := d.Export(context.Background(), out); err != nil {
				t.Fatal(err)
			}
			exported := openRaw(t, out)
			if exported.Replayed() {
				t.Error("the export needs recovery")
			}
			compareTree(t, want, exported)
			tool(t, []int{1}, "e2fsck", "-fp", out) // orphans of the crash are mended
		})
	}
}

// journalWrites makes changes that reach the journal but not their places:
// new, deleted, renamed and grown files, and metadata blocks that are freed
// and used again as data, for which the journal has revocations.
func journalWrites(t testing.TB, dir string, wrap bool) {
	t.Helper()
	syncDir := func() { syncFile(t, dir) }
	rounds := 6
	if wrap {
		rounds = 60 // some MiB of journal
	}
	for round := range rounds {
		sub := filepath.Join(dir, fmt.Sprintf("round-%d", round))
		for i := range 60 {
			name := fmt.Sprintf("file-%d-%s", i, strings.Repeat("n", 60))
			writeFile(t, sub, name, pattern(round*100+i))
			if i%20 == 0 || round%2 == 1 { // delayed data of the others may be lost
				syncFile(t, filepath.Join(sub, name))
			}
		}
		syncDir()
		if round%2 == 0 { // frees directory blocks: revocations
			if err := os.RemoveAll(sub); err != nil {
				t.Fatal(err)
			}
			syncDir()
		}
	}
	// A data block that starts with the journal's magic number is escaped.
	f := create(t, dir, "magic")
	defer f.Close()
	if _, err := f.Write(append([]byte{0xC0, 0x3B, 0x39, 0x98}, pattern(9000)...)); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "workspace/note.txt")); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	syncDir()
}

// syncFile is fsync of a file or directory.
func syncFile(t testing.TB, p string) {
	t.Helper()
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// TestScrubDirty: a scrub is not undone by a later replay, which is what
// happens when debugfs removes files from an image that needs recovery.
func TestScrubDirty(t *testing.T) {
	needTools(t)
	dir := secretTree(t)
	img := makeImage(t, dir, "64M")
	mnt, unmount := mount(t, img, "data=journal")
	writeFile(t, mnt, "run/pyro-secrets/in-journal-only", token)
	f := create(t, mnt, "workspace/synced")
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	crashed := crash(t, img)
	unmount()

	got, err := workspacedisk.Scrub(context.Background(), workspacedisk.Source{Path: crashed, Format: workspacedisk.FormatRaw}, workspacedisk.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Removed) != 3 {
		t.Errorf("removed %v", got.Removed)
	}
	mustNotHold(t, crashed, token)
	fsck(t, crashed)
	mnt, _ = mount(t, crashed)
	if list, err := os.ReadDir(filepath.Join(mnt, "run")); err != nil || len(list) != 0 {
		t.Errorf("/run after the next mount: %v, %v", list, err)
	}
	if _, err := os.Stat(filepath.Join(mnt, "workspace/synced")); err != nil {
		t.Errorf("what was synced is gone: %v", err)
	}
}
