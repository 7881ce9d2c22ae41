package engines_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// linkTree makes directories with links that stay in the workspace, at each
// depth, and with links that lead to "outside" beside it.
const linkTree = `set -e
mkdir -p in/deep/deeper ../outside/sub; umask 022
echo in >in/f; echo deep >in/deep/f; echo deeper >in/deep/deeper/f
echo secret >../outside/f; echo secret >../outside/sub/f
ln -s in i1; ln -s i1 i2; ln -s ../in/deep in/i3; ln -s ../../in/./deep/deeper/../ in/deep/i4; ln -s in/deep/i4/deeper i5; ln -s in/f if
ln -s .. o1; ln -s o1/outside o2; ln -s ../.. in/o3; ln -s ../../../outside in/deep/o4; ln -s in/deep/o4 o5
ln -s "$(cd ../outside && pwd)" o6; ln -s "$PWD/in" o7; ln -s ../../i1/o3/outside in/deep/o8; ln -s in/deep/../../../outside o9
ln -s ../outside/f of; ln -s o9/f og
mkdir ../outside/deep; echo secret >../outside/deep/f`

// TestLinks leads every tool along links. A kernel decides where they end, so
// this is asked of each: gVisor's follows some that it is asked not to.
func TestLinks(t *testing.T) {
	s := chosenEngine(t)
	caps := s.Engine.Probe(t.Context())
	g := enginetest.Boot(t, s, nil)
	m := machine{g.Client, time.Duration(max(1, caps.TimeScale))}
	if _, errs, r := m.sh(t, linkTree, 0); r.ExitCode != 0 {
		t.Fatal(errs)
	}
	outside := func() string {
		out, _, _ := m.sh(t, "cd ../outside && find . | sort && cat f sub/f deep/f", 0)
		return out
	}
	before := outside()

	tools := map[string]func(path string) error{ // on a file
		"list": func(p string) error {
			_, err := m.ListFiles(m.within(t, time.Minute), p, true, func(guestproto.FileEntry) error { return nil })
			return err
		},
		"read": func(p string) error {
			_, err := m.ReadFile(m.within(t, time.Minute), p, 0, 100, io.Discard)
			return err
		},
		"write": func(p string) error {
			_, err := m.WriteFile(m.within(t, time.Minute), guestproto.WriteFileRequest{Path: guestproto.Path(p)}, strings.NewReader("written"))
			return err
		},
		"export": func(p string) error {
			_, err := m.ExportArchive(m.within(t, time.Minute), "/workspace/"+p, io.Discard)
			return err
		},
	}
	onDirs := map[string]func(path string) error{
		"manifest": func(p string) error {
			_, err := m.Manifest(m.within(t, time.Minute), p, func(guestproto.ManifestEntry) error { return nil })
			return err
		},
		"sync": func(p string) error {
			_, err := m.Sync(m.within(t, time.Minute), guestproto.SyncRequest{Destination: guestproto.Path(p)}, bytes.NewReader(oneFile(t, "synced")))
			return err
		},
		"export files": func(p string) error {
			_, err := m.ExportFiles(m.within(t, time.Minute), p, slices.Values([]string{"f"}), io.Discard)
			return err
		},
		"extract": func(p string) error {
			_, err := m.UploadArchive(m.within(t, time.Minute), "/workspace/"+p, bytes.NewReader(oneFile(t, "extracted")))
			return err
		},
	}
	leaving := []string{"o1/outside", "o2", "in/o3/outside", "i2/o3/outside", "in/deep/o4", "i1/i3/o4", "in/i3/i4/o4", "o5", "o6", "in/deep/o8", "o9"}
	t.Run("Leaving", func(t *testing.T) {
		refused := func(tool, p string, err error) {
			if !errors.Is(err, api.ErrDenied) || !strings.Contains(err.Error(), "leaves /workspace through a link") {
				t.Errorf("%s %s: %v", tool, p, err)
			}
		}
		for _, dir := range append(leaving, "o7") { // an absolute link is refused wherever it leads
			for name, tool := range tools {
				for _, p := range []string{"/f", "/deep", "/new/f"} {
					refused(name, dir+p, tool(dir+p))
				}
			}
			for name, tool := range onDirs {
				for _, p := range []string{"/deep", "/new/new"} {
					refused(name, dir+p, tool(dir+p))
				}
			}
		}
		for _, dir := range []string{"o2", "in/o3", "in/deep/o4", "i1/i3/o4", "o5", "o6", "o7", "in/deep/o8", "o9"} { // the link last
			for name, tool := range onDirs {
				refused(name, dir, tool(dir))
			}
		}
		for _, p := range []string{"of", "og"} {
			refused("read", p, tools["read"](p))
		}
		for _, dir := range leaving {
			for _, name := range []string{dir + "/f", dir + "/deep", dir + "/deep/f"} {
				var out bytes.Buffer
				r, err := m.ExportFiles(m.within(t, time.Minute), ".", slices.Values([]string{name}), &out)
				if err != nil || r.MissingCount != 1 || r.EntryCount != 0 || bytes.Contains(out.Bytes(), []byte("secret")) {
					t.Errorf("exporting %s: %+v, %v", name, r, err)
				}
				req := guestproto.SyncRequest{Destination: ".", Remove: []guestproto.Path{guestproto.Path(name)}}
				if _, err := m.Sync(m.within(t, time.Minute), req, bytes.NewReader(oneFile(t, "ignored"))); !errors.Is(err, api.ErrDenied) {
					t.Errorf("removing %s: %v", name, err)
				}
			}
			// A link in the place of a directory that the archive has is not
			// gone through either: it is replaced or in the way.
			if first, _, _ := strings.Cut(dir, "/"); first == dir {
				req := guestproto.SyncRequest{Destination: "."}
				if _, err := m.Sync(m.within(t, time.Minute), req, bytes.NewReader(oneFile(t, dir+"/evil"))); !errors.Is(err, api.ErrExists) {
					t.Errorf("a directory for the link %s: %v", dir, err)
				}
				if _, err := m.UploadArchive(m.within(t, time.Minute), "/workspace", bytes.NewReader(oneFile(t, dir+"/evil"))); !errors.Is(err, api.ErrDenied) {
					t.Errorf("unpacking through the link %s: %v", dir, err)
				}
			}
		}
		if d := cmp.Diff(before, outside()); d != "" {
			t.Errorf("outside (-before +after):\n%s", d)
		}
		if out, _, _ := m.sh(t, "find . -newer ../outside/deep/f -type f; ls -A / | grep pyro-stage", 0); out != "" {
			t.Errorf("what was refused left %q", out)
		}
	})
	t.Run("Inside", func(t *testing.T) {
		for dir, real := range map[string]string{
			"i1": "in", "i2": "in", "in/i3": "in/deep", "i2/i3": "in/deep", "in/deep/i4": "in/deep",
			"i1/i3/i4/deeper": "in/deep/deeper", "i5": "in/deep/deeper",
		} {
			for name, tool := range tools {
				p := "/f"
				if name == "write" {
					p = "/new1/new2/f"
				}
				if err := tool(dir + p); err != nil {
					t.Errorf("%s %s: %v", name, dir+p, err)
				}
			}
			for name, tool := range onDirs {
				if err := tool(dir); err != nil {
					t.Errorf("%s %s: %v", name, dir, err)
				}
			}
			if out, errs, _ := m.sh(t, "cd "+real+" && cat new1/new2/f synced extracted && rm -r new1 synced extracted", 0); out != "writtentexttext" {
				t.Errorf("written, synced and unpacked into %s: %q %s", dir, out, errs)
			}
			var out bytes.Buffer
			names := []string{dir + "/f", real + "/f", dir + "/missing"}
			r, err := m.ExportFiles(m.within(t, time.Minute), ".", slices.Values(names), &out)
			if err != nil || r.EntryCount != 2 || r.MissingCount != 1 {
				t.Errorf("exporting %s: %+v, %v", dir, r, err)
			}
		}
		var out bytes.Buffer
		if _, err := m.ReadFile(m.within(t, time.Minute), "if", 0, 100, &out); err != nil || out.String() != "in\n" {
			t.Errorf("reading a link: %q, %v", &out, err)
		}
	})
}

// oneFile is a tar of one file.
func oneFile(t *testing.T, name string) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: 4}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, "text"); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
