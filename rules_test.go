package pyro_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/pyro-mcp/pyro"

type goPackage struct {
	ImportPath string
	Doc        string
	Imports    []string
	Standard   bool
}

func listPackages(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Doc,Imports", "./...")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pkgs []goPackage
	for dec := json.NewDecoder(out); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(pkgs) < 10 {
		t.Fatalf("go list sees %d packages only", len(pkgs))
	}
	return pkgs
}

// layers is the architecture, top first: a package imports only from lines
// below its own, and within a line only what is nested below itself or stands
// to its right. docs/architecture.md says what each is.
var layers = [][]string{
	{"cmd/pyro", "cmd/pyro-agent", "cmd/pyro-man"},
	{"internal/cli"},
	{"internal/mcpserver", "internal/hosthelper"},
	{""}, // package pyro, the SDK
	{"internal/workspace"},
	{"internal/supervisor"},
	{"internal/environment", "internal/guestkernel", "internal/seed"},
	{"internal/engine/all"},
	{"internal/engine/enginetest"},
	{"internal/engine/qemu", "internal/engine/gvisor", "internal/engine/host"},
	{"internal/engine", "internal/initramfs"},
	{"internal/guestagent"},
	{"internal/guestclient", "internal/network"},
	{"internal/guestconn"},
	{"internal/guestproto"},
	{"internal/workspacedisk"},
	{"internal/ext4image", "internal/archive", "internal/gitdiff", "internal/patch"},
	{"internal/mmdebstrap"},
	{"internal/artifact"},
	{"internal/store"},
	{"internal/statedir"},
	{"internal/termtext", "internal/hostproc", "internal/boundedlog", "internal/manifest", "internal/passwd", "internal/rtnetlink", "internal/redact"},
	{"internal/testenv", "internal/failpoint"},
	{"api"},
}

// outside are packages that no layer imports: tests and benchmarks.
var outside = []string{"test", "bench"}

// place returns the layer and the position in it of a package of ours.
func place(importPath string) (layer, position int, ok bool) {
	rel := strings.TrimPrefix(strings.TrimPrefix(importPath, module), "/")
	for {
		for i, l := range layers {
			if j := slices.Index(l, rel); j >= 0 {
				return i, j, true
			}
		}
		if rel == "" || rel == "." {
			return 0, 0, false
		}
		if rel = path.Dir(rel); rel == "." || rel == "internal" || rel == "cmd" {
			return 0, 0, false
		}
	}
}

func TestImportsPointDown(t *testing.T) {
	for _, p := range listPackages(t) {
		rel := strings.TrimPrefix(p.ImportPath, module+"/")
		top, _, _ := strings.Cut(rel, "/")
		if slices.Contains(outside, top) {
			continue
		}
		layer, position, ok := place(p.ImportPath)
		if !ok {
			t.Errorf("%s is in no layer: give it a place in layers and in docs/architecture.md", p.ImportPath)
			continue
		}
		for _, imp := range p.Imports {
			if imp != module && !strings.HasPrefix(imp, module+"/") {
				continue
			}
			l, pos, ok := place(imp)
			nested := strings.HasPrefix(imp, p.ImportPath+"/") || strings.HasPrefix(p.ImportPath, imp+"/")
			sameRoom := ok && l == layer && pos == position
			if !ok || l < layer || (l == layer && pos <= position && !nested && !sameRoom) {
				t.Errorf("%s imports %s, which is not below it", p.ImportPath, imp)
			}
		}
	}
}

// The faces may use the SDK and api. cli also starts supervisors, in one file,
// and offers the other two.
func TestFacesUseTheSDKOnly(t *testing.T) {
	common := []string{module, module + "/api", module + "/internal/boundedlog"}
	allowed := map[string][]string{
		module + "/internal/cli": append(slices.Clone(common),
			module+"/internal/engine/all", module+"/internal/supervisor", module+"/internal/workspace",
			module+"/internal/mcpserver", module+"/internal/hosthelper"),
		module + "/internal/mcpserver":  common,
		module + "/internal/hosthelper": common,
	}
	for _, p := range listPackages(t) {
		may, isFace := allowed[p.ImportPath]
		if !isFace {
			continue
		}
		for _, imp := range p.Imports {
			if strings.HasPrefix(imp, module) && !slices.Contains(may, imp) {
				t.Errorf("%s imports %s: let the SDK offer what is missing", p.ImportPath, imp)
			}
		}
	}
}

func TestLeavesStayLeaves(t *testing.T) {
	only := map[string][]string{
		// Everybody imports api, so it may import nobody.
		module + "/api": nil,
		// The protocol is its own definition and knows no transport.
		module + "/internal/guestproto": {module + "/api", "github.com/go-json-experiment/json", "github.com/go-json-experiment/json/jsontext"},
	}
	for _, p := range listPackages(t) {
		allowed, ok := only[p.ImportPath]
		if !ok {
			continue
		}
		for _, imp := range p.Imports {
			if strings.Contains(imp, ".") && !slices.Contains(allowed, imp) {
				t.Errorf("%s imports %s", p.ImportPath, imp)
			}
		}
	}
}

func TestPackageComments(t *testing.T) {
	for _, p := range listPackages(t) {
		if len(strings.Fields(p.Doc)) < 5 && !slices.Contains(outside, strings.Split(strings.TrimPrefix(p.ImportPath, module+"/"), "/")[0]) {
			t.Errorf("%s has no package comment that says what it is for", p.ImportPath)
		}
	}
}
