package guestagent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestagent/process"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

const (
	// killGrace is how long a command that is to end (time limit, caller gone)
	// has between TERM and KILL.
	killGrace = 2 * time.Second
	// drainGrace is how long what a command left in the background may go on
	// writing after the command itself has ended, before it is killed.
	drainGrace = 250 * time.Millisecond
	// flushLimit is how long a read may wait for output of a killed tree; only
	// a process that got out of the tree keeps it waiting.
	flushLimit = time.Second

	// Exit codes as shells and timeout(1) use them.
	exitTimedOut      = 124
	exitNotExecutable = 126
	exitNotFound      = 127

	// maxArgs and maxEnv bound a request's lists.
	maxArgs = 100_000
	maxEnv  = 10_000
)

func (q *request) exec(ctx context.Context, line []byte) error {
	var req guestproto.ExecRequest
	if err := decodeRequest(line, &req); err != nil {
		return err
	}
	if err := checkExec(&req); err != nil {
		return err
	}
	if q.stream {
		return q.execStream(ctx, &req)
	}
	return q.execPlain(ctx, &req)
}

func checkExec(req *guestproto.ExecRequest) error {
	switch {
	case req.Command == "" && len(req.Argv) == 0:
		return api.Errorf(api.ErrInvalid, "the request has neither command nor argv")
	case req.Command != "" && len(req.Argv) > 0:
		return api.Errorf(api.ErrInvalid, "the request has both command and argv")
	case len(req.Argv) > maxArgs:
		return api.Errorf(api.ErrInvalid, "argv has %d words, the limit is %d", len(req.Argv), maxArgs)
	case len(req.Env) > maxEnv:
		return api.Errorf(api.ErrInvalid, "env has %d variables, the limit is %d", len(req.Env), maxEnv)
	case math.IsNaN(req.TimeoutSeconds) || req.TimeoutSeconds < 0 || req.TimeoutSeconds > 365*24*3600:
		return api.Errorf(api.ErrInvalid, "timeout_seconds is %v, not between 0 and a year", req.TimeoutSeconds)
	case (req.Stdin || req.TTY != nil) && !req.Stream:
		return api.Errorf(api.ErrInvalid, "stdin and tty need the streaming form")
	case strings.ContainsRune(req.Cwd, 0):
		return api.Errorf(api.ErrInvalid, "cwd has a NUL in it")
	}
	for _, word := range append([]string{req.Command}, req.Argv...) {
		if strings.ContainsRune(word, 0) {
			return api.Errorf(api.ErrInvalid, "the command has a NUL in it")
		}
	}
	for name, value := range req.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.ContainsRune(value, 0) {
			return api.Errorf(api.ErrInvalid, "env has an impossible variable %q", name)
		}
	}
	return nil
}

// An execution is one command on its way.
type execution struct {
	cmd     *process.Command
	outputs [2]*output // stdout, stderr; the second is nil on a terminal
	sink    sink
	started time.Time
	// unblock ends a sink that waits for a caller that reads no more.
	unblock func()

	// A command that could not be started is a result, not an error.
	result *guestproto.ExecReply
	says   string // on stderr
}

// A sink takes the command's output, 0 for stdout and 1 for stderr. An error
// ends the command.
type sink func(stream int, p []byte) error

// spec turns a request into what to run.
func (s *Server) spec(req *guestproto.ExecRequest) (process.Spec, error) {
	u, err := s.user(req.User)
	if err != nil {
		return process.Spec{}, err
	}
	dir, err := s.workDir(req.Cwd, u)
	if err != nil {
		return process.Spec{}, err
	}
	argv := req.Argv
	if req.Command != "" {
		argv = []string{"/bin/sh", "-c", req.Command}
	}
	return process.Spec{Argv: argv, Env: s.environ(req, dir, u), Dir: dir, Credential: u.credential()}, nil
}

// workDir returns the directory on this system's disk that a command of u's runs
// in.
func (s *Server) workDir(cwd string, u *user) (string, error) {
	if cwd == "" {
		dir := filepath.Join(s.Root, defaultCwd)
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() {
			return dir, nil
		}
		return filepath.Clean(s.Root), nil
	}
	if !filepath.IsAbs(cwd) {
		cwd = filepath.Join(defaultCwd, cwd)
	}
	dir := filepath.Join(s.Root, filepath.Clean(cwd))
	fi, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return "", api.Errorf(api.ErrInvalid, "the working directory %s does not exist in the guest", cwd)
	case err != nil:
		return "", api.Errorf(api.ErrInvalid, "looking at the working directory %s: %w", cwd, errors.Unwrap(err))
	case !fi.IsDir():
		return "", api.Errorf(api.ErrInvalid, "the working directory %s is not a directory", cwd)
	case !process.MayEnter(dir, u.credential()):
		return "", api.WithHint(api.Errorf(api.ErrDenied, "user %q may not enter the working directory %s", u.Name, cwd),
			"choose another one with --cwd, or --user root")
	}
	return dir, nil
}

// MachineVariable marks every process of an agent that runs without isolation,
// if the agent has it: by that the host finds what a killed agent left running.
const MachineVariable = "PYRO_MACHINE"

// reapLimit is how long a command that was killed may take to be gone.
const reapLimit = 10 * time.Second

// defaultCwd is where commands run unless they say otherwise.
const defaultCwd = "/workspace"

func (s *Server) environ(req *guestproto.ExecRequest, dir string, u *user) []string {
	env := map[string]string{
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME": "/root",
		"USER": "root",
		"LANG": "C.UTF-8",
		"PWD":  dir,
	}
	if s.InheritEnv {
		for _, name := range []string{"PATH", "HOME", "USER", MachineVariable} {
			if v, ok := os.LookupEnv(name); ok {
				env[name] = v
			}
		}
	}
	u.environ(env)
	if req.TTY != nil {
		env["TERM"] = "xterm-256color"
	}
	for name, value := range req.Env {
		env[name] = value
	}
	out := make([]string, 0, len(env))
	for name, value := range env {
		out = append(out, name+"="+value)
	}
	slices.Sort(out)
	return out
}

// cannotStart turns a start that failed into the result a shell would give, or
// returns err where it is no fault of the command.
func cannotStart(req *guestproto.ExecRequest, err error) (*guestproto.ExecReply, string, error) {
	name := "/bin/sh"
	if len(req.Argv) > 0 {
		name = req.Argv[0]
	}
	var errno syscall.Errno
	switch {
	case errors.Is(err, fs.ErrNotExist) && req.Command != "":
		return &guestproto.ExecReply{ExitCode: exitNotFound},
			"pyro-agent: this guest has no /bin/sh to run the command with; pass its words apart instead\n", nil
	case errors.Is(err, fs.ErrNotExist):
		return &guestproto.ExecReply{ExitCode: exitNotFound}, fmt.Sprintf("pyro-agent: %s: not found\n", name), nil
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOEXEC), errors.Is(err, syscall.E2BIG),
		errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP), errors.Is(err, syscall.ENAMETOOLONG),
		errors.Is(err, syscall.ETXTBSY), errors.Is(err, syscall.ELIBBAD):
		errors.As(err, &errno)
		why := "cannot be executed"
		if errno != 0 {
			why = errno.Error()
		}
		return &guestproto.ExecReply{ExitCode: exitNotExecutable}, fmt.Sprintf("pyro-agent: %s: %s\n", name, why), nil
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return nil, "", api.WithHint(api.Errorf(api.ErrExhausted, "starting the command: the guest has no room for another process: %w", err),
			"end what runs in the workspace, or give it more memory")
	}
	return nil, "", api.Errorf(api.ErrInternal, "starting the command: %w", err)
}

// finish waits for the command's end, by itself or by why it is ended early,
// ends what it left behind, and returns the result once all output was
// delivered. early yields the reason to end it early.
func (e *execution) finish(ctx context.Context, timeout time.Duration) (guestproto.ExecReply, error) {
	defer e.cmd.Release()
	var limit <-chan time.Time
	if timeout > 0 {
		t := time.NewTimer(timeout)
		defer t.Stop()
		limit = t.C
	}
	pumps := make(chan error, 1)
	go func() { pumps <- pumpAll(e.outputs[:], e.sink) }()
	timedOut := false
	var pumpErr error
	select {
	case <-e.cmd.Done():
	case <-limit:
		timedOut = true
		e.cmd.Terminate(killGrace)
	case <-ctx.Done():
		e.cmd.Terminate(killGrace)
	case pumpErr = <-pumps:
		// All output has ended or cannot be delivered; the command may run on.
		pumps <- pumpErr
		if pumpErr != nil {
			e.cmd.Terminate(killGrace)
			break
		}
		select {
		case <-e.cmd.Done():
		case <-limit:
			timedOut = true
			e.cmd.Terminate(killGrace)
		case <-ctx.Done():
			e.cmd.Terminate(killGrace)
		}
	}
	took := time.Since(e.started)
	// What still holds the outputs gets a moment to finish, as a pipeline's
	// last process does; then everything left goes.
	if !timedOut && ctx.Err() == nil && !e.cmd.Quiet() {
		t := time.NewTimer(drainGrace)
		select {
		case pumpErr = <-pumps:
			pumps <- pumpErr
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
	}
	e.cmd.Kill()
	for _, o := range e.outputs {
		if o != nil {
			o.flush()
		}
	}
	// The outputs' ends are delivered as fast as the caller takes them. One
	// that takes nothing any more is ended by its connection's deadline.
	select {
	case pumpErr = <-pumps:
	case <-ctx.Done():
		e.unblock()
		for _, o := range e.outputs {
			if o != nil {
				o.close()
			}
		}
		pumpErr = <-pumps
	}
	if ctx.Err() != nil {
		return guestproto.ExecReply{}, errGone
	}
	if pumpErr != nil {
		return guestproto.ExecReply{}, pumpErr
	}
	// A process leaves its tree when it has died, a moment before it is reaped.
	reaped := time.NewTimer(reapLimit)
	defer reaped.Stop()
	select {
	case <-e.cmd.Done():
	case <-reaped.C:
		return guestproto.ExecReply{}, api.Errorf(api.ErrUnavailable, "the command cannot be killed: it hangs in the guest's kernel")
	}
	r := guestproto.ExecReply{
		ExitCode:   e.cmd.ExitCode(),
		DurationMS: took.Milliseconds(),
		TimedOut:   timedOut,
		OOMKilled:  e.cmd.OOMKilled(),
	}
	if timedOut {
		r.ExitCode = exitTimedOut
	}
	return r, nil
}

// execPlain runs a command without stdin and answers with its output as text.
func (q *request) execPlain(ctx context.Context, req *guestproto.ExecRequest) error {
	var bufs [2]cappedBuffer
	e, err := q.start(req, func(stream int, p []byte) error {
		bufs[stream].write(p)
		return nil
	}, nil)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if e.result == nil {
		watch := q.watchCaller(ctx, cancel)
		reply, err := e.finish(ctx, seconds(req.TimeoutSeconds))
		cancel()
		_ = q.conn.SetReadDeadline(time.Unix(1, 0))
		<-watch
		if err != nil {
			q.gone = errors.Is(err, errGone)
			return err
		}
		e.result = &reply
	}
	if e.says != "" {
		bufs[1].write([]byte(e.says))
	}
	e.result.Stdout, e.result.StdoutTruncated = bufs[0].text(), bufs[0].cut
	e.result.Stderr, e.result.StderrTruncated = bufs[1].text(), bufs[1].cut
	return q.reply(e.result)
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// A cappedBuffer keeps the first MaxPlainOutput bytes.
type cappedBuffer struct {
	buf bytes.Buffer
	cut bool
}

func (b *cappedBuffer) write(p []byte) {
	room := guestproto.MaxPlainOutput - b.buf.Len()
	if len(p) > room {
		p, b.cut = p[:room], true
	}
	b.buf.Write(p)
}

// text returns what was kept, bytes that are no UTF-8 replaced. Replacing may
// make it longer than what was kept, so it is cut again.
func (b *cappedBuffer) text() string {
	s := strings.ToValidUTF8(b.buf.String(), "\uFFFD")
	if len(s) > guestproto.MaxPlainOutput {
		s, b.cut = strings.ToValidUTF8(s[:guestproto.MaxPlainOutput], ""), true
	}
	return s
}
