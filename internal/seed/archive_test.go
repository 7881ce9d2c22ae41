package seed_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/seed"
)

func tarOf(tb testing.TB, headers ...tar.Header) []byte {
	tb.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, h := range headers {
		content := ""
		if h.Typeflag == tar.TypeReg {
			content = h.Linkname // the tests' place for it
			h.Linkname, h.Size = "", int64(len(content))
		}
		if h.Mode == 0 && h.Typeflag != tar.TypeXGlobalHeader {
			h.Mode = 0o644
		}
		must(tb, tw.WriteHeader(&h))
		_, err := io.WriteString(tw, content)
		must(tb, err)
	}
	must(tb, tw.Close())
	return b.Bytes()
}

func reg(name, content string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Linkname: content}
}

func typed(t byte, name, target string) tar.Header {
	return tar.Header{Typeflag: t, Name: name, Linkname: target}
}

func archiveFile(tb testing.TB, name string, b []byte) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), name)
	must(tb, os.WriteFile(path, b, 0o644))
	return path
}

func TestArchiveFormats(t *testing.T) {
	plain := tarOf(t, typed(tar.TypeDir, "./", ""), reg("./a", "1"), reg("d/e/f", "2"), typed(tar.TypeSymlink, "l", "/etc/passwd"))
	var gz, zst bytes.Buffer
	zw := gzip.NewWriter(&gz)
	_, err := zw.Write(plain)
	must(t, errors.Join(err, zw.Close()))
	sw, err := zstd.NewWriter(&zst)
	must(t, err)
	_, err = sw.Write(plain)
	must(t, errors.Join(err, sw.Close()))
	store := newStore(t)
	var digests []string
	for name, b := range map[string][]byte{"x.tar": plain, "x.tgz": gz.Bytes(), "x.tar.zst": zst.Bytes(), "no extension": gz.Bytes()} {
		s := build(t, store, seed.Source{Path: archiveFile(t, name, b)})
		if diff := cmp.Diff([]string{"a", "d/", "d/e/", "d/e/f", "l->/etc/passwd"}, paths(t, s)); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if s.Info.Mode != api.SeedArchive || s.Info.EntryCount != 5 || s.Info.BytesWritten != 2 {
			t.Errorf("%s: %+v", name, s.Info)
		}
		digests = append(digests, s.Digest)
	}
	for _, d := range digests {
		if d != digests[0] {
			t.Errorf("digests differ: %v", digests)
		}
	}
}

func TestArchiveContent(t *testing.T) {
	when := time.Unix(1e9, 0)
	headers := []tar.Header{
		{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}, Format: tar.FormatPAX},
		reg("twice", "first"), reg("twice", "second"), typed(tar.TypeLink, "hard", "twice"),
		reg("d/f", "late parent"), {Typeflag: tar.TypeDir, Name: "d/", Mode: 0o700, ModTime: when},
		{Typeflag: tar.TypeReg, Name: "suid", Mode: 0o4755, ModTime: when},
		typed(tar.TypeFifo, "pipe", ""), {Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3},
		typed(tar.TypeSymlink, "l", "twice"), typed(tar.TypeSymlink, "l", "hard"), typed(tar.TypeLink, "l2", "l"),
		reg("\xff odd\n", "x"), typed(tar.TypeDir, "empty/", ""),
	}
	file := archiveFile(t, "x.tar", tarOf(t, headers...))
	s := build(t, newStore(t), seed.Source{Path: file})
	if diff := cmp.Diff([]string{"d/", "d/f", "empty/", "hard", "l->hard", "l2->hard", "suid", "twice", "\xff odd\n"}, paths(t, s)); diff != "" {
		t.Error(diff)
	}
	if s.Info.SkippedCount != 2 {
		t.Errorf("skipped %v", s.Info.Skipped)
	}
	check := func(out string) {
		t.Helper()
		for name, want := range map[string]string{"twice": "second", "hard": "second", "d/f": "late parent"} {
			if got, err := os.ReadFile(filepath.Join(out, name)); err != nil || string(got) != want {
				t.Errorf("%s holds %q, %v", name, got, err)
			}
		}
		for name, mode := range map[string]os.FileMode{"suid": 0o755, "d": os.ModeDir | 0o700} {
			fi, err := os.Stat(filepath.Join(out, name))
			must(t, err)
			if fi.Mode() != mode || !fi.ModTime().Equal(when) {
				t.Errorf("%s has %v, %v", name, fi.Mode(), fi.ModTime())
			}
		}
	}
	check(unpack(t, s))
	var b bytes.Buffer
	info, err := seed.WriteTar(context.Background(), seed.Source{Path: file}, &b, nil)
	must(t, err)
	if diff := cmp.Diff(s.Info, info); diff != "" {
		t.Error(diff)
	}
	out := t.TempDir()
	untar(t, &b, out)
	check(out)
}

func TestHostileArchives(t *testing.T) {
	long := strings.Repeat("x", 256)
	tests := []struct {
		name    string
		headers []tar.Header
		class   error
	}{
		{"up", []tar.Header{reg("../x", "1")}, api.ErrDenied},
		{"up_inside", []tar.Header{reg("a/../../x", "1")}, api.ErrDenied},
		{"up_and_down", []tar.Header{reg("a/../x", "1")}, api.ErrDenied},
		{"dot_up", []tar.Header{reg("./../x", "1")}, api.ErrDenied},
		{"absolute", []tar.Header{reg("/etc/passwd", "1")}, api.ErrDenied},
		{"after_good_ones", []tar.Header{reg("a", "1"), reg("../x", "1")}, api.ErrDenied},
		{"through_a_link", []tar.Header{typed(tar.TypeSymlink, "l", "/etc"), reg("l/passwd", "1")}, api.ErrDenied},
		{"through_a_link_inside", []tar.Header{typed(tar.TypeDir, "d/", ""), typed(tar.TypeSymlink, "l", "d"), reg("l/x", "1")}, api.ErrDenied},
		{"through_a_file", []tar.Header{reg("f", "1"), reg("f/x", "1")}, api.ErrDenied},
		{"link_over_directory", []tar.Header{reg("d/x", "1"), typed(tar.TypeSymlink, "d", "/etc"), reg("d/y", "1")}, api.ErrDenied},
		{"directory_over_file", []tar.Header{reg("d", "1"), typed(tar.TypeDir, "d/", "")}, api.ErrDenied},
		{"hard_link_out", []tar.Header{typed(tar.TypeLink, "h", "/etc/passwd")}, api.ErrDenied},
		{"hard_link_up", []tar.Header{typed(tar.TypeLink, "h", "../x")}, api.ErrDenied},
		{"hard_link_to_nothing", []tar.Header{typed(tar.TypeLink, "h", "x")}, api.ErrDenied},
		{"hard_link_to_directory", []tar.Header{typed(tar.TypeDir, "d/", ""), typed(tar.TypeLink, "h", "d")}, api.ErrDenied},
		{"hard_link_to_itself", []tar.Header{reg("h", "1"), typed(tar.TypeLink, "h", "h")}, api.ErrDenied},
		{"hard_link_to_replaced", []tar.Header{reg("a", "1"), typed(tar.TypeLink, "h", "a"), reg("a", "2")}, api.ErrUnsupported},
		{"top_is_a_link", []tar.Header{typed(tar.TypeSymlink, ".", "/etc")}, api.ErrDenied},
		{"long_name", []tar.Header{reg(long, "1")}, api.ErrDenied},
		{"long_path", []tar.Header{reg(strings.Repeat("y/", 2500)+"x", "1")}, api.ErrDenied},
		{"deep", []tar.Header{reg(strings.Repeat("y/", 300)+"x", "1")}, api.ErrDenied},
		{"long_target", []tar.Header{typed(tar.TypeSymlink, "l", strings.Repeat("y/", 2500))}, api.ErrDenied},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			file := archiveFile(t, "x.tar", tarOf(t, tt.headers...))
			_, err := newStore(t).Build(context.Background(), seed.Source{Path: file}, nil)
			if !errors.Is(err, tt.class) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A kilobyte of archive that stands for a terabyte is refused by its header.
func TestArchiveBombs(t *testing.T) {
	t.Run("declared", func(t *testing.T) {
		var b bytes.Buffer
		must(t, tar.NewWriter(&b).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "f", Size: 1 << 40}))
		_, err := newStore(t).Build(context.Background(), seed.Source{Path: archiveFile(t, "x.tar", b.Bytes())}, nil)
		if !errors.Is(err, api.ErrExhausted) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("sum", func(t *testing.T) {
		var headers bytes.Buffer
		for range 3 { // the first is cut off before its content, so only the plan counts
			must(t, tar.NewWriter(&headers).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "f", Size: 65 << 30}))
		}
		_, err := newStore(t).Build(context.Background(), seed.Source{Path: archiveFile(t, "x.tar", headers.Bytes())}, nil)
		if !errors.Is(err, api.ErrExhausted) {
			t.Errorf("got %v", err)
		}
	})
}

func TestDamagedArchives(t *testing.T) {
	plain := tarOf(t, reg("a", strings.Repeat("1", 5000)), reg("b", "2"))
	var gz bytes.Buffer
	zw := gzip.NewWriter(&gz)
	_, err := zw.Write(plain)
	must(t, errors.Join(err, zw.Close()))
	flipped := bytes.Clone(gz.Bytes())
	flipped[len(flipped)-6] ^= 1 // in the checksum
	base := filepath.Join(t.TempDir(), "seeds")
	store, err := seed.Open(base, nil)
	must(t, err)
	for name, b := range map[string][]byte{
		"cut": plain[:3000], "cut_header": plain[:5632+100], "cut_gzip": gz.Bytes()[:gz.Len()/2], "gzip_sum": flipped, "gzip_of_text": gz.Bytes()[:20],
	} {
		_, err := store.Build(context.Background(), seed.Source{Path: archiveFile(t, "x", b)}, nil)
		if !errors.Is(err, api.ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(base, "objects")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// Whatever an archive is, what is made of it is a tree. A seed would be synced
// to the disk each time, so the fuzzer makes the tar only.
func FuzzArchive(f *testing.F) {
	f.Add(tarOf(f, reg("a", "1"), typed(tar.TypeLink, "b", "a"), typed(tar.TypeSymlink, "c", "/x"), reg("d/e", "2")))
	f.Add(tarOf(f, reg("../a", "1")))
	file := archiveFile(f, "x.tar", nil)
	f.Fuzz(func(t *testing.T, b []byte) {
		must(t, os.WriteFile(file, b, 0o644))
		var out bytes.Buffer
		info, err := seed.WriteTar(context.Background(), seed.Source{Path: file}, &out, nil)
		if err != nil {
			if api.Code(err) == "internal" {
				t.Errorf("an error without class: %v", err)
			}
			return
		}
		made := map[string]byte{".": tar.TypeDir}
		for tr := tar.NewReader(&out); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			must(t, err)
			name := filepath.Clean(h.Name)
			if made[filepath.Dir(name)] != tar.TypeDir || made[name] != 0 {
				t.Errorf("%q comes twice, or before its directory", name)
			}
			made[name] = h.Typeflag
		}
		if int64(len(made)-1) != info.EntryCount {
			t.Errorf("%d entries, %d reported", len(made)-1, info.EntryCount)
		}
	})
}
