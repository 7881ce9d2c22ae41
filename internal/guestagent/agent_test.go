package guestagent_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// buildAgent builds the real program once per run of the tests.
var buildAgent = sync.OnceValues(func() (string, error) {
	path := filepath.Join(tempDir, "pyro-agent")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=test", "-o", path,
		"github.com/pyro-mcp/pyro/cmd/pyro-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the agent: %w\n%s", err, out)
	}
	return path, nil
})

var tempDir string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "guestagent")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	tempDir = dir
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

func agentBinary(t testing.TB) string {
	t.Helper()
	path, err := buildAgent()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// An agent is one running process of the real program.
type agent struct {
	*guestclient.Client
	cmd    *exec.Cmd
	root   string
	dial   guestclient.Dialer
	stderr *bytes.Buffer
	done   chan struct{}
}

// startAgent runs the agent on a socket in a directory of the test's own and
// ends it with the test.
func startAgent(t testing.TB) *agent {
	t.Helper()
	dir := t.TempDir()
	a := &agent{root: filepath.Join(dir, "root"), stderr: &bytes.Buffer{}, done: make(chan struct{})}
	if err := os.MkdirAll(filepath.Join(a.root, "workspace"), 0o755); err != nil {
		t.Fatal(err)
	}
	// The listening socket is ours and inherited, so there is nothing to wait
	// for: a connection before the agent accepts is queued.
	sock := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	a.cmd = exec.Command(agentBinary(t), "--listen", "fd:3", "--root", a.root)
	a.cmd.ExtraFiles = []*os.File{f}
	a.cmd.Stderr = a.stderr
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	_ = l.Close()
	go func() {
		defer close(a.done)
		_ = a.cmd.Wait()
	}()
	a.dial = func(ctx context.Context) (net.Conn, error) {
		return guestconn.DialHybrid(ctx, sock, guestproto.Port)
	}
	a.Client = guestclient.New(a.dial, guestclient.Options{})
	t.Cleanup(func() {
		_ = a.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-a.done:
		case <-time.After(30 * time.Second):
			_ = a.cmd.Process.Kill()
			<-a.done
			t.Error("the agent did not end on SIGTERM")
		}
		if strings.Contains(a.stderr.String(), "panic") {
			t.Errorf("the agent panicked:\n%s", a.stderr)
		}
	})
	return a
}

// testContext ends before the test binary's own limit.
func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// sh runs a shell command and returns its outputs.
func (a *agent) sh(t testing.TB, command string) (stdout, stderr string, r guestproto.ExecReply) {
	t.Helper()
	var out, errs bytes.Buffer
	r, err := a.Exec(testContext(t), guestproto.ExecRequest{Command: command}, guestclient.ExecIO{Stdout: &out, Stderr: &errs})
	if err != nil {
		t.Fatalf("exec %q: %v", command, err)
	}
	return out.String(), errs.String(), r
}

// execStarted calls f when the command has been started.
func execStarted(f func()) guestclient.ExecIO {
	return guestclient.ExecIO{Started: func(int) { f() }}
}
