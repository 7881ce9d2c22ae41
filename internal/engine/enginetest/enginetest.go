// Package enginetest is the suite that every engine passes, on real guests.
package enginetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// A Subject is an engine under test with what it needs for a machine.
type Subject struct {
	Engine engine.Engine
	// Spec has everything filled in but ID, Dir, Console and Logger.
	Spec engine.MachineSpec
	// Smallest is the memory below which the engine must refuse; 0 if it has
	// no such bound.
	SmallestMiB int
}

// Run runs the suite. Every test starts machines of its own.
func Run(t *testing.T, s Subject) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, Subject)
	}{
		{"Probe", testProbe},
		{"Exec", testExec},
		{"Streams", testStreams},
		{"Timeout", testTimeout},
		{"Cancel", testCancel},
		{"Concurrency", testConcurrency},
		{"StopKeepsDisk", testStopKeepsDisk},
		{"StopTwice", testStopTwice},
		{"Killed", testKilled},
		{"Pause", testPause},
		{"DiskElsewhere", testDiskElsewhere},
		{"SnapshotDisk", testSnapshotDisk},
		{"ManySnapshots", testManySnapshots},
		{"SnapshotWhileWriting", testSnapshotWhileWriting},
		{"SaveWhileWriting", testSaveWhileWriting},
		{"SnapshotRefused", testSnapshotRefused},
		{"SnapshotThenKilled", testSnapshotThenKilled},
		{"KilledWhileFreezing", testKilledWhileFreezing},
		{"MergeLayer", testMergeLayer},
		{"MergeInUse", testMergeInUse},
		{"Refuses", testRefuses},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, s) })
	}
}

// A Guest is a machine that a test has started.
type Guest struct {
	engine.Machine
	Client  *guestclient.Client
	Console *boundedlog.File
	scale   time.Duration
}

// Boot starts a machine and waits for its agent. The machine is stopped when
// the test ends, and if the test failed its console is printed.
func Boot(t *testing.T, s Subject, change func(*engine.MachineSpec)) *Guest {
	t.Helper()
	spec := s.Spec
	spec.ID = fmt.Sprintf("t%x", time.Now().UnixNano())
	spec.Hostname = "pyro-test"
	spec.Dir = t.TempDir()
	spec.Logger = slog.New(slog.DiscardHandler)
	if change != nil {
		change(&spec)
	}
	console, err := boundedlog.Open(spec.Dir+".console", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	spec.Console = console
	caps := s.Engine.Probe(t.Context())
	g := &Guest{Console: console, scale: time.Duration(max(1, caps.TimeScale))}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console:\n%s", strings.Join(console.Tail(40), "\n"))
		}
		console.Close()
		os.Remove(spec.Dir + ".console")
	})
	g.Machine, err = s.Engine.Start(t.Context(), spec)
	if err != nil {
		t.Fatalf("Start: %v", err)
	}
	t.Cleanup(func() {
		if err := g.Stop(context.Background(), 0); err != nil {
			t.Errorf("Stop: %v", err)
		}
		for _, pid := range g.PIDs() {
			if id, err := hostproc.Identify(pid); err == nil && id.Alive() {
				t.Errorf("process %d of the machine is still there after Stop", pid)
			}
		}
	})
	g.Client = guestclient.New(g.DialGuest, guestclient.Options{Patience: 3 * time.Minute})
	ctx := g.within(t, 20*time.Second)
	for {
		if _, err = g.Client.Hello(ctx); err == nil {
			return g
		}
		if ctx.Err() != nil || !errors.Is(err, api.ErrUnavailable) {
			t.Fatalf("Hello: %v", err)
		}
		time.Sleep(10 * time.Millisecond) // between two tries at a socket that refuses
	}
}

// within bounds a step; d is for a machine at full speed.
func (g *Guest) within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d*g.scale)
	t.Cleanup(cancel)
	return ctx
}

// sh runs a shell command and returns its stdout, failing the test unless it
// exits with 0.
func (g *Guest) sh(t *testing.T, command string) string {
	t.Helper()
	out, errOut, reply := g.exec(t, guestproto.ExecRequest{Command: command}, nil)
	if reply.ExitCode != 0 {
		t.Fatalf("%s: exit code %d, stderr %q", command, reply.ExitCode, errOut)
	}
	return out
}

func (g *Guest) exec(t *testing.T, req guestproto.ExecRequest, stdin io.Reader) (stdout, stderr string, reply guestproto.ExecReply) {
	t.Helper()
	var out, errOut bytes.Buffer
	reply, err := g.Client.Exec(g.within(t, 20*time.Second), req, guestclient.ExecIO{Stdin: stdin, Stdout: &out, Stderr: &errOut})
	if err != nil {
		t.Fatalf("Exec %q: %v", req.Command, err)
	}
	return out.String(), errOut.String(), reply
}

func testProbe(t *testing.T, s Subject) {
	began := time.Now()
	caps := s.Engine.Probe(t.Context())
	if !caps.Available || caps.Detail == "" || caps.Isolation == "" || caps.TimeScale < 1 {
		t.Errorf("Probe = %+v: not available, or without detail, isolation or time scale", caps)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("Probe took %v", d)
	}
}

func testExec(t *testing.T, s Subject) {
	g := Boot(t, s, nil)
	t.Run("Output", func(t *testing.T) {
		out, errOut, reply := g.exec(t, guestproto.ExecRequest{Command: "echo out; echo err >&2; exit 7"}, nil)
		if out != "out\n" || errOut != "err\n" || reply.ExitCode != 7 {
			t.Errorf("stdout %q, stderr %q, exit code %d; want out, err, 7", out, errOut, reply.ExitCode)
		}
	})
	t.Run("Words", func(t *testing.T) {
		out, _, _ := g.exec(t, guestproto.ExecRequest{Argv: []string{"printf", "[%s]", "a b", "", "$HOME", "'"}}, nil)
		if want := "[a b][][$HOME][']"; out != want {
			t.Errorf("got %q, want %q", out, want)
		}
	})
	t.Run("Environment", func(t *testing.T) {
		out, _, _ := g.exec(t, guestproto.ExecRequest{Command: `echo "$GREETING"; pwd`, Cwd: "/workspace", Env: map[string]string{"GREETING": "hi\tthere"}}, nil)
		lines := strings.SplitN(out, "\n", 2)
		if lines[0] != "hi\tthere" || !strings.HasSuffix(strings.TrimSpace(lines[1]), "/workspace") {
			t.Errorf("got %q", out)
		}
	})
	t.Run("Statuses", func(t *testing.T) {
		for command, want := range map[string]int{"kill -9 $$": 137, "no-such-command-here": 127, "exit 255": 255} {
			if _, _, reply := g.exec(t, guestproto.ExecRequest{Command: command}, nil); reply.ExitCode != want {
				t.Errorf("%s: exit code %d, want %d", command, reply.ExitCode, want)
			}
		}
	})
	t.Run("Devices", func(t *testing.T) {
		g.sh(t, "test -c /dev/null && test -c /dev/urandom && test -e /dev/ptmx && test -d /dev/pts && rm $(mktemp) && test -d /proc/self")
	})
}

func testStreams(t *testing.T, s Subject) {
	g := Boot(t, s, nil)
	t.Run("StdinComesBack", func(t *testing.T) {
		in := make([]byte, 10<<20)
		for i := range in {
			in[i] = byte(i * 7 >> 3)
		}
		var out bytes.Buffer
		_, err := g.Client.Exec(g.within(t, 30*time.Second), guestproto.ExecRequest{Argv: []string{"cat"}},
			guestclient.ExecIO{Stdin: bytes.NewReader(in), Stdout: &out})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(in, out.Bytes()) {
			t.Errorf("%d bytes went in and %d other bytes came back", len(in), out.Len())
		}
	})
	t.Run("MuchOutput", func(t *testing.T) {
		const size = 64 << 20
		var n counter
		reply, err := g.Client.Exec(g.within(t, 30*time.Second), guestproto.ExecRequest{Command: fmt.Sprintf("yes | head -c %d", size)},
			guestclient.ExecIO{Stdout: &n})
		if err != nil || reply.ExitCode != 0 || int64(n) != size {
			t.Errorf("%d bytes of %d, exit code %d, %v", n, size, reply.ExitCode, err)
		}
	})
}

type counter int64

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

func testTimeout(t *testing.T, s Subject) {
	g := Boot(t, s, nil)
	for name, command := range map[string]string{
		"Background":  "sleep 998877 & sleep 998877",
		"NewSession":  "setsid sleep 998877 & sleep 998877",
		"Nohup":       "nohup sleep 998877 >/dev/null 2>&1 & sleep 998877",
		"DoubleFork":  "(setsid sh -c 'sleep 998877 & exit' &) ; sleep 998877",
		"IgnoresTERM": `trap "" TERM; sleep 998877 & while :; do sleep 998877; done`,
	} {
		t.Run(name, func(t *testing.T) {
			_, _, reply := g.exec(t, guestproto.ExecRequest{Command: command, TimeoutSeconds: 1}, nil)
			if !reply.TimedOut || reply.ExitCode != 124 {
				t.Errorf("timed out %v, exit code %d; want true, 124", reply.TimedOut, reply.ExitCode)
			}
			g.nothingLeft(t, "998877")
		})
	}
}

// nothingLeft fails the test if a process in the guest still has marker among
// its arguments.
func (g *Guest) nothingLeft(t *testing.T, marker string) {
	t.Helper()
	// The shell's own command line holds the marker too; the pattern does not
	// match itself.
	find := fmt.Sprintf(`for p in /proc/[0-9]*; do tr '\0' ' ' < $p/cmdline 2>/dev/null | grep -q '[%s]%s$\|[%s]%s ' && echo $p; done; true`,
		marker[:1], marker[1:], marker[:1], marker[1:])
	deadline := g.within(t, 10*time.Second)
	for {
		left := g.sh(t, find)
		if left == "" {
			return
		}
		if deadline.Err() != nil {
			t.Errorf("still running in the guest: %s", strings.Fields(left))
			return
		}
	}
}

func testCancel(t *testing.T, s Subject) {
	g := Boot(t, s, nil)
	ctx, cancel := context.WithCancel(g.within(t, 20*time.Second))
	started := make(chan struct{})
	var once sync.Once
	go func() {
		<-started
		cancel()
	}()
	_, err := g.Client.Exec(ctx, guestproto.ExecRequest{Command: "echo go; sleep 887766 & sleep 887766"}, guestclient.ExecIO{
		Stdout: writerFunc(func(p []byte) (int, error) { once.Do(func() { close(started) }); return len(p), nil }),
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Exec after cancel: %v", err)
	}
	g.nothingLeft(t, "887766")
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func testConcurrency(t *testing.T, s Subject) {
	g := Boot(t, s, nil)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			var out bytes.Buffer
			reply, err := g.Client.Exec(g.within(t, 30*time.Second), guestproto.ExecRequest{Command: fmt.Sprintf("echo %d; exit %d", i, i)},
				guestclient.ExecIO{Stdout: &out})
			if err != nil || reply.ExitCode != i || out.String() != fmt.Sprintf("%d\n", i) {
				t.Errorf("exec %d: exit code %d, stdout %q, %v", i, reply.ExitCode, out.String(), err)
			}
		})
	}
	wg.Wait()
}

func testStopKeepsDisk(t *testing.T, s Subject) {
	dir := t.TempDir()
	same := func(spec *engine.MachineSpec) { spec.Dir = dir }
	g := Boot(t, s, same)
	g.sh(t, "echo kept > note; ln -s note link")
	if err := g.Client.Shutdown(g.within(t, 10*time.Second), time.Second); err != nil {
		t.Fatal(err)
	}
	exit, err := g.Wait(g.within(t, 10*time.Second))
	if err != nil || !exit.Requested {
		t.Fatalf("Wait after a shutdown: %+v, %v", exit, err)
	}
	if err := g.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	g = Boot(t, s, same)
	if got := g.sh(t, "cat link"); got != "kept\n" {
		t.Errorf("after stop and start: %q", got)
	}
}

func testStopTwice(t *testing.T, s Subject) {
	g := Boot(t, s, nil)
	for range 2 {
		if err := g.Stop(g.within(t, 10*time.Second), 0); err != nil {
			t.Fatal(err)
		}
	}
	exit, err := g.Wait(g.within(t, time.Second))
	if err != nil || !exit.Requested {
		t.Errorf("Wait after Stop: %+v, %v", exit, err)
	}
	if conn, err := g.DialGuest(g.within(t, time.Second)); err == nil {
		conn.Close()
		t.Error("DialGuest works on a machine that was stopped")
	} else if !errors.Is(err, api.ErrUnavailable) {
		t.Errorf("DialGuest on a stopped machine: %v, want ErrUnavailable", err)
	}
}

func testKilled(t *testing.T, s Subject) {
	g := Boot(t, s, nil)
	running := make(chan error, 1)
	started := make(chan struct{})
	var once sync.Once
	go func() {
		_, err := g.Client.Exec(g.within(t, 20*time.Second), guestproto.ExecRequest{Command: "echo go; sleep 1000"}, guestclient.ExecIO{
			Stdout: writerFunc(func(p []byte) (int, error) { once.Do(func() { close(started) }); return len(p), nil }),
		})
		running <- err
	}()
	<-started
	id, err := hostproc.Identify(g.PIDs()[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Kill(9); err != nil {
		t.Fatal(err)
	}
	exit, err := g.Wait(g.within(t, 5*time.Second))
	if err != nil || exit.Requested || exit.Reason == "" {
		t.Errorf("Wait after a kill: %+v, %v; want an unrequested end with a reason", exit, err)
	}
	select {
	case err := <-running:
		if !errors.Is(err, api.ErrUnavailable) {
			t.Errorf("Exec on a killed machine: %v, want ErrUnavailable", err)
		}
	case <-g.within(t, 5*time.Second).Done():
		t.Error("Exec hangs on a killed machine")
	}
}

func testPause(t *testing.T, s Subject) {
	g := Boot(t, s, nil)
	p, ok := g.Machine.(engine.Pauser)
	if !ok {
		t.Skipf("engine %s does not pause", s.Engine.Name())
	}
	if err := p.Pause(g.within(t, 5*time.Second)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := g.Client.Hello(ctx); err == nil {
		t.Error("a paused guest answers")
	}
	if err := p.Resume(g.within(t, 5*time.Second)); err != nil {
		t.Fatal(err)
	}
	g.sh(t, "true")
}

func testRefuses(t *testing.T, s Subject) {
	for name, change := range map[string]func(*engine.MachineSpec){
		"NoProcessor":    func(m *engine.MachineSpec) { m.VCPUCount = 0 },
		"ManyProcessors": func(m *engine.MachineSpec) { m.VCPUCount = 100000 },
		"LittleMemory":   func(m *engine.MachineSpec) { m.MemMiB = 16 },
		"LittleDisk":     func(m *engine.MachineSpec) { m.DiskMiB = 1 },
	} {
		t.Run(name, func(t *testing.T) {
			if s.SmallestMiB == 0 {
				t.Skipf("engine %s has no bounds of its own", s.Engine.Name())
			}
			spec := s.Spec
			spec.ID, spec.Dir, spec.Console, spec.Logger = "refused", t.TempDir(), io.Discard, slog.New(slog.DiscardHandler)
			change(&spec)
			m, err := s.Engine.Start(t.Context(), spec)
			if err == nil {
				_ = m.Stop(context.Background(), 0)
				t.Fatal("it started")
			}
			if !errors.Is(err, api.ErrInvalid) || api.Hint(err) == "" {
				t.Errorf("%v (hint %q): want ErrInvalid with a hint", err, api.Hint(err))
			}
		})
	}
}
