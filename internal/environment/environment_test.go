package environment_test

import (
	"archive/tar"
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

const envName = "debian:12-base"

// The test binary is also a pull that gets killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv("ENVIRONMENT_TEST_PULL"); dir != "" {
		s, err := environment.Open(options(dir))
		if err == nil {
			_, err = s.Pull(context.Background(), cmp.Or(os.Getenv("ENVIRONMENT_TEST_NAME"), envName), nil)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// options are those of a store below dir with dir/mmdebstrap as its tool.
func options(dir string) environment.Options {
	return environment.Options{
		CacheDir:   filepath.Join(dir, "cache"),
		TempDir:    filepath.Join(dir, "temp"),
		Mmdebstrap: filepath.Join(dir, "mmdebstrap"),
	}
}

// newStore returns a store whose mmdebstrap counts its runs in dir/runs, does
// what extra says, and prints a small Debian-like tree.
func newStore(t *testing.T, extra string) (s *environment.Store, dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "temp"), 0o755); err != nil {
		t.Fatal(err)
	}
	writeTree(t, filepath.Join(dir, "tree.tar"))
	script := fmt.Sprintf("#!/bin/sh\necho run >> %[1]s/runs\n%[2]s\ncat %[1]s/tree.tar\n", dir, extra)
	if err := os.WriteFile(filepath.Join(dir, "mmdebstrap"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := environment.Open(options(dir))
	if err != nil {
		t.Fatal(err)
	}
	return s, dir
}

func writeTree(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for _, e := range []struct {
		name    string
		kind    byte
		content string
	}{
		{"./", tar.TypeDir, ""},
		{"./dev/null", tar.TypeChar, ""},
		{"./etc/hostname", tar.TypeReg, "the-host-of-the-build\n"},
		{"./etc/resolv.conf", tar.TypeReg, "nameserver 192.0.2.1\n"},
		{"./etc/machine-id", tar.TypeReg, "0123456789abcdef0123456789abcdef\n"},
		{"./etc/ssh/ssh_host_rsa_key", tar.TypeReg, "secret"},
		{"./etc/shadow", tar.TypeReg, "root:*:20779:0:99999:7:::\ndaemon:*:20779:0:99999:7:::\n"},
		{"./etc/os-release", tar.TypeReg, "ID=debian\n"},
		{"./tmp/left", tar.TypeReg, "x"},
		{"./var/log/apt/", tar.TypeDir, ""},
		{"./var/log/apt/history.log", tar.TypeReg, "x"},
		{"./var/lib/apt/lists/deb.debian.org_Packages", tar.TypeReg, "x"},
		{"./var/cache/apt/archives/git.deb", tar.TypeReg, "x"},
	} {
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Mode: 0o755, Size: int64(len(e.content)), ModTime: releaseDay}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// runs is how often the tool was started.
func runs(t *testing.T, dir string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "runs"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Count(string(b), "run")
}

func TestPullUsePrune(t *testing.T) {
	s, dir := newStore(t, "")
	ctx := t.Context()
	before, err := s.Inspect(ctx, envName)
	if err != nil {
		t.Fatal(err)
	}
	if before.Installed || before.Digest != "" || before.Distribution != "debian" || len(before.DefaultPackages) == 0 {
		t.Errorf("before the pull: %+v", before)
	}
	pulled, err := s.Pull(ctx, envName, nil)
	if err != nil {
		t.Fatal(err)
	}
	img, err := s.Use(ctx, envName, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if !pulled.Installed || pulled.Digest != img.Digest || pulled.SizeBytes <= 0 || pulled.InstallDir != filepath.Dir(img.Path) {
		t.Errorf("pulled %+v but used %+v", pulled, img)
	}
	fi, err := os.Stat(img.Path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Size() != int64(img.DiskMiB)<<20 {
		t.Errorf("the image has %d bytes, its disk %d MiB", fi.Size(), img.DiskMiB)
	}
	list, err := s.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if e.Installed != (e.Name == envName) {
			t.Errorf("%s is listed with installed = %v", e.Name, e.Installed)
		}
	}
	if _, err := s.Pull(ctx, envName, nil); err != nil || runs(t, dir) != 1 {
		t.Errorf("the second pull ended with %v after %d builds", err, runs(t, dir))
	}
	// In use, then wanted by a workspace, then neither.
	for _, opts := range []environment.PruneOptions{{}, {All: true}, {All: true, InUse: []string{img.Digest}}} {
		if got, err := s.Prune(ctx, opts); err != nil || len(got.Removed) != 0 {
			t.Errorf("prune %+v removed %v, %v", opts, got.Removed, err)
		}
		if opts.All && opts.InUse == nil {
			img.Close()
		}
	}
	got, err := s.Prune(ctx, environment.PruneOptions{All: true})
	if err != nil || len(got.Removed) != 1 || got.FreedBytes <= 0 || !strings.HasPrefix(got.Removed[0], envName+" ") {
		t.Errorf("prune of the unused one gave %+v, %v", got, err)
	}
	if _, err := s.UseDigest(ctx, envName, img.Digest); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("after the prune: %v", err)
	}
}

func TestUnknownName(t *testing.T) {
	s, _ := newStore(t, "")
	_, inspect := s.Inspect(t.Context(), "debian:99")
	_, pull := s.Pull(t.Context(), "../../etc", nil)
	_, use := s.Use(t.Context(), "", nil)
	for _, err := range []error{inspect, pull, use} {
		if !errors.Is(err, api.ErrNotFound) || !strings.Contains(api.Hint(err), environment.Default) {
			t.Errorf("got %v, hint %q", err, api.Hint(err))
		}
	}
}

// garble changes an installed image behind pyro's back.
func garble(t *testing.T, path string) {
	t.Helper()
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("garbage"), 5<<20); err != nil {
		t.Fatal(err)
	}
}

func TestDamagedIsReportedAndHealed(t *testing.T) {
	s, dir := newStore(t, "")
	img, err := s.Use(t.Context(), envName, nil)
	if err != nil {
		t.Fatal(err)
	}
	img.Close()
	garble(t, img.Path)
	if _, err := s.Use(t.Context(), envName, nil); !errors.Is(err, api.ErrDamaged) || !strings.Contains(api.Hint(err), "pyro env pull "+envName) {
		t.Errorf("use gave %v, hint %q", err, api.Hint(err))
	}
	if _, err := s.UseDigest(t.Context(), envName, img.Digest); !errors.Is(err, api.ErrDamaged) {
		t.Errorf("use by digest gave %v", err)
	}
	healed, err := s.Pull(t.Context(), envName, nil)
	if err != nil {
		t.Fatal(err)
	}
	if healed.Digest != img.Digest || runs(t, dir) != 2 {
		t.Errorf("healed to %s (was %s) with %d builds", healed.Digest, img.Digest, runs(t, dir))
	}
	again, err := s.Use(t.Context(), envName, nil)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
}

func TestFailedPullLeavesNothing(t *testing.T) {
	s, dir := newStore(t, "mkdir $TMPDIR/tree; echo 'E: Could not connect to mirror' >&2; exit 1")
	_, err := s.Pull(t.Context(), envName, nil)
	if !errors.Is(err, api.ErrUnavailable) || api.Hint(err) == "" || !strings.HasPrefix(err.Error(), `building environment "debian:12-base": `) {
		t.Errorf("got %v, hint %q", err, api.Hint(err))
	}
	if e, err := s.Inspect(t.Context(), envName); err != nil || e.Installed {
		t.Errorf("after a failed pull: %+v, %v", e, err)
	}
	for _, sub := range []string{"temp", "cache/environments/objects", "cache/environments/refs"} {
		if left, err := os.ReadDir(filepath.Join(dir, sub)); err != nil || len(left) != 0 {
			t.Errorf("%s has %v, %v", sub, left, err)
		}
	}
}

func TestTwoPullsBuildOnce(t *testing.T) {
	// The first holds the tool up until the second has said that it waits.
	s, dir := newStore(t, "")
	gate := filepath.Join(dir, "gate")
	if err := unix.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile(filepath.Join(dir, "mmdebstrap"))
	if err != nil {
		t.Fatal(err)
	}
	script = []byte(strings.Replace(string(script), "\ncat ", "\nread go < "+gate+"\ncat ", 1))
	if err := os.WriteFile(filepath.Join(dir, "mmdebstrap"), script, 0o700); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			_, err := s.Pull(t.Context(), envName, func(p api.Progress) {
				if p.Phase != "waiting" {
					return
				}
				once.Do(func() {
					if err := os.WriteFile(gate, []byte("go\n"), 0); err != nil {
						t.Error(err)
					}
				})
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := runs(t, dir); n != 1 {
		t.Errorf("%d builds, want 1", n)
	}
}

// TestKilledPull: a pull that is killed in the middle leaves a tool running
// and files lying; the next one ends and removes them and succeeds.
func TestKilledPull(t *testing.T) {
	s, dir := newStore(t, "")
	script := fmt.Sprintf("#!/bin/sh\nmkdir $TMPDIR/tree\necho $$ > %s/pid\nexec sleep 1000\n", dir)
	tool := filepath.Join(dir, "mmdebstrap")
	whole, err := os.ReadFile(tool)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tool, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	pidFile := filepath.Join(dir, "pid")
	if err := unix.Mkfifo(pidFile, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "ENVIRONMENT_TEST_PULL="+dir)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(pidFile) // waits for the tool
	if err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(f).ReadString('\n')
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Kill(pid, unix.SIGKILL) // should the test fail
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed, as asked
	temp := filepath.Join(dir, "temp")
	if left, err := os.ReadDir(temp); err != nil || len(left) != 1 {
		t.Fatalf("the killed pull left %v, %v: this tests nothing", left, err)
	}
	if err := os.WriteFile(tool, whole, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(t.Context(), envName, nil); err != nil {
		t.Fatal(err)
	}
	if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(stat), ") Z ") {
		t.Errorf("the tool still runs: %s", stat)
	}
	if left, err := os.ReadDir(temp); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestImageContent: nothing of the host or of the moment is in the image, and
// what a guest mounts on is.
func TestImageContent(t *testing.T) {
	testenv.RequireTools(t, "e2fsprogs", "e2fsck", "debugfs")
	s, _ := newStore(t, "")
	img, err := s.Use(t.Context(), envName, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if out, err := exec.Command("e2fsck", "-fn", img.Path).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
	debugfs := func(request string) string {
		out, err := exec.Command("debugfs", "-R", request, img.Path).CombinedOutput()
		if err != nil {
			t.Fatalf("debugfs %s: %v", request, err)
		}
		_, text, _ := strings.Cut(string(out), "\n") // behind its version
		return text
	}
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "workspace"} {
		if got := debugfs("stat /" + dir); !strings.Contains(got, "Type: directory") {
			t.Errorf("/%s: %s", dir, got)
		}
	}
	if got := debugfs("stat /tmp"); !strings.Contains(got, "01777") {
		t.Errorf("/tmp: %s", got)
	}
	for path, want := range map[string]string{
		"/etc/hostname":    "pyro\n",
		"/etc/resolv.conf": "",
		"/etc/machine-id":  "",
		"/etc/os-release":  "ID=debian\n",
		"/etc/shadow":      "root:*:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n",
	} {
		if got := debugfs("cat " + path); got != want {
			t.Errorf("%s holds %q, want %q", path, got, want)
		}
	}
	for _, path := range []string{
		"/etc/ssh/ssh_host_rsa_key", "/tmp/left", "/dev/null", "/var/log/apt/history.log",
		"/var/lib/apt/lists/deb.debian.org_Packages", "/var/cache/apt/archives/git.deb",
	} {
		if got := debugfs("stat " + path); !strings.Contains(got, "File not found") {
			t.Errorf("%s is there: %s", path, got)
		}
	}
	if got := debugfs("stat /var/log/apt"); !strings.Contains(got, "Type: directory") {
		t.Errorf("/var/log/apt: %s", got)
	}
}
