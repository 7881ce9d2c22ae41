package archive_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/archive"
)

// listed writes a list and returns the archive's names with content or target.
func listed(t *testing.T, dir string, limits archive.Limits, names ...string) ([]string, archive.Result, error) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var out bytes.Buffer
	r, err := archive.WriteList(context.Background(), root.OpenRoot, slices.Values(names), &out, limits)
	if err != nil {
		return nil, r, err
	}
	var got []string
	for tr := tar.NewReader(&out); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return got, r, nil
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, h.Name+"="+string(b)+h.Linkname)
	}
}

func TestWriteList(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"a": "one", "d/b\xff\n": "two"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, "l")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc", filepath.Join(dir, "away")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, r, err := listed(t, dir, archive.Limits{}, "l", "d/b\xff\n", "none", "fifo", "away/passwd", "d", "a", "a")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"l=/etc/passwd", "d/b\xff\n=two", "d/=", "a=one", "a=one"}
	if d := cmp.Diff(want, got); d != "" || r.Entries != 5 || r.SkippedCount != 3 || r.Bytes != 9 {
		t.Errorf("%+v\n%s", r, d)
	}
	if _, _, err := listed(t, dir, archive.Limits{Entries: 1}, "a", "d"); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("above the limit of entries: %v", err)
	}
	if _, _, err := listed(t, dir, archive.Limits{Bytes: 4}, "a", "a"); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("above the limit of bytes: %v", err)
	}
}

// TestListedFileIsShorterThanItsSize packs what can be read: files of sysfs
// announce a page and hold a line.
func TestListedFileIsShorterThanItsSize(t *testing.T) {
	const name = "uevent_seqnum"
	content, err := os.ReadFile("/sys/kernel/" + name)
	if fi, statErr := os.Stat("/sys/kernel/" + name); err != nil || statErr != nil || fi.Size() <= int64(len(content)) {
		t.Skip("no file here is shorter than its size")
	}
	got, _, err := listed(t, "/sys/kernel", archive.Limits{}, name)
	if err != nil || len(got) != 1 || len(got[0]) >= 4096 {
		t.Errorf("%.100q, %v", got, err)
	}
}
