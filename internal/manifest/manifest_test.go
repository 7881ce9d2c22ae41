package manifest_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

func dir(path string) manifest.Entry {
	return manifest.Entry{Path: path, Type: manifest.Directory, Mode: 0o755}
}

func file(path, content string) manifest.Entry {
	return manifest.Entry{Path: path, Type: manifest.File, Mode: 0o644, Size: int64(len(content)), SHA256: sha256.Sum256([]byte(content))}
}

func link(path, target string) manifest.Entry {
	return manifest.Entry{Path: path, Type: manifest.Symlink, Mode: 0o777, Size: int64(len(target)), Target: target}
}

func seq(entries ...manifest.Entry) iter.Seq2[manifest.Entry, error] {
	return func(yield func(manifest.Entry, error) bool) {
		for _, e := range entries {
			if !yield(e, nil) {
				return
			}
		}
	}
}

func collect(s iter.Seq2[manifest.Entry, error]) (out []manifest.Entry, err error) {
	for e, err := range s {
		if err != nil {
			return out, err
		}
		out = append(out, e)
	}
	return out, nil
}

func encode(t testing.TB, entries ...manifest.Entry) ([]byte, [32]byte) {
	t.Helper()
	var buf bytes.Buffer
	w := manifest.NewWriter(&buf)
	for _, e := range entries {
		if err := w.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	digest, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), digest
}

var tree = []manifest.Entry{
	dir("a"), dir("a/b"), file("a/b/c", "x"), file("a/z", ""), file("a b", "1"), file("a.txt", "2"), link("l", "/etc/passwd"), file("\xff\n", "odd"),
}

func TestOrder(t *testing.T) {
	var paths []string
	for _, e := range tree {
		paths = append(paths, e.Path)
	}
	for range 20 {
		shuffled := slices.Clone(paths)
		rand.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		slices.SortFunc(shuffled, manifest.ComparePaths)
		if diff := cmp.Diff(paths, shuffled); diff != "" {
			t.Fatal(diff)
		}
	}
}

func TestComparePaths(t *testing.T) {
	want := []string{"a", "a/\x01", "a/b", "a/b/c", "a/b-c", "a\x01", "a-b", "a.b", "ab", "b"}
	for i, a := range want {
		for j, b := range want {
			if got := manifest.ComparePaths(a, b); sign(got) != sign(i-j) {
				t.Errorf("%q and %q compare as %d", a, b, got)
			}
		}
	}
}

func TestStoredForm(t *testing.T) {
	b, digest := encode(t, tree...)
	got, err := collect(manifest.Read(bytes.NewReader(b)))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(tree, got); diff != "" {
		t.Error(diff)
	}
	same, err := manifest.Digest(seq(tree...))
	if err != nil || same != digest {
		t.Errorf("Digest gives %x, %v; Close gave %x", same, err, digest)
	}
	other, err := manifest.Digest(seq(tree[:len(tree)-1]...))
	if err != nil || other == digest {
		t.Errorf("a shorter manifest has the digest %x, %v", other, err)
	}
}

func sign(n int) int { return max(-1, min(n, 1)) }

func TestStoredFormDamaged(t *testing.T) {
	b, _ := encode(t, tree...)
	for n := range b {
		if _, err := collect(manifest.Read(bytes.NewReader(b[:n]))); !errors.Is(err, api.ErrDamaged) {
			t.Fatalf("cut at %d of %d: %v", n, len(b), err)
		}
		flipped := bytes.Clone(b)
		flipped[n] ^= 1
		if _, err := collect(manifest.Read(bytes.NewReader(flipped))); !errors.Is(err, api.ErrDamaged) {
			t.Fatalf("byte %d of %d altered: %v", n, len(b), err)
		}
	}
}

func TestChecked(t *testing.T) {
	long := strings.Repeat("x", 256)
	tests := map[string][]manifest.Entry{
		"twice":          {file("a", ""), file("a", "")},
		"out_of_order":   {file("b", ""), file("a", "")},
		"parent_missing": {file("a/b", "")},
		"parent_is_file": {file("a", ""), file("a/b", "")},
		"parent_of_link": {link("a", "b"), file("a/b", "")},
		"left_directory": {dir("a"), file("a/x", ""), file("b/x", "")},
		"absolute":       {file("/a", "")},
		"dots":           {file("..", "")},
		"dot":            {dir("a"), file("a/.", "")},
		"empty_part":     {dir("a"), file("a//b", "")},
		"empty_path":     {file("", "")},
		"nul":            {file("a\x00", "")},
		"long_name":      {file(long, "")},
		"mode":           {{Path: "a", Type: manifest.File, Mode: 0o4755}},
		"type":           {{Path: "a", Type: "device"}},
		"negative_size":  {{Path: "a", Type: manifest.File, Size: -1}},
		"sized_dir":      {{Path: "a", Type: manifest.Directory, Size: 1}},
		"hashed_link":    {{Path: "a", Type: manifest.Symlink, Size: 1, Target: "b", SHA256: [32]byte{1}}},
		"no_target":      {{Path: "a", Type: manifest.Symlink}},
		"wrong_length":   {{Path: "a", Type: manifest.Symlink, Size: 2, Target: "b"}},
		"file_target":    {{Path: "a", Type: manifest.File, Target: "b"}},
	}
	for name, entries := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := collect(manifest.Checked(seq(entries...))); !errors.Is(err, api.ErrInvalid) {
				t.Errorf("passed with %v", err)
			}
		})
	}
	if got, err := collect(manifest.Checked(seq(tree...))); err != nil || len(got) != len(tree) {
		t.Errorf("a good one gives %d entries, %v", len(got), err)
	}
}

func TestCompare(t *testing.T) {
	exec, private := file("f", "1"), file("f", "1")
	exec.Mode, private.Mode = 0o755, 0o600
	type change struct {
		Path, Status string
	}
	tests := []struct {
		name     string
		old, new []manifest.Entry
		want     []change
	}{
		{"nothing", tree, tree, nil},
		{"added", nil, []manifest.Entry{dir("d"), file("d/f", "1")}, []change{{"d/f", "added"}}},
		{"deleted", []manifest.Entry{dir("d"), file("d/f", "1")}, nil, []change{{"d/f", "deleted"}}},
		{"content", []manifest.Entry{file("f", "1")}, []manifest.Entry{file("f", "2")}, []change{{"f", "modified"}}},
		{"executable", []manifest.Entry{file("f", "1")}, []manifest.Entry{exec}, []change{{"f", "modified"}}},
		{"other_modes", []manifest.Entry{file("f", "1")}, []manifest.Entry{private}, nil},
		{"target", []manifest.Entry{link("l", "a")}, []manifest.Entry{link("l", "b")}, []change{{"l", "modified"}}},
		{"type", []manifest.Entry{link("f", "a")}, []manifest.Entry{file("f", "a")}, []change{{"f", "type_changed"}}},
		{"file_to_directory", []manifest.Entry{file("f", "a")}, []manifest.Entry{dir("f"), file("f/g", "")},
			[]change{{"f", "type_changed"}, {"f/g", "added"}}},
		{"empty_directory_added", nil, []manifest.Entry{dir("d"), file("d.x", "")}, []change{{"d", "added"}, {"d.x", "added"}}},
		{"empty_directory_deleted", []manifest.Entry{dir("d")}, nil, []change{{"d", "deleted"}}},
		{"directory_emptied", []manifest.Entry{dir("d"), file("d/f", "1")}, []manifest.Entry{dir("d")},
			[]change{{"d", "modified"}, {"d/f", "deleted"}}},
		{"directory_filled", []manifest.Entry{dir("d")}, []manifest.Entry{dir("d"), file("d/f", "1")}, []change{{"d/f", "added"}}},
		{"both_ends", []manifest.Entry{file("a", ""), file("c", "")}, []manifest.Entry{file("b", ""), file("d", "")},
			[]change{{"a", "deleted"}, {"b", "added"}, {"c", "deleted"}, {"d", "added"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			changes, err := manifest.Compare(seq(tt.old...), seq(tt.new...))
			if err != nil {
				t.Fatal(err)
			}
			var got []change
			for _, c := range changes {
				got = append(got, change{c.Path, c.Status})
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	bad := manifest.Checked(seq(file("b", ""), file("a", "")))
	if _, err := manifest.Compare(seq(), bad); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("a bad sequence gives %v", err)
	}
}

func FuzzRead(f *testing.F) {
	b, _ := encode(f, tree...)
	f.Add(b)
	b, _ = encode(f)
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := collect(manifest.Read(bytes.NewReader(b)))
		if again, cerr := collect(manifest.Checked(seq(entries...))); cerr != nil || len(again) != len(entries) {
			t.Fatalf("yielded what is no manifest: %v", cerr)
		}
		if err == nil {
			if stored, _ := encode(t, entries...); len(stored) > len(b) {
				t.Fatalf("%d bytes became %d", len(b), len(stored))
			}
		}
	})
}
