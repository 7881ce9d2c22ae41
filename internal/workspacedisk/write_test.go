//go:build linux

package workspacedisk_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

const token = "CANARY-TOKEN-0123456789"

// secretTree is a tree with runtime paths in all their forms.
func secretTree(t testing.TB) string {
	t.Helper()
	dir := sampleTree(t)
	writeFile(t, dir, "run/pyro-secrets/small", token)
	writeFile(t, dir, "run/pyro-secrets/large", strings.Repeat(token+"\n", 20_000))
	writeFile(t, dir, "run/pyro-secrets/deep/er/nested name", token)
	symlink(t, "/"+token, filepath.Join(dir, "run/pyro-secrets/fast"))
	symlink(t, "/"+strings.Repeat(token, 10), filepath.Join(dir, "run/pyro-secrets/slow"))
	writeFile(t, dir, "run/pyro-shells/1/log", token)
	writeFile(t, dir, "run/pyro-services", token) // a file in a directory's place
	writeFile(t, dir, "run-is-not-run/pyro-secrets", "kept")
	if err := os.Link(dir+"/run/pyro-shells/1/log", dir+"/run/pyro-secrets/twice"); err != nil {
		t.Fatal(err)
	}
	// A large attribute lies in a block of its own.
	attr := []byte(strings.Repeat(token, 30))
	if err := unix.Setxattr(dir+"/run/pyro-secrets/small", "user.secret", attr, 0); err != nil {
		t.Logf("no xattrs on this filesystem: %v", err)
	}
	return dir
}

var allRuntime = []string{"/run/pyro-secrets", "/run/pyro-services", "/run/pyro-shells"}

// withoutRun is the tree of dir without what lies in /run.
func withoutRun(t testing.TB, dir string) map[string]node {
	t.Helper()
	tree := hostTree(t, dir)
	for p := range tree {
		if strings.HasPrefix(p, "/run/") {
			delete(tree, p)
		}
	}
	return tree
}

// fsck fails the test unless e2fsck finds nothing to complain about.
func fsck(t testing.TB, img string) {
	t.Helper()
	tool(t, nil, "e2fsck", "-fn", img)
}

func mustNotHold(t testing.TB, file, text string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if at := bytes.Index(data, []byte(text)); at >= 0 {
		t.Errorf("%s holds %q at byte %d", filepath.Base(file), text, at)
	}
}

func onlyFiles(t testing.TB, dir string, want ...string) {
	t.Helper()
	var got []string
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		got = append(got, e.Name())
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files beside the image (-want +got):\n%s", diff)
	}
}

func TestScrub(t *testing.T) {
	t.Parallel()
	needTools(t)
	dir := secretTree(t)
	layouts := map[string][]string{
		"default": nil,
		"1k":      {"-b", "1024"},
		"inline":  {"-O", "inline_data", "-I", "512"},
		"ext2":    {"-t", "ext2"},
		"ext3":    {"-t", "ext3"},
	}
	for name, opts := range layouts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			img := makeImage(t, dir, "16M", opts...)
			if err := os.Chmod(img, 0o640); err != nil {
				t.Fatal(err)
			}
			src := workspacedisk.Source{Path: img, Format: workspacedisk.FormatAuto}
			got, err := workspacedisk.Scrub(context.Background(), src, workspacedisk.Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&api.DiskScrub{Path: img, Removed: allRuntime}, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			d := openRaw(t, img)
			list, err := d.List(context.Background(), "/run", true)
			if err != nil || len(list.Entries) != 0 {
				t.Errorf("/run after the scrub: %+v, %v", list, err)
			}
			compareTree(t, withoutRun(t, dir), d)
			d.Close()
			fsck(t, img)
			mustNotHold(t, img, token)
			onlyFiles(t, filepath.Dir(img), filepath.Base(img))
			info, err := os.Stat(img)
			if err != nil || info.Mode().Perm() != 0o640 || int(info.Sys().(*syscall.Stat_t).Uid) != os.Getuid() {
				t.Errorf("the image's owner or mode changed: %v, %v", info.Mode(), err)
			}
			// A second scrub has nothing to do and leaves the file alone.
			again, err := workspacedisk.Scrub(context.Background(), src, workspacedisk.Limits{})
			after, serr := os.Stat(img)
			if err != nil || serr != nil || len(again.Removed) != 0 || !os.SameFile(info, after) {
				t.Errorf("second scrub: %+v, %v", again, err)
			}
		})
	}
}

// TestScrubKeepsOtherNames: an inode with a name elsewhere stays there.
func TestScrubKeepsOtherNames(t *testing.T) {
	t.Parallel()
	needTools(t)
	dir := secretTree(t)
	if err := os.Link(dir+"/run/pyro-secrets/small", dir+"/workspace/kept"); err != nil {
		t.Fatal(err)
	}
	img := makeImage(t, dir, "16M")
	if _, err := workspacedisk.Scrub(context.Background(), workspacedisk.Source{Path: img, Format: workspacedisk.FormatRaw}, workspacedisk.Limits{}); err != nil {
		t.Fatal(err)
	}
	compareTree(t, withoutRun(t, dir), openRaw(t, img))
	fsck(t, img)
}

func TestScrubQcow2(t *testing.T) {
	t.Parallel()
	needTools(t)
	testenv.RequireTools(t, "qemu", "qemu-img")
	dir := secretTree(t)
	img := makeQcow2(t, makeImage(t, dir, "16M"))
	src := workspacedisk.Source{Path: img, Format: workspacedisk.FormatAuto}
	got, err := workspacedisk.Scrub(context.Background(), src, workspacedisk.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(allRuntime, got.Removed); diff != "" {
		t.Error(diff)
	}
	compareTree(t, withoutRun(t, dir), openSource(t, workspacedisk.Source{Path: img, Format: workspacedisk.FormatQcow2}))
	tool(t, nil, "qemu-img", "check", "-f", "qcow2", img)
	onlyFiles(t, filepath.Dir(img), filepath.Base(img))
}

func TestScrubRefuses(t *testing.T) {
	t.Parallel()
	needTools(t)
	img := makeImage(t, secretTree(t), "16M")
	before, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	scrub := func(src workspacedisk.Source) error {
		_, err := workspacedisk.Scrub(context.Background(), src, workspacedisk.Limits{})
		return err
	}
	raw := workspacedisk.Source{Path: img, Format: workspacedisk.FormatRaw}
	if err := scrub(workspacedisk.Source{Path: img, Format: workspacedisk.FormatQcow2, Backing: &raw}); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("an overlay: %v", err)
	}
	if err := scrub(workspacedisk.Source{Path: img + "x", Format: workspacedisk.FormatRaw}); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("a missing image: %v", err)
	}
	d := openRaw(t, img)
	if err := scrub(raw); !errors.Is(err, api.ErrBusy) {
		t.Errorf("an image that somebody reads: %v", err)
	}
	d.Close()
	// An image that is not consistent is not scrubbed: mending it could
	// change more than what was scrubbed.
	tool(t, nil, "debugfs", "-w", "-R", "sif /workspace/note.txt block[1] 5", img)
	broken, err := os.ReadFile(img)
	if err != nil || bytes.Equal(before, broken) {
		t.Fatal("debugfs did not damage the image")
	}
	if err := scrub(raw); !errors.Is(err, api.ErrDamaged) {
		t.Errorf("a damaged image: %v", err)
	}
	if after, err := os.ReadFile(img); err != nil || !bytes.Equal(broken, after) {
		t.Errorf("a refused scrub changed the image: %v", err)
	}
	onlyFiles(t, filepath.Dir(img), filepath.Base(img))
}

func TestExport(t *testing.T) {
	t.Parallel()
	needTools(t)
	ctx := context.Background()
	plain, secret := oddTree(t), secretTree(t)
	img, secretImg := makeImage(t, plain, "96M"), makeImage(t, secret, "16M")
	out := filepath.Join(t.TempDir(), "out.ext4")

	got, err := openRaw(t, img).Export(ctx, out)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&api.DiskExport{BytesWritten: 96 << 20, DiskFormat: "ext4", OutputPath: out}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	sameBytes(t, img, out)
	if a, b := diskUsage(t, img), diskUsage(t, out); b > a+1<<20 {
		t.Errorf("the export takes %d bytes of the host's disk, the image %d", b, a)
	}
	onlyFiles(t, filepath.Dir(out), "out.ext4")

	d := openRaw(t, secretImg)
	for name, p := range map[string]string{"file": out, "directory": t.TempDir()} {
		if _, err := d.Export(ctx, p); !errors.Is(err, api.ErrExists) || !strings.Contains(err.Error(), "output_path already exists") {
			t.Errorf("exporting onto a %s: %v", name, err)
		}
	}
	dangling := filepath.Join(t.TempDir(), "link")
	symlink(t, filepath.Join(t.TempDir(), "victim"), dangling)
	if _, err := d.Export(ctx, dangling); !errors.Is(err, api.ErrExists) {
		t.Errorf("exporting onto a dangling link: %v", err)
	}
	if _, err := d.Export(ctx, filepath.Join(t.TempDir(), "no/such/dir")); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("exporting into a missing directory: %v", err)
	}
	sameBytes(t, img, out) // still

	scrubbed := filepath.Join(t.TempDir(), "scrubbed.ext4")
	before, err := os.ReadFile(secretImg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Export(ctx, scrubbed); err != nil {
		t.Fatal(err)
	}
	compareTree(t, withoutRun(t, secret), openRaw(t, scrubbed))
	fsck(t, scrubbed)
	mustNotHold(t, scrubbed, token)
	if after, err := os.ReadFile(secretImg); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the export changed its source: %v", err)
	}
	info, err := os.Stat(scrubbed)
	if err != nil || info.Mode().Perm() != 0o600 || int(info.Sys().(*syscall.Stat_t).Uid) != os.Getuid() {
		t.Errorf("the export's owner or mode is wrong: %v, %v", info, err)
	}
}

// TestExportBound: an export that holds too much leaves nothing behind.
func TestExportBound(t *testing.T) {
	t.Parallel()
	needTools(t)
	img := makeImage(t, oddTree(t), "96M")
	d, err := workspacedisk.Open(context.Background(), workspacedisk.Source{Path: img, Format: workspacedisk.FormatRaw},
		workspacedisk.Options{Limits: workspacedisk.Limits{MaxExportBytes: 1 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	dir := t.TempDir()
	if _, err := d.Export(context.Background(), filepath.Join(dir, "out")); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("got %v, want the limit", err)
	}
	onlyFiles(t, dir)
}

func sameBytes(t testing.TB, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x, y) {
		t.Errorf("%s and %s differ", filepath.Base(a), filepath.Base(b))
	}
}

// diskUsage is what a file takes, without its holes.
func diskUsage(t testing.TB, p string) int64 {
	t.Helper()
	info, err := os.Stat(p)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}
