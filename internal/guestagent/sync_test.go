package guestagent_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// A tarEntry is a file, or with a target a link, or with a slash a directory.
type tarEntry struct{ name, content, target string }

func tarOf(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range entries {
		h := &tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.content)), Typeflag: tar.TypeReg}
		switch {
		case strings.HasSuffix(e.name, "/"):
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		case e.target != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.target
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// files describes the workspace: path -> content, "dir" or "-> target".
func (a *agent) files(t testing.TB) map[string]string {
	t.Helper()
	entries, _ := a.manifest(t, "")
	out := make(map[string]string)
	for _, e := range entries {
		switch e.Type {
		case "directory":
			out[string(e.Path)] = "dir"
		case "symlink":
			out[string(e.Path)] = "-> " + string(e.Target)
		default:
			b, err := os.ReadFile(a.path(string(e.Path)))
			if err != nil {
				t.Fatal(err)
			}
			out[string(e.Path)] = string(b)
		}
	}
	return out
}

func (a *agent) noStages(t testing.TB) {
	t.Helper()
	for _, dir := range []string{a.root, a.path()} {
		if left, _ := filepath.Glob(filepath.Join(dir, ".pyro-stage-*")); len(left) > 0 {
			t.Errorf("stages stay: %q", left)
		}
	}
}

func TestSync(t *testing.T) {
	for _, tt := range []struct {
		name    string
		req     guestproto.SyncRequest
		entries []tarEntry
		want    map[string]string // nil: nothing has changed
		counts  guestproto.SyncReply
		class   error
		text    string
	}{
		{
			name:    "merge",
			req:     guestproto.SyncRequest{Destination: "/workspace"},
			entries: []tarEntry{{"d/f", "new", ""}, {"d/g", "more", ""}, {"l", "", "f"}},
			want:    map[string]string{"d": "dir", "d/f": "new", "d/g": "more", "d/e": "dir", "f": "old", "l": "-> f", "to-d": "-> d"},
			counts:  guestproto.SyncReply{Destination: "/workspace", EntryCount: 3, BytesWritten: 7},
		},
		{
			name:    "remove and add",
			req:     guestproto.SyncRequest{Destination: ".", Remove: []guestproto.Path{"d", "none", "f/below"}},
			entries: []tarEntry{{"d", "a file now", ""}},
			want:    map[string]string{"d": "a file now", "f": "old", "l": "-> nowhere", "to-d": "-> d"},
			counts:  guestproto.SyncReply{Destination: "/workspace", EntryCount: 1, BytesWritten: 10, RemovedCount: 1},
		},
		{
			name:    "new destination",
			req:     guestproto.SyncRequest{Destination: "new/deep"},
			entries: []tarEntry{{"f", "x", ""}},
			want: map[string]string{"d": "dir", "d/f": "old", "d/e": "dir", "f": "old", "l": "-> nowhere", "to-d": "-> d",
				"new": "dir", "new/deep": "dir", "new/deep/f": "x"},
			counts: guestproto.SyncReply{Destination: "/workspace/new/deep", EntryCount: 1, BytesWritten: 1},
		},
		{
			name:    "destination through a link",
			req:     guestproto.SyncRequest{Destination: "to-d/x", Remove: []guestproto.Path{"../f"}},
			entries: []tarEntry{{"f", "x", ""}},
			class:   api.ErrDenied,
		},
		{
			name:    "destination through a link that stays",
			req:     guestproto.SyncRequest{Destination: "to-d/x"},
			entries: []tarEntry{{"f", "x", ""}},
			want:    map[string]string{"d": "dir", "d/f": "old", "d/e": "dir", "d/x": "dir", "d/x/f": "x", "f": "old", "l": "-> nowhere", "to-d": "-> d"},
			counts:  guestproto.SyncReply{Destination: "/workspace/to-d/x", EntryCount: 1, BytesWritten: 1},
		},
		{
			name:    "replaced kinds",
			req:     guestproto.SyncRequest{Destination: "/workspace", ReplaceKinds: true},
			entries: []tarEntry{{"d", "file", ""}, {"f/x", "in", ""}, {"to-d/y", "in", ""}},
			want:    map[string]string{"d": "file", "f": "dir", "f/x": "in", "l": "-> nowhere", "to-d": "dir", "to-d/y": "in"},
			counts:  guestproto.SyncReply{Destination: "/workspace", EntryCount: 3, BytesWritten: 8},
		},
		{
			name:    "file for directory",
			req:     guestproto.SyncRequest{Destination: "/workspace", Remove: []guestproto.Path{"f"}},
			entries: []tarEntry{{"a", "added", ""}, {"d", "file", ""}},
			class:   api.ErrExists, text: `"d" is a directory`,
		},
		{
			name:    "directory for file",
			req:     guestproto.SyncRequest{Destination: "/workspace"},
			entries: []tarEntry{{"a", "added", ""}, {"f/x", "file", ""}},
			class:   api.ErrExists, text: `"f" is a file or link`,
		},
		{
			name:    "directory for link",
			req:     guestproto.SyncRequest{Destination: "/workspace"},
			entries: []tarEntry{{"to-d/x", "file", ""}},
			class:   api.ErrExists, text: `"to-d" is a file or link`,
		},
		{
			name:    "remove through a link",
			req:     guestproto.SyncRequest{Destination: "/workspace", Remove: []guestproto.Path{"to-d/f"}},
			entries: []tarEntry{{"a", "added", ""}},
			class:   api.ErrDenied, text: "symbolic link",
		},
		{name: "remove outside", req: guestproto.SyncRequest{Destination: "d", Remove: []guestproto.Path{"../f"}}, class: api.ErrDenied},
		{name: "remove itself", req: guestproto.SyncRequest{Destination: "d", Remove: []guestproto.Path{"."}}, class: api.ErrDenied},
		{name: "outside", req: guestproto.SyncRequest{Destination: "/etc"}, class: api.ErrDenied, text: "leaves /workspace"},
		{name: "into a file", req: guestproto.SyncRequest{Destination: "f/x"}, class: api.ErrInvalid},
		{name: "into a dangling link", req: guestproto.SyncRequest{Destination: "l/x"}, class: api.ErrInvalid, text: "link to nothing"},
		{name: "evil archive", req: guestproto.SyncRequest{Destination: "d"}, entries: []tarEntry{{"g", "x", ""}, {"../h", "x", ""}}, class: api.ErrDenied},
		{name: "stage", req: guestproto.SyncRequest{Destination: "."}, entries: []tarEntry{{".pyro-stage-0123456789abcdef0123456789abcdef/x", "x", ""}}, class: api.ErrDenied},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := startAgent(t)
			a.put(t, "f", "old", 0o644)
			a.put(t, "d/f", "old", 0o600)
			if err := os.Mkdir(a.path("d", "e"), 0o755); err != nil {
				t.Fatal(err)
			}
			for name, target := range map[string]string{"l": "nowhere", "to-d": "d"} {
				if err := os.Symlink(target, a.path(name)); err != nil {
					t.Fatal(err)
				}
			}
			before := a.files(t)
			r, err := a.Sync(testContext(t), tt.req, bytes.NewReader(tarOf(t, tt.entries...)))
			if tt.class != nil {
				tt.want = before
				if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("error %v", err)
				}
			} else if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.counts, r); d != "" {
				t.Errorf("the reply (-want +got):\n%s", d)
			}
			if d := cmp.Diff(tt.want, a.files(t)); d != "" {
				t.Errorf("the workspace (-want +got):\n%s", d)
			}
			a.noStages(t)
		})
	}
}

// TestSyncCut ends the transfer at many places: nothing of it is ever seen, and
// the next one succeeds (RELIABILITY A9, F17).
func TestSyncCut(t *testing.T) {
	a := startAgent(t)
	a.put(t, "f", "old", 0o644)
	before := a.files(t)
	whole := tarOf(t, tarEntry{"f", strings.Repeat("new", 10_000), ""}, tarEntry{"g", strings.Repeat("x", 10_000), ""})
	for cut := 0; cut < len(whole); cut += 4096 {
		c, err := a.dial(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, `{"action":"sync","destination":"/workspace","stream":true}`+"\n")
		if cut > 0 {
			if err := guestproto.WriteFrame(c, guestproto.FrameData, whole[:cut]); err != nil {
				t.Fatal(err)
			}
		}
		_ = c.(*net.UnixConn).CloseWrite()
		typ, p, err := guestproto.NewFrameReader(c).Next()
		if err != nil || typ != guestproto.FrameError || !strings.Contains(string(p), `"damaged"`) {
			t.Errorf("cut at %d: frame %d %s, %v", cut, typ, p, err)
		}
		_ = c.Close()
	}
	if d := cmp.Diff(before, a.files(t)); d != "" {
		t.Error(d)
	}
	a.noStages(t)
	if _, err := a.Sync(testContext(t), guestproto.SyncRequest{Destination: "."}, bytes.NewReader(whole)); err != nil {
		t.Error(err)
	}
}

// TestSyncsAtOnce lets many syncs write the same files: each is seen as a whole.
func TestSyncsAtOnce(t *testing.T) {
	a := startAgent(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			content := fmt.Sprint(i)
			_, err := a.Sync(testContext(t), guestproto.SyncRequest{Destination: "x"},
				bytes.NewReader(tarOf(t, tarEntry{"a", content, ""}, tarEntry{"d/b", content, ""}, tarEntry{"d/c", content, ""})))
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got := a.files(t)
	if got["x/a"] == "" || got["x/a"] != got["x/d/b"] || got["x/a"] != got["x/d/c"] {
		t.Errorf("the files are mixed: %v", got)
	}
	a.noStages(t)
}

// TestRoundTrip is RELIABILITY F17: a tree of odd names goes in and comes out by
// list as it was.
func TestRoundTrip(t *testing.T) {
	a := startAgent(t)
	var entries []tarEntry
	var names []string
	add := func(e tarEntry) {
		entries = append(entries, e)
		names = append(names, strings.TrimSuffix(e.name, "/"))
	}
	for i := range 2000 {
		add(tarEntry{fmt.Sprintf("d%d/e%d/f%d", i%10, i%7, i), strings.Repeat("x", i%300), ""})
	}
	add(tarEntry{"new\nline/\xff\xfe/" + strings.Repeat("n", 255), "odd", ""})
	add(tarEntry{strings.Repeat("d/", 200) + "deep", "deep", ""})
	add(tarEntry{"--checkpoint-action=exec=sh", "", ""})
	add(tarEntry{"long link", "", strings.Repeat("t", 4000)})
	add(tarEntry{"not utf-8 \xc3\x28", "", "\xff\xfe"})
	add(tarEntry{"empty directory/", "", ""})
	add(tarEntry{"\x01\u202e", strings.Repeat("large", 1<<18), ""})
	in := tarOf(t, entries...)
	if _, err := a.Sync(testContext(t), guestproto.SyncRequest{Destination: "in"}, bytes.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	asked := append(slices.Clone(names), "missing", "d0/missing")
	var out bytes.Buffer
	r, err := a.ExportFiles(testContext(t), "in", slices.Values(asked), &out)
	if err != nil {
		t.Fatal(err)
	}
	if r.EntryCount != int64(len(names)) || r.MissingCount != 2 {
		t.Errorf("the reply is %+v", r)
	}
	got := make([]tarEntry, 0, len(entries))
	for tr := tar.NewReader(&out); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, tarEntry{h.Name, string(b), h.Linkname})
	}
	if d := cmp.Diff(entries, got, cmp.AllowUnexported(tarEntry{})); d != "" {
		t.Error(d)
	}
	manifest, _ := a.manifest(t, "in")
	byName := make(map[string]guestproto.ManifestEntry)
	for _, e := range manifest {
		byName[string(e.Path)] = e
	}
	for _, e := range entries {
		m := byName[strings.TrimSuffix(e.name, "/")]
		sum := sha256.Sum256([]byte(e.content))
		if e.target == "" && !strings.HasSuffix(e.name, "/") && m.SHA256 != hex.EncodeToString(sum[:]) || string(m.Target) != e.target {
			t.Errorf("the manifest has %+v for %q", m, e.name)
		}
	}
}

func TestExportFiles(t *testing.T) {
	a := startAgent(t)
	a.oddTree(t)
	for _, tt := range []struct {
		name  string
		path  string
		list  []string
		want  []string
		class error
	}{
		{"order", ".", []string{"up", "a", "empty", "a/c"}, []string{"up", "a/", "empty", "a/c"}, nil},
		{"special", ".", []string{"fifo", "a/fifo", "link"}, []string{"link"}, nil},
		{"nothing", "a", nil, nil, nil},
		{"through a link that leaves", ".", []string{"up/passwd"}, nil, nil},
		{"outside", ".", []string{"../x"}, nil, api.ErrDenied},
		{"from outside", "/etc", []string{"passwd"}, nil, api.ErrDenied},
		{"from a link outside", "up", []string{"passwd"}, nil, api.ErrDenied},
		{"from nothing", "none", []string{"x"}, nil, api.ErrNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			r, err := a.ExportFiles(testContext(t), tt.path, slices.Values(tt.list), &out)
			if tt.class != nil {
				if !errors.Is(err, tt.class) {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for tr := tar.NewReader(&out); ; {
				h, err := tr.Next()
				if err != nil {
					break
				}
				got = append(got, h.Name)
			}
			if d := cmp.Diff(tt.want, got); d != "" || r.MissingCount != int64(len(tt.list)-len(got)) {
				t.Errorf("%+v\n%s", r, d)
			}
		})
	}
	t.Run("lists of a liar", func(t *testing.T) {
		for _, list := range []string{"a", "a\x00../b\x00", "/etc/passwd\x00", "a//c\x00", "\x00"} {
			c, err := a.dial(testContext(t))
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(c, `{"action":"export_files","path":".","stream":true}`+"\n")
			_ = guestproto.WriteFrame(c, guestproto.FrameData, []byte(list))
			_ = guestproto.WriteFrame(c, guestproto.FrameDataEnd, nil)
			if typ, p, err := guestproto.NewFrameReader(c).Next(); err != nil || typ != guestproto.FrameError {
				t.Errorf("list %q: frame %d %q, %v", list, typ, p, err)
			}
			_ = c.Close()
		}
	})
}
