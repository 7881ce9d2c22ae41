package ext4image_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
)

// TestStored writes files with holes and has e2fsprogs read them.
func TestStored(t *testing.T) {
	t.Parallel()
	const block = 4096
	many := func(n int) (list []ext4image.Stretch) {
		for i := range int64(n) {
			list = append(list, ext4image.Stretch{Off: (2*i + 1) * block, Len: block})
		}
		return list
	}
	tests := []struct {
		name   string
		size   int64
		stored []ext4image.Stretch
	}{
		{"zeros", 10 << 20, []ext4image.Stretch{}},
		{"the end", 20<<20 + 5, []ext4image.Stretch{{20 << 20, 5}}},
		{"front and middle", 9 * block, []ext4image.Stretch{{0, 2 * block}, {4 * block, block}}},
		{"an extent tree", 2000 * block, many(1000)},
	}
	w, f := newImage(t, 128<<20)
	for i, tt := range tests {
		var content bytes.Buffer
		for j, s := range tt.stored {
			content.Write(bytes.Repeat([]byte{byte(1 + i + j)}, int(s.Len)))
		}
		e := ext4image.Entry{Path: tt.name, Mode: file, ModTime: testTime, Size: tt.size, Stored: tt.stored}
		if err := w.Add(e, &content); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
	}
	// A file larger than its disk is none of a disk's business.
	if err := w.Add(ext4image.Entry{Path: "huge", Mode: file, Size: 16<<40 - block, Stored: []ext4image.Stretch{}}, nil); err != nil {
		t.Fatal(err)
	}
	finish(t, w)
	check(t, f)
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			want := make([]byte, tt.size)
			for j, s := range tt.stored {
				copy(want[s.Off:], bytes.Repeat([]byte{byte(1 + i + j)}, int(s.Len)))
			}
			out := filepath.Join(t.TempDir(), "out")
			debugfs(t, f, `dump "`+tt.name+`" `+out)
			got, err := os.ReadFile(out)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes differ from the %d written (%v)", len(got), len(want), err)
			}
		})
	}
	if out := debugfs(t, f, "stat huge"); !strings.Contains(out, "Size: 17592186040320") || !strings.Contains(out, "Blockcount: 0") {
		t.Errorf("the huge file:\n%s", out)
	}
}

func TestStoredRefuses(t *testing.T) {
	t.Parallel()
	for name, stored := range map[string][]ext4image.Stretch{
		"unaligned":       {{1, 4096}},
		"negative":        {{0, -4096}},
		"half a block":    {{0, 100}},
		"behind the end":  {{8192, 8192}},
		"backwards":       {{4096, 4096}, {0, 4096}},
		"far, wraps":      {{1 << 62, 4096}},
		"long, wraps":     {{4096, 1<<63 - 1}},
		"negative offset": {{-4096, 4096}},
	} {
		w, _ := newImage(t, 128<<20)
		e := ext4image.Entry{Path: "x", Mode: file, Size: 10_000, Stored: stored}
		if err := w.Add(e, neverEnding{}); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) { return len(p), nil }

var _ io.Reader = neverEnding{}

// TestSizeFor: what fits by its answer does, and a group less does not do.
func TestSizeFor(t *testing.T) {
	t.Parallel()
	const group = 128 << 20
	tests := []struct {
		name          string
		files, blocks int64
		groups        int64
	}{
		{"nothing", 1, 1, 1},
		{"many files", 9000, 1, 2},
		{"a full group", 2, 23_804, 1},
		{"a block more", 2, 23_805, 2},
		{"four groups", 2, 4*32768 - 8193 - 4*514 - 3*257, 4}, // copies of the superblock in groups 0, 1 and 3
		{"five", 2, 4*32768 - 8193 - 4*514 - 3*257 + 1, 5},
	}
	for _, tt := range tests {
		size, err := ext4image.SizeFor(tt.files, tt.blocks)
		if err != nil || size != tt.groups*group {
			t.Errorf("%s: %d groups, %v; want %d", tt.name, size/group, err, tt.groups)
		}
		if tt.blocks > 1 { // a file of that many blocks, but for the directories and its extents
			blocks := tt.blocks - 3
			w, f := newImage(t, size)
			e := ext4image.Entry{Path: "x", Mode: file, Size: blocks * 4096}
			if err := w.Add(e, neverEnding{}); err != nil {
				t.Errorf("%s: %v", tt.name, err)
				continue
			}
			finish(t, w)
			check(t, f)
		}
	}
	if _, err := ext4image.SizeFor(1, 1<<40); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("more than there can be: %v", err)
	}
}
