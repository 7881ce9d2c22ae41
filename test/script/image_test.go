package script_test

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/rogpeppe/go-internal/testscript"
)

// cmdImage writes an OCI layout with an image of one static program, pyro
// itself, and of links where a guest mounts: image DIR.
func cmdImage(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: image DIR")
	}
	program, err := os.ReadFile(filepath.Join(programs, "pyro"))
	ts.Check(err)
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range []tar.Header{
		{Name: "pyro", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(program))},
		{Name: "tmp", Typeflag: tar.TypeSymlink, Linkname: "/var/tmp"},
		{Name: "run", Typeflag: tar.TypeSymlink, Linkname: "nowhere"},
		{Name: "etc", Typeflag: tar.TypeDir, Mode: 0o755},
	} {
		ts.Check(w.WriteHeader(&h))
		if h.Name == "pyro" {
			_, err := w.Write(program)
			ts.Check(err)
		}
	}
	ts.Check(w.Close())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	ts.Check(err)
	img, err := mutate.AppendLayers(empty.Image, layer)
	ts.Check(err)
	c, err := img.ConfigFile()
	ts.Check(err)
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", runtime.GOARCH
	c.Config = v1.Config{Env: []string{"GREETING=hello"}, WorkingDir: "/srv/app", User: "nobody"}
	img, err = mutate.ConfigFile(img, c)
	ts.Check(err)
	_, err = layout.Write(ts.MkAbs(args[0]), mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img}))
	ts.Check(err)
}
