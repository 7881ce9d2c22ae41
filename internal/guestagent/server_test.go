package guestagent_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestagent"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// TestPanic is RELIABILITY L9: a fault in a handler ends the request only. A
// server without a runner has such a fault in every exec.
func TestPanic(t *testing.T) {
	var log bytes.Buffer
	s, err := guestagent.NewServer(guestagent.Config{Root: t.TempDir(), Logger: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	c := guestclient.New(func(context.Context) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go s.Handle(context.Background(), theirs)
		return ours, nil
	}, guestclient.Options{})
	for range 3 {
		_, err = c.Exec(testContext(t), guestproto.ExecRequest{Command: "true"}, guestclient.ExecIO{})
		if !errors.Is(err, api.ErrInternal) || !strings.Contains(err.Error(), "fault of its own") {
			t.Errorf("error %v", err)
		}
		if _, err := c.Hello(testContext(t)); err != nil {
			t.Errorf("after it, hello: %v", err)
		}
	}
	if !strings.Contains(log.String(), "panic") {
		t.Error("the log does not mention it")
	}
}

// FuzzRequest lets the agent read arbitrary bytes as a request. Nothing can be
// run, so an exec is answered with an error too.
func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"action":"hello"}` + "\n"))
	f.Add([]byte(`{"action":"extract_archive","destination":"x","archive_size":3}` + "\nabc"))
	f.Add([]byte(`{"action":"export_archive","path":"/","stream":true}` + "\n"))
	f.Add([]byte(`{"action":"exec","argv":["x"],"stream":true}` + "\n\x01\x00\x00\x00\x00"))
	s, err := guestagent.NewServer(guestagent.Config{Root: f.TempDir(), Logger: slog.New(slog.DiscardHandler), PowerOff: func(time.Duration) {}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		ours, theirs := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.Handle(context.Background(), theirs)
		}()
		go func() {
			_, _ = ours.Write(data)
			_ = ours.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			_, _ = io.Copy(io.Discard, ours)
			_ = ours.Close()
		}()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatal("the request does not end")
		}
	})
}

// TestDialOut is the agent in a sandbox: it connects to the host, shows its
// token, serves streams, and comes back after the host hung up, to go on with the
// session or to begin another as the host says.
func TestDialOut(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "host.sock")
	cmd := exec.Command(agentBinary(t), "--dial", "unix:"+path, "--root", dir)
	cmd.Env = append(os.Environ(), "PYRO_AGENT_TOKEN=secret token")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the agent ends with %v", err)
		}
	}()
	// dialled waits until the agent has come with the token.
	dialled := func(token string) net.Conn {
		t.Helper()
		l, err := guestconn.ListenUnix(path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		line := make([]byte, len(token)+1)
		if _, err := io.ReadFull(conn, line); err != nil || string(line) != token+"\n" {
			t.Fatalf("the token is %q, %v; want %q", line, err, token)
		}
		return conn
	}
	bootID, token, last := "", "secret token", ""
	for round := range 3 {
		conn := dialled(token)
		token = fmt.Sprintf("token %d", round)
		if err := guestconn.GreetBegin(conn, token); err != nil {
			t.Fatal(err)
		}
		pipe := guestconn.NewSplicedPipe(conn, guestconn.Host)
		m, err := guestconn.NewMux(testContext(t), pipe, guestconn.Host)
		if err != nil {
			t.Fatal(err)
		}
		c := guestclient.New(m.Open, guestclient.Options{})
		h, err := c.Hello(testContext(t))
		if err != nil || round > 0 && h.BootID != bootID {
			t.Fatalf("hello in round %d: %+v, %v", round, h, err)
		}
		bootID = h.BootID
		if last != "" {
			eventually(t, "the last session's command is gone", func() bool { return len(running("999."+last)) == 0 })
		}
		// No command learns the token.
		r, err := c.ExecPlain(testContext(t), guestproto.ExecRequest{Command: "echo ${PYRO_AGENT_TOKEN-unset}; tr '\\0' '\\n' < /proc/$PPID/environ | grep -c TOKEN"})
		if err != nil || !strings.HasPrefix(r.Stdout, "unset\n") {
			t.Errorf("round %d: %+v, %v", round, r, err)
		}
		// A command of a session ends with it, and not with one of its connections.
		mark := marker()
		started := make(chan struct{})
		ended := make(chan error, 1)
		go func() {
			_, err := c.Exec(testContext(t), guestproto.ExecRequest{Command: "sleep 999." + mark}, execStarted(func() { close(started) }))
			ended <- err
		}()
		<-started
		for range 3 {
			if err := pipe.Detach(testContext(t)); err != nil {
				t.Fatal(err)
			}
			conn := dialled(token)
			if err := errors.Join(guestconn.GreetContinue(conn), pipe.Attach(conn)); err != nil {
				t.Fatal(err)
			}
			if h, err := c.Hello(testContext(t)); err != nil || h.BootID != bootID {
				t.Fatalf("hello over the next connection: %+v, %v", h, err)
			}
		}
		if len(running("999."+mark)) == 0 {
			t.Error("a command has ended with its connection")
		}
		if round == 0 {
			// A copy of the agent meets a host of its own: another session begins
			// while this one waits for a connection.
			if err := pipe.Detach(testContext(t)); err != nil {
				t.Fatal(err)
			}
			conn := dialled(token)
			token = "token of the copy"
			if err := guestconn.GreetBegin(conn, token); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the command of the session before is gone", func() bool { return len(running("999."+mark)) == 0 })
			_ = conn.Close()
		}
		_ = m.Close()
		if err := <-ended; !errors.Is(err, api.ErrUnavailable) {
			t.Errorf("a command of an ended session: %v", err)
		}
		last = mark
	}
}

// TestArchivesOfTheAgent moves a tree in and out in both forms.
func TestArchivesOfTheAgent(t *testing.T) {
	a := startAgent(t)
	a.sh(t, `mkdir -p src/d && echo one > src/d/f && chmod 750 src/d/f && ln -s f src/d/l && head -c 3000000 /dev/urandom > src/big`)
	want, _, _ := a.sh(t, `cd src && find . | sort && sha256sum big d/f && readlink d/l && stat -c %a d/f`)
	var streamed, plain bytes.Buffer
	h, err := a.ExportArchive(testContext(t), "/workspace/src", &streamed)
	if err != nil {
		t.Fatal(err)
	}
	ph, err := a.ExportArchivePlain(testContext(t), "src", &plain) // relative to the workspace
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(h, ph); d != "" || !bytes.Equal(streamed.Bytes(), plain.Bytes()) {
		t.Errorf("the two forms differ (-stream +plain):\n%s", d)
	}
	if _, err := a.UploadArchive(testContext(t), "/workspace/copy1", bytes.NewReader(streamed.Bytes())); err != nil {
		t.Fatal(err)
	}
	r, err := a.UploadArchivePlain(testContext(t), "/workspace/copy2", bytes.NewReader(plain.Bytes()), int64(plain.Len()))
	if err != nil {
		t.Fatal(err)
	}
	if r.EntryCount != h.EntryCount || r.BytesWritten != h.BytesWritten || r.Destination != "/workspace/copy2" {
		t.Errorf("packed %+v, unpacked %+v", h, r)
	}
	for _, dir := range []string{"copy1", "copy2"} {
		got, _, _ := a.sh(t, `cd `+dir+` && find . | sort && sha256sum big d/f && readlink d/l && stat -c %a d/f`)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", dir, d)
		}
	}
	t.Run("confined", func(t *testing.T) {
		a.sh(t, `ln -s /etc away; ln -s ../../.. up`)
		for _, dest := range []string{"/workspace/away", "/workspace/up", "/workspace/away/x"} {
			if _, err := a.UploadArchive(testContext(t), dest, bytes.NewReader(streamed.Bytes())); !errors.Is(err, api.ErrDenied) {
				t.Errorf("unpacking into %s: %v", dest, err)
			}
			if _, err := a.ExportArchive(testContext(t), dest+"/passwd", io.Discard); !errors.Is(err, api.ErrDenied) {
				t.Errorf("packing %s/passwd: %v", dest, err)
			}
		}
	})
	t.Run("cut", func(t *testing.T) {
		c, err := a.dial(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, _ = fmt.Fprintf(c, `{"action":"extract_archive","destination":"/workspace/cut","archive_size":%d}`+"\n", plain.Len())
		_, _ = c.Write(plain.Bytes()[:plain.Len()/2])
		_ = c.(*net.UnixConn).CloseWrite()
		answer, _ := bufio.NewReader(c).ReadString('\n')
		if !strings.Contains(answer, `"code":"damaged"`) {
			t.Errorf("the agent answers %s", answer)
		}
		if out, _, _ := a.sh(t, "ls cut"); strings.Contains(out, "big") {
			t.Errorf("half a file stayed: %s", out)
		}
	})
}

// TestHalfClose gets the answer to a request of the plain form after ending the
// sending side.
func TestHalfClose(t *testing.T) {
	a := startAgent(t)
	c, err := a.dial(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = io.WriteString(c, `{"command":"sleep 0.5; echo done"}`+"\n")
	_ = c.(*net.UnixConn).CloseWrite()
	if b, err := io.ReadAll(c); err != nil || !strings.Contains(string(b), `"done\n"`) {
		t.Errorf("read %s, %v", b, err)
	}
}

// TestSlowReader takes 64 MB slowly at first: the agent waits, keeps little, and
// loses nothing.
func TestSlowReader(t *testing.T) {
	a := startAgent(t)
	const size = 64 << 20
	var n int64
	first := true
	r, err := a.Exec(testContext(t), guestproto.ExecRequest{Argv: []string{"head", "-c", fmt.Sprint(size), "/dev/zero"}},
		guestclient.ExecIO{Stdout: writerFunc(func(p []byte) (int, error) {
			if first {
				time.Sleep(time.Second) // longer than the grace after a command's end
				first = false
			}
			n += int64(len(p))
			return len(p), nil
		})})
	if err != nil || r.ExitCode != 0 || n != size {
		t.Errorf("%d bytes, %+v, %v", n, r, err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var kib int
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	_, _ = fmt.Sscan(after, &kib)
	if kib == 0 || kib > 64<<10 {
		t.Errorf("the agent took %d KiB", kib)
	}
}

// TestMidOutputHangUp kills a command whose output nobody takes any more.
func TestMidOutputHangUp(t *testing.T) {
	a := startAgent(t)
	m := marker()
	ctx, cancel := context.WithCancel(testContext(t))
	var once sync.Once
	_, err := a.Exec(ctx, guestproto.ExecRequest{Command: "while :; do echo x; done; : " + m},
		guestclient.ExecIO{Stdout: writerFunc(func(p []byte) (int, error) {
			once.Do(cancel)
			return len(p), nil
		})})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	eventually(t, "the command is gone", func() bool { return len(running(m)) == 0 })
}
