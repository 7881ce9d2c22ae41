//go:build linux

package workspacedisk_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// hostWalk is what Walk is to show of a directory of the host.
func hostWalk(t testing.TB, dir string) []workspacedisk.WalkEntry {
	t.Helper()
	var out []workspacedisk.WalkEntry
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		e := workspacedisk.WalkEntry{
			Path: strings.TrimPrefix(p, dir+"/"), Mode: st.Mode & 0o7777, ModTime: time.Unix(st.Mtim.Sec, st.Mtim.Nsec),
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			e.Type = api.ArtifactDirectory
		case unix.S_IFREG:
			e.Type, e.Size = api.ArtifactFile, st.Size
		case unix.S_IFLNK:
			e.Type, e.Size = api.ArtifactSymlink, st.Size
			e.Target, err = os.Readlink(p)
		default:
			return nil
		}
		out = append(out, e)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// walked is what Walk shows.
func walked(t testing.TB, d *workspacedisk.Disk, p string) []workspacedisk.WalkEntry {
	t.Helper()
	var out []workspacedisk.WalkEntry
	if err := d.Walk(t.Context(), p, func(e workspacedisk.WalkEntry) error {
		out = append(out, e)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// walkedContents is contents by way of WalkContent.
func walkedContents(t testing.TB, d *workspacedisk.Disk) map[string]string {
	t.Helper()
	got := map[string]string{}
	err := d.WalkContent(t.Context(), "/", func(e workspacedisk.WalkEntry, open func() (io.Reader, error)) error {
		r, err := open()
		if e.Type != api.ArtifactFile {
			if !errors.Is(err, api.ErrInvalid) {
				t.Errorf("opening the %s %s: %v", e.Type, e.Path, err)
			}
			got["/"+e.Path] = e.Type
			if e.Type == api.ArtifactSymlink {
				got["/"+e.Path] = "-> " + e.Target
			}
			return nil
		}
		if err != nil {
			return err
		}
		b, err := io.ReadAll(r)
		got["/"+e.Path] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	delete(got, "/lost+found")
	return got
}

func TestWalk(t *testing.T) {
	t.Parallel()
	now := time.Unix(1_700_000_000, 123456789) // as handmade has it
	odd := put{path: "/dir/\xff\n", mode: ext4image.ModeFile | 0o4751, content: "x"}
	src := layered(t,
		[]put{dirAt("/dir"), fileAt("/dir/b"), dirAt("/dir/a"), fileAt("/dir/a/z"), fileAt("/dir/a.x"), fileAt("/other")},
		[]put{dirAt("/dir"), odd, linkAt("/dir/c", "\xfe/"), put{path: "/dir/dev", mode: ext4image.ModeFIFO | 0o644}, whiteoutAt("/dir/b")})
	d := openSource(t, src)
	want := []workspacedisk.WalkEntry{
		{Path: "a", Type: "directory", Mode: 0o755, ModTime: now},
		{Path: "a/z", Type: "file", Mode: 0o644, Size: 11, ModTime: now},
		{Path: "a.x", Type: "file", Mode: 0o644, Size: 11, ModTime: now},
		{Path: "c", Type: "symlink", Mode: 0o777, Size: 2, Target: "\xfe/", ModTime: now},
		{Path: "\xff\n", Type: "file", Mode: 0o4751, Size: 1, ModTime: now},
	}
	if diff := cmp.Diff(want, walked(t, d, "/dir")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, tt := range []struct {
		name, path string
		class      error
	}{
		{"missing", "/none", api.ErrNotFound},
		{"a file", "/other", api.ErrInvalid},
		{"a symlink", "/dir/c", api.ErrInvalid},
		{"relative", "dir", api.ErrInvalid},
	} {
		if err := d.Walk(t.Context(), tt.path, func(workspacedisk.WalkEntry) error { return nil }); !errors.Is(err, tt.class) {
			t.Errorf("walking %s: %v, want %v", tt.name, err, tt.class)
		}
	}
	stop := errors.New("enough")
	calls := 0
	err := d.Walk(t.Context(), "/", func(workspacedisk.WalkEntry) error {
		calls++
		return stop
	})
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("after the callback's error: %v, %d calls", err, calls)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = d.WalkContent(ctx, "/other/..", func(e workspacedisk.WalkEntry, open func() (io.Reader, error)) error {
		if e.Path != "dir/a.x" {
			return nil
		}
		r, err := open()
		if err != nil {
			return err
		}
		cancel()
		if _, err := io.ReadAll(r); !errors.Is(err, context.Canceled) {
			t.Errorf("reading after the context's end: %v", err)
		}
		return nil
	})
	if err == nil || !errors.Is(err, context.Canceled) {
		t.Errorf("walking after the context's end: %v", err)
	}
}

// TestWalkLimits: what is left out counts, too.
func TestWalkLimits(t *testing.T) {
	t.Parallel()
	src := layered(t, []put{dirAt("/d"), fileAt("/d/f"), put{path: "/d/pipe", mode: ext4image.ModeFIFO | 0o644}}, nil)
	for name, limits := range map[string]workspacedisk.Limits{
		"entries": {MaxEntries: 3}, "paths": {MaxPathBytes: 19}, "directories": {MaxDirBytes: 4096},
	} {
		d, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{Limits: limits})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if err := d.Walk(t.Context(), "/", func(workspacedisk.WalkEntry) error { return nil }); !errors.Is(err, api.ErrExhausted) {
			t.Errorf("%s: %v, want the limit", name, err)
		}
	}
	d, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{Limits: workspacedisk.Limits{MaxEntries: 4}, HideRuntime: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var got []string
	for _, e := range walked(t, d, "/") {
		got = append(got, e.Path)
	}
	if !slices.Equal(got, []string{"d", "d/f", "lost+found"}) {
		t.Errorf("walked %q", got)
	}
}
