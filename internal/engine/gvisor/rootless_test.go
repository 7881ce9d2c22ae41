package gvisor_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// rootless reports whether this process is root of no more than a user
// namespace, or not root at all.
func rootless() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && (os.Geteuid() != 0 || strings.Join(strings.Fields(string(b)), " ") != "0 0 4294967295")
}

// nobody is an ordinary user without ranges of further ids.
const nobody = 65534

// TestWithoutRoot runs this package's tests again as an ordinary user: the ones
// about the engine itself as they are, the ones about guests behind the
// engine's launcher.
func TestWithoutRoot(t *testing.T) {
	newEngine(t)
	if rootless() {
		t.Skip("this is that run")
	}
	for _, file := range []string{"/proc/sys/kernel/unprivileged_userns_clone", "/proc/sys/user/max_user_namespaces"} {
		b, err := os.ReadFile(file)
		testenv.Require(t, "userns", err != nil || strings.TrimSpace(string(b)) != "0", file+" is 0")
	}
	agent, err := shared.agent()
	if err != nil {
		t.Fatal(err)
	}
	// Not below t.TempDir, whose parents are closed to other users.
	dir, err := os.MkdirTemp("", "nobody-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	runsc, err := gvisor.New(gvisor.Options{}).Runtime(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, from := range map[string]string{"test": self, "agent": agent, "runsc": runsc} {
		if err := copyInto(from, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	launch := []string{"unshare", "--user", "--map-root-user", "--"} // what TestOrdinaryUser holds the launcher to
	for _, run := range []struct {
		name string
		argv []string
	}{
		{"plainly", []string{filepath.Join(dir, "test"), "-test.v", "-test.run", "^TestOrdinaryUser$"}},
		{"launched", append(slices.Clone(launch), filepath.Join(dir, "test"), "-test.v", "-test.run",
			"^(TestGuest|TestDiskSurvivesStopAndStart|TestPause|TestManyAtOnce|TestOneDiskOneMachine|TestKillProcess|TestKillSupervisor|TestStartRefuses|"+
				"TestSharedLayer|TestSeedLayer|TestEveryLayerCounts|TestSnapshotHasWhatWasFlushed|TestSnapshotOfPaused|TestSnapshotGivenUp|TestKillSupervisorFreezing|"+
				"TestSaveWhileCommandsRun|TestSaveOpenFiles|TestSaveGivenUp|TestStartFromBadImage)$")},
		{"suite", append(slices.Clone(launch), filepath.Join(dir, "test"), "-test.v", "-test.run",
			"^TestSuite$/^(DiskElsewhere|SnapshotDisk|ManySnapshots|SnapshotWhileWriting|SaveWhileWriting|SnapshotRefused|SnapshotThenKilled|KilledWhileFreezing)$")},
	} {
		t.Run(run.name, func(t *testing.T) {
			cmd := exec.Command(run.argv[0], run.argv[1:]...)
			cmd.Dir = dir
			cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "TMPDIR=" + dir,
				gvisor.RuntimeVariable + "=" + filepath.Join(dir, "runsc"), "PYRO_TEST_AGENT=" + filepath.Join(dir, "agent"),
				testenv.Variable + "=gvisor", "PYRO_TEST_ENGINE=gvisor"}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), "--- PASS") {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

// An ordinary user is told to go through the launcher, and what that gives up.
func TestOrdinaryUser(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("this is root; TestWithoutRoot runs it")
	}
	e := gvisor.New(gvisor.Options{})
	c := e.Probe(t.Context())
	if !c.Available || !strings.Contains(c.Detail, "no bound on disk") {
		t.Errorf("Probe = %+v", c)
	}
	for _, f := range c.Facts {
		if f.Name == "disk" && f.OK {
			t.Errorf("doctor calls an unbounded disk good: %+v", f)
		}
	}
	argv, err := e.Launcher()
	if err != nil || len(argv) < 4 || filepath.Base(argv[0]) != "unshare" || argv[len(argv)-1] != "--" {
		t.Errorf("Launcher = %q, %v", argv, err)
	}
	if _, err := e.Start(t.Context(), newSpec(t)); err == nil {
		t.Error("Start worked outside of the launcher")
	}
}
