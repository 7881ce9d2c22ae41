package environment_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// releaseDay is that of Debian 12.
var releaseDay = time.Date(2023, 6, 10, 0, 0, 0, 0, time.UTC)

// TestRealBase builds the smallest environment from Debian's packages. It
// takes tens of seconds and a mirror, so only those get it who ask for it.
func TestRealBase(t *testing.T) {
	if !testenv.Wanted("mmdebstrap") {
		t.Skip("it takes Debian's mirror; PYRO_TEST_REQUIRE=mmdebstrap runs it")
	}
	testenv.RequireTools(t, "mmdebstrap", "mmdebstrap", "e2fsck", "debugfs")
	s, err := environment.Open(environment.Options{CacheDir: t.TempDir(), DebianMirror: os.Getenv("PYRO_DEBIAN_MIRROR")})
	if err != nil {
		t.Fatal(err)
	}
	phases := map[string]bool{}
	img, err := s.Use(t.Context(), envName, func(p api.Progress) { phases[p.Phase] = true })
	if err != nil {
		t.Fatalf("%v (%s)", err, api.Hint(err))
	}
	defer img.Close()
	for _, phase := range []string{"lists", "downloading", "installing", "writing", "verifying"} {
		if !phases[phase] {
			t.Errorf("nothing was heard of the phase %q", phase)
		}
	}
	if out, err := exec.Command("e2fsck", "-fn", img.Path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	out, err := exec.Command("debugfs", "-R", "cat /usr/lib/os-release", img.Path).Output()
	if err != nil || !strings.Contains(string(out), `VERSION_ID="12"`) {
		t.Errorf("os-release: %v\n%s", err, out)
	}
}
