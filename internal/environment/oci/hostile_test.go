package oci_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/environment/oci"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// TestHostileLayers: each is refused, or makes a tree that holds nothing but
// what is listed, and leaves the file alone that it aims at.
func TestHostileLayers(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	many := func(n int) []entry {
		var out []entry
		for i := range n {
			out = append(out, file(fmt.Sprint(i), ""))
		}
		return out
	}
	tests := []struct {
		name   string
		layers [][]entry
		class  error  // nil if it is harmless
		says   string // in the error
		want   map[string]string
	}{
		{"DotDot", [][]entry{{file("../../../../"+outside, "x")}}, api.ErrInvalid, "leaves its directory", nil},
		{"DotDotInTheMiddle", [][]entry{{file("a/../../b", "x")}}, api.ErrInvalid, "leaves its directory", nil},
		{"DotDotBehindDot", [][]entry{{file("./../x", "x")}}, api.ErrInvalid, "leaves its directory", nil},
		{"Absolute", [][]entry{{file(outside, "x")}}, nil, "", map[string]string{}},
		{"ThroughALink", [][]entry{{symlink("l", filepath.Dir(outside)), file("l/outside", "x")}}, nil, "", map[string]string{}},
		{"ThroughALinkUpwards", [][]entry{{symlink("l", "../../../.."), file("l"+outside, "x")}}, nil, "", map[string]string{}},
		{"ThroughALinkOfALowerLayer", [][]entry{{symlink("etc", filepath.Dir(outside))}, {file("etc/outside", "x")}}, nil, "", map[string]string{}},
		{"ThroughALoop", [][]entry{{symlink("a", "b"), symlink("b", "a"), file("a/f", "x")}}, api.ErrInvalid, "too many links", nil},
		{"HardLinkOutside", [][]entry{{link("h", outside), file("h", "x")}}, api.ErrInvalid, "no file", nil},
		{"HardLinkDotDot", [][]entry{{link("h", "../"+outside)}}, api.ErrInvalid, "leaves its directory", nil},
		{"HardLinkToALink", [][]entry{{symlink("l", outside), link("h", "l"), file("h", "x")}}, nil, "",
			map[string]string{"l": "-> " + outside, "h": describe(tar.TypeReg, 0o755, "x")}},
		{"HardLinkToADirectory", [][]entry{{dir("d"), link("h", "d")}}, api.ErrInvalid, "no file", nil},
		{"WhiteoutThroughALink", [][]entry{{symlink("l", filepath.Dir(outside))}, {whiteout("l/.wh.outside")}}, api.ErrInvalid, `leads through the link "l"`, nil},
		{"OpaqueThroughALink", [][]entry{{dir("d"), file("d/f", "x"), symlink("l", "d")}, {whiteout("l/.wh..wh..opq")}}, api.ErrInvalid, `leads through the link "l"`, nil},
		{"WhiteoutDotDot", [][]entry{{file("f", "x")}, {whiteout(".wh...")}}, api.ErrInvalid, "names nothing", nil},
		{"WhiteoutOutside", [][]entry{{file("f", "x")}, {whiteout("../../.wh.f")}}, api.ErrInvalid, "leaves its directory", nil},
		{"WhiteoutOfTheRoot", [][]entry{{file("f", "x")}, {whiteout(".wh..")}}, api.ErrInvalid, "names nothing", nil},
		{"WhiteoutWithoutName", [][]entry{{whiteout(".wh.")}}, api.ErrInvalid, "names nothing", nil},
		{"LostAndFound", [][]entry{{file("lost+found", "x"), file("f", "x")}, {whiteout(".wh.lost+found")}}, nil, "",
			map[string]string{"f": describe(tar.TypeReg, 0o755, "x")}},
		{"RootIsAFile", [][]entry{{file(".", "x")}}, api.ErrInvalid, "replace the root", nil},
		{"FileAsDirectory", [][]entry{{file("f", "x"), file("f/g", "y")}}, api.ErrInvalid, "used as a directory", nil},
		{"LongName", [][]entry{{file(strings.Repeat("x", 256), "")}}, api.ErrInvalid, "limit is 255", nil},
		{"LongPath", [][]entry{{file(strings.Repeat("x/", 2049)+"f", "")}}, api.ErrInvalid, "limit is 4096", nil},
		{"LongTarget", [][]entry{{symlink("l", strings.Repeat("x", 5000))}}, api.ErrInvalid, "symlink's target", nil},
		{"HugeAttribute", [][]entry{{{name: "f", kind: tar.TypeReg, pax: map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 5000)}}}}, api.ErrExhausted, "extended attributes", nil},
		{"Owner", [][]entry{{{name: "f", kind: tar.TypeReg, uid: 1 << 32}}}, api.ErrInvalid, "out of range", nil},
		{"ManyEntries", [][]entry{many(60), many(60)}, api.ErrExhausted, "limit is 100", nil},
		{"DeepTree", [][]entry{{file(strings.Repeat("d/", 120)+"f", "")}}, api.ErrExhausted, "limit is 100", nil},
		{"ManyNames", [][]entry{{{name: "f", kind: tar.TypeReg, pax: map[string]string{"SCHILY.xattr.user.x": strings.Repeat("x", 70<<10)}}}}, api.ErrExhausted, "names and attributes", nil},
		{"LargeFile", [][]entry{{file("f", strings.Repeat("x", 2<<20))}}, api.ErrExhausted, "", nil},
		{"ManyLayers", make([][]entry, 9), api.ErrExhausted, "9 layers, the limit is 8", nil},
		{"Sparse", [][]entry{{{name: "f", kind: tar.TypeReg, pax: map[string]string{
			"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "f", "GNU.sparse.realsize": "1099511627776"}, content: "0\n" + strings.Repeat("\x00", 510)}}},
			api.ErrUnsupported, "sparse", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := os.WriteFile(outside, []byte("untouched"), 0o600); err != nil {
				t.Fatal(err)
			}
			s, p := newServer(t), newPuller(t)
			p.Limits = oci.Limits{Layers: 8, CompressedBytes: 1 << 20, TreeBytes: 1 << 20, Entries: 100, NameBytes: 64 << 10, DocumentBytes: 64 << 10}
			var layers []v1.Layer
			for _, l := range tt.layers {
				layers = append(layers, rawLayer(t, rawArchive(t, l...)))
			}
			image, _, err := build(t.Context(), t, p, s.push(t, "hostile", imageOf(t, v1.Config{}, layers...)))
			switch {
			case tt.class != nil && (!errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.says)):
				t.Errorf("got %v (%s), want %q of the class %v", err, api.Code(err), tt.says, tt.class)
			case tt.class == nil && err != nil:
				t.Error(err)
			case tt.class == nil && len(tt.want) > 0:
				if d := cmp.Diff(tt.want, read(t, image)); d != "" {
					t.Error(d)
				}
			}
			if b, err := os.ReadFile(outside); err != nil || string(b) != "untouched" {
				t.Errorf("the file outside holds %q, %v", b, err)
			}
		})
	}
}

// rawArchive is archive without the writer's refusal of GNU's records.
func rawArchive(t *testing.T, entries ...entry) []byte {
	for _, e := range entries {
		if e.pax["GNU.sparse.major"] == "" {
			continue
		}
		var records strings.Builder
		for k, v := range e.pax {
			for n := len(k) + len(v) + 3; ; n++ {
				if s := fmt.Sprintf("%d %s=%s\n", n, k, v); len(s) == n {
					records.WriteString(s)
					break
				}
			}
		}
		// As the writer knows no such record, the header that holds them is
		// made of that of a file.
		b := archive(t, file("pax", records.String()), file(e.name, e.content))
		retype(b[:512], tar.TypeXHeader, int64(records.Len()))
		return b
	}
	return archive(t, entries...)
}

// retype changes what a header says, with the checksum that it then has: POSIX
// ustar, pax(1).
func retype(header []byte, kind byte, size int64) {
	header[156] = kind
	copy(header[124:], fmt.Sprintf("%011o\x00", size))
	copy(header[148:], "        ")
	sum := 0
	for _, c := range header {
		sum += int(c)
	}
	copy(header[148:], fmt.Sprintf("%06o\x00 ", sum))
}

// TestBomb: what unpacks to far more than allowed is given up early.
func TestBomb(t *testing.T) {
	s, p := newServer(t), newPuller(t)
	p.Limits = oci.DefaultLimits
	p.Limits.TreeBytes = 1 << 20
	bomb := rawLayer(t, append(archive(t, file("f", "x")), make([]byte, 64<<20)...)) // zeros behind the end
	_, _, err := build(t.Context(), t, p, s.push(t, "bomb", imageOf(t, v1.Config{}, bomb)))
	if !errors.Is(err, api.ErrExhausted) {
		t.Errorf("got %v", err)
	}
}

// changed is an image whose manifest or configuration lies.
type changed struct {
	v1.Image
	manifest  func(*v1.Manifest)
	rawConfig []byte
}

func (c changed) RawManifest() ([]byte, error) {
	m, err := c.Manifest()
	if err != nil {
		return nil, err
	}
	return json.Marshal(m)
}

func (c changed) Manifest() (*v1.Manifest, error) {
	m, err := c.Image.Manifest()
	if err != nil {
		return nil, err
	}
	m = m.DeepCopy()
	if c.rawConfig != nil {
		m.Config.Digest, m.Config.Size, _ = v1.SHA256(bytes.NewReader(c.rawConfig))
	}
	if c.manifest != nil {
		c.manifest(m)
	}
	return m, nil
}

func (c changed) RawConfigFile() ([]byte, error) {
	if c.rawConfig != nil {
		return c.rawConfig, nil
	}
	return c.Image.RawConfigFile()
}

func (c changed) ConfigFile() (*v1.ConfigFile, error)       { return partial.ConfigFile(c) }
func (c changed) Digest() (v1.Hash, error)                  { return partial.Digest(c) }
func (c changed) Size() (int64, error)                      { return partial.Size(c) }
func (c changed) ConfigName() (v1.Hash, error)              { return partial.ConfigName(c) }
func (c changed) Layers() ([]v1.Layer, error)               { return c.Image.Layers() }
func (c changed) ConfigLayer() (v1.Layer, error)            { return partial.ConfigLayer(c) }
func (c changed) LayerByDiffID(h v1.Hash) (v1.Layer, error) { return c.Image.LayerByDiffID(h) }

func TestHostileManifests(t *testing.T) {
	layer := layerOf(t, file("f", "x"))
	good := imageOf(t, v1.Config{}, layer)
	other, err := layerOf(t, file("g", "y")).Digest()
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name  string
		image v1.Image
		class error
		says  string
	}{
		{"Foreign", changed{Image: good, manifest: func(m *v1.Manifest) { m.Layers[0].MediaType = types.DockerForeignLayer }}, api.ErrUnsupported, "somewhere else"},
		{"ForeignURL", changed{Image: good, manifest: func(m *v1.Manifest) { m.Layers[0].URLs = []string{"http://192.0.2.1/x"} }}, api.ErrUnsupported, "somewhere else"},
		{"LayerType", changed{Image: good, manifest: func(m *v1.Manifest) { m.Layers[0].MediaType = "application/x-sh" }}, api.ErrUnsupported, "media type"},
		{"ConfigType", changed{Image: good, manifest: func(m *v1.Manifest) { m.Config.MediaType = "application/vnd.example.chart" }}, api.ErrUnsupported, "no image's"},
		{"LayerSize", changed{Image: good, manifest: func(m *v1.Manifest) { m.Layers[0].Size += 10 }}, api.ErrDamaged, "the manifest says 110"},
		{"SmallLayerSize", changed{Image: good, manifest: func(m *v1.Manifest) { m.Layers[0].Size -= 10 }}, api.ErrDamaged, "the manifest says 90"},
		{"NegativeLayerSize", changed{Image: good, manifest: func(m *v1.Manifest) { m.Layers[0].Size = -1 }}, api.ErrInvalid, ""},
		{"HugeLayerSize", changed{Image: good, manifest: func(m *v1.Manifest) { m.Layers[0].Size = 1 << 62 }}, api.ErrExhausted, "limit"},
		{"SumOverflows", changed{Image: good, manifest: func(m *v1.Manifest) {
			m.Layers = append(m.Layers, m.Layers[0], m.Layers[0])
			m.Layers[1].Size, m.Layers[2].Size = 1<<34, 1<<34
		}}, api.ErrExhausted, "limit"},
		{"MissingLayer", changed{Image: good, manifest: func(m *v1.Manifest) { m.Layers[0].Digest = other }}, api.ErrNotFound, "layer 1 of 1"},
		{"FewerDiffIDs", changed{Image: good, manifest: func(m *v1.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) }}, api.ErrInvalid, "names 1 layers"},
		{"OtherDiffID", withConfig(t, good, func(c *v1.ConfigFile) { c.RootFS.DiffIDs[0] = other }), api.ErrDamaged, "its archive has the digest"},
		{"ConfigSize", changed{Image: good, manifest: func(m *v1.Manifest) { m.Config.Size = 1 << 40 }}, api.ErrExhausted, "configuration has"},
		{"HugeConfig", withConfig(t, good, func(c *v1.ConfigFile) { c.Author = strings.Repeat("x", 5<<20) }), api.ErrExhausted, "configuration has"},
		{"ConfigIsNoJSON", changed{Image: good, rawConfig: []byte("{")}, api.ErrInvalid, "configuration"},
		{"OtherSystem", withConfig(t, good, func(c *v1.ConfigFile) { c.OS = "windows" }), api.ErrUnsupported, "no image for linux/"},
		{"OtherProcessor", withConfig(t, good, func(c *v1.ConfigFile) { c.Architecture = "s390x" }), api.ErrUnsupported, "no image for linux/"},
		{"UserOverflows", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.User = "4294967296" }), api.ErrInvalid, "user"},
		{"UserNegative", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.User = "-1:0" }), api.ErrInvalid, "user"},
		{"UserWithBreak", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.User = "root\nx:0" }), api.ErrInvalid, "user"},
		{"UserWithTwoColons", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.User = "a:b:c" }), api.ErrInvalid, "more than one colon"},
		{"UserWithoutName", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.User = ":0" }), api.ErrInvalid, "a name is empty"},
		{"GroupOverflows", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.User = "app:18446744073709551616" }), api.ErrInvalid, "the largest id"},
		{"UserLong", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.User = strings.Repeat("u", 257) }), api.ErrInvalid, "longer than 256"},
		{"WorkingDirLeaves", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.WorkingDir = "/a/../../etc" }), api.ErrInvalid, "working directory"},
		{"WorkingDirLong", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.WorkingDir = "/" + strings.Repeat("x", 5000) }), api.ErrInvalid, "working directory"},
		{"WorkingDirInAFile", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.WorkingDir = "/f/x" }), api.ErrInvalid, "working directory"},
		{"WorkingDirIsAFile", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.WorkingDir = "/f" }), api.ErrInvalid, "is no directory"},
		{"EnvLong", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.Env = []string{"A=" + strings.Repeat("x", 40<<10)} }), api.ErrInvalid, "environment"},
		{"EnvMany", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.Env = make([]string, 1001) }), api.ErrInvalid, "environment"},
		{"EnvNUL", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.Env = []string{"A=\x00"} }), api.ErrInvalid, "NUL"},
		{"EnvNameless", withConfig(t, good, func(c *v1.ConfigFile) { c.Config.Env = []string{"=x"} }), api.ErrInvalid, "no name"},
		{"NotGzip", imageOf(t, v1.Config{}, badLayer{layer, []byte("\x1f\x8bno gzip at all")}), api.ErrDamaged, "unpacking"},
		{"CutGzip", imageOf(t, v1.Config{}, badLayer{layer, cut(t, layer)}), api.ErrDamaged, ""},
		{"NoArchive", imageOf(t, v1.Config{}, badLayer{layer, bytes.Repeat([]byte("nonsense"), 100)}), api.ErrInvalid, "archive"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, p := newServer(t), newPuller(t)
			_, _, err := build(t.Context(), t, p, s.pushRaw(t, tt.image))
			if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v (%s), want %q of the class %v", err, api.Code(err), tt.says, tt.class)
			}
			if left, _ := filepath.Glob(filepath.Join(p.CacheDir, "*.part")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func withConfig(t *testing.T, img v1.Image, change func(*v1.ConfigFile)) v1.Image {
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	change(c)
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return changed{Image: img, rawConfig: raw}
}

// badLayer is a layer with other packed bytes.
type badLayer struct {
	v1.Layer
	packed []byte
}

func (b badLayer) Digest() (v1.Hash, error) {
	h, _, err := v1.SHA256(bytes.NewReader(b.packed))
	return h, err
}
func (b badLayer) Size() (int64, error) { return int64(len(b.packed)), nil }
func (b badLayer) Compressed() (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(b.packed)), nil
}

func cut(t *testing.T, l v1.Layer) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	r, err := l.Uncompressed()
	if err == nil {
		_, err = io.Copy(w, r)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()[:buf.Len()-6]
}

// pushRaw puts an image into the registry without anything being checked on
// the way: its documents are served as they are.
func (s *server) pushRaw(t *testing.T, img v1.Image) oci.Reference {
	t.Helper()
	manifest, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	blobs := map[string][]byte{}
	h, _, _ := v1.SHA256(bytes.NewReader(config))
	blobs[h.String()] = config
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		r, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		h, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		blobs[h.String()] = b
	}
	s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		at := r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:]
		switch {
		case strings.Contains(r.URL.Path, "/manifests/"):
			w.Header().Set("Content-Type", string(types.DockerManifestSchema2))
			_, _ = w.Write(manifest)
		case strings.Contains(r.URL.Path, "/blobs/") && blobs[at] != nil:
			_, _ = w.Write(blobs[at])
		default:
			return false
		}
		return true
	}
	return reference(t, "docker://"+s.host+"/raw")
}

// TestManifestAndIndex: a document that is both, and other documents.
func TestManifestAndIndex(t *testing.T) {
	for _, tt := range []struct {
		name, doc string
		mediaType types.MediaType
		class     error
	}{
		{"Both", `{"schemaVersion":2,"config":{},"layers":[],"manifests":[]}`, types.OCIManifestSchema1, api.ErrInvalid},
		{"BothAsIndex", `{"schemaVersion":2,"config":{},"layers":[],"manifests":[]}`, types.OCIImageIndex, api.ErrInvalid},
		{"NoPlatform", `{"schemaVersion":2,"manifests":[]}`, types.OCIImageIndex, api.ErrUnsupported},
		{"Old", `{"schemaVersion":1,"fsLayers":[]}`, types.DockerManifestSchema1, api.ErrUnsupported},
		{"Unknown", `{}`, "text/html", api.ErrUnsupported},
		{"NoJSON", `<html>`, types.OCIManifestSchema1, api.ErrInvalid},
		{"Huge", strings.Repeat(" ", 5<<20) + "{}", types.OCIManifestSchema1, api.ErrExhausted},
		{"ShortDigest", `{"schemaVersion":2,"config":{"digest":"sha256:../../etc"},"layers":[]}`, types.OCIManifestSchema1, api.ErrInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, p := newServer(t), newPuller(t)
			s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.Contains(r.URL.Path, "/manifests/") {
					return false
				}
				w.Header().Set("Content-Type", string(tt.mediaType))
				_, _ = io.WriteString(w, tt.doc)
				return true
			}
			if _, err := p.Resolve(t.Context(), reference(t, "docker://"+s.host+"/x")); !errors.Is(err, tt.class) {
				t.Errorf("got %v (%s), want %v", err, api.Code(err), tt.class)
			}
		})
	}
}

// TestFlippedByte: the registry sends another byte in one place, wherever.
func TestFlippedByte(t *testing.T) {
	img := imageOf(t, v1.Config{}, layerOf(t, file("f", "x")))
	for _, where := range []string{"/manifests/sha256:", "/blobs/"} {
		for nth := range 2 { // the configuration, the layer
			s, p := newServer(t), newPuller(t)
			digest, err := img.Digest()
			if err != nil {
				t.Fatal(err)
			}
			s.push(t, "image:1", img)
			var seen atomic.Int32
			hit := map[string]bool{}
			target := flipping(t, s.host, func(path string) bool {
				if !strings.Contains(path, where) {
					return false
				}
				if !hit[path] {
					hit[path] = seen.Add(1) == int32(nth+1)
					return hit[path]
				}
				return true
			})
			_, _, err = build(t.Context(), t, p, reference(t, "docker://"+target+"/image@"+digest.String()))
			if where != "/blobs/" && nth > 0 {
				continue // there is one manifest only
			}
			if err == nil || strings.Contains(where, "blobs") && nth == 1 && !errors.Is(err, api.ErrDamaged) {
				t.Errorf("%s, number %d: %v", where, nth, err)
			}
			files, err := filepath.Glob(filepath.Join(p.CacheDir, "*"))
			if err != nil || len(files) != 0 {
				t.Errorf("in the cache: %v, %v", files, err)
			}
		}
	}
}

// flipping is a registry that is the one at host, but for bytes.
func flipping(t *testing.T, host string, flip func(path string) bool) string {
	ts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		req, err := http.NewRequestWithContext(r.Context(), r.Method, "http://"+host+r.URL.Path, nil)
		if err != nil {
			t.Error(err)
			return
		}
		req.Header = r.Header.Clone()
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Error(err)
			return
		}
		if len(b) > 0 && flip(r.URL.Path) {
			b[len(b)/2] ^= 1
		}
		for k, v := range resp.Header {
			w.Header()[k] = v
		}
		w.WriteHeader(resp.StatusCode)
		_, _ = w.Write(b)
	}))
	t.Cleanup(ts.Close)
	return strings.TrimPrefix(ts.URL, "http://")
}

// TestRedirect: a registry cannot send its client to other services of this
// host.
func TestRedirect(t *testing.T) {
	var dialled atomic.Bool
	victim := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { dialled.Store(true) }))
	defer victim.Close()
	// Another spelling, so that not the name of the host decides.
	elsewhere := strings.Replace(victim.URL, "127.0.0.1", "localhost", 1)
	img := imageOf(t, v1.Config{}, layerOf(t, file("f", "x")))
	for _, what := range []string{"/manifests/", "/blobs/", "token"} {
		s, p := newServer(t), newPuller(t)
		ref := s.push(t, "image:1", img)
		s.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			switch {
			case what == "token" && r.URL.Path == "/v2/":
				w.Header().Set("WWW-Authenticate", `Bearer realm="`+elsewhere+`/token",service="x"`)
				w.WriteHeader(http.StatusUnauthorized)
			case strings.Contains(r.URL.Path, what):
				http.Redirect(w, r, elsewhere+"/secret", http.StatusTemporaryRedirect)
			default:
				return false
			}
			return true
		}
		_, _, err := build(t.Context(), t, p, ref)
		if !errors.Is(err, api.ErrDenied) || dialled.Load() {
			t.Errorf("%s: got %v (%s), dialled %v", what, err, api.Code(err), dialled.Load())
		}
	}
}

var _ v1.Image = changed{}

// TestSparse: a few kilobytes that stand for a TiB, in each of the ways in which
// GNU tar writes holes.
func TestSparse(t *testing.T) {
	testenv.RequireTools(t, "tar", "tar", "truncate")
	for _, format := range []string{"--format=gnu", "--format=pax --sparse-version=0.0", "--format=pax --sparse-version=0.1", "--format=pax --sparse-version=1.0"} {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			shell(t, dir, "truncate -s 1T f && tar -S "+format+" -cf layer.tar f")
			text, err := os.ReadFile(filepath.Join(dir, "layer.tar"))
			if err != nil {
				t.Fatal(err)
			}
			s, p := newServer(t), newPuller(t)
			_, _, err = build(t.Context(), t, p, s.push(t, "sparse", imageOf(t, v1.Config{}, rawLayer(t, text))))
			if !errors.Is(err, api.ErrUnsupported) || !strings.Contains(err.Error(), "sparse") {
				t.Errorf("got %v (%s)", err, api.Code(err))
			}
		})
	}
}

// TestTwoSizes: an entry has another size in its extended header than in its
// own, and its content is an archive for whoever believes the wrong one
// (CVE-2025-62518).
func TestTwoSizes(t *testing.T) {
	inner := archive(t, file("hidden", "x"))
	record := fmt.Sprintf("%d size=%d\n", len(fmt.Sprintf("99 size=%d\n", len(inner))), len(inner))
	text := archive(t, file("pax", record), file("outer", string(inner)))
	retype(text[:512], tar.TypeXHeader, int64(len(record)))
	retype(text[1024:1536], tar.TypeReg, 0) // the entry itself says that it is empty
	s, p := newServer(t), newPuller(t)
	image, _, err := build(t.Context(), t, p, s.push(t, "two", imageOf(t, v1.Config{}, rawLayer(t, text))))
	if err != nil {
		t.Fatal(err)
	}
	// As GNU tar has it.
	if d := cmp.Diff(unpack([]entry{file("outer", string(inner))}), read(t, image)); d != "" {
		t.Error(d)
	}
}

// TestNoHelpers: programs for unpacking that are on the PATH are not started
// (CVE-2026-41567).
func TestNoHelpers(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"gzip", "gunzip", "pigz", "unpigz", "zstd", "unzstd", "tar", "xz"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n: >"+dir+"/started\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir)
	s, p := newServer(t), newPuller(t)
	ref := s.pushRaw(t, imageOf(t, v1.Config{}, layerOf(t, file("a", "1")), newZstdLayer(t, file("b", "2"))))
	if _, _, err := build(t.Context(), t, p, ref); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "started")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a program was started: %v", err)
	}
}
