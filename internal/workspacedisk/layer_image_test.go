//go:build linux

package workspacedisk_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/ext4image"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// put is one file of a handmade image: its kind, content (a link's target) and
// overlayfs's marks. Without a mode it is a hard link to the file at content.
type put struct {
	path, content string
	mode          uint16
	marks         map[string]string
}

func dirAt(p string, marks ...string) put {
	return marked(put{path: p, mode: ext4image.ModeDir | 0o755}, marks)
}
func fileAt(p string, marks ...string) put {
	return marked(put{path: p, mode: ext4image.ModeFile | 0o644, content: "in " + p}, marks)
}
func emptyAt(p string, marks ...string) put {
	return marked(put{path: p, mode: ext4image.ModeFile | 0o644}, marks)
}
func linkAt(p, target string) put {
	return put{path: p, mode: ext4image.ModeSymlink | 0o777, content: target}
}
func whiteoutAt(p string) put { return put{path: p, mode: ext4image.ModeChar} }

func marked(p put, marks []string) put {
	p.marks = map[string]string{}
	for _, m := range marks {
		name, value, _ := strings.Cut(m, "=")
		p.marks["trusted.overlay."+name] = value
	}
	return p
}

// handmade writes an image of these files below dir.
func handmade(t testing.TB, dir string, puts []put) string {
	t.Helper()
	img := filepath.Join(t.TempDir(), "handmade.ext4")
	f, err := os.Create(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	now := time.Unix(1_700_000_000, 123456789)
	w, err := ext4image.New(f, ext4image.Options{SizeBytes: 128 << 20, Time: now})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range puts {
		if p.mode == 0 {
			if err := w.Link(dir+p.path, dir+p.content); err != nil {
				t.Fatal(err)
			}
			continue
		}
		e := ext4image.Entry{Path: dir + p.path, Mode: p.mode, ModTime: now, Xattrs: map[string][]byte{}}
		for name, value := range p.marks {
			e.Xattrs[name] = []byte(value)
		}
		if p.mode&0o170000 == ext4image.ModeSymlink {
			e.Target = p.content
		} else {
			e.Size = int64(len(p.content))
		}
		if err := w.Add(e, strings.NewReader(p.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return img
}

// layered is the source of handmade images, the lowest layer first.
func layered(t testing.TB, base []put, layers ...[]put) workspacedisk.Source {
	t.Helper()
	src := workspacedisk.Source{Path: handmade(t, "", base), Format: workspacedisk.FormatRaw}
	for _, l := range layers {
		img := handmade(t, "/upper", append([]put{dirAt("")}, l...))
		src.Layers = append(src.Layers, workspacedisk.Source{Path: img, Format: workspacedisk.FormatRaw})
	}
	return src
}

// dataMustNotHold is mustNotHold for a file that is mostly holes.
func dataMustNotHold(t testing.TB, file, text string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	read := int64(0)
	for end := int64(0); ; {
		start, err := f.Seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if end, err = f.Seek(start, unix.SEEK_HOLE); err != nil {
			t.Fatal(err)
		}
		data := make([]byte, end-start)
		if _, err := f.ReadAt(data, start); err != nil {
			t.Fatal(err)
		}
		if read += end - start; bytes.Contains(data, []byte(text)) {
			t.Errorf("%s holds %q behind byte %d", file, text, start)
		}
	}
	if read == 0 {
		t.Errorf("%s has no data", file)
	}
}
