package guestagent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// TestManyEntries lists many files of one directory in bounded memory: 200 000
// where PYRO_TEST_REQUIRE has "many", because making them takes long.
func TestManyEntries(t *testing.T) {
	count := 20_000
	if testenv.Wanted("many") {
		count = 200_000
	}
	a := startAgent(t)
	dir, err := os.Open(a.path())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for i := range count {
		// Links take no inode table of their own: this is the quick way.
		if err := unix.Symlinkat("target", int(dir.Fd()), fmt.Sprintf("entry-%06d", i)); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	n := 0
	r, err := a.Manifest(testContext(t), "", func(e guestproto.ManifestEntry) error {
		if want := fmt.Sprintf("entry-%06d", n); string(e.Path) != want {
			return fmt.Errorf("entry %d is %q", n, e.Path)
		}
		n++
		return nil
	})
	if err != nil || n != count || r.EntryCount != int64(count) {
		t.Fatalf("%d entries, %+v, %v", n, r, err)
	}
	t.Logf("the manifest took %v", time.Since(began))
	if kib := a.largestSize(t); kib > 100<<10 {
		t.Errorf("the agent took %d KiB", kib)
	}
}

// largestSize is how many KiB the agent's process had at most.
func (a *agent) largestSize(t testing.TB) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	kib := 0
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	_, _ = fmt.Sscan(after, &kib)
	return kib
}

// TestTreeThatChanges walks while somebody makes, changes and removes files: no
// manifest fails, and each is in order, which the client checks.
func TestTreeThatChanges(t *testing.T) {
	a := startAgent(t)
	for i := range 300 {
		a.put(t, fmt.Sprintf("d%d/f%d", i%10, i), strings.Repeat("x", i), 0o644)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			d := fmt.Sprintf("d%d", i%10)
			_ = os.RemoveAll(a.path(d))
			if i%3 == 0 {
				_ = syscall.Mkfifo(a.path(d), 0o600)
				_ = os.Remove(a.path(d))
				_ = os.Symlink("/", a.path(d))
				_ = os.Remove(a.path(d))
			}
			_ = os.MkdirAll(a.path(d), 0o755)
			for j := range 30 {
				_ = os.WriteFile(a.path(d, fmt.Sprintf("f%d", j)), []byte(strings.Repeat("y", i%5000)), 0o644)
			}
		}
	})
	for range 50 {
		if _, err := a.Manifest(testContext(t), "", func(guestproto.ManifestEntry) error { return nil }); err != nil {
			t.Error(err)
		}
		if _, err := a.ListFiles(testContext(t), ".", true, func(guestproto.FileEntry) error { return nil }); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
}

// TestTooDeep says where it stops, and fails nothing.
func TestTooDeep(t *testing.T) {
	a := startAgent(t)
	fd, err := unix.Open(a.path(), unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range 300 {
		if err := unix.Mkdirat(fd, "d", 0o755); err != nil {
			t.Fatal(err)
		}
		sub, err := unix.Openat(fd, "d", unix.O_DIRECTORY, 0)
		_ = unix.Close(fd)
		if err != nil {
			t.Fatal(err)
		}
		fd = sub
	}
	_ = unix.Close(fd)
	entries, r := a.manifest(t, "")
	if len(entries) != guestproto.MaxDepth || r.ErrorCount != 1 || !strings.Contains(entries[len(entries)-1].Error, "deeper") {
		t.Errorf("%d entries, %+v, the last is %+v", len(entries), r, entries[len(entries)-1])
	}
	n := 0
	if _, err := a.ListFiles(testContext(t), ".", true, func(guestproto.FileEntry) error { n++; return nil }); err != nil || n != guestproto.MaxDepth {
		t.Errorf("%d entries, %v", n, err)
	}
}

// startAgentAs runs the agent by a command that ends in "$@", on a socket.
func startAgentAs(t *testing.T, root, script string) *guestclient.Client {
	t.Helper()
	dir := t.TempDir()
	for d := dir; d != "/"; d = filepath.Dir(d) {
		if strings.HasPrefix(d, os.TempDir()+"/") {
			_ = os.Chmod(d, 0o755) // for another user
		}
	}
	_ = os.Chmod(filepath.Dir(agentBinary(t)), 0o755)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", script, "sh", agentBinary(t), "--listen", "fd:3", "--root", root)
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, _ = f.Close(), l.Close()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	return guestclient.New(func(ctx context.Context) (net.Conn, error) {
		return guestconn.DialHybrid(ctx, filepath.Join(dir, "s"), guestproto.Port)
	}, guestclient.Options{})
}

// TestUnreadable is an agent without privilege among files that are not its
// own to read, with a root that it may not write to.
func TestUnreadable(t *testing.T) {
	testenv.Require(t, "root", os.Geteuid() == 0, "only root can become another user")
	testenv.RequireTools(t, "root", "setpriv")
	root := filepath.Join(t.TempDir(), "root")
	ws := filepath.Join(root, "workspace")
	if err := os.MkdirAll(filepath.Join(ws, "closed"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"open": 0o644, "secret": 0o600, "closed/inside": 0o644} {
		if err := os.WriteFile(filepath.Join(ws, name), []byte("text"), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(ws, "closed"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(ws, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	for d := filepath.Dir(root); strings.HasPrefix(d, os.TempDir()+"/"); d = filepath.Dir(d) {
		_ = os.Chmod(d, 0o755)
	}
	c := startAgentAs(t, root, `exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"`)
	got := make(map[guestproto.Path]string)
	r, err := c.Manifest(testContext(t), "", func(e guestproto.ManifestEntry) error {
		got[e.Path] = fmt.Sprintf("%s %o %d %s", e.Type, e.Mode, e.Size, e.Error)
		return nil
	})
	if err != nil || r.ErrorCount != 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	for path, want := range map[guestproto.Path]string{
		"open": "file 644 4 ", "secret": "file 600 4 permission denied", "closed": "directory 700 0 permission denied",
	} {
		if got[path] != want {
			t.Errorf("%s is %q, want %q", path, got[path], want)
		}
	}
	er, err := c.ExportFiles(testContext(t), ".", slices.Values([]string{"open", "secret", "closed/inside"}), io.Discard)
	if err != nil || er.EntryCount != 1 || er.MissingCount != 2 {
		t.Errorf("%+v, %v", er, err)
	}
	if _, err := c.ReadFile(testContext(t), "secret", 0, 5, io.Discard); !errors.Is(err, api.ErrDenied) {
		t.Errorf("reading: %v", err)
	}
	// The stage is in the workspace, as the root is not the agent's.
	if _, err := c.Sync(testContext(t), guestproto.SyncRequest{Destination: "."}, bytes.NewReader(tarOf(t, tarEntry{"new", "x", ""}))); err != nil {
		t.Error(err)
	}
	req := guestproto.SyncRequest{Destination: ".", Remove: []guestproto.Path{"open", "closed/inside"}}
	if _, err := c.Sync(testContext(t), req, bytes.NewReader(nil)); !errors.Is(err, api.ErrDenied) {
		t.Errorf("removing what may not be: %v", err)
	}
	if _, err := os.Stat(filepath.Join(ws, "open")); err != nil {
		t.Errorf("a sync that failed removed a file: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(ws, ".pyro-stage-*")); len(left) > 0 {
		t.Errorf("stages stay: %q", left)
	}
}

// TestWorkspaceOfItsOwn syncs into a workspace that is a mount, and around one
// below it.
func TestWorkspaceOfItsOwn(t *testing.T) {
	testenv.Require(t, "root", os.Geteuid() == 0, "only root can mount")
	testenv.RequireTools(t, "root", "unshare")
	root := filepath.Join(t.TempDir(), "root")
	if err := os.MkdirAll(filepath.Join(root, "workspace"), 0o755); err != nil {
		t.Fatal(err)
	}
	probe := exec.Command("unshare", "-m", "mount", "-t", "tmpfs", "none", filepath.Join(root, "workspace"))
	out, err := probe.CombinedOutput()
	testenv.Require(t, "root", err == nil, "no mount in a namespace of its own: "+string(out))
	c := startAgentAs(t, root, `exec unshare -m sh -c 'mount -t tmpfs none "$5/workspace" && mkdir "$5/workspace/m" && mount -t tmpfs none "$5/workspace/m" && exec "$@"' sh "$@"`)
	if _, err := c.Sync(testContext(t), guestproto.SyncRequest{Destination: "."}, bytes.NewReader(tarOf(t, tarEntry{"d/f", "x", ""}))); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Sync(testContext(t), guestproto.SyncRequest{Destination: ".", Remove: []guestproto.Path{"d"}}, bytes.NewReader(tarOf(t, tarEntry{"e", "x", ""}))); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		req   guestproto.SyncRequest
		entry string
	}{
		{guestproto.SyncRequest{Destination: "m"}, "f"},
		{guestproto.SyncRequest{Destination: "."}, "m/f"},
	} {
		if _, err := c.Sync(testContext(t), tt.req, bytes.NewReader(tarOf(t, tarEntry{"a", "x", ""}, tarEntry{tt.entry, "x", ""}))); !errors.Is(err, api.ErrUnsupported) {
			t.Errorf("into %s, %s: %v", tt.req.Destination, tt.entry, err)
		}
	}
	if _, err := c.WriteFile(testContext(t), guestproto.WriteFileRequest{Path: "w"}, strings.NewReader("text")); err != nil {
		t.Error(err)
	}
	var got []guestproto.Path
	if _, err := c.Manifest(testContext(t), "", func(e guestproto.ManifestEntry) error {
		got = append(got, e.Path)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, []guestproto.Path{"e", "m", "w"}) {
		t.Errorf("there is %q", got)
	}
}
