// Package build makes the real programs for tests that run them.
package build

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// Main builds the programs into a temporary directory, tells the tests where, and
// runs them. It is for TestMain: os.Exit(build.Main(m, &programs, false)).
func Main(m *testing.M, programs *string, race bool) int {
	dir, err := os.MkdirTemp("", "pyro-programs-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	if err := Programs(dir, race); err != nil {
		panic(err)
	}
	*programs = dir
	return m.Run()
}

// Programs builds pyro and pyro-agent into dir, as make build does, with the
// race detector in pyro if race is set. The go command's cache makes this quick
// from the second time on. pyro-runsc takes minutes to build: the one that make
// build made is linked into dir, if there is one.
func Programs(dir string, race bool, tags ...string) error {
	_, self, _, ok := runtime.Caller(0)
	if !ok {
		return fmt.Errorf("cannot tell where the sources are")
	}
	root := filepath.Dir(filepath.Dir(filepath.Dir(self)))
	runsc := filepath.Join(root, "bin", "pyro-runsc")
	if _, err := os.Stat(runsc); err == nil {
		if err := os.Symlink(runsc, filepath.Join(dir, "pyro-runsc")); err != nil {
			return err
		}
	}
	for _, p := range []struct {
		name string
		race bool
	}{{"pyro", race}, {"pyro-agent", false}} {
		args := []string{"build", "-trimpath"}
		cgo := "CGO_ENABLED=0"
		if p.race {
			args, cgo = append(args, "-race"), "CGO_ENABLED=1"
		} else {
			args = append(args, "-ldflags=-s -w")
		}
		if p.name == "pyro" && len(tags) > 0 {
			args = append(args, "-tags="+strings.Join(tags, ","))
		}
		cmd := exec.Command("go", append(args, "-o", filepath.Join(dir, p.name), "./cmd/"+p.name)...)
		cmd.Dir = root
		cmd.Env = append(os.Environ(), cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w\n%s", p.name, err, out)
		}
	}
	return nil
}
