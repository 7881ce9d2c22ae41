//go:build linux

package workspacedisk_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// TestEveryLayout reads images of all supported layouts and compares each name,
// type, size, target and byte with the tree that they were made from.
func TestEveryLayout(t *testing.T) {
	t.Parallel()
	needTools(t)
	dir := oddTree(t)
	layouts := []struct {
		name string
		opts []string
	}{
		{"default", nil},
		{"1k blocks", []string{"-b", "1024"}},
		{"2k blocks", []string{"-b", "2048"}},
		{"4k blocks", []string{"-b", "4096"}},
		{"ext2", []string{"-t", "ext2"}},
		{"ext3 with 1k blocks", []string{"-t", "ext3", "-b", "1024"}},
		{"block maps with 4k blocks", []string{"-b", "4096", "-O", "^extents,^64bit"}},
		{"no filetype", []string{"-t", "ext2", "-O", "^filetype"}},
		{"128 byte inodes", []string{"-I", "128"}},
		{"512 byte inodes", []string{"-I", "512"}},
		{"no checksums", []string{"-O", "^metadata_csum"}},
		{"64bit and checksums", []string{"-O", "64bit,metadata_csum"}},
		{"checksum seed", []string{"-O", "metadata_csum,metadata_csum_seed"}},
		{"group checksums", []string{"-O", "^metadata_csum,uninit_bg"}},
		{"inline data", []string{"-O", "inline_data"}},
		{"inline data in 1024 byte inodes", []string{"-O", "inline_data", "-I", "1024"}},
		{"inline data without checksums", []string{"-O", "inline_data,^metadata_csum"}},
		{"meta_bg", []string{"-b", "1024", "-O", "meta_bg,^resize_inode"}},
		{"meta_bg and sparse_super2", []string{"-b", "1024", "-O", "meta_bg,^resize_inode,sparse_super2"}},
		{"no flex_bg", []string{"-O", "^flex_bg"}},
		{"small groups", []string{"-b", "1024", "-g", "1024"}},
		{"bigalloc", []string{"-O", "bigalloc"}},
		{"ea_inode and large_dir", []string{"-O", "ea_inode,large_dir"}},
	}
	want := hostTree(t, dir)
	for _, tt := range layouts {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			img := makeImage(t, dir, "96M", tt.opts...)
			compareTree(t, want, openRaw(t, img))
		})
	}
}

// node is one file of a tree, with all that a listing and a read show.
type node struct {
	Type, Target, Content string
	Size                  int64
}

// hostTree reads a directory of the host.
func hostTree(t testing.TB, dir string) map[string]node {
	t.Helper()
	tree := map[string]node{}
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		var n node
		switch {
		case e.Type().IsDir():
			n.Type = "directory"
		case e.Type().IsRegular():
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			n = node{Type: "file", Content: string(data), Size: int64(len(data))}
		case e.Type() == fs.ModeSymlink:
			if n.Target, err = os.Readlink(p); err != nil {
				return err
			}
			n.Type, n.Size = "symlink", int64(len(n.Target))
		default:
			return nil
		}
		tree[strings.TrimPrefix(p, dir)] = n
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// diskTree reads the whole disk but /lost+found and what is in /big.
func diskTree(t testing.TB, d *workspacedisk.Disk) map[string]node {
	t.Helper()
	ctx := context.Background()
	list, err := d.List(ctx, "/", true)
	if err != nil {
		t.Fatal(err)
	}
	tree := map[string]node{}
	for _, e := range list.Entries {
		p := original(t, e.Path, e.PathBase64)
		if p == "/lost+found" || strings.HasPrefix(p, "/big/") {
			continue
		}
		n := node{Type: e.ArtifactType, Size: e.SizeBytes}
		switch e.ArtifactType {
		case "symlink":
			n.Target = original(t, *e.LinkTarget, e.LinkTargetBase64)
		case "file":
			var buf bytes.Buffer
			if _, truncated, err := d.CopyFile(ctx, &buf, p, 1<<40); err != nil || truncated {
				t.Fatalf("reading %q: truncated %v, %v", p, truncated, err)
			}
			n.Content = buf.String()
		}
		tree[p] = n
	}
	return tree
}

func compareTree(t testing.TB, want map[string]node, d *workspacedisk.Disk) {
	t.Helper()
	compareTrees(t, want, diskTree(t, d))
}

func compareTrees(t testing.TB, want, got map[string]node) {
	t.Helper()
	// Contents are long: name the file instead of printing them.
	for p, w := range want {
		if g, ok := got[p]; ok && g.Content != w.Content {
			t.Errorf("%q has wrong content: %d bytes, want %d", p, len(g.Content), len(w.Content))
		}
	}
	short := cmp.Transformer("noContent", func(n node) string { return fmt.Sprintf("%s %d %q", n.Type, n.Size, n.Target) })
	if diff := cmp.Diff(want, got, short); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
}

// TestLargeDirectory reads a directory as mke2fs leaves it and with the hash
// index that e2fsck -D makes. mke2fs needs minutes for more entries than this;
// TestKernelWritten has 100,000.
func TestLargeDirectory(t *testing.T) {
	t.Parallel()
	needTools(t)
	const count = 8_000
	dir := t.TempDir()
	writeFile(t, dir, "first", "one inode for all")
	if err := os.Mkdir(filepath.Join(dir, "big"), 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range count {
		if err := os.Link(filepath.Join(dir, "first"), filepath.Join(dir, "big", fmt.Sprintf("a rather long name %06d", i))); err != nil {
			t.Fatal(err)
		}
	}
	img := makeImage(t, dir, "16M", "-b", "1024")
	t.Run("linear", func(t *testing.T) { checkLarge(t, img, count) })
	tool(t, []int{1}, "e2fsck", "-fyD", img)
	requireIndex(t, img)
	t.Run("hash-indexed", func(t *testing.T) { checkLarge(t, img, count) })
}

// checkLarge expects count entries in /big.
func checkLarge(t *testing.T, img string, count int) {
	d := openRaw(t, img)
	defer d.Close()
	list, err := d.List(context.Background(), "/big", true)
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Entries) != count {
		t.Fatalf("%d entries, want %d", len(list.Entries), count)
	}
	for i, e := range list.Entries {
		if want := fmt.Sprintf("/big/a rather long name %06d", i); e.Path != want || e.SizeBytes != 17 {
			t.Fatalf("entry %d is %+v, want %s", i, e, want)
		}
	}
	last := fmt.Sprintf("/big/a rather long name %06d", count-1)
	if r, err := d.Read(context.Background(), last, 100); err != nil || r.Content != "one inode for all" {
		t.Errorf("reading the last one: %v, %v", r, err)
	}
}

// requireIndex makes sure that /big has a hash index of at least two levels.
func requireIndex(t *testing.T, img string) {
	t.Helper()
	out := tool(t, nil, "debugfs", "-R", "htree_dump /big", img)
	if !strings.Contains(out, "Indirect levels: 1") && !strings.Contains(out, "Indirect levels: 2") {
		t.Fatalf("/big has no deep index:\n%.500s", out)
	}
}

// TestHugeFile reads a sparse file of more than 4 GiB through a bound, and its
// last bytes through a writer that keeps only these.
func TestHugeFile(t *testing.T) {
	t.Parallel()
	needTools(t)
	for _, opts := range [][]string{{"-b", "4096"}, {"-b", "1024", "-t", "ext3"}} {
		t.Run(strings.Join(opts, " "), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			const size = 4<<30 + 4096 + 3
			sparse(t, filepath.Join(dir, "huge"), size, map[int64]string{10: "begin", 4<<30 + 4096: "end"})
			d := openRaw(t, makeImage(t, dir, "32M", opts...))
			r, err := d.Read(context.Background(), "/huge", 15)
			if err != nil || r.Content != strings.Repeat("\x00", 10)+"begin" || r.SizeBytes != size || !r.Truncated {
				t.Fatalf("got %+v, %v", r, err)
			}
			var last tailWriter
			n, truncated, err := d.CopyFile(context.Background(), &last, "/huge", size)
			if n != size || truncated || err != nil || string(last.tail) != "\x00end" {
				t.Errorf("copied %d bytes ending in %q, truncated %v, %v", n, last.tail, truncated, err)
			}
		})
	}
}

// tailWriter keeps the last four bytes.
type tailWriter struct{ tail []byte }

var _ io.Writer = (*tailWriter)(nil)

func (w *tailWriter) Write(p []byte) (int, error) {
	w.tail = append(w.tail, p[max(0, len(p)-4):]...)
	w.tail = append([]byte(nil), w.tail[max(0, len(w.tail)-4):]...)
	return len(p), nil
}
