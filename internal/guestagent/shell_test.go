package guestagent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// A testShell is an open shell and how far the test has read it.
type testShell struct {
	a      *agent
	id     string
	cursor int64
}

func (a *agent) shell(t testing.TB, id string) *testShell {
	t.Helper()
	// The home of whoever runs the test may hold a .bashrc that does anything.
	sh, err := a.OpenShell(testContext(t), guestproto.OpenShell{ShellID: id, Env: map[string]string{"HOME": a.root}})
	if err != nil {
		t.Fatal(err)
	}
	if sh.State != "running" || sh.ExitCode != nil || sh.EndedAt != nil || sh.Cols != 120 || sh.Rows != 30 || sh.Cwd != "/workspace" {
		t.Errorf("a new shell is %+v", sh)
	}
	return &testShell{a: a, id: id}
}

func (s *testShell) typeLine(t testing.TB, line string) {
	t.Helper()
	r, err := s.a.WriteShell(testContext(t), guestproto.WriteShell{ShellID: s.id, Input: line, AppendNewline: true})
	if err != nil {
		t.Fatal(err)
	}
	if r.InputLength != int64(len(line)) || !r.AppendNewline {
		t.Errorf("wrote %+v", r)
	}
}

// until reads on until the output holds text, and returns what it has read.
func (s *testShell) until(t testing.TB, text string) string {
	t.Helper()
	var out string
	for end := time.Now().Add(time.Minute); !strings.Contains(out, text); {
		r, err := s.a.ReadShell(testContext(t), guestproto.ReadShell{ShellID: s.id, Cursor: s.cursor, WaitMS: 1000})
		if err != nil {
			t.Fatal(err)
		}
		if time.Now().After(end) || r.State == "stopped" && r.Output == "" {
			t.Fatalf("waited in vain for %q, the output is %q", text, out)
		}
		out += r.Output
		s.cursor = r.NextCursor
	}
	return out
}

func (s *testShell) state(t testing.TB) guestproto.Shell {
	t.Helper()
	r, err := s.a.ReadShell(testContext(t), guestproto.ReadShell{ShellID: s.id})
	if err != nil {
		t.Fatal(err)
	}
	return r.Shell
}

func (s *testShell) signal(t testing.TB, name string) {
	t.Helper()
	if r, err := s.a.SignalShell(testContext(t), guestproto.SignalShell{ShellID: s.id, Signal: name}); err != nil || r.Signal != name {
		t.Fatalf("%+v, %v", r, err)
	}
}

func TestShell(t *testing.T) {
	a := startAgent(t)
	ctx := testContext(t)
	s := a.shell(t, "s")
	s.typeLine(t, `echo "[$(stty size) $TERM $(basename $SHELL) $LOGNAME $((40+2))]"; tty; pwd; cd /; echo done-$((1+1))`)
	out := s.until(t, "done-2")
	for _, want := range []string{"[30 120 xterm-256color bash root 42]", "/dev/pts/", "/root/workspace\r\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("the output lacks %q:\n%s", want, out)
		}
	}
	// Reading consumes nothing, and a shell keeps its state between requests.
	first, err := a.ReadShell(ctx, guestproto.ReadShell{ShellID: "s"})
	if err != nil || !strings.HasPrefix(first.Output, out) || first.Cursor != 0 || first.Truncated || first.NextCursor < s.cursor {
		t.Errorf("the second read is %+v, %v", first, err)
	}
	s.typeLine(t, `echo now in $PWD`)
	s.until(t, "now in /\r\n")

	if sh, err := a.ResizeShell(ctx, guestproto.ResizeShell{ShellID: "s", Cols: 44, Rows: 22}); err != nil || sh.Cols != 44 || sh.Rows != 22 {
		t.Errorf("resized: %+v, %v", sh, err)
	}
	s.typeLine(t, "stty size")
	s.until(t, "22 44")

	s.typeLine(t, "exit 7")
	eventually(t, "the shell has ended", func() bool { return s.state(t).State == "stopped" })
	if sh := s.state(t); sh.ExitCode == nil || *sh.ExitCode != 7 || sh.EndedAt == nil {
		t.Errorf("the ended shell is %+v", sh)
	}
	// What it wrote can still be read.
	if r, err := a.ReadShell(ctx, guestproto.ReadShell{ShellID: "s", WaitForIdleMS: 60_000}); err != nil || !strings.Contains(r.Output, "22 44") {
		t.Errorf("after its end: %+v, %v", r, err)
	}
	for name, err := range map[string]error{
		"write":  second(a.WriteShell(ctx, guestproto.WriteShell{ShellID: "s", Input: "x"})),
		"signal": second(a.SignalShell(ctx, guestproto.SignalShell{ShellID: "s", Signal: "INT"})),
		"resize": second(a.ResizeShell(ctx, guestproto.ResizeShell{ShellID: "s", Cols: 1, Rows: 1})),
	} {
		if !errors.Is(err, api.ErrState) {
			t.Errorf("%s after its end: %v", name, err)
		}
	}
	if r, err := a.CloseShell(ctx, guestproto.CloseShell{ShellID: "s"}); err != nil || !r.Closed || *r.ExitCode != 7 {
		t.Errorf("closed: %+v, %v", r, err)
	}
	if _, err := a.ReadShell(ctx, guestproto.ReadShell{ShellID: "s"}); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("after the close: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestShellRefusals(t *testing.T) {
	a := startAgent(t)
	ctx := testContext(t)
	s := a.shell(t, "s")
	s.typeLine(t, "echo $((1+1))")
	s.until(t, "2\r\n")
	long := strings.Repeat("x", guestproto.MaxWorkloadName+1)
	for name, test := range map[string]struct {
		err   error
		class error
	}{
		"SameName":        {second(a.OpenShell(ctx, guestproto.OpenShell{ShellID: "s"})), api.ErrExists},
		"LongName":        {second(a.OpenShell(ctx, guestproto.OpenShell{ShellID: long})), api.ErrInvalid},
		"NoName":          {second(a.OpenShell(ctx, guestproto.OpenShell{})), api.ErrInvalid},
		"MissingCwd":      {second(a.OpenShell(ctx, guestproto.OpenShell{ShellID: "t", Cwd: "/nowhere"})), api.ErrInvalid},
		"BadVariable":     {second(a.OpenShell(ctx, guestproto.OpenShell{ShellID: "t", Env: map[string]string{"A=B": "c"}})), api.ErrInvalid},
		"CursorBeyond":    {second(a.ReadShell(ctx, guestproto.ReadShell{ShellID: "s", Cursor: 1 << 40})), api.ErrInvalid},
		"NegativeCursor":  {second(a.ReadShell(ctx, guestproto.ReadShell{ShellID: "s", Cursor: -1})), api.ErrInvalid},
		"TooManyChars":    {second(a.ReadShell(ctx, guestproto.ReadShell{ShellID: "s", MaxChars: guestproto.MaxShellChars + 1})), api.ErrInvalid},
		"NegativeChars":   {second(a.ReadShell(ctx, guestproto.ReadShell{ShellID: "s", MaxChars: -1})), api.ErrInvalid},
		"LongWait":        {second(a.ReadShell(ctx, guestproto.ReadShell{ShellID: "s", WaitMS: 60_001})), api.ErrInvalid},
		"NegativeIdle":    {second(a.ReadShell(ctx, guestproto.ReadShell{ShellID: "s", WaitForIdleMS: -1})), api.ErrInvalid},
		"OddSignal":       {second(a.SignalShell(ctx, guestproto.SignalShell{ShellID: "s", Signal: "STOP"})), api.ErrInvalid},
		"NoColumns":       {second(a.ResizeShell(ctx, guestproto.ResizeShell{ShellID: "s", Rows: 4})), api.ErrInvalid},
		"Missing":         {second(a.WriteShell(ctx, guestproto.WriteShell{ShellID: "t"})), api.ErrNotFound},
		"AttachToMissing": {second(a.AttachShell(ctx, guestproto.AttachShell{ShellID: "t"}, guestclient.ExecIO{}, nil)), api.ErrNotFound},
	} {
		if !errors.Is(test.err, test.class) {
			t.Errorf("%s: %v, want %v", name, test.err, test.class)
		}
	}
}

// A character is never split between two reads, whatever their size.
func TestShellReadsWholeCharacters(t *testing.T) {
	a := startAgent(t)
	s := a.shell(t, "s")
	const text = "aé€😀\xff-end"
	s.typeLine(t, `stty -echo; printf 'a\303\251\342\202\254\360\237\230\200\377-%s\n' end`)
	s.until(t, "-end")
	for chars := int64(1); chars < 12; chars++ {
		var out string
		cursor := int64(0)
		for cursor < s.cursor {
			r, err := a.ReadShell(testContext(t), guestproto.ReadShell{ShellID: "s", Cursor: cursor, MaxChars: chars})
			if err != nil {
				t.Fatal(err)
			}
			if n := int64(len([]rune(r.Output))); n > chars || n == 0 || r.Cursor != cursor || r.NextCursor <= cursor {
				t.Fatalf("%d characters at once: %+v", chars, r)
			}
			if n, left := int64(len([]rune(r.Output))), r.NextCursor < s.cursor; r.Truncated != (left && n == chars) && left {
				t.Fatalf("truncated is %v with more at %d", r.Truncated, r.NextCursor)
			}
			out += r.Output
			cursor = r.NextCursor
		}
		if want := strings.ToValidUTF8(text, "\uFFFD"); !strings.Contains(out, want) {
			t.Fatalf("%d characters at once give %q, which lacks %q", chars, out, want)
		}
	}
	// A character whose rest is on its way is waited for.
	s.typeLine(t, `printf '<\342\202'; read x; printf '\254>'`)
	s.until(t, "<")
	r, err := a.ReadShell(testContext(t), guestproto.ReadShell{ShellID: "s", Cursor: s.cursor, WaitMS: 100})
	if err != nil || r.Output != "" || r.NextCursor != s.cursor {
		t.Errorf("half a character reads as %+v, %v", r, err)
	}
	s.typeLine(t, "")
	s.until(t, "€>")
}

func TestShellWaits(t *testing.T) {
	a := startAgent(t)
	s := a.shell(t, "s")
	s.typeLine(t, "stty -echo; PS1=; echo ready-$((1+1))")
	s.until(t, "ready-2")
	read := func(wait, idle int64) guestproto.ReadShellReply {
		t.Helper()
		r, err := a.ReadShell(testContext(t), guestproto.ReadShell{ShellID: "s", Cursor: s.cursor, WaitMS: wait, WaitForIdleMS: idle})
		if err != nil {
			t.Fatal(err)
		}
		s.cursor = r.NextCursor
		return r
	}
	read(0, 1000) // the rest of the prompt
	began := time.Now()
	if r := read(200, 0); r.Output != "" || time.Since(began) < 200*time.Millisecond {
		t.Errorf("without output a read waited %v and got %q", time.Since(began), r.Output)
	}
	began = time.Now()
	if r := read(0, 200); r.Output != "" || time.Since(began) < 200*time.Millisecond || time.Since(began) > 10*time.Second {
		t.Errorf("an idle shell was idle after %v with %q", time.Since(began), r.Output)
	}
	// Idle begins anew with each output.
	s.typeLine(t, "for i in 1 2 3 4 5; do echo line$i; sleep 0.1; done")
	if r := read(20_000, 2000); !strings.Contains(r.Output, "line1") || !strings.Contains(r.Output, "line5") {
		t.Errorf("until idle came %q", r.Output)
	}
	// Waiting for any output ends with the first of it.
	s.typeLine(t, "echo one; read x; echo two")
	began = time.Now()
	r := read(20_000, 0)
	if r.Output == "" || strings.Contains(r.Output, "two") || time.Since(began) > 10*time.Second {
		t.Errorf("the first output is %q, after %v", r.Output, time.Since(began))
	}
	// The first may be the shell's own word to the terminal, which it then still
	// has to itself: read would take all that is typed until it has let go.
	if !strings.Contains(r.Output, "one") {
		s.until(t, "one")
	}
	// The shell's end ends the wait.
	began = time.Now()
	s.typeLine(t, "")
	s.typeLine(t, "exit")
	for r := read(60_000, 60_000); r.State == "running"; r = read(60_000, 60_000) {
	}
	if time.Since(began) > 20*time.Second {
		t.Errorf("the end of the shell was noticed after %v", time.Since(began))
	}
}

func TestShellSignals(t *testing.T) {
	a := startAgent(t)
	s := a.shell(t, "s")
	m := marker()
	s.typeLine(t, "sleep 999."+m)
	eventually(t, "sleep runs", func() bool { return len(running("999."+m)) > 0 })
	s.signal(t, "INT")
	s.typeLine(t, "echo still-$((1+1))")
	s.until(t, "still-2")
	s.typeLine(t, `sh -c 'trap "echo got-term" TERM; echo set-$((1+1)); while :; do sleep 0.05; done'`)
	s.until(t, "set-2")
	s.signal(t, "TERM")
	s.until(t, "got-term")
	s.signal(t, "KILL") // the foreground, not the shell
	s.typeLine(t, "echo again-$((1+1))")
	s.until(t, "again-2")
	s.signal(t, "HUP") // the shell itself: nothing else is in the foreground
	eventually(t, "the shell has ended", func() bool { return s.state(t).State == "stopped" })
	if left := running("999." + m); len(left) > 0 {
		t.Errorf("left running: %q", left)
	}
}

// A shell that is closed is hung up first: what runs in it may say goodbye.
func TestShellCloseHangsUp(t *testing.T) {
	a := startAgent(t)
	s := a.shell(t, "s")
	s.typeLine(t, `sh -c 'trap "touch bye; exit" HUP; trap "" TERM; echo set-$((1+1)); while :; do sleep 0.05; done'`)
	s.until(t, "set-2")
	if err := second(a.CloseShell(testContext(t), guestproto.CloseShell{ShellID: "s"})); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(a.path("bye")); err != nil {
		t.Error(err)
	}
}

// A caller that hangs up while it waits is not waited with.
func TestShellReaderHangsUp(t *testing.T) {
	a := startAgent(t)
	s := a.shell(t, "s")
	files := func() int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.cmd.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	for r := int64(1); r > 0; { // until the prompt is there
		reply, err := a.ReadShell(testContext(t), guestproto.ReadShell{ShellID: "s", Cursor: s.cursor, WaitForIdleMS: 300})
		if err != nil {
			t.Fatal(err)
		}
		r, s.cursor = reply.NextCursor-s.cursor, reply.NextCursor
	}
	before := 0
	eventually(t, "no request is served", func() bool {
		last := before
		before = files()
		return before == last
	})
	ctx, cancel := context.WithCancel(testContext(t))
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			_, err := a.ReadShell(ctx, guestproto.ReadShell{ShellID: "s", Cursor: s.cursor, WaitMS: 60_000, WaitForIdleMS: 60_000})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
		})
	}
	eventually(t, "they wait", func() bool { return files() >= before+10 })
	cancel()
	wg.Wait()
	eventually(t, "they are let go", func() bool { return files() <= before })
}

// Nothing that a shell started outlives it, however that ends and however it hid
// (RELIABILITY L8, L10).
func TestShellLeavesNothing(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(t *testing.T, a *agent, s *testShell)
	}{
		{"Close", func(t *testing.T, a *agent, s *testShell) {
			if r, err := a.CloseShell(testContext(t), guestproto.CloseShell{ShellID: "s"}); err != nil || r.State != "stopped" {
				t.Errorf("%+v, %v", r, err)
			}
		}},
		{"Exit", func(t *testing.T, a *agent, s *testShell) {
			s.typeLine(t, "exit")
			eventually(t, "the shell has ended", func() bool { return s.state(t).State == "stopped" })
		}},
		{"Shutdown", func(t *testing.T, a *agent, s *testShell) {
			if err := a.Shutdown(testContext(t), time.Second); err != nil {
				t.Error(err)
			}
			<-a.done
		}},
		{"Term", func(t *testing.T, a *agent, s *testShell) {
			if err := a.cmd.Process.Signal(os.Interrupt); err != nil {
				t.Error(err)
			}
			<-a.done
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := startAgent(t)
			s := a.shell(t, "s")
			m := marker()
			s.typeLine(t, "trap '' HUP TERM; set +o notify; sleep 999."+m+" & setsid nohup sleep 999."+m+" >/dev/null 2>&1 & (setsid sh -c 'sleep 999."+m+" & :' &) ; echo begun-$((1+1))")
			s.until(t, "begun-2")
			eventually(t, "three run", func() bool { return len(running("sleep\x00999."+m)) == 3 })
			test.end(t, a, s)
			if left := running("999." + m); len(left) > 0 {
				t.Errorf("left running: %q", left)
			}
		})
	}
}

// A shell writes as much as it likes; the last of it is kept, and the agent
// stays small.
func TestShellPrintsWithoutEnd(t *testing.T) {
	a := startAgent(t)
	s := a.shell(t, "s")
	const total = 128 << 20
	began := time.Now()
	s.typeLine(t, fmt.Sprintf("stty -echo -onlcr; head -c %d /dev/zero | tr '\\0' x; echo; echo the-$((1+1))nd", total))
	for {
		r, err := a.ReadShell(testContext(t), guestproto.ReadShell{ShellID: "s", Cursor: s.cursor, WaitMS: 1000})
		if err != nil {
			t.Fatal(err)
		}
		s.cursor = r.NextCursor
		if strings.Contains(r.Output, "the-2nd") {
			break
		}
		if time.Since(began) > 5*time.Minute {
			t.Fatalf("read up to %d", s.cursor)
		}
	}
	t.Logf("%d MiB took %v", total>>20, time.Since(began))
	r, err := a.ReadShell(testContext(t), guestproto.ReadShell{ShellID: "s"})
	if err != nil || !r.Truncated || r.MissedBytes == 0 || r.Cursor != r.MissedBytes || r.Cursor+8<<20 < total || strings.Trim(r.Output, "x") != "" {
		t.Errorf("the oldest that is kept is at %d, %d missed, %v", r.Cursor, r.MissedBytes, err)
	}
	if mem := agentMemory(t, a); mem > 64<<20 {
		t.Errorf("the agent has %d MiB", mem>>20)
	}
}

// agentMemory is what the agent's process has resident, in bytes.
func agentMemory(t *testing.T, a *agent) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", a.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// A shell that reads nothing cannot make the agent keep what is typed.
func TestShellReadsNothing(t *testing.T) {
	a := startAgent(t)
	s := a.shell(t, "s")
	m := marker()
	s.typeLine(t, "stty raw -echo; sleep 999."+m)
	eventually(t, "sleep runs", func() bool { return len(running("999."+m)) > 0 })
	input := strings.Repeat("x", 900<<10)
	var err error
	accepted := 0
	for ; err == nil && accepted < 10; accepted++ {
		_, err = a.WriteShell(testContext(t), guestproto.WriteShell{ShellID: "s", Input: input})
	}
	if !errors.Is(err, api.ErrBusy) || accepted != 3 {
		t.Errorf("%d writes, then %v", accepted, err)
	}
	s.signal(t, "INT")
	if _, err := a.CloseShell(testContext(t), guestproto.CloseShell{ShellID: "s"}); err != nil {
		t.Error(err)
	}
}

func TestShellLimit(t *testing.T) {
	a := startAgent(t)
	ctx := testContext(t)
	open := func(i int) error {
		return second(a.OpenShell(ctx, guestproto.OpenShell{ShellID: fmt.Sprint("s", i), Env: map[string]string{"HOME": a.root}}))
	}
	for i := range guestproto.MaxShells {
		if err := open(i); err != nil {
			t.Fatal(err)
		}
	}
	if err := open(100); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("one more: %v", err)
	}
	// The one that ended first makes room.
	for _, id := range []string{"s7", "s5", "s9"} {
		s := &testShell{a: a, id: id}
		s.typeLine(t, "exit")
		eventually(t, "it has ended", func() bool { return s.state(t).State == "stopped" })
	}
	if err := open(100); err != nil {
		t.Error(err)
	}
	for id, there := range map[string]bool{"s7": false, "s5": true, "s9": true} {
		if _, err := a.ReadShell(ctx, guestproto.ReadShell{ShellID: id}); errors.Is(err, api.ErrNotFound) == there {
			t.Errorf("%s: %v", id, err)
		}
	}
	all, err := a.ListShells(ctx)
	if err != nil || len(all) != guestproto.MaxShells || all[0].ShellID != "s0" || all[len(all)-1].ShellID != "s100" {
		t.Errorf("%d shells, %v", len(all), err)
	}
}

// An attached is one caller's connection with a shell.
type attached struct {
	mu     sync.Mutex
	out    bytes.Buffer
	notice bytes.Buffer
	result chan guestproto.Shell
	err    chan error
	detach context.CancelFunc
}

func (at *attached) seen(text string) func() bool {
	return func() bool {
		at.mu.Lock()
		defer at.mu.Unlock()
		return strings.Contains(at.out.String(), text)
	}
}

func (a *agent) attach(t *testing.T, req guestproto.AttachShell, streams guestclient.ExecIO) *attached {
	t.Helper()
	ctx, cancel := context.WithCancel(testContext(t))
	at := &attached{result: make(chan guestproto.Shell, 1), err: make(chan error, 1), detach: cancel}
	if streams.Stdout == nil {
		streams.Stdout = writerFunc(func(p []byte) (int, error) {
			at.mu.Lock()
			defer at.mu.Unlock()
			return at.out.Write(p)
		})
	}
	streams.Stderr = writerFunc(func(p []byte) (int, error) {
		at.mu.Lock()
		defer at.mu.Unlock()
		return at.notice.Write(p)
	})
	ready := make(chan struct{})
	go func() {
		sh, err := a.AttachShell(ctx, req, streams, func(guestproto.ShellAttached) { close(ready) })
		at.result <- sh
		at.err <- err
	}()
	select {
	case <-ready:
	case err := <-at.err:
		if err != nil {
			t.Fatal(err)
		}
		at.err <- nil // it was attached, and has ended already
	}
	return at
}

func TestAttach(t *testing.T) {
	a := startAgent(t)
	s := a.shell(t, "s")
	s.typeLine(t, "echo before-$((1+1))")
	s.until(t, "before-2")

	stdin, typed := io.Pipe()
	resize := make(chan guestproto.Resize)
	signals := make(chan guestproto.Signal)
	one := a.attach(t, guestproto.AttachShell{ShellID: "s", Cols: 91, Rows: 17}, guestclient.ExecIO{Stdin: stdin, Resize: resize, Signals: signals})
	zero := int64(0)
	two := a.attach(t, guestproto.AttachShell{ShellID: "s", Cursor: &zero}, guestclient.ExecIO{})
	fmt.Fprintln(typed, "stty size; echo typed-$((1+1))")
	eventually(t, "the first sees it", one.seen("typed-2"))
	eventually(t, "the second sees it", two.seen("typed-2"))
	if !one.seen("17 91")() || one.seen("before-2")() || !two.seen("before-2")() {
		t.Errorf("the outputs are %q and %q", &one.out, &two.out)
	}
	fmt.Fprintln(typed, `until [ "$(stty size)" = "22 44" ]; do sleep 0.01; done; echo resized-$((1+1))`)
	resize <- guestproto.Resize{Cols: 44, Rows: 22}
	eventually(t, "it is resized", one.seen("resized-2"))
	if sh := s.state(t); sh.Cols != 44 || sh.Rows != 22 {
		t.Errorf("after a resize the shell is %+v", sh)
	}
	m := marker()
	fmt.Fprintln(typed, "sleep 999."+m)
	eventually(t, "sleep runs", func() bool { return len(running("999."+m)) > 0 })
	signals <- guestproto.Signal{Name: "INT"}
	fmt.Fprintln(typed, "echo interrupted-$((1+1))")
	eventually(t, "it was interrupted", one.seen("interrupted-2"))

	// Detaching leaves the shell to the others.
	one.detach()
	if err := <-one.err; !errors.Is(err, context.Canceled) {
		t.Errorf("detached with %v", err)
	}
	_ = typed.Close()
	s.typeLine(t, "echo after-$((1+1)); exit 5")
	sh := <-two.result
	if err := <-two.err; err != nil || sh.State != "stopped" || sh.ExitCode == nil || *sh.ExitCode != 5 || !two.seen("after-2")() {
		t.Errorf("ended with %+v, %v, output %q", sh, err, &two.out)
	}
	// One that has ended can be looked at.
	three := a.attach(t, guestproto.AttachShell{ShellID: "s", Cursor: &zero}, guestclient.ExecIO{})
	if sh := <-three.result; sh.State != "stopped" || !three.seen("after-2")() {
		t.Errorf("afterwards: %+v, %q", sh, &three.out)
	}
}

// What is pasted arrives whole, beyond the window, while the shell reads.
func TestAttachPastesMuch(t *testing.T) {
	a := startAgent(t)
	s := a.shell(t, "s")
	const size = 10 * guestproto.StdinWindow // more than may wait at a time
	s.typeLine(t, fmt.Sprintf("stty raw -echo; echo go-$((1+1)); head -c %d | md5sum; stty sane", size))
	s.until(t, "go-2")
	paste := bytes.Repeat([]byte("0123456789abcde\n"), size/16)
	at := a.attach(t, guestproto.AttachShell{ShellID: "s"}, guestclient.ExecIO{Stdin: bytes.NewReader(paste)})
	want, _, _ := a.sh(t, fmt.Sprintf("yes 0123456789abcde | head -c %d | md5sum", size))
	eventually(t, "the sum is there", at.seen(strings.Fields(want)[0]))
	at.detach()
	<-at.err
}

// A caller that does not read misses output, is told so, and does not slow the
// shell down.
func TestAttachReadsSlowly(t *testing.T) {
	a := startAgent(t)
	s := a.shell(t, "s")
	release := make(chan struct{})
	var got int64
	slow := a.attach(t, guestproto.AttachShell{ShellID: "s"}, guestclient.ExecIO{Stdout: writerFunc(func(p []byte) (int, error) {
		<-release
		got += int64(len(p))
		return len(p), nil
	})})
	const total = 32 << 20
	s.typeLine(t, fmt.Sprintf("stty -echo -onlcr; head -c %d /dev/zero | tr '\\0' x; echo; echo the-$((1+1))nd; exit", total))
	eventually(t, "the shell has ended", func() bool { return s.state(t).State == "stopped" })
	close(release)
	<-slow.result
	if err := <-slow.err; err != nil {
		t.Error(err)
	}
	if !strings.Contains(slow.notice.String(), "bytes of output were missed") || got < 1<<20 || got >= total {
		t.Errorf("of %d bytes %d came, with the notice %q", total, got, &slow.notice)
	}
}

// The agent that makes itself heard does not need the whole protocol right: a
// caller that sends nonsense is told so, and the shell lives.
func TestAttachNonsense(t *testing.T) {
	a := startAgent(t)
	s := a.shell(t, "s")
	for name, frames := range map[string]string{
		"Type":   "result {}",
		"Resize": "resize {}",
		"Signal": `signal {"signal":"STOP"}`,
		"JSON":   "resize [",
	} {
		out := play(t, a, `{"action":"attach_shell","shell_id":"s","stream":true}`+"\n"+frames)
		if !strings.Contains(out, `error {"code":"invalid"`) {
			t.Errorf("%s: %s", name, out)
		}
	}
	s.typeLine(t, "echo alive-$((1+1))")
	s.until(t, "alive-2")

	m := marker()
	s.typeLine(t, "stty raw -echo; sleep 999."+m)
	eventually(t, "it reads nothing", func() bool { return len(running("999."+m)) > 0 })
	piece := fmt.Sprintf("stdin %q", strings.Repeat("x", 60<<10))
	out := play(t, a, `{"action":"attach_shell","shell_id":"s","stream":true}`+"\n"+strings.Repeat(piece+"\n", 6))
	if !strings.Contains(out, "more stdin was sent than the window") {
		t.Errorf("too much input: %s", out)
	}
}

// Twenty shells and twenty services work at the same time.
func TestManyAtOnce(t *testing.T) {
	a := startAgent(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			s := a.shell(t, fmt.Sprint("s", i))
			for j := range 5 {
				s.typeLine(t, fmt.Sprintf("echo n%d-$((%d*%d))", i, i, j))
				s.until(t, fmt.Sprintf("n%d-%d\r\n", i, i*j))
			}
		})
		wg.Go(func() {
			name := fmt.Sprint("v", i)
			sv, err := a.StartService(testContext(t), guestproto.StartService{
				ServiceName: name, Command: fmt.Sprintf("echo %s; touch %s.ready; exec sleep 1000", name, name),
				Readiness: &guestproto.Readiness{Type: "file", Path: name + ".ready"}, ReadyIntervalMS: 10,
			})
			if err != nil || sv.State != "running" {
				t.Errorf("%+v, %v", sv, err)
			}
			// What it wrote before it was ready may still be in its pipe.
			eventually(t, "the log has what it wrote", func() bool {
				logs, err := a.LogsService(testContext(t), name, nil)
				return err == nil && logs.Stdout == name+"\n"
			})
		})
	}
	wg.Wait()
	if t.Failed() {
		t.Log(a.stderr.String())
	}
	for i := range 20 {
		wg.Go(func() {
			if err := second(a.CloseShell(testContext(t), guestproto.CloseShell{ShellID: fmt.Sprint("s", i)})); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if sv, err := a.StopService(testContext(t), fmt.Sprint("v", i), -1); err != nil || sv.State != "stopped" {
				t.Errorf("%+v, %v", sv, err)
			}
		})
	}
	wg.Wait()
}
