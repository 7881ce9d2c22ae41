package gvisor_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
)

// A copied layer is the layer: with all that overlayfs reads in it.
func TestCopyTree(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	upper := filepath.Join(from, gvisor.UpperDir)
	at := func(name string) string { return filepath.Join(upper, name) }
	do := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	do(os.MkdirAll(at("dir/sub"), 0o755), os.Mkdir(at("closed"), 0o755), os.Mkdir(at("\xff\n dir"), 0o755))
	do(os.WriteFile(at("file"), []byte("content"), 0o640), os.WriteFile(at("closed/in"), []byte("in"), 0), os.WriteFile(at("setuid"), nil, 0o755))
	do(os.Link(at("file"), at("dir/link")), os.Symlink("/etc/passwd", at("symlink")), os.Symlink("../..", at("dir/up")))
	do(unix.Mkfifo(at("pipe"), 0o622), unix.Mknod(at("socket"), unix.S_IFSOCK|0o755, 0), unix.Mknod(at("whiteout"), unix.S_IFCHR, 0), unix.Mknod(at("dir/whiteout"), unix.S_IFCHR, 0))
	sparse, err := os.Create(at("dir/sparse"))
	do(err)
	_, err = sparse.WriteAt([]byte("behind"), 64<<20)
	do(err, sparse.Close())
	if err := unix.Setxattr(at("dir"), "user.overlay.opaque", []byte("y"), 0); errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("this file system has no user attributes")
	}
	do(unix.Setxattr(at("file"), "user.empty", nil, 0), unix.Setxattr(at("file"), "user.note", []byte(strings.Repeat("n", 2000)), 0))
	if os.Geteuid() == 0 && !rootless() {
		capability := []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00") // cap_net_raw+ep, version 2
		do(os.Lchown(at("symlink"), 1, 2), os.Chown(at("dir/sub"), 70_000, 3), os.Chown(at("setuid"), 4, 5),
			unix.Setxattr(at("closed/in"), "security.capability", capability, 0))
	}
	do(os.Chmod(at("setuid"), 0o755|fs.ModeSetuid|fs.ModeSetgid), os.Chmod(at("dir/sub"), 0o777|fs.ModeSticky), os.Chmod(at("closed"), 0o500))
	t.Cleanup(func() { // for RemoveAll
		for _, dir := range []string{from, to} {
			_ = os.Chmod(filepath.Join(dir, gvisor.UpperDir, "closed"), 0o700)
		}
	})
	old := time.Unix(1_000_000_000, 123456789)
	do(os.Chtimes(at("dir/sub"), old, old), os.Chtimes(at("file"), old, old), os.Chtimes(at("dir"), old, old))

	source, err := os.OpenRoot(from)
	do(err)
	defer source.Close()
	target, err := os.OpenRoot(to)
	do(err)
	defer target.Close()
	want := described(t, from)
	do(gvisor.CopyTree(t.Context(), source, target))
	if diff := cmp.Diff(want, described(t, to)); diff != "" {
		t.Errorf("(-layer +copy):\n%s", diff)
	}
	var st unix.Stat_t
	do(unix.Stat(filepath.Join(to, gvisor.UpperDir, "dir/sparse"), &st))
	if st.Blocks*512 > 1<<20 {
		t.Errorf("the copy of a file of holes takes %d bytes", st.Blocks*512)
	}

	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	again, err := os.OpenRoot(t.TempDir())
	do(err)
	defer again.Close()
	if err := gvisor.CopyTree(canceled, source, again); !errors.Is(err, context.Canceled) {
		t.Errorf("with a canceled context: %v", err)
	}
}

// described says all about the files of a tree.
func described(t *testing.T, dir string) map[string]string {
	t.Helper()
	out, err := describe(dir, true)
	if err != nil {
		t.Fatal(err)
	}
	delete(out, ".")
	return out
}

// describe is described, without the number of links if they are not wanted:
// overlayfs shows those of one layer.
func describe(dir string, links bool) (map[string]string, error) {
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
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if _, ok := first[st.Ino]; !ok {
			first[st.Ino] = name
		}
		content := ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			content = strings.ReplaceAll(string(b), "\x00", "")
		case unix.S_IFLNK:
			if content, err = os.Readlink(p); err != nil {
				return err
			}
		}
		names := make([]byte, 4096)
		n, err := unix.Llistxattr(p, names)
		if err != nil {
			return err
		}
		attrs := map[string]string{}
		for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
			if name == "" {
				continue
			}
			value := make([]byte, 4096)
			n, err := unix.Lgetxattr(p, name, value)
			if err != nil {
				return err
			}
			attrs[name] = string(value[:n])
		}
		if !links {
			st.Nlink = 0
		}
		out[name] = fmt.Sprintf("%o %d:%d links %d same as %q dev %x at %d.%09d %q %q", st.Mode, st.Uid, st.Gid, st.Nlink,
			first[st.Ino], st.Rdev, st.Mtim.Sec, st.Mtim.Nsec, content, attrs)
		return nil
	})
	return out, err
}

// A copied image has the same bytes and holes, also over the remains of another.
func TestCopyImage(t *testing.T) {
	dir := t.TempDir()
	in, err := os.Create(filepath.Join(dir, "in"))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	const size = 200 << 20
	want := map[int64]string{0: "begin", 5<<20 + 1: "middle", 64 << 20: strings.Repeat("long", 5<<20), size - 3: "end"}
	for off, s := range want {
		if _, err := in.WriteAt([]byte(s), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := in.Truncate(size + 8192); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := out.WriteAt([]byte("remains"), 100<<20); err != nil {
		t.Fatal(err)
	}
	copied, err := gvisor.CopyImage(t.Context(), out, in)
	if err != nil {
		t.Fatal(err)
	}
	if copied > 22<<20 {
		t.Errorf("copied %d bytes, the holes included", copied)
	}
	if string(fileDigest(t, out.Name())[:64]) != string(fileDigest(t, in.Name())[:64]) {
		t.Error("the copy differs")
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(out.Fd()), &st); err != nil || st.Blocks*512 > 24<<20 {
		t.Errorf("the copy takes %d bytes, %v", st.Blocks*512, err)
	}
}
