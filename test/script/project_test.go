package script_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/test/project"
)

// hasProject reports whether a project of package project is at hand: the
// condition [project:NAME]. Where PYRO_TEST_REQUIRE lists "projects" it must be.
func hasProject(name string) (bool, error) {
	_, err := project.Fetch(context.Background(), name)
	if err != nil && testenv.Wanted("projects") {
		return false, fmt.Errorf("projects are required by %s: %w", testenv.Variable, err)
	}
	return err == nil, nil
}

// hasEnvironment reports whether an environment can be used without waiting
// minutes for it to be built: the condition [environment:NAME]. Engine host
// needs none. Where PYRO_TEST_REQUIRE lists "mmdebstrap" waiting is right.
func hasEnvironment(engine, cache, name string) (bool, error) {
	if engine == "host" || testenv.Wanted("mmdebstrap") {
		return true, nil
	}
	cmd := exec.Command(filepath.Join(programs, "pyro"), "env", "inspect", name, "--json")
	cmd.Env = append(os.Environ(), "PYRO_CACHE_DIR="+cache)
	out, err := cmd.Output()
	if err != nil {
		return false, fmt.Errorf("pyro env inspect %s: %w", name, err)
	}
	var env struct{ Installed bool }
	if err := json.Unmarshal(out, &env); err != nil {
		return false, err
	}
	return env.Installed, nil
}

// cmdProject unpacks a project into a new directory, or with --archive copies
// it as it was published: project figlet-2.2.5 DIR.
func cmdProject(ts *testscript.TestScript, neg bool, args []string) {
	whole := len(args) == 3 && args[0] == "--archive"
	if whole {
		args = args[1:]
	}
	if neg || len(args) != 2 {
		ts.Fatalf("usage: project [--archive] NAME PATH")
	}
	if !whole {
		ts.Check(project.Unpack(context.Background(), args[0], ts.MkAbs(args[1])))
		return
	}
	path, err := project.Fetch(context.Background(), args[0])
	ts.Check(err)
	b, err := os.ReadFile(path)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), b, 0o644))
}
