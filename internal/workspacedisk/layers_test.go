//go:build linux

package workspacedisk_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// layersTests holds what several layers do to one another, the lowest first.
var layersTests = []struct {
	name   string
	layers [][]put
	gone   []string          // of base
	want   map[string]string // besides base
}{
	{"each adds", [][]put{{dirAt("/a"), fileAt("/a/1")}, {dirAt("/a"), fileAt("/a/2")}, {fileAt("/3")}}, nil,
		map[string]string{"/a/1": "in /a/1", "/a/2": "in /a/2", "/3": "in /3"}},
	{"the highest wins", [][]put{{put{path: "/top", mode: ext4image.ModeFile, content: "1"}}, {put{path: "/top", mode: ext4image.ModeFile, content: "2"}}}, nil,
		map[string]string{"/top": "2"}},
	{"a whiteout between", [][]put{{fileAt("/x")}, {whiteoutAt("/x"), whiteoutAt("/top")}, nil}, []string{"/top"}, nil},
	{"a file over a whiteout", [][]put{{whiteoutAt("/top")}, {linkAt("/top", "again")}}, nil, map[string]string{"/top": "-> again"}},
	{"a directory over a whiteout shows nothing below it", [][]put{{whiteoutAt("/b")}, {dirAt("/b"), fileAt("/b/x")}}, []string{"/b/file"},
		map[string]string{"/b/x": "in /b/x"}},
	{"a directory over a file over a directory", [][]put{{fileAt("/b")}, {dirAt("/b"), fileAt("/b/x")}}, []string{"/b/file"},
		map[string]string{"/b/x": "in /b/x"}},
	{"opaque between", [][]put{{dirAt("/b"), fileAt("/b/1")}, {dirAt("/b", "opaque=y"), fileAt("/b/2")}, {dirAt("/b"), fileAt("/b/3")}}, []string{"/b/file"},
		map[string]string{"/b/2": "in /b/2", "/b/3": "in /b/3"}},
	{"a redirect of a redirect", [][]put{{whiteoutAt("/a"), dirAt("/n", "redirect=/a")}, {whiteoutAt("/n"), dirAt("/m", "redirect=n")}},
		[]string{"/a", "/a/file", "/a/sub", "/a/sub/deep"},
		map[string]string{"/m": "directory", "/m/file": "in /a/file", "/m/sub": "directory", "/m/sub/deep": "in /a/sub/deep"}},
	{"a directory of a redirected one is moved out", [][]put{{whiteoutAt("/a"), dirAt("/n", "redirect=/a")}, {dirAt("/n"), whiteoutAt("/n/sub"), dirAt("/m", "redirect=/n/sub")}},
		[]string{"/a", "/a/file", "/a/sub", "/a/sub/deep"},
		map[string]string{"/n": "directory", "/n/file": "in /a/file", "/m": "directory", "/m/deep": "in /a/sub/deep"}},
	{"a relative redirect on the way", [][]put{{whiteoutAt("/a"), dirAt("/n", "redirect=a")}, {dirAt("/n"), whiteoutAt("/n/sub"), dirAt("/m", "redirect=/n/sub")}},
		[]string{"/a", "/a/file", "/a/sub", "/a/sub/deep"},
		map[string]string{"/n": "directory", "/n/file": "in /a/file", "/m": "directory", "/m/deep": "in /a/sub/deep"}},
	{"an opaque directory on the way", [][]put{{dirAt("/a", "opaque=y")}, {dirAt("/m", "redirect=/a/sub")}},
		[]string{"/a/file", "/a/sub", "/a/sub/deep"}, map[string]string{"/m": "directory"}},
	{"a redirect out of an opaque directory on the way", [][]put{{dirAt("/a", "opaque=y"), dirAt("/a/n", "redirect=/b"), whiteoutAt("/b")}, {dirAt("/a"), whiteoutAt("/a/n"), dirAt("/m", "redirect=/a/n")}},
		[]string{"/a/file", "/a/sub", "/a/sub/deep", "/b", "/b/file"}, map[string]string{"/m": "directory", "/m/file": "in /b/file"}},
	{"a whiteout on the way", [][]put{{whiteoutAt("/a")}, {dirAt("/m", "redirect=/a/sub")}},
		[]string{"/a", "/a/file", "/a/sub", "/a/sub/deep"}, map[string]string{"/m": "directory"}},
	{"a file on the way", [][]put{{fileAt("/a")}, {dirAt("/m", "redirect=/a/sub")}},
		[]string{"/a/file", "/a/sub", "/a/sub/deep"}, map[string]string{"/a": "in /a", "/m": "directory"}},
	{"a redirect passes layers that lack it", [][]put{{fileAt("/1")}, {fileAt("/2")}, {whiteoutAt("/b"), dirAt("/n", "redirect=/b")}},
		[]string{"/b", "/b/file"}, map[string]string{"/1": "in /1", "/2": "in /2", "/n": "directory", "/n/file": "in /b/file"}},
	{"a redirect merges what is there under the old name", [][]put{{dirAt("/b"), fileAt("/b/1")}, {whiteoutAt("/b"), dirAt("/n", "redirect=b"), fileAt("/n/2")}},
		[]string{"/b", "/b/file"}, map[string]string{"/n": "directory", "/n/file": "in /b/file", "/n/1": "in /b/1", "/n/2": "in /n/2"}},
	{"a redirect in the middle", [][]put{{dirAt("/b"), fileAt("/b/1")}, {whiteoutAt("/b"), dirAt("/n", "redirect=/b")}, {dirAt("/n"), whiteoutAt("/n/1"), fileAt("/n/3")}},
		[]string{"/b", "/b/file"}, map[string]string{"/n": "directory", "/n/file": "in /b/file", "/n/3": "in /n/3"}},
	{"a whiteout file between", [][]put{{emptyAt("/top", "whiteout=")}, {fileAt("/x")}}, []string{"/top"}, map[string]string{"/x": "in /x"}},
	{"a layer of nothing", [][]put{{dirAt("/b"), fileAt("/b/1")}, nil, {dirAt("/b")}}, nil, map[string]string{"/b/1": "in /b/1"}},
}

// TestLayers: TestKernelMarks asks the kernel the same.
func TestLayers(t *testing.T) {
	t.Parallel()
	for _, tt := range layersTests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			checkLayers(t, tt.gone, tt.want, tt.layers...)
		})
	}
}

// TestManyLayers: a disk of as many layers as a workspace may have is read in
// reasonable time, and one of more is refused.
func TestManyLayers(t *testing.T) {
	t.Parallel()
	const count = 130
	var layers [][]put
	want := map[string]string{}
	for i := range count {
		layer := []put{fileAt(fmt.Sprintf("/a/%d", i)), dirAt("/d"), fileAt(fmt.Sprintf("/d/%d", i))}
		want[fmt.Sprintf("/a/%d", i)], want[fmt.Sprintf("/d/%d", i)] = fmt.Sprintf("in /a/%d", i), fmt.Sprintf("in /d/%d", i)
		if i%10 == 9 { // d moves on
			last := fmt.Sprintf("/d%d", i)
			layer = []put{fileAt(fmt.Sprintf("/a/%d", i)), whiteoutAt("/d"), dirAt(last, "redirect=d")}
			delete(want, fmt.Sprintf("/d/%d", i))
			for j := i - 9; j < i; j++ {
				want[fmt.Sprintf("%s/%d", last, j)] = want[fmt.Sprintf("/d/%d", j)]
				delete(want, fmt.Sprintf("/d/%d", j))
			}
			want[last] = "directory"
		}
		layers = append(layers, layer)
	}
	src := layered(t, baseTree, layers...)
	begin := time.Now()
	d := openSource(t, src)
	if diff := cmp.Diff(shown(nil, want), walkedContents(t, d)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	t.Logf("%d entries of %d layers in %s", len(want), count, time.Since(begin))
	for len(src.Layers) <= 256 {
		src.Layers = append(src.Layers, src.Layers...)
	}
	if _, err := workspacedisk.Open(t.Context(), src, workspacedisk.Options{}); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("opening a disk of %d layers: %v", len(src.Layers), err)
	}
}
