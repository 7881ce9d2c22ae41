package oci_test

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// describe is one line for what lies in a tree.
func describe(kind byte, mode int64, content string) string {
	if kind == tar.TypeSymlink {
		return "-> " + content
	}
	return fmt.Sprintf("%c %o %q", kind, mode, content)
}

// read returns the tree in a file system, by path. What every image is given
// is left out.
func read(t testing.TB, image string) map[string]string {
	t.Helper()
	d, err := workspacedisk.Open(t.Context(), workspacedisk.Source{Path: image, Format: workspacedisk.FormatRaw}, workspacedisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	out := map[string]string{}
	err = d.WalkContent(t.Context(), "/", func(e workspacedisk.WalkEntry, open func() (io.Reader, error)) error {
		kind, content := byte(tar.TypeDir), ""
		switch e.Type {
		case api.ArtifactSymlink:
			kind, content = tar.TypeSymlink, e.Target
		case api.ArtifactFile:
			kind = tar.TypeReg
			r, err := open()
			if err != nil {
				return err
			}
			b, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			content = string(b)
		}
		out[strings.TrimPrefix(e.Path, "/")] = describe(kind, int64(e.Mode), content)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, given := range []string{"etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/machine-id", "lost+found", "dev", "proc", "sys", "run", "tmp", "workspace"} {
		if _, ok := out[given]; !ok {
			t.Errorf("the image has no /%s", given)
		}
		delete(out, given)
	}
	delete(out, "etc")
	return out
}

// unpack is a second opinion of what layers make: each removes from those
// below, then adds. It knows no links in parents.
func unpack(layers ...[]entry) map[string]string {
	tree := map[string]string{}
	removeBelow := func(dir string) {
		maps.DeleteFunc(tree, func(p, _ string) bool { return dir == "." || strings.HasPrefix(p, dir+"/") })
	}
	for _, l := range layers {
		for _, e := range l {
			base := path.Base(e.name)
			if base == ".wh..wh..opq" {
				removeBelow(path.Dir(e.name))
			} else if victim, ok := strings.CutPrefix(base, ".wh."); ok {
				victim = path.Join(path.Dir(e.name), victim)
				removeBelow(victim)
				delete(tree, victim)
			}
		}
		for _, e := range l {
			if strings.HasPrefix(path.Base(e.name), ".wh.") {
				continue
			}
			p := path.Clean(e.name)
			if e.kind != tar.TypeDir {
				removeBelow(p)
			}
			if e.kind == tar.TypeLink {
				tree[p] = tree[path.Clean(e.content)]
				continue
			}
			mode := e.mode
			if mode == 0 {
				mode = 0o755
			}
			tree[p] = describe(e.kind, mode, e.content)
		}
	}
	return tree
}

func TestTree(t *testing.T) {
	tests := []struct {
		name   string
		layers [][]entry
	}{
		{"Empty", nil},
		{"OneProgram", [][]entry{{file("server", "static")}}},
		{"Replace", [][]entry{
			{dir("a"), file("a/f", "old"), file("a/g", "stays"), symlink("a/l", "f")},
			{dir("a"), {name: "a/f", kind: tar.TypeReg, content: "new", mode: 0o4711, uid: 1000}, file("a/l", "no link now")},
		}},
		{"DirectoryBecomesFileAndBack", [][]entry{
			{dir("a"), file("a/f", "1"), file("b", "2")},
			{file("a", "a file"), dir("b"), file("b/f", "3")},
			{dir("a"), file("a/new", "4")},
		}},
		{"Whiteout", [][]entry{
			{dir("a"), file("a/f", "1"), file("a/g", "2"), dir("d"), dir("d/e"), file("d/e/f", "3")},
			{dir("a"), whiteout("a/.wh.f"), whiteout(".wh.d")},
		}},
		{"WhiteoutBehindItsSuccessor", [][]entry{
			{dir("a"), file("a/f", "1")},
			{dir("a"), file("a/f", "new"), whiteout("a/.wh.f")},
		}},
		{"WhiteoutOfNothing", [][]entry{{file("f", "1")}, {whiteout("a/b/.wh.c"), whiteout(".wh.x"), whiteout("f/.wh.x")}}},
		{"Opaque", [][]entry{
			{dir("a"), file("a/f", "1"), dir("a/d"), file("a/d/g", "2"), file("b", "3")},
			{dir("a"), file("a/new", "4"), whiteout("a/.wh..wh..opq"), file("a/newer", "5")},
		}},
		{"OpaqueRoot", [][]entry{{dir("a"), file("b", "3")}, {whiteout(".wh..wh..opq"), file("c", "4")}}},
		{"OpaqueInTheLinksPlace", [][]entry{
			{dir("b"), file("b/f", "1"), symlink("a", "b")},
			{dir("a"), whiteout("a/.wh..wh..opq"), file("a/g", "2")},
		}},
		{"NotesOfAufs", [][]entry{{file(".wh..wh.aufs", ""), dir(".wh..wh.plnk"), file("f", "1")}}},
		{"HardLinks", [][]entry{
			{dir("a"), file("a/f", "1"), link("g", "a/f"), link("/h", "./g")},
			{file("a/f", "2")},
		}},
		{"ForeignNames", [][]entry{{dir("./"), dir("./a"), file("/a/f", "1"), file("./a//g", "2"), file("a/\xff\n", "3")}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, p := newServer(t), newPuller(t)
			var layers []v1.Layer
			for _, l := range tt.layers {
				layers = append(layers, layerOf(t, l...))
			}
			image, _, err := build(t.Context(), t, p, s.push(t, "some/image:1", imageOf(t, v1.Config{}, layers...)))
			if err != nil {
				t.Fatal(err)
			}
			want := unpack(tt.layers...)
			delete(want, "")
			delete(want, ".")
			for p, line := range maps.Clone(want) { // as they are named there
				if strings.HasPrefix(p, "/") {
					delete(want, p)
					want[p[1:]] = line
				}
			}
			if d := cmp.Diff(want, read(t, image)); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestManyTrees compares with the second opinion on trees that nobody thought
// of.
func TestManyTrees(t *testing.T) {
	names := []string{"a", "b", "a/a", "a/b", "b/a", "b/b", "a/a/a", "a/a/b", "a/b/a"}
	p := newPuller(t)
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		var layers []v1.Layer
		var entries [][]entry
		for n := range 1 + rnd.IntN(4) {
			var l []entry
			made := map[string]byte{}
			for _, name := range names {
				parent := path.Dir(name)
				switch what := rnd.IntN(8); {
				case parent != "." && made[parent] != tar.TypeDir:
				case what < 3:
					l, made[name] = append(l, dir(name)), tar.TypeDir
				case what < 5:
					l, made[name] = append(l, file(name, fmt.Sprint(seed, n, name))), tar.TypeReg
				case what == 5:
					l = append(l, whiteout(path.Join(parent, ".wh."+path.Base(name))))
				case what == 6 && parent != ".":
					l = append(l, whiteout(path.Join(parent, ".wh..wh..opq")))
				}
			}
			entries = append(entries, l)
			layers = append(layers, layerOf(t, l...))
		}
		img := imageOf(t, v1.Config{}, layers...)
		at := filepath.Join(t.TempDir(), "layout")
		if _, err := layout.Write(at, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img})); err != nil {
			t.Fatal(err)
		}
		image, _, err := build(t.Context(), t, p, reference(t, "oci-layout:"+at))
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if d := cmp.Diff(unpack(entries...), read(t, image)); d != "" {
			t.Fatalf("seed %d, layers %v: %s", seed, entries, d)
		}
		os.Remove(image)
	}
}

// TestAttributes: what the second opinion does not look at.
func TestAttributes(t *testing.T) {
	testenv.RequireTools(t, "e2fsprogs", "e2fsck", "debugfs")
	s, p := newServer(t), newPuller(t)
	const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	image, _, err := build(t.Context(), t, p, s.push(t, "attributes", imageOf(t, v1.Config{WorkingDir: "srv/app"}, layerOf(t,
		entry{name: "ping", kind: tar.TypeReg, content: "x", uid: 12345, pax: map[string]string{
			"SCHILY.xattr.security.capability":    capability,
			"SCHILY.xattr.user.note":              "kept",
			"SCHILY.xattr.user.overlay.redirect":  "/etc",
			"SCHILY.xattr.trusted.overlay.opaque": "y",
			"SCHILY.xattr.security.selinux":       "host_t",
		}},
		entry{name: "sticky", kind: tar.TypeDir, mode: 0o1777},
		entry{name: "fifo", kind: tar.TypeFifo},
		entry{name: "disk", kind: tar.TypeBlock},
		file("dev/null", "a log that a careless program wrote"),
		symlink("run", "/proc/self"), symlink("tmp", "var/tmp"), file("workspace", "in the way"),
		file("etc/resolv.conf", "nameserver 192.0.2.1\n"),
	))))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	for request, want := range map[string]string{
		"stat /ping":            "User: 12345",
		"stat /sticky":          "Mode:  01777",
		"stat /fifo":            "Type: FIFO",
		"stat /disk":            "File not found",
		"stat /dev/null":        "File not found",
		"stat /run":             "Type: directory",
		"stat /tmp":             "Type: directory",
		"stat /workspace":       "Type: directory",
		"stat /srv/app":         "Type: directory",
		"stat /etc/resolv.conf": "Size: 0",
	} {
		out, err := exec.Command("debugfs", "-R", request, image).CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("debugfs %s does not say %q: %v\n%s", request, want, err, out)
		}
	}
	out, err := exec.Command("debugfs", "-R", "ea_list /ping", image).Output()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, line := range strings.Split(string(out), "\n") {
		if attr, _, ok := strings.Cut(strings.TrimSpace(line), " ("); ok {
			got = append(got, attr)
		}
	}
	slices.Sort(got)
	if d := cmp.Diff([]string{"security.capability", "user.note"}, got); d != "" {
		t.Errorf("extended attributes: %s\n%s", d, out)
	}
}

// TestSources: the same image, wherever it lies and however it is packed.
func TestSources(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	img := imageOf(t, v1.Config{User: "app", Env: []string{"A=1"}}, layerOf(t, file("f", "1")), newZstdLayer(t, file("g", "2")), layerOf(t, file("f", "3")))
	ref := s.push(t, "an/image:tag", img)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := layout.Write(filepath.Join(dir, "layout"), mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img})); err != nil {
		t.Fatal(err)
	}
	// Such archives hold packed and unpacked layers, but not in zstd.
	plain := imageOf(t, v1.Config{User: "app", Env: []string{"A=1"}}, layerOf(t, file("f", "1")), layerOf(t, file("g", "2")), layerOf(t, file("f", "3")))
	tag, err := name.NewTag("an/image:tag")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.WriteToFile(filepath.Join(dir, "image.tar"), tag, plain); err != nil {
		t.Fatal(err)
	}
	want := unpack([]entry{file("f", "3"), file("g", "2")})
	for _, source := range []string{
		ref.String(),
		"docker://" + s.host + "/an/image@" + digest.String(),
		"oci-layout:" + filepath.Join(dir, "layout"),
		"oci-layout:" + filepath.Join(dir, "layout") + "@" + digest.String(),
		"docker-archive:" + filepath.Join(dir, "image.tar"),
		"docker-archive:" + filepath.Join(dir, "image.tar") + "@an/image:tag",
	} {
		image, found, err := build(t.Context(), t, p, reference(t, source))
		if err != nil {
			t.Errorf("%s: %v", source, err)
			continue
		}
		if d := cmp.Diff(want, read(t, image)); d != "" {
			t.Errorf("%s: %s", source, d)
		}
		if found.Config.User != "app" || !slices.Equal(found.Config.Env, []string{"A=1"}) {
			t.Errorf("%s: config %+v", source, found.Config)
		}
		if !strings.HasPrefix(source, "docker-archive") && found.Digest != digest.String() {
			t.Errorf("%s: digest %s, want %s", source, found.Digest, digest)
		}
	}
	for _, source := range []string{"oci-layout:" + dir + "/none", "docker-archive:" + dir + "/none", "docker-archive:" + dir, "oci-layout:" + dir + "/layout@other",
		"docker-archive:" + dir + "/image.tar@other", "docker://" + s.host + "/none"} {
		if _, _, err := build(context.Background(), t, p, reference(t, source)); err == nil {
			t.Errorf("%s was found", source)
		}
	}
}

// TestDamagedLayout: a byte that changed in any blob of a directory is noticed
// by its digest.
func TestDamagedLayout(t *testing.T) {
	p := newPuller(t)
	at := filepath.Join(t.TempDir(), "layout")
	img := imageOf(t, v1.Config{}, layerOf(t, file("f", strings.Repeat("some text ", 100))), newZstdLayer(t, file("g", "2")))
	if _, err := layout.Write(at, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img})); err != nil {
		t.Fatal(err)
	}
	blobs, err := filepath.Glob(filepath.Join(at, "blobs", "sha256", "*"))
	if err != nil || len(blobs) != 4 {
		t.Fatalf("%v, %v", blobs, err)
	}
	for _, blob := range blobs {
		whole, err := os.ReadFile(blob)
		if err != nil {
			t.Fatal(err)
		}
		for _, pos := range []int{0, len(whole) / 2, len(whole) - 1} {
			changed := slices.Clone(whole)
			changed[pos] ^= 4
			if err := os.WriteFile(blob, changed, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, _, err := build(t.Context(), t, p, reference(t, "oci-layout:"+at)); api.Code(err) != "damaged" && api.Code(err) != "invalid" {
				t.Errorf("byte %d of %.40q: %v (%s)", pos, whole, err, api.Code(err))
			} else if strings.HasPrefix(string(whole), "{") && api.Code(err) != "damaged" {
				t.Errorf("byte %d of the document %.40q was not noticed by its digest: %v", pos, whole, err)
			}
		}
		if err := os.WriteFile(blob, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := build(t.Context(), t, p, reference(t, "oci-layout:"+at)); err != nil {
		t.Error(err)
	}
}
