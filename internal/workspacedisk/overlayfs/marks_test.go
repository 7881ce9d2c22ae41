package overlayfs_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/overlayfs"
)

// FuzzMarks reads marks: a redirect has names of directories, or is refused.
func FuzzMarks(f *testing.F) {
	for _, s := range []string{"/a", "a", "/a/sub", "..", "/", "", "/a//b", "a/sub", strings.Repeat("/a", 3000)} {
		f.Add("y", s)
		f.Add("x", s)
	}
	f.Fuzz(func(t *testing.T, opaque, redirect string) {
		m, err := overlayfs.DecodeMarks([]byte(opaque), []byte(redirect))
		if err != nil {
			if !errors.Is(err, api.ErrDamaged) {
				t.Errorf("an error without a class: %v", err)
			}
			return
		}
		if opaque == "y" {
			return
		}
		path, isAbsolute := strings.CutPrefix(m.Redirect, "/")
		names := strings.Split(path, "/")
		for _, name := range names {
			if name == "" || name == "." || name == ".." || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
				t.Errorf("the name %q", name)
			}
		}
		if m.Redirect != redirect || isAbsolute != m.Absolute || len(names) > 1 && !m.Absolute {
			t.Errorf("%q became %+v", redirect, m)
		}
	})
}
