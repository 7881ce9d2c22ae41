package guestagent

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestagent/process"
	"github.com/pyro-mcp/pyro/internal/guestagent/ring"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

const (
	// hangUpGrace is how long a shell that is closed has between HUP and KILL.
	hangUpGrace = time.Second
	// maxTyped bounds what was written to a shell and not read by it.
	maxTyped = 2 << 20
	// typeChunk is how much input is written to a terminal at once.
	typeChunk = 4 << 10
)

// A shell is one interactive session on a terminal. It lives apart from the
// requests that use it: it ends by itself, when it is closed, or with the agent.
type shell struct {
	id, cwd  string
	cmd      *process.Command
	terminal *os.File
	out      *ring.Ring
	started  time.Time
	closing  chan struct{} // closed when it is to end
	close    func()
	done     chan struct{} // closed when it has ended

	mu         sync.Mutex
	typing     *sync.Cond
	typed      []keystrokes
	typedBytes int
	deaf       bool // takes no more input
	cols, rows uint16
	ended      *time.Time
	exitCode   *int
}

// keystrokes are a piece of input. taken, where not nil, is told how much of it the
// terminal has taken; it must not wait.
type keystrokes struct {
	p     []byte
	taken func(n int)
}

// startShell starts bash, or sh where there is no bash.
func (s *Server) startShell(req *guestproto.OpenShell, budget *ring.Budget) (*shell, error) {
	size := guestproto.Resize{Cols: req.Cols, Rows: req.Rows}
	if size.Cols == 0 {
		size.Cols = guestproto.DefaultShellCols
	}
	if size.Rows == 0 {
		size.Rows = guestproto.DefaultShellRows
	}
	// What holds for a command on a terminal holds for a shell.
	exec := &guestproto.ExecRequest{Envelope: guestproto.Envelope{Stream: true}, Argv: []string{"bash"}, Env: req.Env, Cwd: req.Cwd, TTY: &size}
	if err := checkExec(exec); err != nil {
		return nil, err
	}
	u, err := s.user(req.User)
	if err != nil {
		return nil, err
	}
	dir, err := s.workDir(req.Cwd, u)
	if err != nil {
		return nil, err
	}
	login := "root"
	if u != nil {
		login = u.Name
	}
	master, slave, err := openTerminal(&size)
	if err != nil {
		return nil, err
	}
	defer slave.Close()
	sh := &shell{
		id: req.ShellID, cwd: s.guestPath(dir), cols: size.Cols, rows: size.Rows, terminal: master,
		closing: make(chan struct{}), done: make(chan struct{}), started: time.Now(),
	}
	sh.typing = sync.NewCond(&sh.mu)
	sh.close = sync.OnceFunc(func() { close(sh.closing) })
	if sh.out, err = ring.New(budget); err != nil {
		_ = master.Close()
		return nil, api.Errorf(api.ErrExhausted, "%w", err)
	}
	for _, program := range []string{"bash", "sh"} {
		exec.Env = map[string]string{"SHELL": "/bin/" + program, "LOGNAME": login}
		maps.Copy(exec.Env, req.Env)
		sh.cmd, err = s.Runner.Start(process.Spec{
			Argv: []string{program}, Env: s.environ(exec, dir, u), Dir: dir, Files: [3]*os.File{slave, slave, slave}, Terminal: true, Credential: u.credential(),
		})
		if !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	if err != nil {
		_ = master.Close()
		_ = sh.out.Close()
		if errors.Is(err, fs.ErrNotExist) {
			return nil, api.Errorf(api.ErrUnsupported, "this guest has neither bash nor sh")
		}
		_, says, failed := cannotStart(exec, err)
		if failed == nil {
			failed = api.Errorf(api.ErrUnavailable, "starting the shell: %s", says)
		}
		return nil, failed
	}
	go sh.run(s.Logger)
	go sh.feedTerminal()
	return sh, nil
}

// run records what the shell writes, and ends all of it once it has ended or is
// to end.
func (sh *shell) run(logger *slog.Logger) {
	o := &output{f: sh.terminal, keep: true}
	recorded := make(chan struct{})
	go func() {
		defer close(recorded)
		_ = o.pump(0, func(_ int, p []byte) error {
			_, err := sh.out.Write(p)
			return err
		})
	}()
	select {
	case <-sh.cmd.Done():
		// What it leaves in the background gets a moment to write.
		if !sh.cmd.Quiet() {
			t := time.NewTimer(drainGrace)
			select {
			case <-recorded:
			case <-t.C:
			case <-sh.closing:
			}
			t.Stop()
		}
	case <-sh.closing:
		// An interactive shell ignores TERM. The terminal's end is a HUP to it
		// and its foreground, but gVisor's may not be.
		_ = sh.terminal.Close()
		sh.cmd.Signal(unix.SIGHUP)
		sh.cmd.Terminate(hangUpGrace)
	}
	sh.cmd.Kill()
	o.flush()
	<-recorded
	t := time.NewTimer(reapLimit)
	defer t.Stop()
	var code *int
	select {
	case <-sh.cmd.Done():
		n := sh.cmd.ExitCode()
		code = &n
	case <-t.C:
		logger.Warn("a shell cannot be killed: it hangs in the kernel", "shell", sh.id)
	}
	sh.cmd.Release()
	_ = sh.terminal.Close()
	now := time.Now()
	sh.mu.Lock()
	sh.ended, sh.exitCode = &now, code
	sh.mu.Unlock()
	sh.stopTyping()
	sh.out.End()
	close(sh.done)
}

// feedTerminal passes input on as fast as the terminal takes it.
func (sh *shell) feedTerminal() {
	for {
		sh.mu.Lock()
		for len(sh.typed) == 0 && !sh.deaf {
			sh.typing.Wait()
		}
		if sh.deaf {
			sh.mu.Unlock()
			return
		}
		piece := sh.typed[0]
		sh.mu.Unlock()
		n, err := sh.terminal.Write(piece.p[:min(len(piece.p), typeChunk)])
		if err != nil {
			sh.stopTyping()
			return
		}
		sh.mu.Lock()
		sh.typedBytes -= n
		if n < len(piece.p) {
			sh.typed[0].p = piece.p[n:]
		} else {
			sh.typed = sh.typed[1:]
		}
		sh.mu.Unlock()
		if piece.taken != nil {
			piece.taken(n)
		}
	}
}

func (sh *shell) stopTyping() {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	sh.deaf, sh.typed, sh.typedBytes = true, nil, 0
	sh.typing.Broadcast()
}

// write accepts input. p is the shell's from now on.
func (sh *shell) write(p []byte, taken func(int)) error {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	switch {
	case sh.deaf:
		return sh.over()
	case sh.typedBytes+len(p) > maxTyped:
		return api.WithHint(api.Errorf(api.ErrBusy, "shell %q has not read %d bytes that were written to it", sh.id, sh.typedBytes),
			"wait until it reads, or interrupt what runs in it")
	case len(p) == 0:
		return nil
	}
	sh.typed = append(sh.typed, keystrokes{p, taken})
	sh.typedBytes += len(p)
	sh.typing.Broadcast()
	return nil
}

func (sh *shell) over() error {
	return api.WithHint(api.Errorf(api.ErrState, "shell %q has ended", sh.id), "open another one")
}

// running is an error once the shell has ended.
func (sh *shell) running() error {
	select {
	case <-sh.done:
		return sh.over()
	default:
		return nil
	}
}

func (sh *shell) resize(size guestproto.Resize) {
	if size.Cols == 0 || size.Rows == 0 {
		return
	}
	sh.mu.Lock()
	sh.cols, sh.rows = size.Cols, size.Rows
	sh.mu.Unlock()
	resizeTerminal(sh.terminal, sh.cmd, size)
}

func (sh *shell) signal(sig unix.Signal) {
	if !signalForeground(sh.terminal, sh.cmd, sig) {
		sh.cmd.Signal(sig)
	}
}

// read reads output, after it has waited for it as the request says.
func (sh *shell) read(ctx context.Context, req *guestproto.ReadShell) passage {
	limit := time.NewTimer(guestproto.MaxShellWait)
	defer limit.Stop()
	// wait returns false when there is nothing to wait for any more.
	wait := func(changed <-chan struct{}, pause time.Duration) (more bool) {
		t := time.NewTimer(pause)
		defer t.Stop()
		select {
		case <-changed:
			return true
		case <-t.C:
		case <-limit.C:
		case <-ctx.Done():
		}
		return false
	}
	firstBy := time.Now().Add(milliseconds(req.WaitMS))
	idle := milliseconds(req.WaitForIdleMS)
	for {
		changed := sh.out.Changed()
		_, _, ended := sh.out.Bounds()
		p := readText(sh.out, req.Cursor, req.MaxChars)
		if ended || p.chars >= req.MaxChars {
			return p
		}
		pause := idle
		if p.chars == 0 {
			pause = max(idle, time.Until(firstBy))
		}
		if pause <= 0 || !wait(changed, pause) {
			return readText(sh.out, req.Cursor, req.MaxChars)
		}
	}
}

func milliseconds(n int64) time.Duration { return time.Duration(n) * time.Millisecond }

func (sh *shell) message() guestproto.Shell {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	m := guestproto.Shell{
		ShellID: sh.id, Cwd: sh.cwd, Cols: sh.cols, Rows: sh.rows, State: "running",
		StartedAt: epoch(sh.started), ExitCode: sh.exitCode,
	}
	if sh.ended != nil {
		m.State = "stopped"
		at := epoch(*sh.ended)
		m.EndedAt = &at
	}
	return m
}

// epoch is a time as the protocol has it, in seconds since 1970.
func epoch(t time.Time) float64 { return float64(t.UnixMicro()) / 1e6 }
