package archive_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/archive"
)

var stamp = time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)

// pack makes a tar of these headers; a file's content is its size in x.
func pack(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, h := range headers {
		if h.Typeflag != tar.TypeXGlobalHeader {
			h.ModTime = stamp
			if h.Mode == 0 {
				h.Mode = 0o644
			}
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			_, _ = tw.Write(bytes.Repeat([]byte("x"), int(h.Size)))
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func file(name string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 3}
}
func dir(name string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}
}
func link(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target}
}
func hard(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target}
}

// list describes a tree, one line for each thing in it.
func list(t testing.TB, root string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		fi, err := d.Info()
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%s %s", rel, fi.Mode())
		if d.Type() == fs.ModeSymlink {
			to, _ := os.Readlink(path)
			line = rel + " -> " + to
		} else if d.Type().IsRegular() {
			line += fmt.Sprintf(" %d", fi.Size())
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func openRoot(t testing.TB, dir string) *os.Root {
	t.Helper()
	r, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// TestExtract is RELIABILITY A1, A2, A5 and H1 to H5. Around the root lie
// things that an archive might reach.
func TestExtract(t *testing.T) {
	host := archive.ExtractOptions{Fresh: true, Links: archive.LinksInside}
	guest := archive.ExtractOptions{}
	tests := []struct {
		name  string
		opts  archive.ExtractOptions
		tar   []tar.Header
		want  []string // what the root holds afterwards, beside "keep"
		class error
		skips int64
	}{
		{"tree", host, []tar.Header{dir("d/"), file("d/f"), link("d/l", "f"), hard("h", "d/f")},
			[]string{"d drwxr-xr-x", "d/f -rw-r--r-- 3", "d/l -> f", "h -rw-r--r-- 3"}, nil, 0},
		{"directories it does not name", host, []tar.Header{file("a/b/f")},
			[]string{"a drwxr-xr-x", "a/b drwxr-xr-x", "a/b/f -rw-r--r-- 3"}, nil, 0},
		{"its own root", host, []tar.Header{dir("./"), file("./f")}, []string{"f -rw-r--r-- 3"}, nil, 0},
		{"set-id bits", host, []tar.Header{{Name: "f", Typeflag: tar.TypeReg, Mode: 0o6755}, {Name: "d/", Typeflag: tar.TypeDir, Mode: 0o7755}},
			[]string{"d drwxr-xr-x", "f -rwxr-xr-x 0"}, nil, 0},
		{"read-only directory", host, []tar.Header{{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o555}, file("d/f")},
			[]string{"d dr-xr-xr-x", "d/f -rw-r--r-- 3"}, nil, 0},
		{"special files", host, []tar.Header{{Name: "n", Typeflag: tar.TypeChar}, {Name: "b", Typeflag: tar.TypeBlock}, {Name: "p", Typeflag: tar.TypeFifo}, file("f")},
			[]string{"f -rw-r--r-- 3"}, nil, 3},
		{"parent", host, []tar.Header{file("../x")}, nil, api.ErrDenied, 0},
		{"absolute", host, []tar.Header{file("/x")}, nil, api.ErrDenied, 0},
		{"parent in the middle", host, []tar.Header{file("a/../../x")}, nil, api.ErrDenied, 0},
		{"dot and parent", host, []tar.Header{file("./../x")}, nil, api.ErrDenied, 0},
		{"parent that stays inside", host, []tar.Header{file("a/../x")}, nil, api.ErrDenied, 0},
		{"parent directory", host, []tar.Header{dir("../d")}, nil, api.ErrDenied, 0},
		{"long part", host, []tar.Header{file(strings.Repeat("n", 256))}, nil, api.ErrDenied, 0},
		{"long name", host, []tar.Header{file(strings.Repeat("n/", 2100) + "f")}, nil, api.ErrDenied, 0},
		{"deep", host, []tar.Header{dir(strings.Repeat("d/", 300))}, nil, api.ErrDenied, 0},
		{"through its own link", host, []tar.Header{link("l", "d"), dir("d"), file("l/f")}, []string{"d drwxr-xr-x", "l -> d"}, api.ErrDenied, 0},
		{"through a link outside, host", host, []tar.Header{link("l", "../victim"), file("l/pwn")}, []string{"l drwxr-xr-x", "l/pwn -rw-r--r-- 3"}, nil, 1},
		{"through a link outside, guest", guest, []tar.Header{link("l", "../victim"), file("l/pwn")}, []string{"l -> ../victim"}, api.ErrDenied, 0},
		{"absolute link, host", host, []tar.Header{link("l", "/etc/passwd"), file("f")}, []string{"f -rw-r--r-- 3"}, nil, 1},
		{"absolute link, guest", guest, []tar.Header{link("l", "/etc/passwd")}, []string{"l -> /etc/passwd"}, nil, 0},
		{"link, then a file in its place, host", host, []tar.Header{link("a", "keep"), file("a")}, []string{"a -> keep"}, api.ErrExists, 0},
		{"link, then a file in its place, guest", guest, []tar.Header{link("a", "keep"), file("a")}, []string{"a -rw-r--r-- 3"}, nil, 0},
		{"what was there, host", host, []tar.Header{file("keep")}, nil, api.ErrExists, 0},
		{"hard link to what was there", guest, []tar.Header{hard("h", "keep")}, nil, api.ErrDenied, 0},
		{"hard link outside", guest, []tar.Header{hard("h", "../victim/secret")}, nil, api.ErrDenied, 0},
		{"hard link to a link", guest, []tar.Header{link("l", "/etc/passwd"), hard("h", "l"), file("h")}, []string{"l -> /etc/passwd"}, api.ErrDenied, 0},
		{"hard link to what replaced a file", guest, []tar.Header{file("f"), link("f", "keep"), hard("h", "f")}, []string{"f -> keep"}, api.ErrDenied, 0},
		{"file over a directory", guest, []tar.Header{dir("d"), file("d")}, []string{"d drwxr-xr-x"}, api.ErrExists, 0},
		{"root as a link", guest, []tar.Header{link(".", "x")}, nil, api.ErrDenied, 0},
		{"entries above the limit", archive.ExtractOptions{Limits: archive.Limits{Entries: 2}}, []tar.Header{file("a"), file("b"), file("c")},
			[]string{"a -rw-r--r-- 3", "b -rw-r--r-- 3"}, api.ErrExhausted, 0},
		{"bytes above the limit", archive.ExtractOptions{Limits: archive.Limits{Bytes: 5}}, []tar.Header{file("a"), file("b")},
			[]string{"a -rw-r--r-- 3"}, api.ErrExhausted, 0},
		{"odd names", host, []tar.Header{file("a\nb"), file("c\\d"), file("-rf"), file("\xff\xfe"), file("…")},
			[]string{"-rf -rw-r--r-- 3", "a\nb -rw-r--r-- 3", "c\\d -rw-r--r-- 3", "… -rw-r--r-- 3", "\xff\xfe -rw-r--r-- 3"}, nil, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			base := t.TempDir()
			root := filepath.Join(base, "root")
			victim := filepath.Join(base, "victim")
			for _, d := range []string{root, victim} {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			for _, f := range []string{filepath.Join(root, "keep"), filepath.Join(victim, "secret")} {
				if err := os.WriteFile(f, []byte("before"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			res, err := archive.Extract(context.Background(), openRoot(t, root), bytes.NewReader(pack(t, tt.tar...)), tt.opts)
			if tt.class == nil && err != nil || tt.class != nil && !errors.Is(err, tt.class) {
				t.Errorf("error %v, want class %v", err, tt.class)
			}
			if err == nil && res.SkippedCount != tt.skips {
				t.Errorf("skipped %v", res.Skipped)
			}
			var got []string
			for _, line := range list(t, root) {
				if !strings.HasPrefix(line, "keep ") {
					got = append(got, line)
				}
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("root (-want +got):\n%s", d)
			}
			for _, f := range []string{filepath.Join(root, "keep"), filepath.Join(victim, "secret")} {
				if b, err := os.ReadFile(f); string(b) != "before" {
					t.Errorf("%s is now %q, %v", f, b, err)
				}
			}
			if d := cmp.Diff([]string{"secret -rw------- 6"}, list(t, victim)); d != "" {
				t.Errorf("outside (-want +got):\n%s", d)
			}
		})
	}
}

// TestZerosBecomeHoles is RELIABILITY A3: an archive, compressed or sparse, can
// stand for far more zeros than it has bytes.
func TestZerosBecomeHoles(t *testing.T) {
	const size = 64 << 20
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	tw := tar.NewWriter(zw)
	if err := tw.WriteHeader(&tar.Header{Name: "z", Typeflag: tar.TypeReg, Size: size, Mode: 0o644, ModTime: stamp}); err != nil {
		t.Fatal(err)
	}
	_, _ = io.CopyN(tw, zeroReader{}, size)
	_ = tw.Close()
	_ = zw.Close()
	bomb := buf.Bytes()
	dir := t.TempDir()
	if _, err := archive.Extract(context.Background(), openRoot(t, dir), bytes.NewReader(bomb), archive.ExtractOptions{}); err != nil {
		t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(filepath.Join(dir, "z"), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != size || st.Blocks*512 > 1<<20 {
		t.Errorf("%d bytes take %d on the disk", st.Size, st.Blocks*512)
	}
	dir = t.TempDir()
	_, err := archive.Extract(context.Background(), openRoot(t, dir), bytes.NewReader(bomb),
		archive.ExtractOptions{Limits: archive.Limits{Bytes: size - 1}})
	if !errors.Is(err, api.ErrExhausted) || len(list(t, dir)) > 0 {
		t.Errorf("above the limit: %v, wrote %v", err, list(t, dir))
	}
}

type zeroReader struct{}

func (zeroReader) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// TestCutArchive is RELIABILITY A9: no file under its final name is half.
func TestCutArchive(t *testing.T) {
	whole := pack(t, tar.Header{Name: "big", Typeflag: tar.TypeReg, Size: 100_000}, file("last"))
	for _, zip := range []bool{false, true} {
		data := whole
		if zip {
			var buf bytes.Buffer
			zw := gzip.NewWriter(&buf)
			_, _ = zw.Write(whole)
			_ = zw.Close()
			data = buf.Bytes()
		}
		step := max(len(data)/50, 1)
		for n := 1; n < len(data)-1100; n += step {
			dir := t.TempDir()
			_, err := archive.Extract(context.Background(), openRoot(t, dir), bytes.NewReader(data[:n]), archive.ExtractOptions{})
			if !zip && n < 100_000 && !errors.Is(err, api.ErrDamaged) {
				t.Errorf("cut at %d: %v", n, err)
			}
			if fi, err := os.Stat(filepath.Join(dir, "big")); err == nil && fi.Size() != 100_000 {
				t.Errorf("cut at %d: a file of %d bytes", n, fi.Size())
			}
		}
	}
}

// TestRoundTrip packs what it unpacked, byte for byte the same each time.
func TestRoundTrip(t *testing.T) {
	src := t.TempDir()
	long := strings.Repeat("l", 200)
	tree := pack(t, dir("d/"), file("d/f"), link("d/dangling", "../nowhere/"+long), dir("empty/"),
		tar.Header{Name: "exec", Typeflag: tar.TypeReg, Mode: 0o755, Size: 70_000}, file(long+"/"+long), file("ünïcode"), file("\xff"))
	if _, err := archive.Extract(context.Background(), openRoot(t, src), bytes.NewReader(tree), archive.ExtractOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(src, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	root := openRoot(t, src)
	var first bytes.Buffer
	res, err := archive.Write(context.Background(), root, ".", &first, archive.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	size, measured, err := archive.Measure(context.Background(), root, ".", archive.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if size != int64(first.Len()) {
		t.Errorf("measured %d bytes, wrote %d", size, first.Len())
	}
	if d := cmp.Diff(res, measured); d != "" || res.SkippedCount != 1 {
		t.Errorf("measured other things (-wrote +measured):\n%s%+v", d, res.Skipped)
	}
	dst := t.TempDir()
	if _, err := archive.Extract(context.Background(), openRoot(t, dst), bytes.NewReader(first.Bytes()), archive.ExtractOptions{Fresh: true}); err != nil {
		t.Fatal(err)
	}
	_ = os.Remove(filepath.Join(src, "fifo"))
	if d := cmp.Diff(list(t, src), list(t, dst)); d != "" {
		t.Errorf("(-source +copy):\n%s", d)
	}
	var second bytes.Buffer
	if _, err := archive.Write(context.Background(), openRoot(t, dst), ".", &second, archive.Limits{}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("the copy packs to other bytes")
	}
}

func TestWriteOne(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"f": "abc", "d/g": "de"} {
		_ = os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	_ = os.Symlink("/etc/passwd", filepath.Join(dir, "l"))
	_ = syscall.Mkfifo(filepath.Join(dir, "p"), 0o600)
	tests := []struct {
		name, path, kind string
		want             []string
		class            error
	}{
		{"file", "f", archive.File, []string{"f"}, nil},
		{"directory", "d", archive.Directory, []string{"g"}, nil},
		{"link is not followed", "l", archive.Symlink, []string{"l"}, nil},
		{"nested file", "d/g", archive.File, []string{"g"}, nil},
		{"missing", "none", "", nil, api.ErrNotFound},
		{"fifo", "p", "", nil, api.ErrInvalid},
		{"outside", "../x", "", nil, api.ErrDenied},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := openRoot(t, dir)
			kind, err := archive.Kind(root, tt.path)
			if kind != tt.kind || tt.class != nil && !errors.Is(err, tt.class) {
				t.Errorf("kind %q, %v", kind, err)
			}
			if tt.class != nil {
				return
			}
			var buf bytes.Buffer
			if _, err := archive.Write(context.Background(), root, tt.path, &buf, archive.Limits{}); err != nil {
				t.Fatal(err)
			}
			var got []string
			for tr := tar.NewReader(&buf); ; {
				h, err := tr.Next()
				if err != nil {
					break
				}
				got = append(got, h.Name)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
	if _, err := archive.Write(context.Background(), openRoot(t, dir), ".", io.Discard, archive.Limits{Bytes: 4}); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("bytes above the limit: %v", err)
	}
	if _, err := archive.Write(context.Background(), openRoot(t, dir), ".", io.Discard, archive.Limits{Entries: 2}); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("entries above the limit: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := archive.Write(ctx, openRoot(t, dir), ".", io.Discard, archive.Limits{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled context: %v", err)
	}
}

// TestHeadersWithoutEnd is RELIABILITY A7: nothing but headers, for ever.
func TestHeadersWithoutEnd(t *testing.T) {
	global := pack(t, tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}})
	global = global[:len(global)-1024]
	_, err := archive.Extract(context.Background(), openRoot(t, t.TempDir()), &repeatReader{data: global},
		archive.ExtractOptions{Limits: archive.Limits{Bytes: 1000, Entries: 10}})
	if !errors.Is(err, api.ErrExhausted) {
		t.Errorf("error %v", err)
	}
}

type repeatReader struct {
	data []byte
	at   int
}

func (r *repeatReader) Read(b []byte) (int, error) {
	n := copy(b, r.data[r.at:])
	r.at = (r.at + n) % len(r.data)
	return n, nil
}

func FuzzExtract(f *testing.F) {
	f.Add(pack(f, dir("d/"), file("d/f"), link("d/l", "f"), hard("h", "d/f")), false)
	f.Add(pack(f, link("l", ".."), file("l/x")), true)
	f.Fuzz(func(t *testing.T, data []byte, host bool) {
		base := t.TempDir()
		root := filepath.Join(base, "root")
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		opts := archive.ExtractOptions{Limits: archive.Limits{Bytes: 1 << 20, Entries: 100}}
		if host {
			opts.Fresh, opts.Links = true, archive.LinksInside
		}
		_, _ = archive.Extract(context.Background(), openRoot(t, root), bytes.NewReader(data), opts)
		names, err := os.ReadDir(base)
		if err != nil || len(names) != 1 {
			t.Errorf("beside the root lie %v, %v", names, err)
		}
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil
			}
			switch d.Type() {
			case 0, fs.ModeDir, fs.ModeSymlink:
			default:
				t.Errorf("made %s", d.Type())
			}
			if host && d.Type() == fs.ModeSymlink {
				to, _ := os.Readlink(path)
				rel, _ := filepath.Rel(root, path)
				if filepath.IsAbs(to) || !filepath.IsLocal(filepath.Join(filepath.Dir(rel), to)) {
					t.Errorf("made the link %s -> %s", path, to)
				}
			}
			// So that the directory can be removed again.
			if d.IsDir() {
				_ = os.Chmod(path, 0o755)
			}
			return nil
		})
	})
}
