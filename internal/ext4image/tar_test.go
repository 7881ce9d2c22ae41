package ext4image_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
)

// makeTar makes an archive; the content of a regular file is its name.
func makeTar(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		if h.ModTime.IsZero() {
			h.ModTime = testTime
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(h.Name))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			io.WriteString(w, h.Name)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestAddTar(t *testing.T) {
	archive := makeTar(t,
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		tar.Header{Name: "./bin", Typeflag: tar.TypeSymlink, Linkname: "usr/bin", Mode: 0o777},
		tar.Header{Name: "./usr/bin/tool", Typeflag: tar.TypeReg, Mode: 0o4755, Uid: 5, Gid: 6,
			PAXRecords: map[string]string{"SCHILY.xattr.user.note": "hi"}},
		tar.Header{Name: "./bin/alias", Typeflag: tar.TypeLink, Linkname: "./usr/bin/tool"},
		tar.Header{Name: "./dev/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666},
		tar.Header{Name: "./fifo", Typeflag: tar.TypeFifo, Mode: 0o600},
		tar.Header{Name: "./unwanted", Typeflag: tar.TypeReg},
	)
	w, f := newImage(t, 128<<20)
	filter := func(h *tar.Header, r io.Reader) (io.Reader, error) {
		if h.Name == "./unwanted" {
			return nil, nil
		}
		return r, nil
	}
	if err := w.AddTar(context.Background(), bytes.NewReader(archive), filter); err != nil {
		t.Fatal(err)
	}
	if w.Exists("unwanted") {
		t.Error("the filtered entry is there")
	}
	finish(t, w)
	check(t, f)
	if got := debugfs(t, f, "cat /usr/bin/alias"); got != "./usr/bin/tool" {
		t.Errorf("the link's content is %q", got)
	}
	for _, want := range []string{"Mode:  04755", "User:     5   Group:     6", "Links: 2"} {
		if got := debugfs(t, f, "stat /usr/bin/tool"); !strings.Contains(got, want) {
			t.Errorf("stat does not say %q:\n%s", want, got)
		}
	}
	if got := debugfs(t, f, "ea_list /usr/bin/tool"); !strings.Contains(got, "user.note (2)") {
		t.Errorf("the attribute is missing:\n%s", got)
	}
}

func TestAddTarRefusals(t *testing.T) {
	truncated := makeTar(t, tar.Header{Name: "a-long-enough-name", Typeflag: tar.TypeReg})[:520]
	for _, tt := range []struct {
		name    string
		archive []byte
		class   error
	}{
		{"way out", makeTar(t, tar.Header{Name: "../../outside", Typeflag: tar.TypeReg}), api.ErrInvalid},
		{"link to nothing", makeTar(t, tar.Header{Name: "x", Typeflag: tar.TypeLink, Linkname: "nothing"}), api.ErrInvalid},
		{"link to a directory", makeTar(t,
			tar.Header{Name: "d/", Typeflag: tar.TypeDir}, tar.Header{Name: "x", Typeflag: tar.TypeLink, Linkname: "d"}), api.ErrInvalid},
		{"device out of range", makeTar(t, tar.Header{Name: "x", Typeflag: tar.TypeChar, Devmajor: 1 << 12}), api.ErrInvalid},
		{"truncated", truncated, io.ErrUnexpectedEOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, _ := newImage(t, 128<<20)
			if err := w.AddTar(context.Background(), bytes.NewReader(tt.archive), nil); !errors.Is(err, tt.class) {
				t.Errorf("got the error %v, want one of class %q", err, tt.class)
			}
		})
	}
}

func TestAddTarStopsWhenCancelled(t *testing.T) {
	w, _ := newImage(t, 128<<20)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	archive := makeTar(t, tar.Header{Name: "x", Typeflag: tar.TypeReg})
	if err := w.AddTar(ctx, bytes.NewReader(archive), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// FuzzAddTar: whatever the archive says, there is no panic, and what is
// accepted is a file system that e2fsck finds nothing wrong with.
func FuzzAddTar(f *testing.F) {
	f.Add(makeTar(f,
		tar.Header{Name: "d/", Typeflag: tar.TypeDir},
		tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "d/../d"},
		tar.Header{Name: "l/f", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user.note": "hi"}},
		tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "l/f"}))
	f.Add(makeTar(f,
		tar.Header{Name: "a", Typeflag: tar.TypeReg}, tar.Header{Name: "a/b", Typeflag: tar.TypeReg},
		tar.Header{Name: "c", Typeflag: tar.TypeBlock, Devmajor: 300, Devminor: 70000}))
	_, missing := exec.LookPath("e2fsck")
	f.Fuzz(func(t *testing.T, archive []byte) {
		out, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		w, err := ext4image.New(out, ext4image.Options{SizeBytes: 128 << 20, Time: testTime})
		if err != nil {
			t.Fatal(err)
		}
		if w.AddTar(context.Background(), bytes.NewReader(archive), nil) != nil {
			return
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if missing == nil {
			check(t, out)
		}
	})
}
