//go:build linux

package workspacedisk_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// mountLayers has the kernel join images as gVisor's engine does, the highest to
// be written, and returns the root and how to unmount it all, which happens at
// the end anyway.
func mountLayers(t testing.TB, src workspacedisk.Source) (root string, unmount func()) {
	t.Helper()
	below, unmountBase := mount(t, src.Path, "ro")
	unmounts := []func(){unmountBase}
	last := len(src.Layers) - 1
	for _, l := range src.Layers[:last] {
		dir, unmountLayer := mount(t, l.Path, "ro,noload")
		unmounts = append(unmounts, unmountLayer)
		below = filepath.Join(dir, "upper") + ":" + below
	}
	layer, unmountLayer := mount(t, src.Layers[last].Path, "noinit_itable")
	unmounts = append(unmounts, unmountLayer)
	for _, name := range []string{"upper", "work"} {
		if err := os.Mkdir(filepath.Join(layer, name), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			t.Fatal(err)
		}
	}
	root = t.TempDir()
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work,redirect_dir=on,xino=on,index=off,metacopy=off", below, layer, layer)
	if err := unix.Mount("overlay", root, "overlay", unix.MS_NOATIME|unix.MS_NODEV, options); err != nil {
		testenv.Require(t, "loopmount", false, fmt.Sprintf("mounting an overlay: %v", err))
	}
	mounted := true
	unmountRoot := func() {
		if mounted {
			if err := unix.Unmount(root, 0); err != nil {
				t.Errorf("unmounting the overlay: %v", err)
			}
			mounted = false
		}
	}
	t.Cleanup(unmountRoot)
	return root, func() {
		unmountRoot()
		for _, unmount := range slices.Backward(unmounts) {
			unmount()
		}
	}
}

// kernelShows is contents for what the kernel shows of a tree.
func kernelShows(t testing.TB, root string) map[string]string {
	t.Helper()
	got := map[string]string{}
	for p, n := range hostTree(t, root) {
		switch n.Type {
		case "file":
			got[p] = n.Content
		case "symlink":
			got[p] = "-> " + n.Target
		default:
			got[p] = n.Type
		}
	}
	delete(got, "/lost+found")
	return got
}

// TestKernelMarks lets the kernel say what the marks of TestLayer and TestLayers
// mean.
func TestKernelMarks(t *testing.T) {
	if os.Geteuid() != 0 {
		testenv.Require(t, "loopmount", false, "mounting an image takes root")
	}
	for _, tt := range layerTests {
		t.Run(tt.name, func(t *testing.T) {
			root, unmount := mountLayers(t, layered(t, baseTree, tt.upper))
			defer unmount()
			if diff := cmp.Diff(shown(tt.gone, tt.want), kernelShows(t, root)); diff != "" {
				t.Errorf("the kernel shows (-want +got):\n%s", diff)
			}
		})
	}
	for _, tt := range layersTests {
		t.Run(tt.name, func(t *testing.T) {
			root, unmount := mountLayers(t, layered(t, baseTree, tt.layers...))
			defer unmount()
			if diff := cmp.Diff(shown(tt.gone, tt.want), kernelShows(t, root)); diff != "" {
				t.Errorf("the kernel shows (-want +got):\n%s", diff)
			}
		})
	}
}

// TestKernelLayers reads layers that the kernel wrote one over the other, each
// after a few hundred random changes.
func TestKernelLayers(t *testing.T) {
	needTools(t)
	src := workspacedisk.Source{Path: makeImage(t, layerBase(t), "64M"), Format: workspacedisk.FormatRaw}
	for n := range 6 {
		src.Layers = append(src.Layers, workspacedisk.Source{Path: handmade(t, "", nil), Format: workspacedisk.FormatRaw})
		root, unmount := mountLayers(t, src)
		c := changer{t: t, root: root, rand: rand.New(rand.NewPCG(uint64(n), 7))}
		for range 200 {
			c.change()
		}
		unmount()
		// As the next layer finds it: merged directories are looked up anew.
		root, unmount = mountLayers(t, src)
		want, wantMeta := hostTree(t, root), metadata(t, root)
		delete(want, "/lost+found")
		wantWalk := hostWalk(t, root)
		unmount()
		d := openSource(t, src)
		compareTree(t, want, d)
		if diff := cmp.Diff(wantWalk, walked(t, d, "/")); diff != "" {
			t.Errorf("walking %d layers (-kernel +disk):\n%s", n+1, diff)
		}
		if n == 5 {
			out := filepath.Join(t.TempDir(), "out.ext4")
			if _, err := d.Export(t.Context(), out); err != nil {
				t.Fatal(err)
			}
			fsck(t, out)
			dataMustNotHold(t, out, "overlay.")
			exported, unmountExport := mount(t, out, "ro")
			if diff := cmp.Diff(wantMeta, metadata(t, exported)); diff != "" {
				t.Errorf("exported metadata (-want +got):\n%s", diff)
			}
			unmountExport()
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			t.Fatalf("with %d layers", n+1)
		}
	}
}

// TestKernelLayer reads a layer after hundreds of random changes by the kernel,
// once unmounted and once as a power cut leaves it.
func TestKernelLayer(t *testing.T) {
	needTools(t)
	for seed := range uint64(2) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			src := workspacedisk.Source{
				Path: makeImage(t, layerBase(t), "64M"), Format: workspacedisk.FormatRaw,
				Layers: []workspacedisk.Source{{Path: handmade(t, "", nil), Format: workspacedisk.FormatRaw}},
			}
			root, unmount := mountLayers(t, src)
			c := changer{t: t, root: root, rand: rand.New(rand.NewPCG(seed, 1))}
			for range 600 {
				c.change()
			}
			want, wantMeta := hostTree(t, root), metadata(t, root)
			delete(want, "/lost+found")
			dirty := seed == 1
			if dirty {
				tool(t, nil, "sync", "-f", root) // what follows is in the journal only
				writeFile(t, root, "last", "synced")
				syncFile(t, filepath.Join(root, "last"))
				syncFile(t, root)
				want, wantMeta = hostTree(t, root), metadata(t, root)
				delete(want, "/lost+found")
				src.Layers = []workspacedisk.Source{{Path: crash(t, src.Layers[0].Path), Format: workspacedisk.FormatRaw}}
			}
			unmount()

			d := openSource(t, src)
			if d.Replayed() != dirty {
				t.Errorf("needed recovery: %v, want %v", d.Replayed(), dirty)
			}
			compareTree(t, want, d)
			out := filepath.Join(t.TempDir(), "out.ext4")
			if _, err := d.Export(t.Context(), out); err != nil {
				t.Fatal(err)
			}
			fsck(t, out)
			dataMustNotHold(t, out, "overlay.")
			compareTree(t, want, openRaw(t, out))
			exported, unmountExport := mount(t, out, "ro")
			defer unmountExport()
			if diff := cmp.Diff(wantMeta, metadata(t, exported)); diff != "" {
				t.Errorf("exported metadata (-want +got):\n%s", diff)
			}
		})
	}
}

// layerBase is a tree with something for every change.
func layerBase(t testing.TB) string {
	dir := t.TempDir()
	for i := range 6 {
		for j := range 4 {
			for k := range 3 {
				writeFile(t, dir, fmt.Sprintf("d%d/d%d/f%d", i, j, k), pattern(i*1000+j*100+k))
			}
			symlink(t, fmt.Sprintf("f%d", j), filepath.Join(dir, fmt.Sprintf("d%d/d%d/l", i, j)))
		}
		if err := os.Link(fmt.Sprintf("%s/d%d/d0/f0", dir, i), fmt.Sprintf("%s/d%d/h", dir, i)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// A changer does to a tree what programs do.
type changer struct {
	t    testing.TB
	root string
	rand *rand.Rand
	n    int
}

// paths lists what is in the tree but the root and lost+found.
func (c *changer) paths() (dirs, others []string) {
	err := filepath.WalkDir(c.root, func(p string, e fs.DirEntry, err error) error {
		switch {
		case err != nil || p == c.root:
			return err
		case e.Name() == "lost+found":
			return fs.SkipDir
		case e.IsDir():
			dirs = append(dirs, p)
		default:
			others = append(others, p)
		}
		return nil
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return append(dirs, c.root), others
}

// change makes one random change. Those that the kernel refuses, as to move a
// directory into itself, are none.
func (c *changer) change() {
	dirs, others := c.paths()
	pick := func(list []string) string { return list[c.rand.IntN(len(list))] }
	c.n++
	fresh := filepath.Join(pick(dirs), fmt.Sprintf("n%d", c.n%40))
	dir := pick(dirs)
	if len(others) == 0 {
		others = []string{fresh}
	}
	var err error
	switch c.rand.IntN(14) {
	case 0, 1:
		err = create0600(fresh, pattern(c.rand.IntN(9000)))
	case 2:
		err = os.Mkdir(fresh, 0o711)
	case 3:
		err = os.Remove(pick(others))
	case 4:
		if dir != c.root {
			err = os.RemoveAll(dir)
			if c.rand.IntN(2) == 0 { // opaque
				err = errors.Join(err, os.Mkdir(dir, 0o755))
				err = errors.Join(err, os.WriteFile(filepath.Join(dir, "f0"), []byte("again"), 0o644))
			}
		}
	case 5, 6:
		if dir != c.root {
			err = os.Rename(dir, fresh)
		}
	case 7:
		err = os.Rename(pick(others), pick(others))
	case 8:
		err = os.Link(pick(others), fresh)
	case 9:
		err = os.Symlink(strings.Repeat("target/", 1+c.rand.IntN(20)), fresh)
	case 10:
		err = os.Remove(pick(others))
		err = errors.Join(err, os.Mkdir(fresh, 0o755)) // a directory in the place of a file
	case 11:
		p := pick(append(others, dir))
		if st, lerr := os.Lstat(p); lerr == nil && st.Mode().Type() != fs.ModeSymlink {
			err = os.Chmod(p, fs.FileMode(0o400+c.rand.IntN(0o377)))
			err = errors.Join(err, os.Chown(p, 70_000+c.rand.IntN(9), c.rand.IntN(9)))
			err = errors.Join(err, os.Chtimes(p, time.Now(), time.Unix(c.rand.Int64N(1<<33)-1<<31, c.rand.Int64N(1e9))))
		}
	case 12:
		p := pick(others)
		if st, lerr := os.Lstat(p); lerr == nil && st.Mode().IsRegular() {
			err = unix.Setxattr(p, "user.note", []byte(pattern(c.rand.IntN(300))), 0)
			err = errors.Join(err, appendTo(p, 1<<20+c.rand.Int64N(1<<20)))
		}
	case 13:
		err = errors.Join(unix.Mknod(fresh, unix.S_IFCHR|0o600, int(unix.Mkdev(300, 70_000))), unix.Mkfifo(fresh+"p", 0o644))
	}
	for _, allowed := range []error{unix.EEXIST, unix.EINVAL, unix.ENOTEMPTY, unix.ENOENT, unix.ENOTDIR, unix.EISDIR, unix.EMLINK} {
		if errors.Is(err, allowed) {
			return
		}
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// create0600 makes a file where nothing is: a pipe would block the test.
func create0600(p, content string) error {
	f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	return errors.Join(err, f.Close())
}

// appendTo writes a few bytes at off: the file gets holes.
func appendTo(p string, off int64) error {
	f, err := os.OpenFile(p, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte("behind a hole"), off)
	return errors.Join(err, f.Close())
}

// metadata describes each file of a tree by what an export keeps besides names
// and content: hard links by the first of their names.
func metadata(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		name := strings.TrimPrefix(p, dir)
		if name == "/lost+found" {
			return fs.SkipDir
		}
		if _, ok := first[st.Ino]; !ok {
			first[st.Ino] = name
		}
		out[name] = fmt.Sprintf("%o %d:%d %d.%09d dev %x same as %q xattrs %s",
			st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, st.Rdev, first[st.Ino], xattrs(t, p))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// xattrs lists the extended attributes of a file, sorted.
func xattrs(t testing.TB, p string) string {
	t.Helper()
	names := make([]byte, 4096)
	n, err := unix.Llistxattr(p, names)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for name := range strings.SplitSeq(strings.Trim(string(names[:n]), "\x00"), "\x00") {
		value := make([]byte, 4096)
		if n, err := unix.Lgetxattr(p, name, value); err == nil {
			out = append(out, fmt.Sprintf("%s=%.20q(%d)", name, value[:n], n))
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}
