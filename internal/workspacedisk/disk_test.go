//go:build linux

package workspacedisk_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// TestSample holds the entries, order and texts that the product promises.
func TestSample(t *testing.T) {
	t.Parallel()
	needTools(t)
	ctx := context.Background()
	d := openRaw(t, makeImage(t, sampleTree(t), "16M"))

	target := "note.txt"
	all := []api.DiskEntry{
		{Path: "/workspace/link", ArtifactType: "symlink", SizeBytes: 8, LinkTarget: &target},
		{Path: "/workspace/note.txt", ArtifactType: "file", SizeBytes: 16},
		{Path: "/workspace/src", ArtifactType: "directory"},
		{Path: "/workspace/src/child.txt", ArtifactType: "file", SizeBytes: 13},
	}
	lists := []struct {
		name, path string
		recursive  bool
		want       []api.DiskEntry
	}{
		{"recursive", "/workspace", true, all},
		{"one level", "/workspace", false, all[:3]},
		{"unclean path", "/workspace/./src/..//", false, all[:3]},
		{"a file lists as itself", "/workspace/note.txt", true, all[1:2]},
		{"a symlink lists as itself", "/workspace/link", false, all[0:1]},
	}
	for _, tt := range lists {
		t.Run(tt.name, func(t *testing.T) {
			got, err := d.List(ctx, tt.path, tt.recursive)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got.Entries); diff != "" {
				t.Errorf("entries (-want +got):\n%s", diff)
			}
		})
	}

	got, err := d.Read(ctx, "/workspace/note.txt", 5)
	if err != nil {
		t.Fatal(err)
	}
	want := &api.DiskRead{Content: "hello", MaxBytes: 5, Path: "/workspace/note.txt", SizeBytes: 16, Truncated: true}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("read (-want +got):\n%s", diff)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	needTools(t)
	ctx := context.Background()
	dir := sampleTree(t)
	if err := unix.Mkfifo(dir+"/workspace/pipe", 0o644); err != nil {
		t.Fatal(err)
	}
	symlink(t, "b", dir+"/a")
	symlink(t, "a", dir+"/b")
	d := openRaw(t, makeImage(t, dir, "16M"))
	list := func(p string) error { _, err := d.List(ctx, p, false); return err }
	read := func(p string, n int64) error { _, err := d.Read(ctx, p, n); return err }
	tests := []struct {
		name  string
		err   error
		class error
		text  string
	}{
		{"list a missing path", list("/workspace/missing"), api.ErrNotFound, "workspace disk path does not exist: /workspace/missing"},
		{"list below a file", list("/workspace/note.txt/x"), api.ErrNotFound, "workspace disk path does not exist"},
		{"list a pipe", list("/workspace/pipe"), api.ErrInvalid, "unsupported workspace disk path type"},
		{"list a relative path", list("workspace"), api.ErrInvalid, "must be absolute"},
		{"list a long path", list("/" + strings.Repeat("x/", 4096)), api.ErrInvalid, "longer than"},
		{"list through a link loop", list("/a/x"), api.ErrInvalid, "failed to inspect workspace disk path"},
		{"read a missing path", read("/missing", 5), api.ErrNotFound, "workspace disk path does not exist"},
		{"read a directory", read("/workspace/src", 5), api.ErrInvalid, "regular files"},
		{"read a symlink", read("/workspace/link", 5), api.ErrInvalid, "regular files"},
		{"read a pipe", read("/workspace/pipe", 5), api.ErrInvalid, "regular files"},
		{"read nothing", read("/workspace/note.txt", 0), api.ErrInvalid, "max_bytes must be positive"},
		{"read too much", read("/workspace/note.txt", workspacedisk.MaxReadBytes+1), api.ErrInvalid, "max_bytes must be at most"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if !errors.Is(tt.err, tt.class) || !strings.Contains(tt.err.Error(), tt.text) {
				t.Errorf("got %v, want class %q and text %q", tt.err, api.Code(tt.class), tt.text)
			}
		})
	}
	// The pipe is no entry of its directory's listing.
	got, err := d.List(ctx, "/workspace", false)
	if err != nil || len(got.Entries) != 3 {
		t.Errorf("listing with a pipe: %v, %v", got, err)
	}
}

// A file that is looked for like a program of the guest does is found behind
// links, and nothing else is.
func TestReadLinked(t *testing.T) {
	t.Parallel()
	needTools(t)
	dir := t.TempDir()
	writeFile(t, dir, "usr/lib/passwd", "somebody")
	writeFile(t, dir, "etc/group", "group")
	symlink(t, "../usr/lib/passwd", dir+"/etc/passwd")
	symlink(t, "/etc/passwd", dir+"/etc/again")
	symlink(t, "nowhere", dir+"/etc/broken")
	symlink(t, "loop", dir+"/etc/loop")
	symlink(t, "/usr", dir+"/etc/directory")
	d := openRaw(t, makeImage(t, dir, "1M"))
	for _, tt := range []struct {
		path  string
		max   int64
		want  string
		class error
	}{
		{"/etc/group", 64, "group", nil},
		{"/etc/group", 3, "gro", nil},
		{"/etc/passwd", 64, "somebody", nil},
		{"/etc/again", 64, "somebody", nil},
		{"/etc/broken", 64, "", api.ErrNotFound},
		{"/etc/group/below", 64, "", api.ErrNotFound},
		{"/etc/loop", 64, "", api.ErrInvalid},
		{"/etc/directory", 64, "", api.ErrInvalid},
		{"/etc/group", workspacedisk.MaxReadBytes + 1, "", api.ErrInvalid},
	} {
		got, err := d.ReadLinked(t.Context(), tt.path, tt.max)
		if string(got) != tt.want || !errors.Is(err, tt.class) {
			t.Errorf("%s: %q, %v", tt.path, got, err)
		}
	}
}

// TestReadBeyondText shows what becomes of bytes that are no text, and of a
// character that the bound cuts.
func TestReadBeyondText(t *testing.T) {
	t.Parallel()
	needTools(t)
	dir := t.TempDir()
	writeFile(t, dir, "binary", "\xff\x00\xfe")
	writeFile(t, dir, "umlaut", "aä")
	writeFile(t, dir, "dir/file", "through a link")
	symlink(t, "/dir", dir+"/link")
	symlink(t, "../../../../dir/./", dir+"/up")
	d := openRaw(t, makeImage(t, dir, "1M"))
	tests := []struct {
		path string
		max  int64
		want api.DiskRead
	}{
		{"/binary", 9, api.DiskRead{ContentBase64: "/wD+", SizeBytes: 3}},
		{"/umlaut", 3, api.DiskRead{Content: "aä", SizeBytes: 3}},
		{"/umlaut", 2, api.DiskRead{Content: "a", SizeBytes: 3, Truncated: true}},
		{"/link/file", 64, api.DiskRead{Content: "through a link", SizeBytes: 14}},
		{"/up/file", 64, api.DiskRead{Content: "through a link", SizeBytes: 14}},
	}
	for _, tt := range tests {
		t.Run(tt.path, func(t *testing.T) {
			got, err := d.Read(context.Background(), tt.path, tt.max)
			if err != nil {
				t.Fatal(err)
			}
			tt.want.Path, tt.want.MaxBytes = tt.path, tt.max
			if diff := cmp.Diff(&tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestHideRuntime proves that no path leads to what is hidden.
func TestHideRuntime(t *testing.T) {
	t.Parallel()
	needTools(t)
	dir := t.TempDir()
	writeFile(t, dir, "run/pyro-secrets/token", "TOKEN")
	writeFile(t, dir, "run/pyro-shells/1", "x")
	writeFile(t, dir, "run/other", "x")
	writeFile(t, dir, "home/pyro-secrets", "only under /run is the name special")
	symlink(t, "/run/pyro-secrets", dir+"/s")
	symlink(t, "run", dir+"/r")
	src := workspacedisk.Source{Path: makeImage(t, dir, "1M"), Format: workspacedisk.FormatRaw}
	ctx := context.Background()
	d, err := workspacedisk.Open(ctx, src, workspacedisk.Options{HideRuntime: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, p := range []string{"/run/pyro-secrets/token", "/s/token", "/r/pyro-secrets/token", "/run/../r/pyro-shells/1"} {
		if _, err := d.Read(ctx, p, 9); !errors.Is(err, api.ErrNotFound) {
			t.Errorf("reading %s: %v, want not found", p, err)
		}
	}
	if _, err := d.Read(ctx, "/home/pyro-secrets", 9); err != nil {
		t.Error(err)
	}
	got, err := d.List(ctx, "/run", true)
	if err != nil || len(got.Entries) != 1 || got.Entries[0].Path != "/run/other" {
		t.Errorf("listing /run: %v, %v", got, err)
	}
	// Without the option everything is there.
	if r, err := openSource(t, src).Read(ctx, "/s/token", 9); err != nil || r.Content != "TOKEN" {
		t.Errorf("reading without hiding: %v, %v", r, err)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	needTools(t)
	dir := t.TempDir()
	for _, n := range []string{"a", "b", "c"} {
		writeFile(t, dir, "d/"+n, "x")
	}
	src := workspacedisk.Source{Path: makeImage(t, dir, "1M"), Format: workspacedisk.FormatRaw}
	tests := map[string]workspacedisk.Limits{
		"entries":   {MaxEntries: 2},
		"paths":     {MaxPathBytes: 9},
		"directory": {MaxDirBytes: 1024},
	}
	for name, limits := range tests {
		t.Run(name, func(t *testing.T) {
			d, err := workspacedisk.Open(context.Background(), src, workspacedisk.Options{Limits: limits})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if _, err := d.List(context.Background(), "/d", true); !errors.Is(err, api.ErrExhausted) {
				t.Errorf("got %v, want the limit", err)
			}
		})
	}
	d := openSource(t, src)
	if _, err := d.List(context.Background(), "/d", true); err != nil {
		t.Errorf("with the default limits: %v", err)
	}
	canceled, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := d.List(canceled, "/d", true); !errors.Is(err, context.Canceled) {
		t.Errorf("listing with a canceled context: %v", err)
	}
}

// TestLocks plays QEMU: it holds the lock bytes that a machine holds.
func TestLocks(t *testing.T) {
	t.Parallel()
	needTools(t)
	img := makeImage(t, sampleTree(t), "1M")
	src := workspacedisk.Source{Path: img, Format: workspacedisk.FormatRaw}
	tests := []struct {
		name string
		kind int16
		at   int64
		busy bool
	}{
		{"a writer's shared lock", unix.F_RDLCK, 101, true},
		{"an exclusive lock on byte 100", unix.F_WRLCK, 100, true},
		{"an exclusive lock on byte 201", unix.F_WRLCK, 201, true},
		{"another reader", unix.F_RDLCK, 100, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f, err := os.OpenFile(img, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: tt.kind, Start: tt.at, Len: 1}); err != nil {
				t.Fatal(err)
			}
			d, err := workspacedisk.Open(context.Background(), src, workspacedisk.Options{})
			if err == nil {
				defer d.Close()
			}
			if busy := errors.Is(err, api.ErrBusy) && strings.Contains(err.Error(), "must be stopped"); busy != tt.busy {
				t.Errorf("got %v, want busy %v", err, tt.busy)
			}
		})
	}
	// While a disk is open, a machine's lock on it would be refused by QEMU,
	// which probes byte 201.
	d := openRaw(t, img)
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	lock := unix.Flock_t{Type: unix.F_WRLCK, Start: 201, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err != nil || lock.Type == unix.F_UNLCK {
		t.Errorf("no lock on byte 201 while the disk is open: %v", err)
	}
	d.Close()
	lock = unix.Flock_t{Type: unix.F_WRLCK, Start: 201, Len: 1}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock); err != nil || lock.Type != unix.F_UNLCK {
		t.Errorf("byte 201 is still locked after Close: %v", err)
	}
}
