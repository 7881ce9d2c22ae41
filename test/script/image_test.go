package script_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/pyro-mcp/pyro/internal/testenv"
)

// hasBusybox reports whether this machine has a busybox that needs no library:
// the condition [busybox]. Where PYRO_TEST_REQUIRE lists "busybox" it must.
func hasBusybox() (bool, error) {
	program, err := exec.LookPath("busybox")
	if err == nil {
		// A static program has no interpreter to be named, ELF's PT_INTERP.
		var text []byte
		if text, err = os.ReadFile(program); err == nil && bytes.Contains(text, []byte("/lib64/ld-linux")) {
			err = errors.New("busybox is not static")
		}
	}
	if err != nil && testenv.Wanted("busybox") {
		return false, err
	}
	return err == nil, nil
}

// An imageFile is an entry of an image's only layer. What has neither content
// nor target is a directory.
type imageFile struct {
	name, content, target string
	mode                  int64
	uid                   int
}

// cmdImage writes an OCI layout with an image: image DIR KIND, where KIND is
//
//	static      one program, its tmp and run links, no user
//	nobody      the same with a user, but without /etc/passwd
//	distroless  a program, the user databases and a user, but no shell
//	busybox     a small system as Alpine's, with a user
func cmdImage(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: image DIR KIND")
	}
	config := v1.Config{Env: []string{"GREETING=hello"}, WorkingDir: "/srv/app"}
	users := []imageFile{
		{name: "etc"},
		{name: "etc/passwd", content: "root:x:0:0:root:/root:/bin/sh\napp:x:1234:1235:App:/home/app:/bin/sh\n"},
		{name: "etc/group", content: "root:x:0:\napp:x:1235:\nextra:x:1236:root,app\n"},
		{name: "home"},
		{name: "home/app", uid: 1234},
	}
	links := []imageFile{{name: "tmp", target: "/var/tmp"}, {name: "run", target: "nowhere"}}
	var files []imageFile
	switch args[1] {
	case "static", "nobody":
		files = append(links, imageFile{name: "identity", content: identity(ts), mode: 0o755})
		if args[1] == "nobody" {
			config.User = "nobody"
		}
	case "distroless":
		files = append(users, imageFile{name: "identity", content: identity(ts), mode: 0o755})
		config.User, config.WorkingDir = "app", "/home/app"
	case "busybox":
		program, err := exec.LookPath("busybox")
		ts.Check(err)
		text, err := os.ReadFile(program)
		ts.Check(err)
		files = append(append(users, links...), imageFile{name: "bin"}, imageFile{name: "bin/busybox", content: string(text), mode: 0o755})
		for _, name := range strings.Fields("sh cat echo id ls mkdir pwd rm sleep stat touch tr") {
			files = append(files, imageFile{name: path.Join("bin", name), target: "busybox"})
		}
		config.User = "app:extra"
		config.Env = append(config.Env, "PATH=/bin")
	default:
		ts.Fatalf("unknown kind of image %q", args[1])
	}
	img, err := mutate.AppendLayers(empty.Image, imageLayer(ts, files))
	ts.Check(err)
	c, err := img.ConfigFile()
	ts.Check(err)
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", runtime.GOARCH
	c.Config = config
	img, err = mutate.ConfigFile(img, c)
	ts.Check(err)
	_, err = layout.Write(ts.MkAbs(args[0]), mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img}))
	ts.Check(err)
}

// identity builds the static program of testdata/identity.
func identity(ts *testscript.TestScript) string {
	file := filepath.Join(programs, "identity")
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		_, self, _, _ := runtime.Caller(0)
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, "./testdata/identity")
		cmd.Dir, cmd.Env = filepath.Dir(self), append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			ts.Fatalf("building identity: %v\n%s", err, out)
		}
	}
	text, err := os.ReadFile(file)
	ts.Check(err)
	return string(text)
}

func imageLayer(ts *testscript.TestScript, files []imageFile) v1.Layer {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Typeflag: tar.TypeDir, Mode: 0o755, Uid: f.uid, Gid: f.uid}
		switch {
		case f.target != "":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.target, 0o777
		case f.content != "":
			h.Typeflag, h.Size, h.Mode = tar.TypeReg, int64(len(f.content)), max(f.mode, 0o644)
		}
		ts.Check(w.WriteHeader(h))
		_, err := io.WriteString(w, f.content)
		ts.Check(err)
	}
	ts.Check(w.Close())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	ts.Check(err)
	return layer
}
