package mmdebstrap_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/mmdebstrap"
)

// A fixture is a build with a tool that is a shell script.
type fixture struct {
	tool  mmdebstrap.Tool
	build *artifact.Build
	temp  string
}

func newFixture(t *testing.T, script string) fixture {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "mmdebstrap")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	b := &artifact.Build{Dir: filepath.Join(dir, "build"), Keep: filepath.Join(dir, "keep")}
	temp := filepath.Join(dir, "temp")
	for _, d := range []string{b.Dir, b.Keep, temp} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if b.Leash, err = os.Create(filepath.Join(dir, "leash")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Leash.Close() })
	return fixture{mmdebstrap.Tool{Path: path, TempDir: temp}, b, temp}
}

// clean checks that Clean leaves nothing in the place for temporary files.
func (f fixture) clean(t *testing.T) {
	t.Helper()
	if err := f.tool.Clean(context.Background(), f.build, false); err != nil {
		t.Errorf("cleaning: %v", err)
	}
	left, err := os.ReadDir(f.temp)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func discard(_ context.Context, r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}

func TestRun(t *testing.T) {
	f := newFixture(t, `
echo "$@" > ../args
pwd > ../cwd
env | sort > ../env
mkdir "$TMPDIR/tree"
echo "I: creating tarball..." >&2
printf 'the archive'
`)
	t.Setenv("SOURCE_DATE_EPOCH", "1")
	var got bytes.Buffer
	err := f.tool.Run(t.Context(), f.build, mmdebstrap.Job{
		Suite: "bookworm", Variant: "apt", Include: []string{"git", "curl"}, Options: []string{"--option"},
		Consume: func(_ context.Context, r io.Reader) error {
			_, err := io.Copy(&got, r)
			return err
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != "the archive" {
		t.Errorf("the stream was %q", got.String())
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(f.build.Keep, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	args := read("args")
	for _, want := range []string{"--variant=apt", "--include=git,curl", "--option", "-- bookworm -\n"} {
		if !strings.Contains(args, want) {
			t.Errorf("the arguments lack %q: %s", want, args)
		}
	}
	if cwd := read("cwd"); filepath.Dir(strings.TrimSpace(cwd)) != f.build.Keep {
		t.Errorf("it ran in %s", cwd)
	}
	env := read("env")
	if !strings.Contains(env, "TMPDIR="+f.temp+"/") || strings.Contains(env, "SOURCE_DATE_EPOCH") {
		t.Errorf("the environment was:\n%s", env)
	}
	f.clean(t)
	if err := f.tool.Clean(t.Context(), f.build, true); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(f.build.Keep, "archives")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the downloads are still there: %v", err)
	}
}

func TestMirror(t *testing.T) {
	f := newFixture(t, `echo "$@" > ../args`)
	f.tool.Mirror = "http://mirror.example/debian http://mirror.example/security"
	if err := f.tool.Run(t.Context(), f.build, mmdebstrap.Job{Suite: "bookworm", Variant: "apt", Consume: discard}); err != nil {
		t.Fatal(err)
	}
	args, err := os.ReadFile(filepath.Join(f.build.Keep, "args"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"deb http://mirror.example/debian bookworm main", "deb http://mirror.example/debian bookworm-updates main",
		"deb http://mirror.example/security bookworm-security main",
	} {
		if !strings.Contains(string(args), want) {
			t.Errorf("the arguments lack %q: %s", want, args)
		}
	}
}

func TestFailures(t *testing.T) {
	for _, tt := range []struct {
		name, says string
		class      error
		text, hint string
	}{
		{
			"no network",
			"W: Failed to fetch http://mirror/InRelease  Temporary failure resolving 'mirror'\nE: apt-get update failed to run",
			api.ErrUnavailable, "cannot be downloaded: W: Failed to fetch http://mirror/InRelease", "check the network",
		},
		{
			"full disk",
			"dpkg-deb: error: failed to write: No space left on device\nE: Failed to fetch x",
			api.ErrExhausted, "the disk is full: dpkg-deb", "free some space",
		},
		{
			"no keyring",
			"W: GPG error: InRelease: The following signatures couldn't be verified because the public key is not available: NO_PUBKEY 0E98404D386FA1D9",
			api.ErrDenied, "signatures cannot be checked", "debian-archive-keyring",
		},
		{"no range of ids", "E: no entry in /etc/subuid for someone", api.ErrUnavailable, "no entry in /etc/subuid for someone", "/etc/subuid"},
		{"something else", "I: fine so far\nE: the moon is in the wrong house", api.ErrUnavailable, "exit status 25): E: the moon is in the wrong house", ""},
		{"nothing", "", api.ErrUnavailable, "it said nothing", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, "cat >&2 <<'X'\n"+tt.says+"\nI: removing tempdir...\nX\nexit 25\n")
			if tt.says == "" {
				f = newFixture(t, "exit 25\n")
			}
			// The consumer's own complaint about the missing stream comes second.
			err := f.tool.Run(t.Context(), f.build, mmdebstrap.Job{Suite: "bookworm", Consume: func(ctx context.Context, r io.Reader) error {
				_ = discard(ctx, r)
				return errors.New("there was no archive")
			}})
			if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.text) || !strings.Contains(api.Hint(err), tt.hint) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %q (%s), hint %q", err, api.Code(err), api.Hint(err))
			}
			f.clean(t)
		})
	}
}

func TestMissingTool(t *testing.T) {
	f := newFixture(t, "")
	f.tool.Path = ""
	t.Setenv("PATH", t.TempDir())
	err := f.tool.Run(t.Context(), f.build, mmdebstrap.Job{Consume: discard})
	if !errors.Is(err, api.ErrUnavailable) || !strings.Contains(api.Hint(err), "apt-get install mmdebstrap") {
		t.Errorf("got %v, hint %q", err, api.Hint(err))
	}
}

func TestTooLittleRoom(t *testing.T) {
	f := newFixture(t, "echo should not run >&2; exit 1")
	err := f.tool.Run(t.Context(), f.build, mmdebstrap.Job{NeedBytes: 1 << 60, Consume: discard})
	if !errors.Is(err, api.ErrExhausted) {
		t.Errorf("got %v", err)
	}
	f.clean(t)
}

// hang starts a grandchild, reports both on the stream, and stays. The
// grandchild's pid is that of the stream's first line.
const hang = `
mkdir -p "$TMPDIR/tree/deep"
sleep 1000 &
echo $!
wait
`

// readPid reads the hanging tool's first line and returns a pidfd.
func readPid(t *testing.T, r io.Reader) int {
	var pid int
	if _, err := fmt.Fscan(r, &pid); err != nil {
		t.Error(err)
		return -1
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Error(err)
	}
	return fd
}

// ended waits for the process to be gone, in the kernel's eyes.
func ended(t *testing.T, pidfd int) {
	t.Helper()
	defer unix.Close(pidfd)
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 10000)
	if n != 1 {
		t.Errorf("the tool's child still runs (%v)", err)
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	}
}

func TestCancel(t *testing.T) {
	f := newFixture(t, hang)
	ctx, cancel := context.WithCancel(t.Context())
	pidfd := -1
	began := time.Now()
	err := f.tool.Run(ctx, f.build, mmdebstrap.Job{Consume: func(ctx context.Context, r io.Reader) error {
		pidfd = readPid(t, r)
		cancel()
		return discard(ctx, r)
	}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it took %v", took)
	}
	ended(t, pidfd)
	f.clean(t)
}

func TestConsumerFails(t *testing.T) {
	f := newFixture(t, hang)
	sentinel := errors.New("the image is full")
	pidfd := -1
	err := f.tool.Run(t.Context(), f.build, mmdebstrap.Job{Consume: func(_ context.Context, r io.Reader) error {
		pidfd = readPid(t, r)
		return sentinel
	}})
	if !errors.Is(err, sentinel) {
		t.Errorf("got %v", err)
	}
	ended(t, pidfd)
	f.clean(t)
}

// TestEscapedChild: a process that left the group and keeps the pipes does not
// hold up a cancelled run. (The leash finds it later.)
func TestEscapedChild(t *testing.T) {
	if _, err := exec.LookPath("setsid"); err != nil {
		t.Skip("setsid is not on PATH")
	}
	f := newFixture(t, "setsid sleep 1000 &\necho $!\nwait\n")
	ctx, cancel := context.WithCancel(t.Context())
	pidfd := -1
	err := f.tool.Run(ctx, f.build, mmdebstrap.Job{Consume: func(ctx context.Context, r io.Reader) error {
		pidfd = readPid(t, r)
		cancel()
		return discard(ctx, r)
	}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	ended(t, pidfd)
}

func TestCleanKeepsToItsOwn(t *testing.T) {
	f := newFixture(t, "")
	precious := filepath.Join(f.temp, "precious")
	if err := os.Mkdir(precious, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, record := range []string{precious, "pyro-build-relative", ""} {
		if err := os.WriteFile(filepath.Join(f.build.Dir, "tempdir"), []byte(record), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := f.tool.Clean(t.Context(), f.build, false); !errors.Is(err, api.ErrInternal) {
			t.Errorf("cleaning %q gave %v", record, err)
		}
	}
	if _, err := os.Stat(precious); err != nil {
		t.Error(err)
	}
}

func TestProgress(t *testing.T) {
	f := newFixture(t, `cat >&2 <<'X'
Unpacking usr-is-merged (1) ...
I: running apt-get update...
Get:1 http://mirror/debian bookworm InRelease [151 kB]
I: downloading packages with apt...
0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.
Need to get 38.0 MB of archives.
Get:1 http://mirror/debian bookworm/main amd64 gcc-12-base amd64 12.2.0 [37.6 kB]
Get:2 http://mirror/debian bookworm/main amd64 libc6 amd64 2.36 [2759 kB]
I: extracting archives...
Unpacking gcc-12-base:amd64 (12.2.0-14) ...
Setting up gcc-12-base:amd64 (12.2.0-14) ...
Unpacking libc6:amd64 (2.36) ...
Setting up libc6:amd64 (2.36) ...
I: creating tarball...
X
head -c 1000000 /dev/zero | tr '\0' x >&2
`)
	var got []string
	err := f.tool.Run(t.Context(), f.build, mmdebstrap.Job{Consume: discard, Progress: func(p api.Progress) {
		got = append(got, fmt.Sprintf("%s %d/%d %s", p.Phase, p.Done, p.Total, p.Message))
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"lists 0/0 reading Debian's package lists",
		"downloading 1/2 downloading package 1 of 2: gcc-12-base",
		"downloading 2/2 downloading package 2 of 2: libc6",
		"installing 0/2 unpacking the first packages",
		"installing 0/2 installing packages: unpacking gcc-12-base",
		"installing 1/2 installing packages: setting up gcc-12-base",
		"installing 1/2 installing packages: unpacking libc6",
		"installing 2/2 installing packages: setting up libc6",
		"writing 0/0 writing the image",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("progress (-want +got):\n%s", diff)
	}
}
