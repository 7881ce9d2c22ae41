package guestagent_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"

	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

var update = flag.Bool("update", false, "rewrite the transcripts in testdata")

// frameNames name the frames in transcripts.
var frameNames = map[guestproto.FrameType]string{
	guestproto.FrameStdin: "stdin", guestproto.FrameStdinClose: "stdin-close",
	guestproto.FrameResize: "resize", guestproto.FrameSignal: "signal",
	guestproto.FrameStarted: "started", guestproto.FrameStdout: "stdout", guestproto.FrameStderr: "stderr",
	guestproto.FrameStdinWindow: "stdin-window", guestproto.FrameResult: "result", guestproto.FrameError: "error",
	guestproto.FrameHeader: "header", guestproto.FrameData: "data", guestproto.FrameDataEnd: "data-end",
}

// volatile are the values that differ from run to run.
var volatile = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`"pid":[1-9][0-9]*`), `"pid":PID`},
	{regexp.MustCompile(`"duration_ms":[0-9]+`), `"duration_ms":MS`},
	{regexp.MustCompile(`"boot_id":"[0-9a-f]{32}"`), `"boot_id":"ID"`},
	{regexp.MustCompile(`"kernel":"[^"]+"`), `"kernel":"RELEASE"`},
	{regexp.MustCompile(fmt.Sprintf(`"protocol":%d\b`, guestproto.Version)), `"protocol":VERSION`},
	{regexp.MustCompile(fmt.Sprintf(`agent speaks %d\b`, guestproto.Version)), `agent speaks VERSION`},
	{regexp.MustCompile(`"(started|ended|ready)_at":[0-9.e+]+`), `"${1}_at":TIME`},
}

// TestTranscripts plays what testdata/*.txtar say to the real agent. In each,
// "send" is the request line and, behind it, frames or text as they are sent;
// "receive" is everything that comes back. A frame is one line: its name and
// its payload, quoted unless it is JSON.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	a := startAgent(t)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if len(ar.Files) != 2 || ar.Files[0].Name != "send" || ar.Files[1].Name != "receive" {
				t.Fatal("want the sections send and receive")
			}
			got := play(t, a, string(ar.Files[0].Data))
			if *update {
				ar.Files[1].Data = []byte(got)
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if d := cmp.Diff(string(ar.Files[1].Data), got); d != "" {
				t.Errorf("the agent answers (-transcript +agent):\n%s", d)
			}
		})
	}
}

func play(t *testing.T, a *agent, send string) string {
	t.Helper()
	c, err := a.dial(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	request, rest, _ := strings.Cut(send, "\n")
	if _, err := io.WriteString(c, request+"\n"); err != nil {
		t.Fatal(err)
	}
	streaming := strings.Contains(request, `"stream":true`)
	for line := range strings.Lines(rest) {
		sendFrame(t, c, strings.TrimSuffix(line, "\n"))
	}
	r := bufio.NewReader(c)
	first, err := r.Peek(1)
	if err != nil {
		t.Fatal(err)
	}
	var out string
	if !streaming || first[0] == '{' {
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		out = string(b)
	} else {
		fr := guestproto.NewFrameReader(r)
		var window uint32
		for {
			typ, p, err := fr.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			// Grants come between the outputs wherever they happen to: they
			// are shown together, in front of the end.
			if typ == guestproto.FrameStdinWindow && len(p) == 4 {
				window += binary.BigEndian.Uint32(p)
				continue
			}
			if window > 0 && (typ == guestproto.FrameResult || typ == guestproto.FrameError) {
				out += fmt.Sprintf("%s %d\n", frameNames[guestproto.FrameStdinWindow], window)
			}
			out += describe(typ, p)
		}
	}
	for _, v := range volatile {
		out = v.re.ReplaceAllString(out, v.with)
	}
	return out
}

func describe(typ guestproto.FrameType, p []byte) string {
	name := frameNames[typ]
	if name == "" {
		name = fmt.Sprintf("type-%d", typ)
	}
	switch {
	case len(p) == 0:
		return name + "\n"
	case p[0] == '{':
		return name + " " + string(p) + "\n"
	case typ == guestproto.FrameData && len(p) > 512:
		return fmt.Sprintf("%s of %d bytes\n", name, len(p))
	}
	return name + " " + strconv.Quote(string(p)) + "\n"
}

func sendFrame(t *testing.T, c net.Conn, line string) {
	t.Helper()
	name, payload, _ := strings.Cut(line, " ")
	if strings.HasPrefix(payload, `"`) {
		text, err := strconv.Unquote(payload)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		payload = text
	}
	for typ, n := range frameNames {
		if n == name {
			if err := guestproto.WriteFrame(c, typ, []byte(payload)); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("%s is no frame", line)
}

// TestDocumentedClient runs the client that docs/guest-protocol.md shows, as it
// stands there.
func TestDocumentedClient(t *testing.T) {
	testenv.RequireTools(t, "python3", "python3")
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "guest-protocol.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, code, ok := strings.Cut(string(doc), "```python\n")
	code, _, ok2 := strings.Cut(code, "```")
	if !ok || !ok2 {
		t.Fatal("the document has no Python client")
	}
	dir := t.TempDir()
	sock := filepath.Join(dir, "agent.sock")
	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, agentBinary(t), "--listen", "unix:"+sock, "--root", root)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the agent ends with %v", err)
		}
		if _, err := os.Lstat(sock); err == nil {
			t.Error("the agent left its socket")
		}
	}()
	eventually(t, "the agent listens", func() bool {
		c, err := net.Dial("unix", sock)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	out, err := exec.CommandContext(ctx, "python3", "-c", code, sock).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if d := cmp.Diff(fmt.Sprintf("%d\n3\nSHOUT\n1\nhello\n", guestproto.Version), string(out)); d != "" {
		t.Error(d)
	}
}

// TestShutdown ends the process with 0 and everything that it ran.
func TestShutdown(t *testing.T) {
	a := startAgent(t)
	m := marker()
	started := make(chan struct{})
	go func() {
		_, _ = a.Exec(context.Background(), guestproto.ExecRequest{Command: "setsid sleep 999." + m + " & sleep 999." + m},
			execStarted(func() { close(started) }))
	}()
	<-started
	eventually(t, "the command runs", func() bool { return len(running("999."+m)) > 1 })
	if err := a.Shutdown(testContext(t), time.Second); err != nil {
		t.Fatal(err)
	}
	<-a.done
	if code := a.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("the agent ends with %d", code)
	}
	if left := running("999." + m); len(left) > 0 {
		t.Errorf("left running: %q", left)
	}
}

// TestSmallAndStatic holds the size of what every guest has to load, and that
// nothing heavy creeps in.
func TestSmallAndStatic(t *testing.T) {
	path := agentBinary(t)
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	const limit = 6 << 20
	if fi.Size() > limit {
		t.Errorf("the agent has %d bytes, the limit is %d", fi.Size(), limit)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// An ELF program without an interpreter needs no library.
	if bytes.Contains(data, []byte("/ld-linux")) || bytes.Contains(data, []byte("/ld-musl")) {
		t.Error("the agent is linked dynamically")
	}
	out, err := exec.Command("go", "list", "-deps", "github.com/pyro-mcp/pyro/cmd/pyro-agent").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, heavy := range []string{"net/http", "crypto/tls", "text/template", "github.com/spf13/cobra",
		"github.com/pyro-mcp/pyro/internal/engine", "github.com/pyro-mcp/pyro/internal/guestclient"} {
		if bytes.Contains(out, []byte("\n"+heavy+"\n")) {
			t.Errorf("the agent imports %s", heavy)
		}
	}
}

func TestUsage(t *testing.T) {
	path := agentBinary(t)
	tests := []struct {
		name string
		args []string
		code int
		want string
	}{
		{"version", []string{"--version"}, 0, "pyro-agent test\n"},
		{"help", []string{"--help"}, 0, "--listen unix:PATH"},
		{"nothing", nil, 2, "either --listen or --dial"},
		{"both", []string{"--listen", "unix:/x", "--dial", "unix:/x"}, 2, "either --listen or --dial"},
		{"unknown", []string{"--frob"}, 2, "frob"},
		{"word", []string{"--listen", "unix:/x", "y"}, 2, `unexpected argument "y"`},
		{"address", []string{"--listen", "tcp:1"}, 1, "want unix:PATH or fd:N"},
		{"descriptor", []string{"--listen", "fd:77"}, 1, "not a listening socket"},
		{"no token", []string{"--dial", "unix:/x"}, 1, "PYRO_AGENT_TOKEN"},
		{"no root", []string{"--listen", "unix:/x", "--root", "/no/such/dir"}, 1, "is not a directory"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cmd := exec.Command(path, tt.args...)
			out, _ := cmd.CombinedOutput()
			if cmd.ProcessState.ExitCode() != tt.code || !strings.Contains(string(out), tt.want) {
				t.Errorf("exit code %d, output:\n%s", cmd.ProcessState.ExitCode(), out)
			}
		})
	}
}
