package trees_test

import (
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// seedVariable names the environment variable that repeats a random test, with
// the number that a failure printed.
const seedVariable = "PYRO_TEST_SEED"

// rounds is how many random edits one test makes: 30 where PYRO_TEST_REQUIRE
// lists "many".
func rounds() int {
	switch {
	case testenv.Wanted("many"):
		return 30
	case engine() == "qemu":
		return 4 // an emulated guest takes a second for each command
	}
	return 8
}

// An op is one change of a tree; testdata/ops.py makes it.
type op struct {
	Do   string `json:"do"`
	Path string `json:"path"` // this and what follows in hexadecimal
	With string `json:"with"`
	Mode int    `json:"mode"`
}

//go:embed testdata/ops.py
var opsScript string

// A gardener makes random trees and edits.
type gardener struct{ *rand.Rand }

func (g gardener) name() string {
	// Two bytes short of NAME_MAX: where a file comes into the place of an empty
	// directory, git apply first writes it under a name with "~1" behind it.
	odd := []string{"a", "b", "c", "d", "e", "f", "a.b", "a-b", "-n", "x y", "x\ny", "\t", `"`, `\`, "\xff", "ü", "e\u0301", ".x", "~", "a=>b", "+", "@@", "\x7f", strings.Repeat("l", 253)}
	return odd[g.IntN(len(odd))]
}

func (g gardener) path() string {
	p := g.name()
	for g.IntN(2) == 0 && len(p) < 1000 {
		p += "/" + g.name()
	}
	return p
}

func (g gardener) content() string {
	switch g.IntN(12) {
	case 0:
		return ""
	case 1: // binary
		b := make([]byte, g.IntN(5000))
		for i := range b {
			b[i] = byte(g.Uint32())
		}
		return string(b)
	case 2:
		return "\n\n\n"
	case 3: // what looks like a patch
		return "--- a/a\n+++ b/a\n@@ -1,2 +1,2 @@\n-x\n+y\n z\n"
	}
	var b strings.Builder
	end := []string{"\n", "\n", "\n", "\r\n", "\r", "\f", "\x00", "\u2028"}[g.IntN(8)]
	for range g.IntN(60) {
		b.WriteString([]string{"", " ", "a", "b", "same", "café", "caf\xe9", "-", "+", "\\ No newline at end of file", "\ttab", "end "}[g.IntN(12)] + end)
	}
	if g.IntN(3) == 0 {
		b.WriteString("no newline")
	}
	return b.String()
}

func (g gardener) ops(n int) []op {
	ops := make([]op, n)
	for i := range ops {
		kinds := []string{"write", "write", "write", "append", "line", "line", "delete", "rename", "chmod", "link", "mkdir", "rmtree", "hardlink"}
		o := op{Do: kinds[g.IntN(len(kinds))], Path: hex.EncodeToString([]byte(g.path())), Mode: []int{0o644, 0o755, 0o600, 0o444, 0o700}[g.IntN(5)]}
		switch o.Do {
		case "write", "append", "line":
			o.With = hex.EncodeToString([]byte(g.content()))
		case "rename", "hardlink":
			o.With = hex.EncodeToString([]byte(g.path()))
		case "link":
			o.With = hex.EncodeToString([]byte([]string{g.path(), "../" + g.name(), "/etc/passwd", "../../..", "."}[g.IntN(5)]))
		}
		ops[i] = o
	}
	return ops
}

// edit makes the changes inside a workspace. What cannot be done, such as a
// change of what is not there, is left.
func (u *user) edit(id string, ops []op) {
	u.t.Helper()
	b, err := json.Marshal(ops)
	check(u.t, err)
	u.python(id, opsScript+"\ndo("+strconv.Quote(string(b))+")\n")
}

func TestRandomTrees(t *testing.T) {
	number := uint64(time.Now().UnixNano())
	if s := os.Getenv(seedVariable); s != "" {
		var err error
		number, err = strconv.ParseUint(s, 10, 64)
		check(t, err)
	}
	g := gardener{rand.New(rand.NewPCG(number, 0))}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to repeat it: %s=%d", seedVariable, number)
		}
	})
	u := newUser(t)
	// The seed is grown in a workspace too, so that every name in it is one
	// that a guest can make.
	nursery := u.create()
	u.edit(nursery, g.ops(200))
	seed := u.copyOut(nursery)
	u.pyro("workspace", "delete", nursery)
	id, twin := u.create("--seed-path", seed), u.create("--seed-path", seed)
	pristine := onHost(t, seed)
	if !same(pristine, u.inside(id)) {
		t.Fatal("the seed did not arrive as it is")
	}

	snapshot := ""
	for round := range rounds() {
		t.Logf("round %d", round)
		var since string
		if snapshot != "" {
			since = u.copyOut(id)
		}
		u.edit(id, g.ops(1+g.IntN(30)))
		base := t.TempDir()
		copyTree(t, seed, base)
		d := u.checkDiff(id, "", base)
		if round%3 == 1 {
			u.checkExport(id)
		}
		// The patch of the one workspace makes the other one the same.
		u.checkPatch(twin, d, u.inside(id), pristine)
		if since != "" {
			// since is the snapshot with nothing after it.
			u.checkDiff(id, snapshot, since)
			u.pyro("workspace", "reset", id, "--snapshot", snapshot, "--quiet")
			u.pyro("workspace", "snapshot", "delete", id, snapshot)
			snapshot = ""
		} else if round%4 == 2 {
			snapshot = fmt.Sprintf("s%d", round)
			u.pyro("workspace", "snapshot", "create", id, snapshot)
		}
		if t.Failed() {
			return
		}
	}
}

// checkPatch applies a diff to a workspace in the state of its base, checks what
// comes of it, and takes it back.
func (u *user) checkPatch(id string, d *api.Diff, want, base tree) {
	u.t.Helper()
	if d.Patch == "" {
		return
	}
	if _, errs, status := u.feed([]byte(d.Patch), "workspace", "patch", "apply", id, "--stdin"); status != 0 {
		u.t.Errorf("patch apply refuses a diff: %s", errs)
		if !same(base, u.inside(id)) {
			u.t.Error("the refused patch changed the workspace")
		}
		return
	}
	now := u.inside(id)
	excused := map[string]bool{}
	for _, e := range d.Unpatched {
		excused[e.Path] = true
	}
	for name := range union(want, now) {
		if want[name] == now[name] || excused[printed(name)] || (want[name] == "dir" || now[name] == "dir") && excusedBelow(excused, printed(name)) {
			continue
		}
		u.t.Errorf("%q is %q in the workspace, %q after patch apply", name, want[name], now[name])
	}
	u.pyro("workspace", "reset", id, "--quiet")
}

// copyTree copies what lies in a directory into another, links and all.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "-a", from+"/.", to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v: %s", err, out)
	}
}
