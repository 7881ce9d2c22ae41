package guestagent

import (
	"errors"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// linkedTree makes a tree in which a link l lies at each of three depths.
func linkedTree(t testing.TB, targets [3]string) (*os.Root, *directory) {
	t.Helper()
	top := filepath.Join(t.TempDir(), "top")
	for _, dir := range []string{"a/b/c", "d"} {
		if err := os.MkdirAll(filepath.Join(top, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"f", "a/f", "a/b/f", "a/b/c/f", "d/f", "../f"} {
		if err := os.WriteFile(filepath.Join(top, file), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for i, link := range []string{"l", "a/l", "a/b/l"} {
		if err := os.Symlink(targets[i], filepath.Join(top, link)); err != nil {
			t.Skip(err) // no target that Linux allows
		}
	}
	root, err := os.OpenRoot(top)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	d, err := directoryOf(root, ".")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.release)
	return root, d
}

// FuzzBeneath compares with os.Root, which on Linux does what it says.
func FuzzBeneath(f *testing.F) {
	for _, seed := range [][4]string{
		{"a", "b", "c", "l/l/l/f"},
		{"..", "../..", "../../..", "a/b/l/f"},
		{"/", "/etc", "../l", "a/b/l"},
		{"a/l", "../l", "../../l", "a/b/l/f"},
		{"a/b/../../d", "../d/../a/f", "../../a/b/../../../top/f", "l/f"},
		{"a/b/../../d", "../d/../a/f", "../../a/b/../../../top/f", "a/b/l"},
		{"f/", "b/", "./././c/.", "a/l/l/f"},
		{"f/", "b//", "..", "l"},
		{"missing", "missing/../f", "../missing/../../..", "a/l"},
		{"missing", "missing/x", "../missing/../../..", "a/b/l/x"},
		{"a/b/l", "../a/b/../l", "../l", "l/x"},
		{".", "..", "../..", "a/b/l/a/l/l/f"},
		{"f/..", "f/.", "f/../f", "a/l"},
	} {
		f.Add(seed[0], seed[1], seed[2], seed[3])
	}
	f.Fuzz(func(t *testing.T, t0, t1, t2, rel string) {
		rel = path.Clean(rel)
		if !filepath.IsLocal(rel) || strings.ContainsRune(rel, 0) || len(t0+t1+t2+rel) > 200 {
			return // the paths that requests name are clean; os.Root bounds its steps differently
		}
		root, d := linkedTree(t, [3]string{t0, t1, t2})
		for _, follow := range []bool{true, false} {
			look := root.Lstat
			if follow {
				look = root.Stat
			}
			want, wantErr := look(rel)
			if errors.Is(wantErr, unix.ELOOP) {
				continue // os.Root follows 8 links at most, Linux 40
			}
			got, gotErr := lookBeneath(d, rel, follow)
			escapes := wantErr != nil && strings.Contains(wantErr.Error(), "escapes")
			switch {
			case (gotErr == nil) != (wantErr == nil), errors.Is(gotErr, errEscapes) != escapes:
				t.Errorf("%q, following %v: %v, os.Root says %v", rel, follow, gotErr, wantErr)
			case gotErr == nil && got.Ino != want.Sys().(*syscall.Stat_t).Ino:
				t.Errorf("%q, following %v, is another file than os.Root's", rel, follow)
			}
		}
	})
}

// lookBeneath looks at what rel leads to, also by the path without links.
func lookBeneath(d *directory, rel string, follow bool) (unix.Stat_t, error) {
	s, err := d.beneath(rel, follow)
	if err != nil {
		return unix.Stat_t{}, err
	}
	defer s.release()
	st, err := s.dir.stat(s.base)
	if err != nil {
		return st, err
	}
	direct := d.hold()
	for part := range strings.SplitSeq(path.Dir(joinPath("", path.Join(".", s.real()))), "/") {
		sub, err := direct.sub(part)
		direct.release()
		if err != nil {
			return st, errors.New("its path has a link in it: " + err.Error())
		}
		direct = sub
	}
	defer direct.release()
	again, err := direct.stat(path.Base(path.Join(".", s.real())))
	if err != nil || again.Ino != st.Ino {
		return st, errors.New("its path leads elsewhere")
	}
	return st, nil
}

// TestBeneathIsBounded looks up what would take a day.
func TestBeneathIsBounded(t *testing.T) {
	for _, tt := range []struct {
		name    string
		targets [3]string
		rel     string
		want    error
	}{
		{"a loop", [3]string{"l", "l", "l"}, "l/x", unix.ELOOP},
		{"a loop at the end", [3]string{"a/l", "../l", "l"}, "l", unix.ELOOP},
		{"up and down", [3]string{strings.Repeat("d/../", 800) + "l", "l", "l"}, "l", unix.ENAMETOOLONG},
		{"a name", [3]string{"x", "x", "x"}, strings.Repeat("n", 256) + "/x", unix.ENAMETOOLONG},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, d := linkedTree(t, tt.targets)
			s, err := d.beneath(tt.rel, true)
			if err == nil {
				s.release()
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
		})
	}
}
