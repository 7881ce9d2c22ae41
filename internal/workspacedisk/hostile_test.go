//go:build linux

package workspacedisk_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// baseImage is the plain image of the ext4 package's test data.
func baseImage(t testing.TB) []byte {
	t.Helper()
	f, err := os.Open("ext4/testdata/extents.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func saveImage(t testing.TB, data []byte) workspacedisk.Source {
	t.Helper()
	p := filepath.Join(t.TempDir(), "hostile.img")
	if err := os.WriteFile(p, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return workspacedisk.Source{Path: p, Format: workspacedisk.FormatRaw}
}

// dirent finds the one entry of that name in an image.
func dirent(t testing.TB, data []byte, name string, kind byte) []byte {
	t.Helper()
	at := bytes.Index(data, append([]byte{byte(len(name)), kind}, name...))
	if at < 0 {
		t.Fatalf("the image has no entry %q", name)
	}
	return data[at-6 : at+2+len(name)]
}

// Entry types on the disk.
const (
	direntFile = 1
	direntDir  = 2
	direntLink = 7
)

// TestForgedEntries: what debugfs rdump would have written outside of its
// target, over a file of the host, or without end.
func TestForgedEntries(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		forge func(data []byte)
		class error
		text  string
	}{
		{"a name that leaves its directory", func(d []byte) { copy(dirent(t, d, "fast", direntLink)[8:], "../x") }, api.ErrDamaged, `impossible name "../x"`},
		{"a slash", func(d []byte) { copy(dirent(t, d, "fast", direntLink)[8:], "a/bc") }, api.ErrDamaged, "impossible name"},
		{"a NUL byte", func(d []byte) { copy(dirent(t, d, "fast", direntLink)[8:], "a\x00bc") }, api.ErrDamaged, "impossible name"},
		{"a second ..", func(d []byte) { e := dirent(t, d, "fast", direntLink); e[6] = 2; copy(e[8:], "..") }, api.ErrDamaged, "impossible name"},
		{"two entries of one name", func(d []byte) { copy(dirent(t, d, "slow", direntLink)[8:], "file") }, api.ErrDamaged, "two entries of the name"},
		{"a directory in itself", func(d []byte) {
			copy(dirent(t, d, "sub", direntDir)[:4], dirent(t, d, "dir", direntDir)[:4])
		}, api.ErrDamaged, "appears twice"},
		{"the root in a directory", func(d []byte) { binary.LittleEndian.PutUint32(dirent(t, d, "sub", direntDir), 2) }, api.ErrDamaged, "appears twice"},
		{"a directory in two places", func(d []byte) {
			copy(dirent(t, d, "sub", direntDir)[:4], dirent(t, d, "many", direntDir)[:4])
		}, api.ErrDamaged, "appears twice"},
		{"an inode out of range", func(d []byte) { binary.LittleEndian.PutUint32(dirent(t, d, "fast", direntLink), 1<<31) }, api.ErrDamaged, "inodes 1 to"},
		{"an inode not in use", func(d []byte) { binary.LittleEndian.PutUint32(dirent(t, d, "fast", direntLink), 96) }, api.ErrDamaged, "not in use"},
		{"an empty record", func(d []byte) { binary.LittleEndian.PutUint16(dirent(t, d, "fast", direntLink)[4:], 0) }, api.ErrDamaged, "record of 0 bytes"},
		{"a record over the end", func(d []byte) { binary.LittleEndian.PutUint16(dirent(t, d, "fast", direntLink)[4:], 4096) }, api.ErrDamaged, "record of 4096 bytes"},
		{"a name over its record", func(d []byte) { dirent(t, d, "fast", direntLink)[6] = 255 }, api.ErrDamaged, "name of 255 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			data := baseImage(t)
			tt.forge(data)
			d := openSource(t, saveImage(t, data))
			_, err := d.List(context.Background(), "/", true)
			if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want class %q and text %q", err, api.Code(tt.class), tt.text)
			}
		})
	}
	// The image is fine before.
	if _, err := openSource(t, saveImage(t, baseImage(t))).List(context.Background(), "/", true); err != nil {
		t.Error(err)
	}
}

// TestForgedInodes sets fields of inodes to lies, with debugfs.
func TestForgedInodes(t *testing.T) {
	t.Parallel()
	needTools(t)
	tests := []struct {
		name, set string
		list      error // class of listing everything, nil for none
		read      error // class of reading /dir/file
	}{
		{"a size of 2^44", "/dir/file size 0x100000000000", api.ErrDamaged, api.ErrDamaged},
		{"a size of 2^41", "/dir/file size 0x20000000000", nil, nil},
		{"a size of 2^64-1", "/dir/file size 0xffffffffffffffff", api.ErrDamaged, api.ErrDamaged},
		{"a long fast link", "/dir/fast size 1000000", api.ErrDamaged, nil},
		{"an empty link", "/dir/fast size 0", api.ErrDamaged, nil},
		{"a fast link that claims blocks", "/dir/fast size 100", api.ErrDamaged, nil},
		{"a directory of half a block", "/dir/sub size 100", api.ErrDamaged, nil},
		{"a directory of 2^31 bytes", "/dir/sub size 0x80000000", api.ErrDamaged, nil},
		{"no extent magic", "/dir/file block[0] 0", nil, api.ErrDamaged},
		{"an extent outside", "/dir/file block[5] 0x7fffffff", nil, api.ErrDamaged},
		{"a deep tree", "/dir/file block[1] 0xff", nil, api.ErrDamaged},
		{"a file that is a directory", "/dir/file mode 0040755", api.ErrDamaged, api.ErrInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			src := saveImage(t, baseImage(t))
			if out := tool(t, nil, "debugfs", "-w", "-R", "sif "+tt.set, src.Path); strings.Contains(out, "nvalid") {
				t.Fatal(out)
			}
			d := openSource(t, src)
			start := time.Now()
			_, err := d.List(context.Background(), "/", true)
			if !errors.Is(err, tt.list) || (err == nil) != (tt.list == nil) {
				t.Errorf("listing: %v, want class %q", err, api.Code(tt.list))
			}
			_, err = d.Read(context.Background(), "/dir/file", 1<<20)
			if !errors.Is(err, tt.read) || (err == nil) != (tt.read == nil) {
				t.Errorf("reading: %v, want class %q", err, api.Code(tt.read))
			}
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

// TestNoExt4: a guest that formats its disk anew gets a sentence, not a guess.
func TestNoExt4(t *testing.T) {
	t.Parallel()
	patch := func(off int, b ...byte) []byte {
		data := baseImage(t)
		copy(data[off:], b)
		return data
	}
	zeros := make([]byte, 1<<20)
	tests := []struct {
		name  string
		data  []byte
		class error
	}{
		{"empty", nil, api.ErrUnsupported},
		{"short", zeros[:1500], api.ErrUnsupported},
		{"zeros", zeros, api.ErrUnsupported},
		{"xfs", append([]byte("XFSB"), zeros...), api.ErrUnsupported},
		{"swap", append(append(append([]byte{}, zeros[:4086]...), "SWAPSPACE2"...), zeros...), api.ErrUnsupported},
		{"encryption", patch(1024+0x60, 0xc2, 0x02, 1, 0), api.ErrUnsupported},
		{"an unknown feature", patch(1024+0x60, 0xc2, 0x02, 0, 0x80), api.ErrUnsupported},
		{"a journal elsewhere", patch(1024+0x60, 0xc6, 0x02, 0, 0), api.ErrUnsupported},
		{"truncated", baseImage(t)[:200<<10], api.ErrDamaged},
		{"more blocks than bytes", patch(1024+4, 0xff, 0xff, 0xff, 0xff), api.ErrDamaged},
		{"no inodes in a group", patch(1024+0x28, 0, 0, 0, 0), api.ErrDamaged},
		{"no blocks in a group", patch(1024+0x20, 0, 0, 0, 0), api.ErrDamaged},
		{"blocks of 4 TiB", patch(1024+0x18, 32), api.ErrDamaged},
		{"inodes of no size", patch(1024+0x58, 0, 0), api.ErrDamaged},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			src := saveImage(t, tt.data)
			d, err := workspacedisk.Open(context.Background(), src, workspacedisk.Options{})
			if err == nil {
				d.Close()
			}
			if !errors.Is(err, tt.class) {
				t.Errorf("got %v, want class %q", err, api.Code(tt.class))
			}
			if _, err := workspacedisk.Scrub(context.Background(), src, workspacedisk.Limits{}); !errors.Is(err, tt.class) {
				t.Errorf("scrub: got %v, want class %q", err, api.Code(tt.class))
			}
		})
	}
	dir := t.TempDir()
	if _, err := workspacedisk.Open(context.Background(), workspacedisk.Source{Path: dir, Format: workspacedisk.FormatRaw}, workspacedisk.Options{}); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("opening a directory: %v", err)
	}
}

// TestToolsThatLie puts programs in the place of debugfs and e2fsck that fail
// in the ways in which the real ones do. Whatever they do, the image stays as
// it is and nothing claims success.
func TestToolsThatLie(t *testing.T) {
	needTools(t)
	img := makeImage(t, secretTree(t), "16M")
	before, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	real := os.Getenv("PATH")
	tests := []struct {
		name, progs, script, text string
		class                     error
	}{
		{"both do nothing and exit 0", "debugfs e2fsck", "exit 0", "not in use", api.ErrDamaged},
		{"debugfs complains and exits 0", "debugfs", "echo 'debugfs 1.47.0 (5-Feb-2023)' >&2; echo 'Could not allocate block' >&2", "debugfs command failed: debugfs -w", api.ErrDamaged},
		{"debugfs crashes", "debugfs", "kill -SEGV $$", "debugfs command failed", api.ErrDamaged},
		{"e2fsck says that errors are left", "e2fsck", "exit 4", "e2fsck command failed: e2fsck -fp", api.ErrDamaged},
		{"e2fsck floods", "e2fsck", "head -c 50000000 /dev/zero | tr '\\0' x >&2; exit 8", "e2fsck command failed", api.ErrDamaged},
		{"e2fsck hangs", "e2fsck", "exec sleep 1000", "deadline", context.DeadlineExceeded},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bin := t.TempDir()
			for p := bin; p != os.TempDir() && p != "/"; p = filepath.Dir(p) { // the tools run as another user
				if err := os.Chmod(p, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			for prog := range strings.FieldsSeq(tt.progs) {
				if err := os.WriteFile(filepath.Join(bin, prog), []byte("#!/bin/sh\nPATH=/usr/bin:/bin\n"+tt.script+"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv("PATH", bin+":"+real)
			ctx, cancel := context.WithCancel(context.Background())
			if errors.Is(tt.class, context.DeadlineExceeded) {
				ctx, cancel = context.WithTimeout(context.Background(), time.Second)
			}
			defer cancel()
			start := time.Now()
			_, err := workspacedisk.Scrub(ctx, workspacedisk.Source{Path: img, Format: workspacedisk.FormatRaw}, workspacedisk.Limits{})
			if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.text) {
				t.Fatalf("got %v, want class %q and text %q", err, api.Code(tt.class), tt.text)
			}
			if len(err.Error()) > 2000 {
				t.Errorf("the error is %d bytes long", len(err.Error()))
			}
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("took %v", took)
			}
			if after, err := os.ReadFile(img); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the image changed: %v", err)
			}
			onlyFiles(t, filepath.Dir(img), filepath.Base(img))
		})
	}
}
