package gvisor_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// shared is where the tests of one run keep what is dear to make.
var shared struct {
	dir   string
	agent func() (string, error)
	image func() (string, error)
}

func TestMain(m *testing.M) {
	if os.Getenv(superviseVariable) != "" {
		os.Exit(supervise())
	}
	dir, err := os.MkdirTemp("", "gvisor-test-")
	if err != nil {
		panic(err)
	}
	shared.dir = dir
	shared.agent = sync.OnceValues(buildAgent)
	shared.image = sync.OnceValues(buildImage)
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// newEngine returns the engine, or skips the test where it does not work.
func newEngine(t testing.TB) *gvisor.Engine {
	t.Helper()
	if os.Getenv("PYRO_TEST_ENGINE") != gvisor.Name {
		t.Skip("runs with PYRO_TEST_ENGINE=gvisor")
	}
	e := gvisor.New(gvisor.Options{})
	c := e.Probe(t.Context())
	testenv.Require(t, "gvisor", c.Available, c.Detail)
	for _, tool := range []string{"ldd", "mke2fs"} {
		_, err := exec.LookPath(tool)
		testenv.Require(t, "gvisor", err == nil, tool+" is not on PATH")
	}
	return e
}

// specs counts the machines of this run.
var specs atomic.Int64

// newSpec returns the specification of a small machine in a directory of the
// test's own.
func newSpec(t testing.TB) engine.MachineSpec {
	t.Helper()
	agent, err := shared.agent()
	if err != nil {
		t.Fatal(err)
	}
	image, err := shared.image()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "engine")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return engine.MachineSpec{
		ID: fmt.Sprintf("test-%d-%d", os.Getpid(), specs.Add(1)), Dir: dir, RootImage: image, AgentPath: agent,
		VCPUCount: 1, MemMiB: 256, DiskMiB: 64, Hostname: "web",
		Console: testWriter{t}, Logger: slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
}

// start starts a machine that is gone when the test ends.
func start(t testing.TB, e *gvisor.Engine, spec engine.MachineSpec) engine.Machine {
	t.Helper()
	m, err := e.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Stop(context.Background(), 0); err != nil {
			t.Error(err)
		}
		if left := leftovers(spec.ID, spec.Dir); left != "" {
			t.Error(left)
		}
	})
	return m
}

// guest runs one command in the guest and returns its output, its standard
// error included.
func guest(t testing.TB, m engine.Machine, command string) string {
	t.Helper()
	out, err := tryGuest(t.Context(), m, command)
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	return out
}

func tryGuest(ctx context.Context, m engine.Machine, command string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	r, err := guestclient.New(m.DialGuest, guestclient.Options{}).ExecPlain(ctx, guestproto.ExecRequest{Command: command, Cwd: "/"})
	return r.Stdout + r.Stderr, err
}

// leftovers says what of a machine is still there: processes, loop devices,
// mounts, cgroups.
func leftovers(id, dir string) string {
	var found []string
	cmdlines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range cmdlines {
		b, err := os.ReadFile(path)
		if err == nil && bytes.HasSuffix(b, []byte("\x00"+id+"\x00")) {
			found = append(found, "process "+strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, path := range loops {
		b, err := os.ReadFile(path)
		if err == nil && strings.HasPrefix(string(b), dir) {
			found = append(found, "loop device on "+string(b))
		}
	}
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, " - tmpfs pyro ") || strings.Contains(line, "/mnt/layer") {
			found = append(found, "mount "+line)
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/pyro-" + id + ".*", "/sys/fs/cgroup/*/pyro-" + id + ".*"} {
		groups, _ := filepath.Glob(pattern)
		found = append(found, groups...)
	}
	return strings.Join(found, "\n")
}

// buildAgent builds the real guest agent.
func buildAgent() (string, error) {
	if path := os.Getenv("PYRO_TEST_AGENT"); path != "" {
		return path, nil
	}
	path := filepath.Join(shared.dir, "pyro-agent")
	cmd := exec.Command("go", "build", "-o", path, "github.com/pyro-mcp/pyro/cmd/pyro-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", errors.New(string(out))
	}
	return path, nil
}

// guestTools are the programs of this host that the test image holds.
var guestTools = []string{"sh", "cat", "ls", "sleep", "true", "sync", "hostname", "df", "dd", "mkdir", "mv", "rm",
	"seq", "chmod", "chown", "env", "head", "mktemp", "printf", "readlink", "stat", "tail", "touch", "yes", "ln", "id", "nproc", "tee", "tr"}

// buildImage makes a small environment from this host's own programs and their
// libraries, so that the tests need no network.
func buildImage() (string, error) {
	root := filepath.Join(shared.dir, "root")
	for _, dir := range []string{"bin", "etc", "workspace", "lower/dir"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return "", err
		}
	}
	if err := os.WriteFile(filepath.Join(root, "lower/dir/file"), []byte("from the environment\n"), 0o644); err != nil {
		return "", err
	}
	for _, tool := range guestTools {
		path, err := exec.LookPath(tool)
		if err != nil {
			return "", err
		}
		if err := copyInto(path, filepath.Join(root, "bin", tool)); err != nil {
			return "", err
		}
		out, err := exec.Command("ldd", path).Output()
		if err != nil {
			return "", err
		}
		for _, word := range strings.Fields(string(out)) {
			if filepath.IsAbs(word) {
				if err := copyInto(word, filepath.Join(root, word)); err != nil {
					return "", err
				}
			}
		}
	}
	image := filepath.Join(shared.dir, "root.ext4")
	out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-d", root, image, "64M").CombinedOutput()
	if err != nil {
		return "", errors.New(string(out))
	}
	return image, nil
}

func copyInto(from, to string) error {
	if _, err := os.Stat(to); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}

// testWriter shows what a machine says in the log of a test that fails.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}
