package ext4image_test

import (
	"errors"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
)

func TestModeAndClear(t *testing.T) {
	w, f := newImage(t, 128<<20)
	add(t, w, "dir/sub/file", ext4image.ModeFile|0o640, "text")
	if err := w.Add(ext4image.Entry{Path: "link", Mode: ext4image.ModeSymlink | 0o777, Target: "dir", ModTime: time.Unix(1, 0)}, nil); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]uint16{
		"": ext4image.ModeDir | 0o755, "dir/sub": ext4image.ModeDir | 0o755, "link": ext4image.ModeSymlink | 0o777,
		"link/sub/file": ext4image.ModeFile | 0o640, "none": 0, "dir/sub/file/x": 0,
	} {
		if got, ok := w.Mode(path); got != want || ok != (want != 0) {
			t.Errorf("%q has the mode %#o, %v; want %#o", path, got, ok, want)
		}
	}
	if err := w.Clear("dir/sub/file"); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("clearing a file gave %v", err)
	}
	if err := w.Clear("dir"); err != nil || w.Exists("dir/sub") || !w.Exists("dir") {
		t.Errorf("clearing a directory gave %v", err)
	}
	if err := w.Clear(""); err != nil || w.Exists("dir") || w.Exists("link") || !w.Exists("lost+found") {
		t.Errorf("clearing the root gave %v", err)
	}
	if err := w.Clear("none"); err != nil {
		t.Error(err)
	}
	finish(t, w)
	check(t, f)
}
