// Package trees_test takes trees of files, messy and random ones, through the
// whole path of a workspace: seed, changes made inside, diff, git apply, export,
// snapshot, reset, sync, patch. What is in the workspace is asked of Python in
// the guest, and what is on the host of the file system, so that no code of
// pyro's own says whether pyro is right.
package trees_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/test/build"
)

var programs string

func TestMain(m *testing.M) { os.Exit(build.Main(m, &programs, false)) }

// engine returns the engine under test, as everywhere: host, or what
// PYRO_TEST_ENGINE names.
func engine() string {
	if e := os.Getenv("PYRO_TEST_ENGINE"); e != "" {
		return e
	}
	return "host"
}

// A user is somebody with a state directory and a shell.
type user struct {
	t   *testing.T
	env []string
	// credential, which may be nil, is who runs pyro.
	credential *syscall.Credential
	// peaks, where not nil, collects the most memory of each command.
	peaks *peaks
}

func newUser(t *testing.T) *user {
	t.Helper()
	testenv.RequireTools(t, "git", "git")
	testenv.RequireTools(t, "python3", "python3")
	// Short, because sockets lie below it.
	dir, err := os.MkdirTemp("", "trees")
	if err != nil {
		t.Fatal(err)
	}
	cache := filepath.Join(dir, "cache")
	if engine() != "host" {
		if cache, err = statedir.DefaultCache(os.Getenv); err != nil {
			t.Fatal(err)
		}
	}
	u := &user{t: t, env: append(os.Environ(), "PYRO_STATE_DIR="+filepath.Join(dir, "state"), "PYRO_CACHE_DIR="+cache, "PYRO_ENGINE="+engine())}
	t.Cleanup(func() {
		_, _, _ = u.try("workspace", "delete", "--all")
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if engine() != "host" {
		out, _, _ := u.try("doctor", "--json")
		var report api.DoctorReport
		if err := json.Unmarshal(out, &report); err != nil {
			t.Fatalf("pyro doctor: %v: %s", err, out)
		}
		for _, e := range report.Engines {
			if e.Engine == engine() {
				testenv.Require(t, engine(), e.Available, e.Detail)
			}
		}
	}
	return u
}

// try runs pyro and returns what it wrote and its status.
func (u *user) try(args ...string) (stdout, stderr []byte, status int) {
	u.t.Helper()
	return u.feed(nil, args...)
}

func (u *user) feed(stdin []byte, args ...string) (stdout, stderr []byte, status int) {
	u.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(programs, "pyro"), args...)
	cmd.Env = u.env
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if u.credential != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: u.credential}
		cmd.Dir = "/"
	}
	err := cmd.Start()
	if err == nil && u.peaks != nil {
		stop := u.peaks.watch(strings.Join(args[:min(3, len(args))], " "), cmd.Process.Pid)
		err = cmd.Wait()
		stop()
	} else if err == nil {
		err = cmd.Wait()
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		u.t.Fatalf("pyro %q: %v", args, err)
	}
	return out.Bytes(), errs.Bytes(), cmd.ProcessState.ExitCode()
}

// pyro runs pyro, which must succeed, and returns its stdout.
func (u *user) pyro(args ...string) []byte {
	u.t.Helper()
	out, errs, status := u.try(args...)
	if status != 0 {
		u.t.Fatalf("pyro %q: status %d: %s", args, status, errs)
	}
	return out
}

// decode runs pyro with --json and decodes what it prints.
func (u *user) decode(v any, args ...string) {
	u.t.Helper()
	out := u.pyro(append([]string{"--json"}, args...)...)
	if err := json.Unmarshal(out, v); err != nil {
		u.t.Fatalf("pyro %q: %v: %.300s", args, err, out)
	}
}

// create makes a workspace and returns its id.
func (u *user) create(args ...string) string {
	u.t.Helper()
	out := u.pyro(append([]string{"workspace", "create", "--allow-host-compat", "--ttl-seconds", "3600", "--id-only", "--quiet", "debian:12"}, args...)...)
	return strings.TrimSpace(string(out))
}

// python runs a script in the workspace and returns its stdout.
func (u *user) python(id, script string, args ...string) []byte {
	u.t.Helper()
	out, errs, status := u.feed([]byte(script), append([]string{"workspace", "exec", "--quiet", "--stdin", "--timeout-seconds", "900", id, "--", "python3", "-B", "-"}, args...)...)
	if status != 0 {
		u.t.Fatalf("python in the workspace: status %d: %s", status, errs)
	}
	return out
}

// A tree is what lies where: for a file "file HASH" or "exec HASH", for a link
// "link TARGET", for a directory "dir".
type tree map[string]string

//go:embed testdata/list.py
var listScript string

// inside returns the tree of a workspace, as Python there sees it.
func (u *user) inside(id string) tree {
	u.t.Helper()
	var hexed map[string]string // both sides in hexadecimal: any bytes are names
	if out := u.python(id, listScript); json.Unmarshal(out, &hexed) != nil {
		u.t.Fatalf("the list is %.300s", out)
	}
	found := tree{}
	for name, what := range hexed {
		found[unhex(u.t, name)] = unhex(u.t, what)
	}
	return found
}

func unhex(t *testing.T, s string) string {
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// onHost returns the tree of a directory of this host.
func onHost(t *testing.T, dir string) tree {
	t.Helper()
	found := tree{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name := strings.TrimPrefix(path, dir+"/")
		fi, err := d.Info()
		if err != nil {
			return err
		}
		switch fi.Mode().Type() {
		case fs.ModeDir:
			found[name] = "dir"
		case fs.ModeSymlink:
			target, err := os.Readlink(path)
			found[name] = "link " + target
			return err
		case 0:
			content, err := os.ReadFile(path)
			kind := "file"
			if fi.Mode()&0o100 != 0 {
				kind = "exec"
			}
			found[name] = fmt.Sprintf("%s %x", kind, sha256.Sum256(content))
			return err
		}
		return nil // pipes and the like are no files
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// copyOut copies a workspace's files to a new directory by tar, links and all.
func (u *user) copyOut(id string) string {
	u.t.Helper()
	dir := u.t.TempDir()
	archive := u.pyro("workspace", "exec", "--quiet", "--timeout-seconds", "900", id, "--", "tar", "c", ".")
	cmd := exec.Command("tar", "x", "-C", dir)
	cmd.Stdin = bytes.NewReader(archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		u.t.Fatalf("tar x: %v: %s", err, out)
	}
	return dir
}

// git runs git in a directory of this host, without anybody's configuration.
func git(t *testing.T, dir string, stdin []byte, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main",
		"-c", "protocol.file.allow=always", "-c", "core.autocrlf=false"}, args...)...)
	cmd.Dir = dir
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %q: %v: %s", args, err, out)
	}
	return string(out)
}

// checkDiff checks that the workspace's diff against from turns base, a copy of
// that state on this host, into what is in the workspace now, but for what it
// says that no patch can carry. It changes base and returns the diff.
func (u *user) checkDiff(id, from, base string) *api.Diff {
	u.t.Helper()
	args := []string{"workspace", "diff", id}
	if from != "" {
		args = append(args, "--from", from)
	}
	before, want := onHost(u.t, base), u.inside(id)
	var d api.Diff
	u.decode(&d, args...)
	plain := u.pyro(args...)
	if diff := cmp.Diff(d.Patch, string(plain)); diff != "" {
		u.t.Errorf("the patch is another in JSON (-json +plain):\n%.2000s", diff)
	}
	excused := map[string]bool{}
	for _, e := range d.Unpatched {
		excused[e.Path] = true
	}
	// Git knows no empty directories, and so makes no file where one lies: what
	// the diff names as gone and in no patch has to be removed by hand.
	for name, what := range before {
		if what == "dir" && excused[printed(name)] {
			for ; name != "." && want[name] != "dir" && os.Remove(filepath.Join(base, name)) == nil; name = filepath.Dir(name) {
			}
		}
	}
	if len(plain) > 0 {
		apply(u.t, base, plain)
	}
	got := onHost(u.t, base)
	for name := range union(want, got) {
		if want[name] == got[name] || excused[printed(name)] || inGit(name) {
			continue
		}
		// A directory that is excused for being empty needs its parents.
		if (want[name] == "dir" || got[name] == "dir") && excusedBelow(excused, printed(name)) {
			continue
		}
		u.t.Errorf("%q is %q in the workspace, %q after git apply", name, want[name], got[name])
	}
	u.checkEntries(&d, before, want)
	return &d
}

// checkEntries checks the list of changed paths against both trees.
func (u *user) checkEntries(d *api.Diff, before, now tree) {
	u.t.Helper()
	want := map[string]string{}
	for name := range union(before, now) {
		a, b := before[name], now[name]
		switch {
		case a == b || inGit(name) || a == "dir" && b == "" || a == "" && b == "dir":
			// Directories are entries only where they are empty: see Compare.
		case a == "":
			want[printed(name)] = api.ChangeAdded
		case b == "":
			want[printed(name)] = api.ChangeDeleted
		case kind(a) != kind(b):
			want[printed(name)] = api.ChangeTypeChanged
		default:
			want[printed(name)] = api.ChangeModified
		}
	}
	got := map[string]string{}
	for _, e := range d.Entries {
		if e.ArtifactType != "directory" && !inGit(e.Path) {
			got[e.Path] = e.Status
		} else if want[e.Path] == api.ChangeTypeChanged {
			got[e.Path] = e.Status
		}
	}
	for name, status := range want {
		// A directory with something in it speaks through what is in it.
		if status == api.ChangeTypeChanged && got[name] != status && (before[name] == "dir" || now[name] == "dir") {
			delete(want, name)
			delete(got, name)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		u.t.Errorf("changed paths (-want +got):\n%.3000s", diff)
	}
}

// printed is a name as JSON can hold it.
func printed(name string) string { return string([]rune(name)) }

func kind(what string) string {
	k, _, _ := strings.Cut(what, " ")
	if k == "exec" {
		return "file"
	}
	return k
}

// inGit reports whether a path lies in a Git directory, which patches leave
// alone.
func inGit(name string) bool {
	return name == ".git" || strings.HasPrefix(name, ".git/") || strings.Contains(name, "/.git/") || strings.HasSuffix(name, "/.git")
}

func excusedBelow(excused map[string]bool, dir string) bool {
	for e := range excused {
		if strings.HasPrefix(e, dir+"/") {
			return true
		}
	}
	return false
}

func union(a, b tree) map[string]bool {
	names := map[string]bool{}
	for _, t := range []tree{a, b} {
		for name := range t {
			names[name] = true
		}
	}
	return names
}

// apply applies a patch with git apply to a directory that is to be no part of
// any repository.
func apply(t *testing.T, dir string, patch []byte) {
	t.Helper()
	cmd := exec.Command("git", "apply", "--whitespace=nowarn", "-")
	cmd.Dir = dir
	cmd.Stdin = bytes.NewReader(patch)
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_CEILING_DIRECTORIES="+filepath.Dir(dir))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git apply: %v: %.2000s", err, out)
	}
}

// checkExport checks that an export is the workspace but for the entries that
// the report names as left out, which may be links only.
func (u *user) checkExport(id string) string {
	u.t.Helper()
	want := u.inside(id)
	out := filepath.Join(u.t.TempDir(), "exported")
	var res api.ExportResult
	u.decode(&res, "workspace", "export", id, ".", "--output", out)
	got := onHost(u.t, out)
	skipped := map[string]bool{}
	for _, s := range res.Skipped {
		skipped[s.Path] = true
	}
	missing := int64(0)
	for name := range union(want, got) {
		if want[name] == got[name] {
			continue
		}
		if kind(want[name]) == "link" && got[name] == "" && (skipped[printed(name)] || res.SkippedCount > int64(len(res.Skipped))) {
			missing++
			continue
		}
		u.t.Errorf("%q is %q in the workspace, %q in the export", name, want[name], got[name])
	}
	if missing != res.SkippedCount {
		u.t.Errorf("the export lacks %d entries and reports %d", missing, res.SkippedCount)
	}
	return out
}
