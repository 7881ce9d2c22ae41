package guestagent_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func TestHello(t *testing.T) {
	a, b := startAgent(t), startAgent(t)
	h, err := a.Hello(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if h.Protocol != guestproto.Version || h.AgentVersion != "test" || h.Kernel == "" {
		t.Errorf("hello is %+v", h)
	}
	want := []string{"exec-stream", "archive-stream", "shutdown", "tty", "files", "sync", "shells", "services", "dial-tcp"}
	if d := cmp.Diff(want, h.Capabilities); d != "" {
		t.Error(d)
	}
	again, err := a.Hello(testContext(t))
	if err != nil || again.BootID != h.BootID {
		t.Errorf("the boot id changed from %q to %q (%v)", h.BootID, again.BootID, err)
	}
	other, err := b.Hello(testContext(t))
	if err != nil || other.BootID == h.BootID {
		t.Errorf("two agents have the boot id %q (%v)", h.BootID, err)
	}
}

func TestExec(t *testing.T) {
	a := startAgent(t)
	if err := os.WriteFile(filepath.Join(a.root, "workspace", "data"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(a.root, "workspace", "noshebang"), []byte("\x7fELFbroken"), 0o755); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name       string
		req        guestproto.ExecRequest
		out, errs  string
		code       int
		errsPrefix bool
	}{
		{name: "both outputs", req: guestproto.ExecRequest{Command: "echo o; echo e >&2; exit 3"}, out: "o\n", errs: "e\n", code: 3},
		{name: "words stay apart", req: guestproto.ExecRequest{Argv: []string{"printf", "%s|", "a b", "", "c'd"}}, out: "a b||c'd|"},
		{name: "signal", req: guestproto.ExecRequest{Command: "kill -KILL $$"}, code: 137},
		{name: "segv", req: guestproto.ExecRequest{Command: "kill -SEGV $$"}, code: 139},
		{name: "not found", req: guestproto.ExecRequest{Argv: []string{"no-such-program"}}, errs: "pyro-agent: no-such-program: not found\n", code: 127},
		{name: "no such path", req: guestproto.ExecRequest{Argv: []string{"/no/such/program"}}, errs: "pyro-agent: /no/such/program: not found\n", code: 127},
		{name: "not executable", req: guestproto.ExecRequest{Argv: []string{"./data"}}, errs: "pyro-agent: ./data: permission denied\n", code: 126},
		{name: "a directory", req: guestproto.ExecRequest{Argv: []string{"/"}}, errs: "pyro-agent: /: permission denied\n", code: 126},
		{name: "no format", req: guestproto.ExecRequest{Argv: []string{"./noshebang"}}, errs: "pyro-agent: ./noshebang: exec format error\n", code: 126},
		{name: "env", req: guestproto.ExecRequest{Command: "echo $A:$LANG:${TERM-unset}", Env: map[string]string{"A": "b c"}}, out: "b c:C.UTF-8:unset\n"},
		{name: "path of the request", req: guestproto.ExecRequest{Argv: []string{"true"}, Env: map[string]string{"PATH": "/nowhere"}}, errs: "pyro-agent: true: not found\n", code: 127},
		{name: "cwd is the workspace", req: guestproto.ExecRequest{Command: "cat data"}, out: "x"},
		{name: "cwd", req: guestproto.ExecRequest{Command: "cat workspace/data", Cwd: "/"}, out: "x"},
		{name: "no stdin is an end", req: guestproto.ExecRequest{Command: "cat; echo end"}, out: "end\n"},
		{name: "session of its own", req: guestproto.ExecRequest{Command: "set -- $(cat /proc/self/stat); test $5 = $6 && echo yes"}, out: "yes\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out, errs bytes.Buffer
			r, err := a.Exec(testContext(t), tt.req, guestclient.ExecIO{Stdout: &out, Stderr: &errs})
			if err != nil {
				t.Fatal(err)
			}
			plain, err := a.ExecPlain(testContext(t), tt.req)
			if err != nil {
				t.Fatal(err)
			}
			for form, got := range map[string][3]string{
				"stream": {out.String(), errs.String(), strconv.Itoa(r.ExitCode)},
				"plain":  {plain.Stdout, plain.Stderr, strconv.Itoa(plain.ExitCode)},
			} {
				if d := cmp.Diff([3]string{tt.out, tt.errs, strconv.Itoa(tt.code)}, got); d != "" {
					t.Errorf("%s form: %s", form, d)
				}
			}
		})
	}
}

func TestExecRefusals(t *testing.T) {
	a := startAgent(t)
	tests := []struct {
		name string
		req  guestproto.ExecRequest
		want string
	}{
		{"nothing", guestproto.ExecRequest{}, "neither command nor argv"},
		{"both", guestproto.ExecRequest{Command: "a", Argv: []string{"b"}}, "both command and argv"},
		{"missing cwd", guestproto.ExecRequest{Command: "true", Cwd: "/missing"}, "working directory /missing does not exist"},
		{"cwd is a file", guestproto.ExecRequest{Command: "true", Cwd: "/file"}, "is not a directory"},
		{"bad variable", guestproto.ExecRequest{Command: "true", Env: map[string]string{"A=B": "c"}}, "impossible variable"},
		{"NUL", guestproto.ExecRequest{Argv: []string{"echo", "a\x00b"}}, "NUL"},
		{"large", guestproto.ExecRequest{Command: strings.Repeat("x", guestproto.MaxLine)}, "limit"},
		{"newer protocol", guestproto.ExecRequest{Envelope: guestproto.Envelope{Version: 99}, Command: "true"}, fmt.Sprintf("needs protocol version 99, the guest agent speaks %d", guestproto.Version)},
	}
	if err := os.WriteFile(filepath.Join(a.root, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := a.Exec(testContext(t), tt.req, guestclient.ExecIO{})
			_, plainErr := a.ExecPlain(testContext(t), tt.req)
			for _, err := range []error{err, plainErr} {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want one with %q", err, tt.want)
				}
				if !errors.Is(err, api.ErrInvalid) && !errors.Is(err, api.ErrUnsupported) {
					t.Errorf("error %v has the class %s", err, api.Code(err))
				}
			}
		})
	}
}

// TestRapidCommands wants exact exit codes of many requests at once. Package
// process has the harder test of the reaper itself.
func TestRapidCommands(t *testing.T) {
	a := startAgent(t)
	const n, parallel = 200, 50
	var wg sync.WaitGroup
	var mu sync.Mutex
	wrong := map[string]int{}
	work := make(chan int)
	for range parallel {
		wg.Go(func() {
			for i := range work {
				want := i % 2
				r, err := a.ExecPlain(context.Background(), guestproto.ExecRequest{Argv: []string{[]string{"true", "false"}[want]}})
				if err != nil || r.ExitCode != want {
					mu.Lock()
					wrong[fmt.Sprintf("want %d, got %d, %v", want, r.ExitCode, err)]++
					mu.Unlock()
				}
			}
		})
	}
	for i := range n {
		work <- i
	}
	close(work)
	wg.Wait()
	if len(wrong) > 0 {
		t.Errorf("wrong results: %v", wrong)
	}
}

// TestBinaryStdin sends 10 MB through cat and wants every byte back.
func TestBinaryStdin(t *testing.T) {
	a := startAgent(t)
	in := make([]byte, 10<<20)
	rnd := rand.NewChaCha8([32]byte{1})
	_, _ = rnd.Read(in)
	var out bytes.Buffer
	r, err := a.Exec(testContext(t), guestproto.ExecRequest{Argv: []string{"cat"}},
		guestclient.ExecIO{Stdin: bytes.NewReader(in), Stdout: &out})
	if err != nil || r.ExitCode != 0 {
		t.Fatal(r, err)
	}
	if sha256.Sum256(in) != sha256.Sum256(out.Bytes()) {
		t.Errorf("sent %d bytes, got %d others", len(in), out.Len())
	}
}

// TestStdinOfOneThatDoesNotRead ends with the command, not with the input.
func TestStdinOfOneThatDoesNotRead(t *testing.T) {
	a := startAgent(t)
	for _, command := range []string{"exit 5", "exec <&-; sleep 0.1; exit 5"} {
		r, err := a.Exec(testContext(t), guestproto.ExecRequest{Command: command},
			guestclient.ExecIO{Stdin: endless{}})
		if err != nil || r.ExitCode != 5 {
			t.Errorf("%s: %+v, %v", command, r, err)
		}
	}
}

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// TestSignalPastStdin reaches a command whose stdin window is used up.
func TestSignalPastStdin(t *testing.T) {
	a := startAgent(t)
	signals := make(chan guestproto.Signal, 1)
	ready := make(chan struct{})
	var once sync.Once
	out := writerFunc(func(p []byte) (int, error) {
		once.Do(func() { close(ready) })
		return len(p), nil
	})
	go func() {
		<-ready
		signals <- guestproto.Signal{Name: "INT"}
	}()
	r, err := a.Exec(testContext(t), guestproto.ExecRequest{Command: `trap 'exit 42' INT; echo ready; while :; do sleep 0.05; done`},
		guestclient.ExecIO{Stdin: endless{}, Stdout: out, Signals: signals})
	if err != nil || r.ExitCode != 42 {
		t.Errorf("%+v, %v", r, err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// leftovers are the commands that start further processes and try to keep them.
var leftovers = map[string]string{
	"background":  `sleep 999.$M & sleep 999.$M`,
	"setsid":      `setsid sleep 999.$M & sleep 999.$M`,
	"nohup":       `nohup sleep 999.$M >/dev/null 2>&1 & sleep 999.$M`,
	"double fork": `(setsid sh -c 'sleep 999.$M & sleep 999.$M' &) ; sleep 999.$M`,
	"clean env":   `(env -i setsid sleep 999.$M &) ; sleep 999.$M`,
	"stubborn":    `trap '' TERM HUP INT; sleep 999.$M; sleep 999.$M; sleep 999.$M`,
	"stopped":     `sleep 999.$M & kill -STOP $!; sleep 999.$M`,
}

// running lists the processes whose command line holds text.
func running(text string) []string {
	var out []string
	dirs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range dirs {
		data, err := os.ReadFile(file)
		if err == nil && bytes.Contains(data, []byte(text)) {
			out = append(out, strings.ReplaceAll(string(data), "\x00", " "))
		}
	}
	return out
}

var nextMarker = 100000 + rand.IntN(800000)

func marker() string {
	nextMarker++
	return strconv.Itoa(nextMarker)
}

// TestTimeoutLeavesNothing is RELIABILITY L8.
func TestTimeoutLeavesNothing(t *testing.T) {
	a := startAgent(t)
	for name, command := range leftovers {
		t.Run(name, func(t *testing.T) {
			m := marker()
			start := time.Now()
			r, err := a.Exec(testContext(t), guestproto.ExecRequest{
				Command: strings.ReplaceAll(command, "$M", m), TimeoutSeconds: 0.3,
			}, guestclient.ExecIO{})
			if err != nil {
				t.Fatal(err)
			}
			if !r.TimedOut || r.ExitCode != 124 {
				t.Errorf("reply %+v", r)
			}
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("took %v", took)
			}
			if left := running("999." + m); len(left) > 0 {
				t.Errorf("left running: %q", left)
			}
		})
	}
}

// TestEndLeavesNothing ends by itself with processes in the background.
func TestEndLeavesNothing(t *testing.T) {
	a := startAgent(t)
	for name, command := range leftovers {
		t.Run(name, func(t *testing.T) {
			m := marker()
			if name == "stubborn" {
				t.Skip("has nothing in the background")
			}
			i := strings.LastIndex(command, "sleep 999.$M")
			start := time.Now()
			out, _, r := a.sh(t, strings.ReplaceAll(command[:i]+"echo done; exit 7", "$M", m))
			if r.ExitCode != 7 || out != "done\n" || r.TimedOut {
				t.Errorf("reply %+v, output %q", r, out)
			}
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("took %v although the command ended at once", took)
			}
			if left := running("999." + m); len(left) > 0 {
				t.Errorf("left running: %q", left)
			}
		})
	}
}

// TestLateOutputOfAPipe gets what a command's children write shortly after it.
func TestLateOutputOfAPipe(t *testing.T) {
	a := startAgent(t)
	out, _, _ := a.sh(t, `(sleep 0.05; echo late) & echo early`)
	if out != "early\nlate\n" {
		t.Errorf("output %q", out)
	}
}

// TestHangUpLeavesNothing is RELIABILITY P11, for both forms.
func TestHangUpLeavesNothing(t *testing.T) {
	a := startAgent(t)
	for name, command := range leftovers {
		for _, form := range []string{"stream", "plain"} {
			t.Run(name+" "+form, func(t *testing.T) {
				m := marker()
				flag := filepath.Join(a.root, "flag"+m)
				ctx, cancel := context.WithCancel(testContext(t))
				ended := make(chan error, 1)
				go func() {
					req := guestproto.ExecRequest{Command: "echo >" + flag + "; " + strings.ReplaceAll(command, "$M", m)}
					var err error
					if form == "plain" {
						_, err = a.ExecPlain(ctx, req)
					} else {
						_, err = a.Exec(ctx, req, guestclient.ExecIO{})
					}
					ended <- err
				}()
				eventually(t, "the command runs", func() bool {
					_, err := os.Stat(flag)
					return err == nil && len(running("999."+m)) > 0
				})
				cancel()
				if err := <-ended; !errors.Is(err, context.Canceled) {
					t.Errorf("error %v", err)
				}
				eventually(t, "nothing of it runs", func() bool { return len(running("999."+m)) == 0 })
			})
		}
	}
}

// eventually waits for something in other processes that tells nobody.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func TestTerminal(t *testing.T) {
	a := startAgent(t)
	stdin, typed := io.Pipe()
	resize := make(chan guestproto.Resize)
	var mu sync.Mutex
	var out bytes.Buffer
	seen := func(text string) func() bool {
		return func() bool {
			mu.Lock()
			defer mu.Unlock()
			return strings.Contains(out.String(), text)
		}
	}
	result := make(chan guestproto.ExecReply, 1)
	go func() {
		r, err := a.Exec(testContext(t), guestproto.ExecRequest{
			Argv: []string{"sh"},
			Env:  map[string]string{"PS1": "$ "},
			TTY:  &guestproto.Resize{Cols: 91, Rows: 17},
		}, guestclient.ExecIO{Stdin: stdin, Resize: resize, Stdout: writerFunc(func(p []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return out.Write(p)
		})})
		if err != nil {
			t.Error(err)
		}
		_ = stdin.CloseWithError(errors.New("the command has ended"))
		result <- r
	}()
	fmt.Fprintln(typed, "stty size; tty; echo term=$TERM")
	eventually(t, "the terminal has its size", seen("17 91"))
	eventually(t, "it is a terminal", seen("/dev/pts/"))
	eventually(t, "TERM is set", seen("term=xterm-256color"))
	// Input and resizing are sent independently: the shell waits for the size.
	fmt.Fprintln(typed, `until [ "$(stty size)" = "22 44" ]; do sleep 0.01; done; echo resized=$((1+1))`)
	resize <- guestproto.Resize{Cols: 44, Rows: 22}
	eventually(t, "the terminal is resized", seen("resized=2"))
	fmt.Fprintln(typed, "sleep 997 && echo not-$((1+1))")
	eventually(t, "sleep runs", func() bool { return len(running("sleep\x00997")) > 0 })
	fmt.Fprint(typed, "\x03")
	fmt.Fprintln(typed, "echo interrupted=$((6*7)); exit 9")
	r := <-result
	if r.ExitCode != 9 || !seen("interrupted=42")() || seen("not-2")() {
		t.Errorf("reply %+v, output:\n%s", r, out.String())
	}
	_ = typed.Close()
}

// TestTerminalEOF passes the end of stdin on as the terminal's own end.
func TestTerminalEOF(t *testing.T) {
	a := startAgent(t)
	var out bytes.Buffer
	r, err := a.Exec(testContext(t), guestproto.ExecRequest{Argv: []string{"cat"}, TTY: &guestproto.Resize{Cols: 80, Rows: 24}},
		guestclient.ExecIO{Stdin: strings.NewReader("line\n"), Stdout: &out})
	if err != nil || r.ExitCode != 0 || !strings.Contains(out.String(), "line") {
		t.Errorf("%+v, %v, %q", r, err, out.String())
	}
}

// TestPlainOutputIsCut keeps the first megabyte and says so.
func TestPlainOutputIsCut(t *testing.T) {
	a := startAgent(t)
	r, err := a.ExecPlain(testContext(t), guestproto.ExecRequest{Command: "head -c 5000000 /dev/zero; head -c 1000 /dev/zero >&2"})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Stdout) != guestproto.MaxPlainOutput || !r.StdoutTruncated || len(r.Stderr) != 1000 || r.StderrTruncated {
		t.Errorf("%d bytes, cut %v; %d bytes, cut %v", len(r.Stdout), r.StdoutTruncated, len(r.Stderr), r.StderrTruncated)
	}
}

// TestNoZombies leaves many orphans to the agent, which must collect them.
func TestNoZombies(t *testing.T) {
	a := startAgent(t)
	a.sh(t, `i=0; while [ $i -lt 500 ]; do (true &) ; i=$((i+1)); done`)
	eventually(t, "no child of the agent is left", func() bool {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", a.cmd.Process.Pid, a.cmd.Process.Pid))
		return err == nil && len(bytes.TrimSpace(data)) == 0
	})
}

// TestNoLeaks runs many requests of all kinds and wants descriptors and memory
// of the agent where they were.
func TestNoLeaks(t *testing.T) {
	a := startAgent(t)
	fds := func() int {
		names, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	round := func() {
		ctx := testContext(t)
		_, _ = a.Hello(ctx)
		_, _ = a.ExecPlain(ctx, guestproto.ExecRequest{Command: "exit 1"})
		_, _ = a.ExecPlain(ctx, guestproto.ExecRequest{Argv: []string{"missing"}})
		_, _ = a.Exec(ctx, guestproto.ExecRequest{Argv: []string{"missing"}}, guestclient.ExecIO{Stdin: strings.NewReader("a")})
		_, _ = a.Exec(ctx, guestproto.ExecRequest{Command: "cat", Cwd: "/none"}, guestclient.ExecIO{Stdin: strings.NewReader("a")})
		_, _ = a.Exec(ctx, guestproto.ExecRequest{Command: "cat"}, guestclient.ExecIO{Stdin: strings.NewReader("a")})
		_, _ = a.Exec(ctx, guestproto.ExecRequest{Command: "true", TTY: &guestproto.Resize{}}, guestclient.ExecIO{})
		_, _ = a.ExportArchive(ctx, "/workspace", io.Discard)
		_, _ = a.ExportArchivePlain(ctx, "/none", io.Discard)
		_, _ = a.UploadArchive(ctx, "/workspace", strings.NewReader("garbage"))
		short, cancel := context.WithCancel(ctx)
		_, _ = a.Exec(short, guestproto.ExecRequest{Command: "sleep 60"}, guestclient.ExecIO{Started: func(int) { cancel() }})
	}
	round()
	before := fds()
	for range 20 {
		round()
	}
	eventually(t, "the agent's descriptors are closed", func() bool { return fds() <= before })
}

// TestTwoAtOnce ends one command's tree while another command runs: what belongs
// to which cannot be told by who is left.
func TestTwoAtOnce(t *testing.T) {
	a := startAgent(t)
	other := marker()
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	started := make(chan struct{})
	go func() {
		_, _ = a.Exec(ctx, guestproto.ExecRequest{Command: "(setsid sleep 999." + other + " &); sleep 999." + other}, execStarted(func() { close(started) }))
	}()
	<-started
	eventually(t, "the other command runs", func() bool { return len(running("sleep\x00999."+other)) == 2 })
	for _, name := range []string{"background", "setsid", "double fork"} {
		m := marker()
		r, err := a.Exec(testContext(t), guestproto.ExecRequest{Command: strings.ReplaceAll(leftovers[name], "$M", m), TimeoutSeconds: 0.2}, guestclient.ExecIO{})
		if err != nil || !r.TimedOut {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
		if left := running("999." + m); len(left) > 0 {
			t.Errorf("%s left running: %q", name, left)
		}
		if n := len(running("sleep\x00999." + other)); n != 2 {
			t.Errorf("%s: %d of 2 processes of the other command are left", name, n)
		}
	}
}

// TestStdinAboveTheWindow ends a command whose caller sends what it was not
// granted.
func TestStdinAboveTheWindow(t *testing.T) {
	a := startAgent(t)
	c, err := a.dial(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	go func() {
		_, _ = io.WriteString(c, `{"argv":["sleep","99"],"stdin":true,"stream":true}`+"\n")
		// The pipe to the command takes 64 KiB of it, pipe(7).
		for range 10 {
			_ = guestproto.WriteFrame(c, guestproto.FrameStdin, make([]byte, guestproto.MaxFrame))
		}
	}()
	fr := guestproto.NewFrameReader(c)
	for {
		typ, p, err := fr.Next()
		if err != nil {
			t.Fatal(err)
		}
		if typ == guestproto.FrameError {
			if !strings.Contains(string(p), "window") {
				t.Errorf("error %s", p)
			}
			return
		}
	}
}
