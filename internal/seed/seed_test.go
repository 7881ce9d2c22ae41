package seed_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
	"github.com/pyro-mcp/pyro/internal/seed"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

func newStore(tb testing.TB) *seed.Store {
	tb.Helper()
	s, err := seed.Open(filepath.Join(tb.TempDir(), "seeds"), nil)
	must(tb, err)
	return s
}

func build(tb testing.TB, s *seed.Store, src seed.Source) *seed.Seed {
	tb.Helper()
	out, err := s.Build(context.Background(), src, nil)
	must(tb, err)
	tb.Cleanup(func() { out.Close() })
	return out
}

// write makes files: a name with a slash at its end is a directory, content
// that begins with "->" a link.
func write(tb testing.TB, dir string, files map[string]string) {
	tb.Helper()
	for name, content := range files {
		full := filepath.Join(dir, name)
		must(tb, os.MkdirAll(filepath.Dir(full), 0o755))
		switch target, isLink := strings.CutPrefix(content, "->"); {
		case strings.HasSuffix(name, "/"):
			must(tb, os.MkdirAll(full, 0o755))
		case isLink:
			must(tb, os.Symlink(target, full))
		default:
			must(tb, os.WriteFile(full, []byte(content), 0o644))
		}
	}
}

// paths returns what is in a seed: "d/" for a directory, "l->x" for a link.
func paths(tb testing.TB, s *seed.Seed) []string {
	tb.Helper()
	out := []string{}
	for e, err := range manifest.Checked(s.Manifest(context.Background())) {
		must(tb, err)
		switch e.Type {
		case manifest.Directory:
			e.Path += "/"
		case manifest.Symlink:
			e.Path += "->" + e.Target
		}
		out = append(out, e.Path)
	}
	return out
}

func without(in []string, prefix string) []string {
	return slices.DeleteFunc(slices.Clone(in), func(p string) bool { return strings.HasPrefix(p, prefix) })
}

// unpack writes a seed's tar into a new directory with the host's tar.
func unpack(tb testing.TB, s *seed.Seed) string {
	tb.Helper()
	dir := tb.TempDir()
	var b bytes.Buffer
	must(tb, s.WriteTar(context.Background(), &b))
	untar(tb, &b, dir)
	return dir
}

func untar(tb testing.TB, r io.Reader, dir string) {
	tb.Helper()
	cmd := exec.Command("tar", "-x", "-p", "-C", dir, "--no-same-owner")
	cmd.Stdin = r
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("tar: %v: %s", err, out)
	}
}

var oddFiles = map[string]string{
	"plain": "content\n", "empty": "", "d/deep/er/f": "x", "vacant/": "",
	"sp ace": "1", "new\nline": "2", "\xff\xfe": "3", "-dash": "4", `quo"te\`: "5", "$(touch PWN);!x": "6",
	"abs": "->/etc/passwd", "broken": "->nowhere", "up": "->../../..", "loop": "->loop", "long": "->" + strings.Repeat("x/", 2000) + "y",
	strings.Repeat("n", 255): "7", "big": strings.Repeat("0123456789abcdef", 60_000), "zeros": strings.Repeat("\x00", 500_000),
}

func TestDirectory(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, oddFiles)
	must(t, os.Chmod(filepath.Join(dir, "plain"), 0o4750))
	must(t, os.Chmod(filepath.Join(dir, "d"), 0o700))
	old := time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC)
	must(t, os.Chtimes(filepath.Join(dir, "plain"), old, old))
	must(t, os.Link(filepath.Join(dir, "plain"), filepath.Join(dir, "hard")))
	must(t, unix.Mkfifo(filepath.Join(dir, "pipe"), 0o644))

	s := build(t, newStore(t), seed.Source{Path: dir})
	if got, want := s.Info.Mode, api.SeedDirectory; got != want {
		t.Errorf("mode %q", got)
	}
	if diff := cmp.Diff([]api.SkippedEntry{{Path: "pipe", Reason: "it is a device, a pipe or a socket"}}, s.Info.Skipped); diff != "" {
		t.Error(diff)
	}
	entries := map[string]manifest.Entry{}
	for e, err := range manifest.Checked(s.Manifest(context.Background())) {
		must(t, err)
		entries[e.Path] = e
	}
	if int64(len(entries)) != s.Info.EntryCount || len(entries) != len(oddFiles)+1+3 { // hard; d, d/deep, d/deep/er
		t.Errorf("%d entries, and %d are reported", len(entries), s.Info.EntryCount)
	}
	for name, content := range oddFiles {
		e, ok := entries[strings.TrimSuffix(name, "/")]
		if !ok {
			t.Errorf("%q is missing", name)
			continue
		}
		if e.Type == manifest.File {
			if e.SHA256 != sha256.Sum256([]byte(content)) {
				t.Errorf("%q has another hash", name)
			}
			var b bytes.Buffer
			must(t, s.Content(context.Background(), name, &b))
			if b.String() != content {
				t.Errorf("%q has other content", name)
			}
		}
	}
	if e := entries["plain"]; e.Mode != 0o750 {
		t.Errorf("plain has mode %o", e.Mode)
	}
	for _, p := range []string{"nowhere", "plain/x", "pipe"} {
		if err := s.Content(context.Background(), p, io.Discard); !errors.Is(err, api.ErrNotFound) {
			t.Errorf("content of %q: %v", p, err)
		}
	}
	if err := s.Content(context.Background(), "abs", io.Discard); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("content of a link: %v", err)
	}

	out := unpack(t, s)
	for name, content := range oddFiles {
		full := filepath.Join(out, name)
		if target, isLink := strings.CutPrefix(content, "->"); isLink {
			if got, err := os.Readlink(full); err != nil || got != target {
				t.Errorf("link %.20q leads to %.20q, %v", name, got, err)
			}
			continue
		}
		if !strings.HasSuffix(name, "/") {
			if got, err := os.ReadFile(full); err != nil || string(got) != content {
				t.Errorf("%.20q differs: %v", name, err)
			}
		}
	}
	fi, err := os.Stat(filepath.Join(out, "plain"))
	must(t, err)
	if !fi.ModTime().Equal(old) || fi.Mode().Perm() != 0o750 {
		t.Errorf("plain has time %v and mode %v", fi.ModTime(), fi.Mode())
	}
}

// The image is what the gVisor engine mounts: it must be whole by itself.
func TestImage(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, oddFiles)
	s := build(t, newStore(t), seed.Source{Path: dir})
	d, err := workspacedisk.Open(context.Background(), workspacedisk.Source{Path: s.ImagePath, Format: workspacedisk.FormatRaw}, workspacedisk.Options{})
	must(t, err)
	defer d.Close()
	if d.Replayed() {
		t.Error("the image needs recovery")
	}
	list, err := d.List(context.Background(), "/upper", false)
	must(t, err)
	if len(list.Entries) != 1 || list.Entries[0].Path != "/upper/workspace" {
		t.Errorf("in /upper lies %v", list.Entries)
	}
	r, err := d.Read(context.Background(), "/upper/workspace/d/deep/er/f", 10)
	must(t, err)
	if r.Content != "x" {
		t.Errorf("content %q", r.Content)
	}
	testenv.RequireTools(t, "e2fsprogs", "e2fsck")
	if out, err := exec.Command("e2fsck", "-f", "-n", s.ImagePath).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	var st unix.Stat_t
	must(t, unix.Stat(s.ImagePath, &st))
	if st.Blocks*512 > 8<<20 {
		t.Errorf("the image takes %d bytes on the disk", st.Blocks*512)
	}
}

// Everything of a seed belongs to whom the source says, and is another seed than
// root's, but the directory that stands for the guest's own root directory.
func TestOwner(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, oddFiles)
	archive := filepath.Join(t.TempDir(), "a.tar")
	if out, err := exec.Command("tar", "-c", "-f", archive, "-C", dir, ".").CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	store := newStore(t)
	// Both numbers have bits that ext4 keeps apart from the others.
	const uid, gid = 70_000, 70_001
	for _, source := range []string{dir, archive} {
		roots := build(t, store, seed.Source{Path: source})
		users := build(t, store, seed.Source{Path: source, UID: uid, GID: gid})
		others := build(t, store, seed.Source{Path: source, UID: gid, GID: uid})
		if roots.Digest == users.Digest || users.Digest == others.Digest {
			t.Error("seeds of different owners are one")
		}
		if d := cmp.Diff(paths(t, roots), paths(t, users)); d != "" {
			t.Error(d)
		}
		for _, s := range []*seed.Seed{roots, users} {
			of := [2]uint32{}
			if s == users {
				of = [2]uint32{uid, gid}
			}
			want := map[string][2]uint32{"/upper": {}, "/upper/workspace": of}
			for e, err := range s.Manifest(t.Context()) {
				must(t, err)
				want["/upper/workspace/"+e.Path] = of
			}
			if d := cmp.Diff(want, owners(t, s.ImagePath)); d != "" {
				t.Error(d)
			}
		}
	}
}

// owners returns whom everything at and below /upper of an image belongs to.
func owners(tb testing.TB, image string) map[string][2]uint32 {
	tb.Helper()
	f, err := os.Open(image)
	must(tb, err)
	defer f.Close()
	fi, err := f.Stat()
	must(tb, err)
	fs, err := ext4.Open(tb.Context(), f, fi.Size())
	must(tb, err)
	budget := &ext4.Budget{DirBytes: 1 << 20}
	root, err := fs.Inode(ext4.RootInode)
	must(tb, err)
	number, _, err := fs.Lookup(tb.Context(), root, budget, "upper")
	must(tb, err)
	out := map[string][2]uint32{}
	pending := map[string]uint32{"/upper": number}
	for len(pending) > 0 {
		for path, number := range pending {
			delete(pending, path)
			ino, err := fs.Inode(number)
			must(tb, err)
			out[path] = [2]uint32{ino.UID, ino.GID}
			if !ino.IsDir() {
				continue
			}
			must(tb, fs.ReadDir(tb.Context(), ino, budget, func(e ext4.Dirent) error {
				pending[path+"/"+e.Name] = e.Inode
				return nil
			}))
		}
	}
	return out
}

func TestEmpty(t *testing.T) {
	store := newStore(t)
	s := build(t, store, seed.Source{})
	if s.Info.Mode != api.SeedEmpty || s.Info.SeedPath != nil || len(paths(t, s)) != 0 {
		t.Errorf("%+v with %v", s.Info, paths(t, s))
	}
	if again := build(t, store, seed.Source{}); again.Digest != s.Digest {
		t.Error("two empty seeds differ")
	}
	var b bytes.Buffer
	must(t, s.WriteTar(context.Background(), &b))
	if _, err := tar.NewReader(&b).Next(); !errors.Is(err, io.EOF) {
		t.Errorf("its tar holds something: %v", err)
	}
}

func TestDigest(t *testing.T) {
	store := newStore(t)
	when := time.Unix(1e9, 5)
	make := func(change func(dir string)) string {
		dir := t.TempDir()
		write(t, dir, map[string]string{"a": "1", "d/b": "2"})
		for _, p := range []string{"a", "d/b", "d", "."} {
			must(t, os.Chtimes(filepath.Join(dir, p), when, when))
		}
		change(dir)
		return build(t, store, seed.Source{Path: dir}).Digest
	}
	same := make(func(string) {})
	if got := make(func(string) {}); got != same {
		t.Error("equal trees have different digests")
	}
	for name, change := range map[string]func(string){
		"content": func(dir string) {
			must(t, os.WriteFile(filepath.Join(dir, "a"), []byte("2"), 0o644))
			must(t, os.Chtimes(filepath.Join(dir, "a"), when, when))
		},
		"mode": func(dir string) { must(t, os.Chmod(filepath.Join(dir, "a"), 0o600)) },
	} {
		if make(change) == same {
			t.Errorf("another %s has the same digest", name)
		}
	}
	older := func(dir string) { must(t, os.Chtimes(filepath.Join(dir, "d/b"), when, when.Add(-1))) }
	if make(older) == same {
		t.Error("another time has the same digest")
	}
}

func TestStoreKeepsAndPrunes(t *testing.T) {
	ctx := context.Background()
	store := newStore(t)
	var digests []string
	for i := range 3 {
		dir := t.TempDir()
		write(t, dir, map[string]string{"f": fmt.Sprint(i)})
		s := build(t, store, seed.Source{Path: dir})
		digests = append(digests, s.Digest)
		if i > 0 { // the first stays held
			must(t, s.Close())
			must(t, s.Close())
		}
	}
	out, err := store.Prune(ctx, []string{digests[1]})
	must(t, err)
	if diff := cmp.Diff([]string{digests[2]}, out.Removed); diff != "" {
		t.Error(diff)
	}
	if out.FreedBytes <= 0 {
		t.Errorf("%d bytes freed", out.FreedBytes)
	}
	for i, d := range digests {
		s, err := store.Get(ctx, d)
		if i == 2 {
			if !errors.Is(err, api.ErrNotFound) {
				t.Errorf("a pruned one: %v", err)
			}
			continue
		}
		must(t, err)
		if i == 1 { // only this holds it now
			if _, err := store.Prune(ctx, nil); err != nil {
				t.Error(err)
			}
			must(t, s.Content(ctx, "f", io.Discard))
		}
		if s.Info.EntryCount != 1 || s.Info.BytesWritten != 1 {
			t.Errorf("%+v", s.Info)
		}
		must(t, s.Close())
	}
	for _, bad := range []string{"", "sha256:../../etc", "sha256:" + strings.Repeat("A", 64)} {
		if _, err := store.Get(ctx, bad); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestDamagedIsNoticedAndMended(t *testing.T) {
	ctx := context.Background()
	store := newStore(t)
	dir := t.TempDir()
	write(t, dir, map[string]string{"f": "1"})
	s := build(t, store, seed.Source{Path: dir})
	must(t, os.Chmod(s.ImagePath, 0o600))
	must(t, os.Truncate(s.ImagePath, 4096))
	if _, err := store.Get(ctx, s.Digest); !errors.Is(err, api.ErrDamaged) {
		t.Errorf("a cut image: %v", err)
	}
	build(t, store, seed.Source{Path: dir})
	again, err := store.Get(ctx, s.Digest)
	must(t, err)
	defer again.Close()
	var b bytes.Buffer
	must(t, again.Content(ctx, "f", &b))
	if b.String() != "1" {
		t.Errorf("content %q", b.String())
	}
	m := filepath.Join(filepath.Dir(s.ImagePath), "manifest")
	text, err := os.ReadFile(m)
	must(t, err)
	must(t, os.Remove(m))
	text[len(text)/2] ^= 1
	must(t, os.WriteFile(m, text, 0o400))
	for _, err = range again.Manifest(ctx) {
	}
	if !errors.Is(err, api.ErrDamaged) {
		t.Errorf("an altered manifest: %v", err)
	}
}

func TestManyBuildAtOnce(t *testing.T) {
	store := newStore(t)
	dir := t.TempDir()
	write(t, dir, oddFiles)
	var wg sync.WaitGroup
	digests := make([]string, 6)
	for i := range digests {
		wg.Go(func() {
			s, err := store.Build(context.Background(), seed.Source{Path: dir}, nil)
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			digests[i] = s.Digest
			if err := s.WriteTar(context.Background(), io.Discard); err != nil {
				t.Error(err)
			}
			if _, err := store.Prune(context.Background(), nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(slices.Compact(digests)) != 1 {
		t.Errorf("different digests: %v", digests)
	}
}

// A build that is cancelled, or whose process is killed, leaves nothing that
// looks like a seed, and what it leaves is removed.
func TestBrokenOff(t *testing.T) {
	base := filepath.Join(t.TempDir(), "seeds")
	store, err := seed.Open(base, nil)
	must(t, err)
	dir := t.TempDir()
	write(t, dir, oddFiles)
	ctx, cancel := context.WithCancel(context.Background())
	_, err = store.Build(ctx, seed.Source{Path: dir}, func(p api.Progress) {
		if p.Phase == "copying" {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	for _, sub := range []string{"objects", "build"} {
		if left, err := os.ReadDir(filepath.Join(base, sub)); err != nil || len(left) > 0 {
			t.Errorf("%s holds %v, %v", sub, left, err)
		}
	}
	write(t, base, map[string]string{"build/0123.lock": "", "build/0123/out/seed.ext4": "half"})
	_, err = store.Prune(context.Background(), nil)
	must(t, err)
	if left, err := os.ReadDir(filepath.Join(base, "build")); err != nil || len(left) > 0 {
		t.Errorf("build holds %v, %v", left, err)
	}
}

func TestProgress(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, oddFiles)
	var last api.Progress
	s, err := newStore(t).Build(context.Background(), seed.Source{Path: dir}, func(p api.Progress) { last = p })
	must(t, err)
	defer s.Close()
	if last.Phase != "copying" || last.Done != s.Info.BytesWritten || last.Total != last.Done {
		t.Errorf("the last is %+v of %d bytes", last, s.Info.BytesWritten)
	}
}

func TestSourceErrors(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"text": "no archive", "long": strings.Repeat("no archive\n", 100)})
	must(t, unix.Mkfifo(filepath.Join(dir, "pipe"), 0o644))
	for path, class := range map[string]error{"missing": api.ErrNotFound, "text": api.ErrInvalid, "long": api.ErrInvalid, "pipe": api.ErrInvalid} {
		_, err := newStore(t).Build(context.Background(), seed.Source{Path: filepath.Join(dir, path)}, nil)
		if !errors.Is(err, class) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// A file that becomes shorter while it is read does not get into a seed half,
// and the seed is whole without it.
func TestFileThatShrinks(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"a": "1", "m": strings.Repeat("x", 20<<20), "z": "1"})
	shrink := func() { must(t, os.Truncate(filepath.Join(dir, "m"), 5)) }
	var once sync.Once
	s, err := newStore(t).Build(context.Background(), seed.Source{Path: dir}, func(p api.Progress) {
		if p.Phase == "copying" { // the first bytes have been read
			once.Do(shrink)
		}
	})
	must(t, err)
	defer s.Close()
	got := paths(t, s)
	switch s.Info.SkippedCount {
	case 0: // it was opened after that
		var b bytes.Buffer
		must(t, s.Content(context.Background(), "m", &b))
		if b.String() != "xxxxx" {
			t.Errorf("it has %d bytes", b.Len())
		}
	case 1:
		if diff := cmp.Diff([]string{"a", "z"}, got); diff != "" {
			t.Error(diff)
		}
		if diff := cmp.Diff([]api.SkippedEntry{{Path: "m", Reason: "it changed while it was read"}}, s.Info.Skipped); diff != "" {
			t.Error(diff)
		}
	default:
		t.Errorf("skipped %v", s.Info.Skipped)
	}
	if out, err := exec.Command("e2fsck", "-f", "-n", s.ImagePath).CombinedOutput(); err != nil && !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}

	write(t, dir, map[string]string{"m": strings.Repeat("x", 20<<20)})
	once = sync.Once{}
	_, err = seed.WriteTar(context.Background(), seed.Source{Path: dir}, writerFunc(func(p []byte) (int, error) {
		once.Do(shrink)
		return len(p), nil
	}), nil)
	if err != nil && !errors.Is(err, api.ErrBusy) { // nil if it was opened after that
		t.Errorf("as a tar: %v", err)
	}
}

// What is replaced by a link after it was measured is not followed to where the
// link leads.
func TestReplacedByLinks(t *testing.T) {
	outside := t.TempDir()
	write(t, outside, map[string]string{"f": "secret"})
	dir := t.TempDir()
	files := map[string]string{"x/f": "1", "y": "1"}
	for i := range 300 { // more than are read ahead
		files[fmt.Sprintf("a%03d", i)] = "1"
	}
	write(t, dir, files)
	var once sync.Once
	var b bytes.Buffer
	info, err := seed.WriteTar(context.Background(), seed.Source{Path: dir}, writerFunc(func(p []byte) (int, error) {
		once.Do(func() {
			must(t, os.RemoveAll(filepath.Join(dir, "x")))
			must(t, os.Remove(filepath.Join(dir, "y")))
			write(t, dir, map[string]string{"x": "->" + outside, "y": "->" + filepath.Join(outside, "f")})
		})
		return b.Write(p)
	}), nil)
	must(t, err)
	if bytes.Contains(b.Bytes(), []byte("secret")) {
		t.Error("a file outside came along")
	}
	want := []api.SkippedEntry{{Path: "x/f", Reason: "it changed while it was read"}, {Path: "y", Reason: "it changed while it was read"}}
	if diff := cmp.Diff(want, info.Skipped); diff != "" {
		t.Error(diff)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestUnreadable(t *testing.T) {
	testenv.Require(t, "unprivileged", os.Geteuid() != 0, "root reads everything")
	dir := t.TempDir()
	write(t, dir, map[string]string{"secret": "1", "closed/f": "1", "open": "1"})
	must(t, os.Chmod(filepath.Join(dir, "secret"), 0))
	must(t, os.Chmod(filepath.Join(dir, "closed"), 0))
	t.Cleanup(func() { os.Chmod(filepath.Join(dir, "closed"), 0o700) })
	s := build(t, newStore(t), seed.Source{Path: dir})
	if diff := cmp.Diff([]string{"open"}, paths(t, s)); diff != "" {
		t.Error(diff)
	}
	if s.Info.SkippedCount != 2 {
		t.Errorf("skipped %v", s.Info.Skipped)
	}
}

func TestWriteTar(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, oddFiles)
	var direct, through bytes.Buffer
	info, err := seed.WriteTar(context.Background(), seed.Source{Path: dir}, &direct, nil)
	must(t, err)
	s := build(t, newStore(t), seed.Source{Path: dir})
	must(t, s.WriteTar(context.Background(), &through))
	if !bytes.Equal(direct.Bytes(), through.Bytes()) {
		t.Errorf("the tar of the source has %d bytes and differs from the seed's with %d", direct.Len(), through.Len())
	}
	if diff := cmp.Diff(s.Info, info); diff != "" {
		t.Error(diff)
	}
}
