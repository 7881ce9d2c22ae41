//go:build linux

package workspacedisk_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// baseTree is what the layers of these tests lie over.
var baseTree = []put{
	dirAt("/a"), fileAt("/a/file"), dirAt("/a/sub"), fileAt("/a/sub/deep"),
	dirAt("/b"), fileAt("/b/file"), linkAt("/to-a", "a"),
	whiteoutAt("/hidden-by-itself"), fileAt("/top"),
}

// baseContents is what baseTree shows.
var baseContents = map[string]string{
	"/a": "directory", "/a/file": "in /a/file", "/a/sub": "directory", "/a/sub/deep": "in /a/sub/deep",
	"/b": "directory", "/b/file": "in /b/file", "/to-a": "-> a", "/top": "in /top",
}

// layerTests holds each mark of overlayfs and what it does.
var layerTests = []struct {
	name  string
	upper []put
	gone  []string          // of base
	want  map[string]string // besides base
}{
	{"nothing", nil, nil, nil},
	{"a new file", []put{dirAt("/a"), fileAt("/a/new")}, nil, map[string]string{"/a/new": "in /a/new"}},
	{"a changed file", []put{put{path: "/top", mode: ext4image.ModeFile, content: "changed"}}, nil, map[string]string{"/top": "changed"}},
	{"a whiteout of a file", []put{whiteoutAt("/top")}, []string{"/top"}, nil},
	{"a whiteout of a directory", []put{whiteoutAt("/b")}, []string{"/b", "/b/file"}, nil},
	{"a whiteout file", []put{emptyAt("/top", "whiteout=")}, []string{"/top"}, nil},
	{"a mark on a file with content is none", []put{fileAt("/top", "whiteout=y")}, nil, nil},
	{"a file over a directory", []put{fileAt("/b")}, []string{"/b/file"}, map[string]string{"/b": "in /b"}},
	{"a directory over a file", []put{dirAt("/top"), fileAt("/top/x")}, nil, map[string]string{"/top": "directory", "/top/x": "in /top/x"}},
	{"opaque", []put{dirAt("/b", "opaque=y"), fileAt("/b/x")}, []string{"/b/file"}, map[string]string{"/b/x": "in /b/x"}},
	{"opaque x shows what is below", []put{dirAt("/a", "opaque=x"), emptyAt("/a/file", "whiteout=")}, []string{"/a/file"}, nil},
	{"opaque wins over a redirect", []put{dirAt("/n", "opaque=y", "redirect=/b")}, nil, map[string]string{"/n": "directory"}},
	{"an absolute redirect", []put{whiteoutAt("/b"), dirAt("/n", "redirect=/b")}, []string{"/b", "/b/file"},
		map[string]string{"/n": "directory", "/n/file": "in /b/file"}},
	{"a relative redirect", []put{whiteoutAt("/b"), dirAt("/n", "redirect=b")}, []string{"/b", "/b/file"},
		map[string]string{"/n": "directory", "/n/file": "in /b/file"}},
	{"a relative redirect below another", []put{whiteoutAt("/a"), dirAt("/n", "redirect=/a"), dirAt("/n/m", "redirect=sub"), whiteoutAt("/n/sub")},
		[]string{"/a", "/a/file", "/a/sub", "/a/sub/deep"},
		map[string]string{"/n": "directory", "/n/file": "in /a/file", "/n/m": "directory", "/n/m/deep": "in /a/sub/deep"}},
	{"an absolute redirect in an opaque directory", []put{dirAt("/a", "opaque=y"), dirAt("/a/n", "redirect=/a/sub")},
		[]string{"/a/file", "/a/sub", "/a/sub/deep"}, map[string]string{"/a/n": "directory", "/a/n/deep": "in /a/sub/deep"}},
	{"a relative redirect in an opaque directory", []put{dirAt("/a", "opaque=y"), dirAt("/a/n", "redirect=sub")},
		[]string{"/a/file", "/a/sub", "/a/sub/deep"}, map[string]string{"/a/n": "directory"}},
	{"a redirect to nothing", []put{dirAt("/n", "redirect=/no/such")}, nil, map[string]string{"/n": "directory"}},
	{"a redirect to a file", []put{dirAt("/n", "redirect=/top")}, nil, map[string]string{"/n": "directory"}},
	{"a redirect through a link", []put{dirAt("/n", "redirect=/to-a/sub")}, nil, map[string]string{"/n": "directory"}},
	{"other marks", []put{dirAt("/b", "impure=y", "origin=xyz", "nlink=U+1", "uuid=1234")}, nil, nil},
}

// TestLayer: TestKernelMarks asks the kernel the same.
func TestLayer(t *testing.T) {
	t.Parallel()
	for _, tt := range layerTests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			checkLayers(t, tt.gone, tt.want, tt.upper)
		})
	}
}

// checkLayers looks at layers over baseTree in every way.
func checkLayers(t *testing.T, gone []string, more map[string]string, layers ...[]put) {
	want := shown(gone, more)
	d := openSource(t, layered(t, baseTree, layers...))
	if diff := cmp.Diff(want, contents(t, d)); diff != "" {
		t.Errorf("listed (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(want, walkedContents(t, d)); diff != "" {
		t.Errorf("walked (-want +got):\n%s", diff)
	}
	for _, p := range append(gone, "/hidden-by-itself") {
		if _, ok := want[p]; ok {
			continue
		}
		if _, err := d.List(t.Context(), p, false); !errors.Is(err, api.ErrNotFound) {
			t.Errorf("looking up %s: %v, want not found", p, err)
		}
	}
	out := filepath.Join(t.TempDir(), "out.ext4")
	if _, err := d.Export(t.Context(), out); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, contents(t, openRaw(t, out))); diff != "" {
		t.Errorf("exported (-want +got):\n%s", diff)
	}
	dataMustNotHold(t, out, "overlay.")
}

// shown is what baseTree shows under a layer.
func shown(gone []string, more map[string]string) map[string]string {
	want := maps.Clone(baseContents)
	for _, p := range gone {
		delete(want, p)
	}
	maps.Copy(want, more)
	return want
}

// contents is all that a disk shows but /lost+found: content, type or target.
func contents(t testing.TB, d *workspacedisk.Disk) map[string]string {
	t.Helper()
	got := map[string]string{}
	for p, n := range diskTree(t, d) {
		switch n.Type {
		case "file":
			got[p] = n.Content
		case "symlink":
			got[p] = "-> " + n.Target
		default:
			got[p] = n.Type
		}
	}
	return got
}

// TestHostileLayer holds what no kernel writes, and what cannot be shown.
func TestHostileLayer(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		upper []put
		class error
		text  string
	}{
		{"a redirect upwards", []put{dirAt("/n", "redirect=/a/../b")}, api.ErrDamaged, "impossible name"},
		{"a redirect to the parent", []put{dirAt("/n", "redirect=..")}, api.ErrDamaged, "impossible name"},
		{"a redirect to the root", []put{dirAt("/n", "redirect=/")}, api.ErrDamaged, "impossible name"},
		{"a redirect to itself", []put{dirAt("/n", "redirect=.")}, api.ErrDamaged, "impossible name"},
		{"an empty redirect", []put{dirAt("/n", "redirect=")}, api.ErrDamaged, "impossible name"},
		{"a redirect with a slash at its end", []put{dirAt("/n", "redirect=/a/")}, api.ErrDamaged, "impossible name"},
		{"a redirect with NUL", []put{dirAt("/n", "redirect=/a\x00b")}, api.ErrDamaged, "impossible name"},
		{"a redirect with a long name", []put{dirAt("/n", "redirect="+strings.Repeat("n", 256))}, api.ErrDamaged, "impossible name"},
		{"a relative path", []put{dirAt("/n", "redirect=a/sub")}, api.ErrDamaged, "neither a name nor absolute"},
		{"what shows elsewhere", []put{dirAt("/n", "redirect=/a")}, api.ErrDamaged, "appears twice"},
		{"two redirects to one place", []put{whiteoutAt("/a"), dirAt("/n", "redirect=/a"), dirAt("/m", "redirect=/a")}, api.ErrDamaged, "appears twice"},
		{"a redirect to what it lies in", []put{whiteoutAt("/a"), dirAt("/n", "redirect=/a"), dirAt("/n/sub", "redirect=/a")}, api.ErrDamaged, "appears twice"},
		{"metacopy", []put{fileAt("/top", "metacopy=")}, api.ErrUnsupported, "metacopy"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			d := openSource(t, layered(t, baseTree, tt.upper))
			check := func(what string, err error) {
				if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("%s: %v, want class %q and text %q", what, err, api.Code(tt.class), tt.text)
				}
			}
			_, err := d.List(t.Context(), "/", true)
			check("listing", err)
			dir := t.TempDir()
			_, err = d.Export(t.Context(), filepath.Join(dir, "out.ext4"))
			check("exporting", err)
			onlyFiles(t, dir)
		})
	}
}

func TestLayerSources(t *testing.T) {
	t.Parallel()
	raw := func(p string) *workspacedisk.Source {
		return &workspacedisk.Source{Path: p, Format: workspacedisk.FormatRaw}
	}
	base := handmade(t, "", baseTree)
	ok := handmade(t, "", []put{dirAt("/upper"), fileAt("/upper/new")})
	nested := raw(ok)
	nested.Layers = []workspacedisk.Source{*raw(ok)}
	locked := handmade(t, "", nil)
	holder, err := os.Open(locked)
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	if err := unix.Flock(int(holder.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name  string
		layer *workspacedisk.Source
		class error
		text  string
	}{
		{"a directory", raw(t.TempDir()), api.ErrUnsupported, "lie in a directory"},
		{"a missing one", raw(base + ".none"), api.ErrNotFound, "does not exist"},
		{"of a running machine", raw(locked), api.ErrBusy, "must be stopped"},
		{"a layer with a layer", nested, api.ErrInvalid, "no layers of its own"},
		{"a file in the place of upper", raw(handmade(t, "", []put{fileAt("/upper")})), api.ErrDamaged, "/upper is no directory"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			src := *raw(base)
			src.Layers = []workspacedisk.Source{*tt.layer}
			d, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{})
			if err == nil {
				d.Close()
			}
			if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("%v, want class %q and text %q", err, api.Code(tt.class), tt.text)
			}
		})
	}
	t.Run("a machine that never started", func(t *testing.T) {
		src := *raw(base)
		src.Layers = []workspacedisk.Source{*raw(handmade(t, "", nil))}
		if diff := cmp.Diff(contents(t, openRaw(t, base)), contents(t, openSource(t, src))); diff != "" {
			t.Errorf("(-base +disk):\n%s", diff)
		}
	})
	t.Run("locked while open", func(t *testing.T) {
		src := *raw(base)
		src.Layers = []workspacedisk.Source{*raw(ok)}
		d := openSource(t, src)
		f, err := os.Open(ok)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			t.Errorf("a machine's lock while the disk is open: %v", err)
		}
		d.Close()
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			t.Errorf("a machine's lock after Close: %v", err)
		}
	})
	t.Run("scrub", func(t *testing.T) {
		src := *raw(base)
		src.Layers = []workspacedisk.Source{*raw(ok)}
		if _, err := workspacedisk.Scrub(t.Context(), src, workspacedisk.Limits{}); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("scrubbing: %v", err)
		}
	})
}

// TestLayerRuntime: the runtime paths of a layer are hidden, and no byte of
// them is exported.
func TestLayerRuntime(t *testing.T) {
	t.Parallel()
	secret := put{path: "/run/pyro-secrets/token", mode: ext4image.ModeFile, content: token}
	src := layered(t, []put{dirAt("/run"), fileAt("/run/other"), fileAt("/run/pyro-shells")}, []put{dirAt("/run"), dirAt("/run/pyro-secrets"), secret})
	d, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{HideRuntime: true, DiskBytes: 200 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	want := map[string]string{"/run": "directory", "/run/other": "in /run/other"}
	if diff := cmp.Diff(want, contents(t, d)); diff != "" {
		t.Errorf("hidden (-want +got):\n%s", diff)
	}
	open := openSource(t, src)
	if r, err := open.Read(t.Context(), secret.path, 99); err != nil || r.Content != token {
		t.Errorf("without hiding: %+v, %v", r, err)
	}
	for _, disk := range []*workspacedisk.Disk{d, open} {
		out := filepath.Join(t.TempDir(), "out.ext4")
		info, err := disk.Export(t.Context(), out)
		if err != nil {
			t.Fatal(err)
		}
		if disk == d && info.BytesWritten < 200<<20 {
			t.Errorf("exported %d bytes, asked for 200 MiB", info.BytesWritten)
		}
		if st, err := os.Stat(out); err != nil || st.Size() != info.BytesWritten {
			t.Errorf("the file: %v, %v; said %d", st, err, info.BytesWritten)
		}
		if diff := cmp.Diff(want, contents(t, openRaw(t, out))); diff != "" {
			t.Errorf("exported (-want +got):\n%s", diff)
		}
		dataMustNotHold(t, out, token)
	}
}

// TestLayerLimits: an export ends at the bounds that a caller sets.
func TestLayerLimits(t *testing.T) {
	t.Parallel()
	src := layered(t, baseTree, []put{put{path: "/big", mode: ext4image.ModeFile, content: pattern(100_000)}, linkAt("/lost+found", "x")})
	for name, limits := range map[string]workspacedisk.Limits{
		"entries": {MaxEntries: 8}, "paths": {MaxPathBytes: 9}, "directories": {MaxDirBytes: 4096}, "content": {MaxExportBytes: 99_999},
	} {
		d, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{Limits: limits})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		dir := t.TempDir()
		if _, err := d.Export(t.Context(), filepath.Join(dir, "out")); !errors.Is(err, api.ErrExhausted) {
			t.Errorf("%s: %v, want the limit", name, err)
		}
		onlyFiles(t, dir)
	}
	// Whiteouts are no entries, but names to remember.
	var whiteouts []put
	for i := range 5 {
		whiteouts = append(whiteouts, whiteoutAt(fmt.Sprintf("/dir/%d", i)))
	}
	for name, src := range map[string]workspacedisk.Source{
		"above": layered(t, nil, whiteouts), "below": layered(t, whiteouts, []put{dirAt("/dir")}),
	} {
		d, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{Limits: workspacedisk.Limits{MaxEntries: 4}})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if _, err := d.List(t.Context(), "/dir", false); !errors.Is(err, api.ErrExhausted) {
			t.Errorf("whiteouts %s: %v, want the limit", name, err)
		}
	}
	d := openSource(t, src)
	if _, err := d.Export(t.Context(), filepath.Join(t.TempDir(), "out")); !errors.Is(err, api.ErrUnsupported) {
		t.Errorf("a link in the place of lost+found: %v", err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.Export(canceled, filepath.Join(t.TempDir(), "out")); !errors.Is(err, context.Canceled) {
		t.Errorf("with a canceled context: %v", err)
	}
}

// TestLayerSparse exports a file in more pieces than an extent tree of
// ext4image has room for, with a hole larger than the disk.
func TestLayerSparse(t *testing.T) {
	t.Parallel()
	const pieces, hole, tail = 2000, 200 << 20, 3 << 20
	dir := t.TempDir()
	at := map[int64]string{hole: pattern(tail)}
	for i := range int64(pieces) {
		at[i*8192] = fmt.Sprintf("piece %d", i)
	}
	name := filepath.Join(dir, "holes")
	sparse(t, name, hole+tail, at)
	if err := unix.Setxattr(name, "user.large", []byte(pattern(700)), 0); err != nil { // takes a block of its own
		t.Logf("no xattrs on this filesystem: %v", err)
	}
	src := workspacedisk.Source{
		Path: makeImage(t, dir, "32M"), Format: workspacedisk.FormatRaw,
		Layers: []workspacedisk.Source{{Path: handmade(t, "", nil), Format: workspacedisk.FormatRaw}},
	}
	out := filepath.Join(t.TempDir(), "out.ext4")
	info, err := openSource(t, src).Export(t.Context(), out)
	if err != nil {
		t.Fatal(err)
	}
	if info.BytesWritten != 128<<20 {
		t.Errorf("the export has %d bytes: the holes were filled", info.BytesWritten)
	}
	fsck(t, out)
	var sums [][]byte
	for _, d := range []*workspacedisk.Disk{openSource(t, src), openRaw(t, out)} {
		sum := sha256.New()
		if n, _, err := d.CopyFile(t.Context(), sum, "/holes", 1<<40); err != nil || n != hole+tail {
			t.Fatalf("read %d bytes, %v", n, err)
		}
		sums = append(sums, sum.Sum(nil))
	}
	if !bytes.Equal(sums[0], sums[1]) {
		t.Error("the exported file differs")
	}
}

// TestLayerGrows: what came with the environment counts on a machine's disk
// only once it is exported, which then takes a larger image.
func TestLayerGrows(t *testing.T) {
	t.Parallel()
	const size = 60 << 20
	big := func(p string) put {
		return put{path: p, mode: ext4image.ModeFile | 0o644, content: strings.Repeat("\x00", size)}
	}
	link := func(p, to string) put { return put{path: p, content: to} }
	d := openSource(t, layered(t, []put{big("/a"), link("/a2", "/a")}, []put{big("/b"), link("/b2", "/b")}))
	out := filepath.Join(t.TempDir(), "out.ext4")
	info, err := d.Export(t.Context(), out)
	if err != nil {
		t.Fatal(err)
	}
	if info.BytesWritten != 256<<20 {
		t.Errorf("the export has %d bytes, want the next size above 128 MiB", info.BytesWritten)
	}
	list, err := openRaw(t, out).List(t.Context(), "/", false)
	if err != nil || len(list.Entries) != 5 || list.Entries[3].SizeBytes != size {
		t.Errorf("exported %+v, %v", list, err)
	}
}

// FuzzLayerMarks puts hostile marks on directories of two layers.
func FuzzLayerMarks(f *testing.F) {
	for _, s := range []string{"/a", "a", "/a/sub", "..", "/", "", "/a//b", "a/sub", "/n/sub", "sub", strings.Repeat("/a", 1000)} {
		f.Add("y", s, s, "/n/sub")
		f.Add("x", s, "sub", "n")
	}
	f.Fuzz(func(t *testing.T, opaque, one, two, three string) {
		if len(opaque)+len(one)+len(two) > 3500 || len(three) > 3500 {
			return // more than a block of attributes
		}
		marks := []put{dirAt("/a", "redirect="+one), dirAt("/a/sub", "redirect="+two), dirAt("/n", "opaque="+opaque, "redirect="+two)}
		src := layered(t, baseTree, marks, []put{dirAt("/a"), dirAt("/m", "redirect="+three), dirAt("/n/sub", "redirect="+one)})
		d := openSource(t, src)
		list, err := d.List(t.Context(), "/", true)
		if err != nil && !errors.Is(err, api.ErrDamaged) {
			t.Errorf("an error without a class: %v", err)
		}
		if err == nil && len(list.Entries) > 50 {
			t.Errorf("%d entries of 20 files", len(list.Entries))
		}
		if walkErr := d.Walk(t.Context(), "/", func(workspacedisk.WalkEntry) error { return nil }); (err == nil) != (walkErr == nil) {
			t.Errorf("listing: %v; walking: %v", err, walkErr)
		}
	})
}
