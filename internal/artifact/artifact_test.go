package artifact_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
)

func open(t testing.TB, dir string) *artifact.Store {
	t.Helper()
	s, err := artifact.Open(artifact.Options{Dir: dir, Noun: "thing"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// writing is a build that makes these files.
func writing(files map[string]string) func(context.Context, *artifact.Build) error {
	return func(_ context.Context, b *artifact.Build) error {
		for name, content := range files {
			path := filepath.Join(b.Out, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				return err
			}
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				return err
			}
		}
		b.Properties["color"] = "blue"
		return nil
	}
}

func install(t testing.TB, s *artifact.Store, name, content string) *artifact.Held {
	t.Helper()
	h, err := s.Do(t.Context(), artifact.Install{Name: name, Recipe: content, Build: writing(map[string]string{"file": content})})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

func mustNotBuild(t testing.TB) func(context.Context, *artifact.Build) error {
	return func(context.Context, *artifact.Build) error {
		t.Error("it was built again")
		return errors.New("built again")
	}
}

func TestInstallAndAcquire(t *testing.T) {
	s := open(t, t.TempDir())
	if _, err := s.Acquire(t.Context(), "a/b:1"); !errors.Is(err, api.ErrNotFound) {
		t.Fatalf("before the install: %v", err)
	}
	files := map[string]string{"one": "1", "sub/two": "22", "sub/three": strings.Repeat("\x00", 1<<20)}
	built, err := s.Do(t.Context(), artifact.Install{Name: "a/b:1", Recipe: "r", Build: writing(files)})
	if err != nil {
		t.Fatal(err)
	}
	defer built.Close()
	h, err := s.Acquire(t.Context(), "a/b:1")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if diff := cmp.Diff(built.Manifest, h.Manifest); diff != "" {
		t.Errorf("the manifests differ (-built +acquired):\n%s", diff)
	}
	var paths []string
	for _, f := range h.Files {
		paths = append(paths, f.Path)
		fi, err := os.Stat(h.Path(f.Path))
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != 0o400 {
			t.Errorf("%s has mode %v", f.Path, fi.Mode())
		}
	}
	if diff := cmp.Diff([]string{"one", "sub/three", "sub/two"}, paths); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if h.Properties["color"] != "blue" {
		t.Errorf("properties are %v", h.Properties)
	}
	again, err := s.Do(t.Context(), artifact.Install{Name: "a/b:1", Recipe: "r", Build: mustNotBuild(t)})
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if _, err := s.AcquireDigest(t.Context(), "sha256:../../etc"); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("a made-up digest gave %v", err)
	}
	if left, err := os.ReadDir(filepath.Join(s.Dir(), "build")); err != nil || len(left) != 2 { // lock and leash
		t.Errorf("the build left %v, %v", left, err)
	}
}

func TestNewRecipeReplaces(t *testing.T) {
	s := open(t, t.TempDir())
	old := install(t, s, "x", "one")
	fresh := install(t, s, "x", "two")
	if old.Digest == fresh.Digest {
		t.Fatal("the digest did not change")
	}
	h, err := s.AcquireDigest(t.Context(), old.Digest) // a workspace made from it
	if err != nil {
		t.Fatal(err)
	}
	h.Close()
}

// TestDamage: whatever happened to the files, it is noticed on use, and the
// next install mends it.
func TestDamage(t *testing.T) {
	rewrite := func(t *testing.T, path, content string) {
		t.Helper()
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name   string
		damage func(t *testing.T, h *artifact.Held)
	}{
		{"changed byte", func(t *testing.T, h *artifact.Held) { rewrite(t, h.Path("file"), "Content") }},
		{"truncated", func(t *testing.T, h *artifact.Held) { rewrite(t, h.Path("file"), "cont") }},
		{"file gone", func(t *testing.T, h *artifact.Held) { must(t, os.Remove(h.Path("file"))) }},
		{"file is a link", func(t *testing.T, h *artifact.Held) {
			must(t, os.Rename(h.Path("file"), h.Dir+".moved"))
			must(t, os.Symlink(h.Dir+".moved", h.Path("file")))
		}},
		{"directory gone", func(t *testing.T, h *artifact.Held) { must(t, os.RemoveAll(h.Dir)) }},
		{"manifest cut", func(t *testing.T, h *artifact.Held) { must(t, os.Truncate(h.Path("manifest.json"), 20)) }},
		{"manifest of something else", func(t *testing.T, h *artifact.Held) {
			b, err := os.ReadFile(h.Path("manifest.json"))
			must(t, err)
			must(t, os.Rename(h.Path("file"), h.Path("fine"))) // so that it fits what is there
			must(t, os.WriteFile(h.Path("manifest.json"), bytes.Replace(b, []byte(`"file"`), []byte(`"fine"`), 1), 0o600))
		}},
		{"reference cut", func(t *testing.T, h *artifact.Held) {
			must(t, os.Truncate(filepath.Join(h.Dir, "../../refs/x.json"), 5))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t, t.TempDir())
			first := install(t, s, "x", "content")
			tt.damage(t, first)
			if h, err := s.Acquire(t.Context(), "x"); !errors.Is(err, api.ErrDamaged) {
				t.Errorf("use of the damaged one gave %v, %v", h, err)
			}
			second := install(t, s, "x", "content")
			if second.Digest != first.Digest {
				t.Errorf("the digest is now %s", second.Digest)
			}
			if b, err := os.ReadFile(second.Path("file")); err != nil || string(b) != "content" {
				t.Errorf("the mended file holds %q, %v", b, err)
			}
			h, err := s.Acquire(t.Context(), "x")
			if err != nil {
				t.Fatal(err)
			}
			h.Close()
		})
	}
}

// TestRestored: equal content in a new file (a restored backup) is accepted.
func TestRestored(t *testing.T) {
	s := open(t, t.TempDir())
	h := install(t, s, "x", "content")
	if err := os.Remove(h.Path("file")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.Path("file"), []byte("content"), 0o400); err != nil {
		t.Fatal(err)
	}
	again, err := s.Acquire(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if again.Files[0].Stamp == h.Files[0].Stamp {
		t.Fatal("the new file has the old one's stamp: this tests nothing")
	}
	_, m, err := s.Lookup("x")
	if err != nil {
		t.Fatal(err)
	}
	if m.Files[0].Stamp != again.Files[0].Stamp {
		t.Error("the new stamp was not recorded")
	}
}

func TestFailedBuildLeavesTheOldOne(t *testing.T) {
	s := open(t, t.TempDir())
	old := install(t, s, "x", "one")
	sentinel := errors.New("no luck")
	cleaned := 0
	_, err := s.Do(t.Context(), artifact.Install{
		Name: "x", Recipe: "two",
		Build: func(_ context.Context, b *artifact.Build) error {
			os.WriteFile(filepath.Join(b.Out, "half"), []byte("h"), 0o600)
			os.WriteFile(filepath.Join(b.Keep, "download"), []byte("d"), 0o600)
			return sentinel
		},
		Clean: func(_ context.Context, _ *artifact.Build, all bool) error {
			cleaned++
			if all {
				t.Error("the downloads of a failed build are to be removed")
			}
			return nil
		},
	})
	if !errors.Is(err, sentinel) {
		t.Fatalf("got %v", err)
	}
	if cleaned != 2 {
		t.Errorf("Clean was called %d times, want before and after", cleaned)
	}
	h, err := s.Acquire(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if h.Digest != old.Digest {
		t.Error("the name means something else now")
	}
	// The next attempt finds the download and nothing else.
	done, err := s.Do(t.Context(), artifact.Install{Name: "x", Recipe: "two", Build: func(_ context.Context, b *artifact.Build) error {
		if _, err := os.Stat(filepath.Join(b.Keep, "download")); err != nil {
			t.Errorf("the download is gone: %v", err)
		}
		if _, err := os.Stat(filepath.Join(b.Out, "half")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the half-made file is there: %v", err)
		}
		return os.WriteFile(filepath.Join(b.Out, "file"), nil, 0o600)
	}})
	if err != nil {
		t.Fatal(err)
	}
	done.Close()
	if _, err := os.Stat(filepath.Join(s.Dir(), "build", "x.keep")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the downloads outlived their use: %v", err)
	}
}

func TestFullDisk(t *testing.T) {
	s := open(t, t.TempDir())
	in := artifact.Install{Name: "x", NeedBytes: 1 << 60, Build: mustNotBuild(t)}
	_, err := s.Do(t.Context(), in)
	if !errors.Is(err, api.ErrExhausted) || api.Hint(err) == "" {
		t.Errorf("too little room gave %v, hint %q", err, api.Hint(err))
	}
	in.NeedBytes = 0
	in.Build = func(context.Context, *artifact.Build) error {
		return fmt.Errorf("writing: %w", &fs.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC})
	}
	_, err = s.Do(t.Context(), in)
	if !errors.Is(err, api.ErrExhausted) || api.Hint(err) == "" {
		t.Errorf("a disk that became full gave %v, hint %q", err, api.Hint(err))
	}
}

// TestTwoAtOnce: one builds, the others wait, say so, and use the result.
func TestTwoAtOnce(t *testing.T) {
	s := open(t, t.TempDir())
	var builds, waits atomic.Int32
	waiting := make(chan struct{}, 3)
	in := artifact.Install{
		Name: "x", Recipe: "r",
		Build: func(ctx context.Context, b *artifact.Build) error {
			builds.Add(1)
			for range 2 { // until both others wait
				select {
				case <-waiting:
				case <-time.After(20 * time.Second):
					return errors.New("nobody waits")
				}
			}
			return os.WriteFile(filepath.Join(b.Out, "file"), []byte("x"), 0o600)
		},
		Progress: func(p api.Progress) {
			if p.Phase == "waiting" {
				waits.Add(1)
				waiting <- struct{}{}
			}
		},
	}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			h, err := s.Do(t.Context(), in)
			if err != nil {
				t.Error(err)
				return
			}
			h.Close()
		})
	}
	wg.Wait()
	if builds.Load() != 1 || waits.Load() != 2 {
		t.Errorf("%d builds and %d waits, want 1 and 2", builds.Load(), waits.Load())
	}
}

func TestCancelWhileWaiting(t *testing.T) {
	s := open(t, t.TempDir())
	started, finish := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		h, err := s.Do(t.Context(), artifact.Install{Name: "x", Build: func(_ context.Context, b *artifact.Build) error {
			close(started)
			<-finish
			return os.WriteFile(filepath.Join(b.Out, "file"), nil, 0o600)
		}})
		if err != nil {
			t.Error(err)
			return
		}
		h.Close()
	})
	<-started
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.Do(ctx, artifact.Install{Name: "x", Build: mustNotBuild(t), Progress: func(api.Progress) { cancel() }})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	close(finish)
	wg.Wait()
}

func TestPrune(t *testing.T) {
	s := open(t, t.TempDir())
	held := install(t, s, "x", "held")
	wanted := install(t, s, "x", "wanted by a workspace")
	unused := install(t, s, "x", "unused")
	child := install(t, s, "x", "held by a child")
	current := install(t, s, "x", "current")
	for _, h := range []*artifact.Held{wanted, unused, current} {
		h.Close()
	}
	// A child that inherited the lock holds on when we let go.
	cmd := exec.Command("cat")
	cmd.ExtraFiles = []*os.File{child.Lock}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	child.Close()
	// A build that broke off.
	_, _ = s.Do(t.Context(), artifact.Install{Name: "broken", Build: func(_ context.Context, b *artifact.Build) error {
		return errors.Join(os.WriteFile(filepath.Join(b.Keep, "download"), make([]byte, 1<<20), 0o600), errors.New("broke off"))
	}})

	got, err := s.Prune(t.Context(), []string{wanted.Digest}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{unused.Digest, "unfinished build of broken"}, got.Removed); diff != "" {
		t.Errorf("removed (-want +got):\n%s", diff)
	}
	if got.FreedBytes < 1<<20 {
		t.Errorf("%d bytes are said to be freed, the download alone had more", got.FreedBytes)
	}
	for _, h := range []*artifact.Held{held, wanted, child, current} {
		again, err := s.AcquireDigest(t.Context(), h.Digest)
		if err != nil {
			t.Errorf("one that is used is gone: %v", err)
			continue
		}
		again.Close()
	}
	if is, err := s.IsHeld(child.Digest); err != nil || !is {
		t.Errorf("the child's is held: %v, %v", is, err)
	}
	stdin.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	held.Close()
	got, err = s.Prune(t.Context(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{held.Digest, wanted.Digest, child.Digest}
	slices.Sort(want)
	if diff := cmp.Diff(want, got.Removed); diff != "" {
		t.Errorf("removed in the second run (-want +got):\n%s", diff)
	}
}

func TestHashFile(t *testing.T) {
	write := func(name string, f func(*os.File)) *os.File {
		file, err := os.Create(filepath.Join(t.TempDir(), name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { file.Close() })
		f(file)
		return file
	}
	hash := func(f *os.File) string {
		sum, err := artifact.HashFile(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		return sum
	}
	const size = 40 << 20
	data := func(f *os.File, off int64) { f.WriteAt([]byte("some data"), off) }
	sparse := hash(write("sparse", func(f *os.File) { f.Truncate(size); data(f, 20<<20+5) }))
	if dense := hash(write("dense", func(f *os.File) { f.Write(make([]byte, size)); data(f, 20<<20+5) })); dense != sparse {
		t.Error("holes and stored zeros have different hashes")
	}
	for name, f := range map[string]func(*os.File){
		"elsewhere": func(f *os.File) { f.Truncate(size); data(f, 21<<20+5) },
		"longer":    func(f *os.File) { f.Truncate(size + 1); data(f, 20<<20+5) },
		"more":      func(f *os.File) { f.Truncate(size); data(f, 20<<20+5); data(f, size-9) },
		"empty":     func(f *os.File) {},
	} {
		if hash(write(name, f)) == sparse {
			t.Errorf("%s: the same hash", name)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	f := write("cancelled", func(f *os.File) { f.Write([]byte("x")) })
	if _, err := artifact.HashFile(ctx, f); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestHashTree(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	seen := map[string]string{}
	differs := func(what string) {
		t.Helper()
		digest, err := artifact.HashTree(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := seen[digest]; ok {
			t.Errorf("%s: the digest is that of %s", what, other)
		}
		seen[digest] = what
	}
	differs("nothing")
	write("a", "1")
	differs("one file")
	write("a", "2")
	differs("another content")
	write("sub/b", "2")
	differs("two files")
	if err := os.Rename(filepath.Join(dir, "a"), filepath.Join(dir, "c")); err != nil {
		t.Fatal(err)
	}
	differs("another name")
	file, err := artifact.HashTree(t.Context(), filepath.Join(dir, "c"))
	if err != nil || seen[file] != "" {
		t.Errorf("a file alone: %s, %v", file, err)
	}
	if err := os.Symlink("c", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := artifact.HashTree(t.Context(), dir); !errors.Is(err, api.ErrDamaged) {
		t.Errorf("with a link: %v, want ErrDamaged", err)
	}
	if _, err := artifact.HashTree(t.Context(), filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("nothing there: %v, want ErrNotExist", err)
	}
}
