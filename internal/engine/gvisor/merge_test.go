package gvisor_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/ext4image"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// A chain is a disk that this host's overlayfs wrote, without any machine.
type chain struct {
	image  string
	layers []string
}

// newChain makes the environment's image of the tree that fill makes.
func newChain(t *testing.T, fill func(root string) error) *chain {
	t.Helper()
	newEngine(t)
	if rootless() {
		t.Skip("the layers of this test are images")
	}
	root := t.TempDir()
	if err := fill(root); err != nil {
		t.Fatal(err)
	}
	c := &chain{image: filepath.Join(t.TempDir(), "root.ext4")}
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-d", root, c.image, "64M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return c
}

// add puts a layer with the given changes on the chain.
func (c *chain) add(t *testing.T, change func(root string) error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "layer")
	if err := gvisor.Mounted(t.Context(), c.image, c.layers, path, change); err != nil {
		t.Fatal(err)
	}
	c.layers = append(c.layers, path)
}

// shell is a change made by a shell.
func shell(script string) func(root string) error {
	return func(root string) error {
		cmd := exec.Command("sh", "-euc", script)
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", script, err, out)
		}
		return nil
	}
}

// view says all that shows on the layers. That is not the root itself, which is
// a new disk's own.
func (c *chain) view(t *testing.T, layers []string) map[string]string {
	t.Helper()
	out := c.viewDisk(t, append(slices.Clone(layers), filepath.Join(t.TempDir(), "scratch")))
	delete(out, ".")
	return out
}

// viewDisk says all that shows on the disk that is the last of layers.
func (c *chain) viewDisk(t *testing.T, layers []string) map[string]string {
	t.Helper()
	var out map[string]string
	last := len(layers) - 1
	err := gvisor.Mounted(t.Context(), c.image, layers[:last], layers[last], func(root string) (err error) {
		out, err = describe(root, false)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// merge merges layer i of the chain with the one above it, and returns the
// chain with that.
func (c *chain) merge(t *testing.T, i int) []string {
	t.Helper()
	spare := filepath.Join(t.TempDir(), "merged")
	merged, err := newEngine(t).MergeLayer(t.Context(), c.layers, i, c.image, spare)
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Dir(spare)); merged != spare || err != nil || len(left) != 1 {
		t.Fatalf("merged to %s; at the spare: %v, %v", merged, left, err)
	}
	fsck(t, merged)
	return slices.Replace(slices.Clone(c.layers), i, i+2, merged)
}

// TestMergeShows merges what is hard about overlayfs, each case in a directory of
// its own.
func TestMergeShows(t *testing.T) {
	cases := []struct {
		name    string
		changes []string
		// shows is a file that must be there in the end, to see that the case is
		// what it is meant to be.
		shows string
	}{
		{"Files", []string{"echo 1 >new; echo 1 >d/f", "echo 2 >new; echo 2 >other"}, "new"},
		{"Whiteouts", []string{"rm d/f; rm -r e", "echo 1 >d/g; rm d/sub/h"}, "d/g"},
		{"WhiteoutTakenBack", []string{"rm -r d", "mkdir d; echo 1 >d/x"}, "d/x"},
		{"WhiteoutThenDirectory", []string{"rm top", "mkdir top; echo 1 >top/x"}, "top/x"},
		{"FileThenDirectory", []string{"rm -r d; echo 1 >d", "rm d; mkdir d; echo 1 >d/x"}, "d/x"},
		{"DirectoryThenFile", []string{"mkdir n; echo 1 >n/x", "rm -r n; echo 1 >n"}, "n"},
		{"OpaqueBelow", []string{"rm -r d; mkdir d; echo 1 >d/x", "echo 2 >d/y; mkdir d/sub; echo 1 >d/sub/z"}, "d/sub/z"},
		{"OpaqueAbove", []string{"echo 1 >d/x", "rm -r d; mkdir d; echo 1 >d/y"}, "d/y"},
		{"MovedBelow", []string{"mv d m", "echo 1 >m/x; rm m/f"}, "m/sub/h"},
		{"MovedAbove", []string{"echo 1 >d/x; rm d/f", "mv d m; echo 1 >m/y"}, "m/sub/h"},
		{"MovedTwice", []string{"mv d m; echo 1 >m/x", "mv m n; echo 1 >n/y; rm n/f"}, "n/sub/h"},
		{"MovedBack", []string{"mv d m; echo 1 >m/x", "mv m d; echo 1 >d/y"}, "d/sub/h"},
		{"MovedInto", []string{"mv d e/d; echo 1 >e/d/x", "mv e n; echo 1 >n/d/y"}, "n/d/sub/h"},
		{"MovedOutOf", []string{"mv d m", "mv m/sub s; rm -r m"}, "s/h"},
		{"MovedOutOfMovedLater", []string{"mv d/sub s; echo 1 >s/x", "mv d m; mv s m/t; rm m/t/h"}, "m/t/x"},
		{"Swapped", []string{"mv d x; mv e d; mv x e", "mv d x; mv e d; mv x e; echo 1 >d/new"}, "d/sub/h"},
		{"SwappedOnce", []string{"echo 1 >d/was-d; echo 1 >e/was-e", "mv d x; mv e d; mv x e"}, "e/sub/h"},
		{"MovedOverEmpty", []string{"mkdir n", "mv -T d n; echo 1 >n/x"}, "n/sub/h"},
		{"MovedIntoNew", []string{"mkdir n; mv d n/d", "mkdir o; mv n/d/sub o/s; echo 1 >o/s/x"}, "o/s/h"},
		{"ReplacedThenMoved", []string{"rm -r d; mkdir d; echo 1 >d/x", "mv d m; echo 1 >m/y"}, "m/x"},
		{"MovedThenReplaced", []string{"mv d m; mkdir d; echo 1 >d/x", "mv d e/d; mv m d; echo 1 >d/y"}, "d/sub/h"},
		{"OldNameTaken", []string{"mv d m", "mkdir d; echo 1 >d/x; mv m/sub d/s"}, "d/s/h"},
		{"Relative", []string{"mv d/sub d/r; echo 1 >d/r/x", "mv d m; mv m/r m/q"}, "m/q/h"},
		{"LinksBelow", []string{"echo 1 >a; ln a d/b; ln a e/c", "rm a; echo 2 >>e/c"}, "d/b"},
		{"LinksAbove", []string{"echo 1 >a", "ln a b; ln b d/c"}, "d/c"},
		{"Attributes", []string{"chmod 700 d; touch -d '2001-02-03 04:05:06.789' d e", "chown 5:6 d/sub; touch -d '2002-02-03' d/sub"}, "d/sub/h"},
		{"Times", []string{"echo 1 >d/x", "echo 2 >d/y; touch -d 2001-02-03 d"}, "d/x"},
		{"NothingBelow", []string{"true", "echo 1 >x; mv d m"}, "m/sub/h"},
		{"NothingAbove", []string{"echo 1 >x; mv d m", "true"}, "m/sub/h"},
	}
	in := func(change func(i int) string) func(root string) error {
		script := ""
		for i, c := range cases {
			script += fmt.Sprintf("mkdir -p %s; (cd %s; %s)\n", c.name, c.name, change(i))
		}
		return shell(script)
	}
	c := newChain(t, in(func(int) string { return "mkdir -p d/sub e; echo f >d/f; echo h >d/sub/h; echo i >e/i; echo top >top" }))
	for layer := range 2 {
		c.add(t, in(func(i int) string { return cases[i].changes[layer] }))
	}
	want := c.viewDisk(t, c.layers)
	merged := c.merge(t, 0)
	disk := c.viewDisk(t, merged)
	if diff := cmp.Diff(want["."], disk["."]); diff != "" {
		t.Errorf("the root (-before +after):\n%s", diff)
	}
	below := c.view(t, merged)
	for _, test := range cases {
		t.Run(test.name, func(t *testing.T) {
			its := func(view map[string]string) map[string]string {
				out := maps.Clone(view)
				maps.DeleteFunc(out, func(name, _ string) bool { return name != test.name && !strings.HasPrefix(name, test.name+"/") })
				return out
			}
			if want[test.name+"/"+test.shows] == "" {
				t.Fatalf("there is no %s", test.shows)
			}
			if diff := cmp.Diff(its(want), its(disk)); diff != "" {
				t.Errorf("as the disk (-before +after):\n%s", diff)
			}
			if diff := cmp.Diff(its(want), its(below)); diff != "" {
				t.Errorf("below another disk (-before +after):\n%s", diff)
			}
		})
	}
}

// mergeRounds is how many disks TestMergeKeepsTheView changes at random, where
// somebody has asked for all that there is.
const mergeRounds = 200

// TestMergeKeepsTheView merges layers with random changes in them: on what comes
// of it everything shows that showed before, and the old ones are as they were.
func TestMergeKeepsTheView(t *testing.T) {
	rounds := 2
	if testenv.Wanted("faults") {
		rounds = mergeRounds
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("PYRO_TEST_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatal(err)
		}
	}
	for round := range rounds {
		seed := seed + uint64(round)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			e := &editor{Rand: rand.New(rand.NewPCG(seed, 1))}
			c := newChain(t, func(root string) error { return e.edit(root, 80, false) })
			for range 3 + e.IntN(2) {
				e.log = append(e.log, "--")
				c.add(t, func(root string) error { return e.edit(root, 5+e.IntN(40), true) })
			}
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("PYRO_TEST_SEED=%d; the changes, layer by layer:\n%s", seed, strings.Join(e.log, "\n"))
				}
			})
			want := c.view(t, c.layers)
			for len(c.layers) > 1 {
				i := e.IntN(len(c.layers) - 1)
				before := append(fileDigest(t, c.layers[i]), fileDigest(t, c.layers[i+1])...)
				merged := c.merge(t, i)
				if diff := cmp.Diff(want, c.view(t, merged)); diff != "" {
					t.Fatalf("after merging layer %d of %d (-before +after):\n%s", i, len(c.layers), diff)
				}
				if !bytes.Equal(before, append(fileDigest(t, c.layers[i]), fileDigest(t, c.layers[i+1])...)) {
					t.Error("the old layers have changed")
				}
				c.layers = merged
			}
		})
	}
}

// An editor changes a tree at random.
type editor struct {
	*rand.Rand
	log []string
}

// longName and oddNames are among the names that it gives.
var (
	longName = strings.Repeat("n", 255)
	oddNames = []string{"a", "b", "c", "d", "e", "f", "g", "\xff\n x", "- *", "...", ".wh.a", longName}
)

// edit makes so many changes below root: in a layer all that a guest could, else
// what mke2fs takes over.
func (e *editor) edit(root string, changes int, layer bool) error {
	for range changes {
		var dirs, all []string
		err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
			rel := strings.TrimPrefix(strings.TrimPrefix(p, root), "/")
			switch {
			case err != nil:
				return err
			case rel == "lost+found":
				return fs.SkipDir
			case d.IsDir() && strings.Count(rel, "/") < 4:
				dirs = append(dirs, rel)
			}
			if rel != "" {
				all = append(all, rel)
			}
			return nil
		})
		if err != nil {
			return err
		}
		pick := func(from []string) string { return from[e.IntN(len(from))] }
		at := func(rel string) string { return filepath.Join(root, rel) }
		fresh := filepath.Join(pick(dirs), pick(oddNames)) // maybe taken
		some := fresh
		if len(all) > 0 {
			some = pick(all)
		}
		kinds := 3
		if layer {
			kinds = 16
		}
		var did string
		switch e.IntN(kinds) {
		case 0:
			did, err = "mkdir "+fresh, os.Mkdir(at(fresh), 0o700|fs.FileMode(e.IntN(0o100)))
		case 1:
			did, err = "write "+fresh, create(at(fresh), fmt.Sprint(e.Uint64()), 0o600|fs.FileMode(e.IntN(0o100)))
		case 2:
			did, err = "symlink "+fresh, os.Symlink(some, at(fresh))
		case 3, 4, 5, 6:
			did, err = "rename "+some+" to "+fresh, os.Rename(at(some), at(fresh))
		case 7:
			did, err = "remove "+some, os.RemoveAll(at(some))
		case 8:
			did, err = "replace "+some, errors.Join(os.RemoveAll(at(some)), os.Mkdir(at(some), 0o711))
		case 9:
			did, err = "replace by file "+some, errors.Join(os.RemoveAll(at(some)), create(at(some), fmt.Sprint(e.Uint64()), 0o604))
		case 10:
			did, err = "link "+some+" to "+fresh, os.Link(at(some), at(fresh))
		case 11:
			did, err = "mode of "+some, errors.Join(os.Lchown(at(some), e.IntN(70000), e.IntN(9)), unix.Fchmodat(unix.AT_FDCWD, at(some), uint32(e.IntN(0o10000)), 0))
		case 12:
			did, err = "attribute of "+some, setAttribute(at(some), pick([]string{"user.x", "trusted.y", "user.overlay.opaque"}), fmt.Sprint(e.IntN(9)))
		case 13:
			did, err = "no attribute of "+some, unix.Lremovexattr(at(some), pick([]string{"user.x", "trusted.y", "user.overlay.opaque"}))
		case 14:
			did, err = "special "+fresh, unix.Mknod(at(fresh), pickMode(e), 0)
		case 15:
			did, err = "append to "+some, appendSparse(at(some), int64(e.IntN(1<<20)))
		}
		if err == nil { // else the change was not possible
			e.log = append(e.log, fmt.Sprintf("%q", strings.ReplaceAll(did, longName, "LONG")))
		}
	}
	return nil
}

func pickMode(e *editor) uint32 { return []uint32{unix.S_IFIFO, unix.S_IFSOCK}[e.IntN(2)] | 0o640 }

// create makes a file where nothing is: what is there may be a pipe.
func create(path, content string, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.WriteString(content)
	return errors.Join(err, f.Close())
}

// setAttribute leaves what only the host's root could give an attribute as it is.
func setAttribute(path, name, value string) error {
	if st, err := os.Lstat(path); err != nil || !st.IsDir() && !st.Mode().IsRegular() {
		return errors.Join(err, fs.ErrInvalid)
	}
	return unix.Lsetxattr(path, name, []byte(value), 0)
}

func appendSparse(path string, hole int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return errors.Join(err, fs.ErrInvalid)
	}
	_, err = f.WriteAt([]byte("more"), st.Size()+hole)
	return err
}

// fill writes n MiB that are no holes.
func fill(name string, n int) func(root string) error {
	return func(root string) error {
		return os.WriteFile(filepath.Join(root, name), bytes.Repeat([]byte("content "), n<<17), 0o600)
	}
}

// What two layers hold may be more than either has room for.
func TestMergeOfFullLayers(t *testing.T) {
	c := newChain(t, shell("mkdir d; echo f >d/f"))
	c.add(t, fill("below", 80))
	c.add(t, fill("above", 80))
	c.add(t, shell("rm below above; mv d m"))
	want := c.view(t, c.layers)
	both := c.view(t, c.layers[:2])
	c.layers = c.merge(t, 0)
	if diff := cmp.Diff(both, c.view(t, c.layers[:1])); diff != "" {
		t.Error("two full layers show something else when they are merged")
	}
	c.layers = c.merge(t, 0)
	if diff := cmp.Diff(want, c.view(t, c.layers)); diff != "" {
		t.Errorf("(-before +after):\n%s", diff)
	}
}

// A merge copies what the two layers hold, not what shows through them, and what
// was deleted is gone.
func TestMergeCostsItsLayers(t *testing.T) {
	c := newChain(t, func(root string) error {
		return errors.Join(os.Mkdir(filepath.Join(root, "d"), 0o755), fill("d/large", 24)(root))
	})
	c.add(t, func(root string) error {
		return errors.Join(fill("below", 20)(root), fill("deleted", 20)(root), os.Rename(filepath.Join(root, "d"), filepath.Join(root, "m")))
	})
	c.add(t, func(root string) error {
		return errors.Join(fill("above", 4)(root), os.Remove(filepath.Join(root, "deleted")), os.Rename(filepath.Join(root, "m"), filepath.Join(root, "n")))
	})
	merged := c.merge(t, 0)
	var st unix.Stat_t
	if err := unix.Stat(merged[0], &st); err != nil {
		t.Fatal(err)
	}
	const metadata = 8 << 20
	if took := st.Blocks * 512; took > 24<<20+metadata {
		t.Errorf("the merged layer takes %d bytes", took)
	}
}

// killed is a layer as its machine leaves it that is killed with its host: with
// what was flushed in the journal.
func (c *chain) killed(t *testing.T, change func(root string) error) string {
	t.Helper()
	path, cut := filepath.Join(t.TempDir(), "layer"), filepath.Join(t.TempDir(), "cut")
	err := gvisor.Mounted(t.Context(), c.image, c.layers, path, func(root string) error {
		if err := change(root); err != nil {
			return err
		}
		dir, err := os.Open(root)
		if err != nil {
			return err
		}
		defer dir.Close()
		if err := unix.Syncfs(int(dir.Fd())); err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		return errors.Join(err, os.WriteFile(cut, b, 0o600))
	})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(cut)
	if err != nil {
		t.Fatal(err)
	}
	if b[1024+0x60]&4 == 0 {
		t.Fatal("the layer needs no recovery")
	}
	return cut
}

// Only the upper layer may need its journal: it may be a disk, the lower one was
// frozen.
func TestMergeAfterPowerCut(t *testing.T) {
	c := newChain(t, shell("mkdir d; echo f >d/f"))
	c.add(t, shell("echo below >below; echo old >d/g"))
	cut := c.killed(t, shell("echo above >above; rm d/f"))
	c.layers = append(c.layers, cut)
	before := fileDigest(t, cut)
	merged := c.merge(t, 0)
	if !bytes.Equal(before, fileDigest(t, cut)) {
		t.Error("the old layer was changed")
	}
	got := c.view(t, merged)
	for name, there := range map[string]bool{"below": true, "above": true, "d/g": true, "d/f": false} {
		if _, ok := got[name]; ok != there {
			t.Errorf("%s is there: %v, want %v", name, ok, there)
		}
	}
	c.layers = []string{c.killed(t, shell("echo x >x")), c.layers[0]}
	c.refused(t, api.ErrDamaged)
}

// refused wants a merge of the first two layers refused, with nothing left.
func (c *chain) refused(t *testing.T, class error) error {
	t.Helper()
	spare := filepath.Join(t.TempDir(), "merged")
	merged, err := newEngine(t).MergeLayer(t.Context(), c.layers, 0, c.image, spare)
	if !errors.Is(err, class) || merged != "" {
		t.Errorf("merged to %q, %v; want %v", merged, err, class)
	}
	if left, err := os.ReadDir(filepath.Dir(spare)); err != nil || len(left) > 0 {
		t.Errorf("at the spare: %v, %v", left, err)
	}
	return err
}

// A state directory may lie where a merge would mount what it needs.
func TestMergeBelowAStage(t *testing.T) {
	dir, err := os.MkdirTemp("/mnt", "pyro-")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := newChain(t, shell("mkdir d"))
	c.add(t, shell("echo below >below"))
	c.add(t, shell("echo above >above"))
	spare := filepath.Join(dir, "merged")
	if merged, err := newEngine(t).MergeLayer(t.Context(), c.layers, 0, c.image, spare); err != nil || merged != spare {
		t.Errorf("merged to %q, %v", merged, err)
	}
}

func TestMergeRefuses(t *testing.T) {
	c := newChain(t, shell("mkdir d"))
	c.add(t, shell("echo below >below"))
	c.add(t, shell("echo above >above"))
	image := func(b []byte) string {
		path := filepath.Join(t.TempDir(), "layer")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	marked := func(redirect string) string {
		return layerImage(t, ext4image.Entry{Path: "/upper", Mode: ext4image.ModeDir | 0o755},
			ext4image.Entry{Path: "/upper/d", Mode: ext4image.ModeDir | 0o755, Xattrs: map[string][]byte{"trusted.overlay.redirect": []byte(redirect)}})
	}
	for name, test := range map[string]struct {
		layers []string
		class  error
	}{
		"Missing":         {[]string{c.layers[0], c.layers[1] + ".none"}, os.ErrNotExist},
		"Twice":           {[]string{c.layers[0], c.layers[0]}, api.ErrInvalid},
		"LowerIsNothing":  {[]string{image(make([]byte, 1<<20)), c.layers[1]}, api.ErrDamaged},
		"UpperIsNothing":  {[]string{c.layers[0], image(make([]byte, 1<<20))}, api.ErrDamaged},
		"Directory":       {[]string{t.TempDir(), c.layers[1]}, api.ErrDamaged},
		"RedirectUpwards": {[]string{c.layers[0], marked("../../d")}, api.ErrDamaged},
		"RedirectToRoot":  {[]string{marked("/"), marked("/d")}, api.ErrDamaged},
	} {
		t.Run(name, func(t *testing.T) {
			(&chain{image: c.image, layers: test.layers}).refused(t, test.class)
		})
	}
	t.Run("Canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		spare := filepath.Join(t.TempDir(), "merged")
		if _, err := newEngine(t).MergeLayer(ctx, c.layers, 0, c.image, spare); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		if left, err := os.ReadDir(filepath.Dir(spare)); err != nil || len(left) > 0 {
			t.Errorf("at the spare: %v, %v", left, err)
		}
	})
	t.Run("SomethingAtTheSpare", func(t *testing.T) {
		spare := image([]byte("mine"))
		if _, err := newEngine(t).MergeLayer(t.Context(), c.layers, 0, c.image, spare); !errors.Is(err, api.ErrExists) {
			t.Errorf("%v, want ErrExists", err)
		}
		if b, err := os.ReadFile(spare); err != nil || string(b) != "mine" {
			t.Errorf("at the spare: %q, %v", b, err)
		}
	})
	t.Run("HostDiskFull", func(t *testing.T) {
		dir := t.TempDir()
		if err := unix.Mount("none", dir, "tmpfs", 0, "size=8m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		_, err := newEngine(t).MergeLayer(t.Context(), c.layers, 0, c.image, filepath.Join(dir, "merged"))
		if !errors.Is(err, api.ErrExhausted) || api.Hint(err) == "" {
			t.Errorf("%v (hint %q), want ErrExhausted with a hint", err, api.Hint(err))
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("at the spare: %v, %v", left, err)
		}
	})
}

// The layers of a machine without root are directories, with marks that its guest
// may write too.
func TestMergeDirectories(t *testing.T) {
	newEngine(t)
	layer := func(script string) string {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, gvisor.UpperDir), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := shell(script)(filepath.Join(dir, gvisor.UpperDir)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	mark := func(dir, name, attr, value string) {
		t.Helper()
		if err := unix.Setxattr(filepath.Join(dir, gvisor.UpperDir, name), "user.overlay."+attr, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	lower := layer("mkdir d o gone kept; echo 1 >d/both; echo 1 >d/below; echo 1 >o/hidden; echo 1 >kept/f; ln kept/f gone/link; mknod w c 0 0; mknod wd c 0 0; echo 1 >type")
	upper := layer("mkdir d o wd type made; echo 2 >d/both; echo 2 >d/above; echo 2 >o/shown; mknod gone c 0 0; echo 2 >wd/f; touch -d 2001-02-03 d")
	mark(upper, "o", "opaque", "y")
	mark(upper, "made", "redirect", "/../../etc") // by the guest
	to, err := os.OpenRoot(upper)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	from, err := os.OpenRoot(lower)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	if err := gvisor.UniteLayers(t.Context(), from, to); err != nil {
		t.Fatal(err)
	}
	var got []string
	err = filepath.WalkDir(filepath.Join(upper, gvisor.UpperDir), func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		line := strings.TrimPrefix(p, upper+"/"+gvisor.UpperDir) + " " + d.Type().String()
		if d.Type().IsRegular() {
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += " " + strings.TrimSpace(string(b))
		}
		value := make([]byte, 64)
		if n, err := unix.Lgetxattr(p, "user.overlay.opaque", value); err == nil {
			line += " opaque=" + string(value[:n])
		}
		got = append(got, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{" d---------", "/d d---------", "/d/above ---------- 2", "/d/below ---------- 1", "/d/both ---------- 2",
		"/gone Dc---------", "/kept d---------", "/kept/f ---------- 1", "/made d---------", "/o d--------- opaque=y", "/o/shown ---------- 2",
		"/type d--------- opaque=y", "/w Dc---------", "/wd d--------- opaque=y", "/wd/f ---------- 2"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if st, err := os.Stat(filepath.Join(upper, gvisor.UpperDir, "d")); err != nil || st.ModTime().Year() != 2001 {
		t.Errorf("a directory that something was added to is of %v, %v", st.ModTime(), err)
	}
}
