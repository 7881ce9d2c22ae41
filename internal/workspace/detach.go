package workspace

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// DetachedCommand is the hidden subcommand that stays with a command that
// outlives its caller.
const DetachedCommand = "exec-detached"

// detachedRequest is what it reads on stdin, detachedReply what it answers on
// stdout as soon as the command is in the journal.
type detachedRequest struct {
	StateDir  string            `json:"state_dir"`
	CacheDir  string            `json:"cache_dir"`
	Workspace string            `json:"workspace"`
	Argv      []string          `json:"argv"`
	Cwd       string            `json:"cwd"`
	Env       map[string]string `json:"env"`
	User      string            `json:"user,omitzero"`
	SecretEnv map[string]string `json:"secret_env"`
	Timeout   time.Duration     `json:"timeout"`
}

type detachedReply struct {
	Sequence int64          `json:"sequence"`
	Error    *api.WireError `json:"error,omitempty"`
}

// StartExec starts a command that goes on when this process ends. A process of
// its own stays with it, as this one would have, and keeps the journal.
func (m *Manager) StartExec(ctx context.Context, ref string, req api.ExecRequest) (*api.CommandRecord, error) {
	if req.Stdin != nil || req.Stdout != nil || req.Stderr != nil || req.TTY != nil {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "a detached command has no streams and no terminal"), "leave --stdin and --tty out")
	}
	if err := fillExec(&req); err != nil {
		return nil, err
	}
	ws, err := m.running(ctx, ref)
	if err != nil {
		return nil, err
	}
	binary, err := m.findBinary()
	if err != nil {
		return nil, err
	}
	in, err := json.Marshal(detachedRequest{
		StateDir: m.state.Path(), CacheDir: m.cacheDir, Workspace: ws.WorkspaceID,
		Argv: req.Argv, Cwd: req.Cwd, Env: req.Env, User: req.User, SecretEnv: req.SecretEnv, Timeout: req.Timeout,
	})
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(binary, DetachedCommand)
	cmd.Dir = "/"
	cmd.Stdin = bytes.NewReader(in)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the process that stays with the command: %w", err)
	}
	line, readErr := bufio.NewReader(io.LimitReader(out, 64<<10)).ReadBytes('\n')
	go func() { _ = cmd.Wait() }() // how it ends is in the journal
	var reply detachedReply
	if readErr != nil || json.Unmarshal(line, &reply) != nil {
		return nil, api.Errorf(api.ErrInternal, "the process that stays with the command died: %q", line)
	}
	if reply.Error != nil {
		return nil, reply.Error.Err()
	}
	logs, err := m.Logs(ctx, ws.WorkspaceID, api.LogsQuery{Sequence: reply.Sequence})
	if err != nil {
		return nil, err
	}
	return &logs.Entries[0], nil
}

// MainDetached is that process: it reads a request from in, answers on out, and
// returns when the command has ended.
func MainDetached(ctx context.Context, in io.Reader, out *os.File) error {
	answer := func(r detachedReply) {
		_ = json.NewEncoder(out).Encode(r) // nobody to tell if the caller is gone
		out.Close()
	}
	var req detachedRequest
	err := json.NewDecoder(io.LimitReader(in, 16<<20)).Decode(&req)
	if err != nil {
		err = api.WithHint(api.Errorf(api.ErrInvalid, "reading the request: %w", err), "%s is started by pyro itself; it is no command for people", DetachedCommand)
		answer(detachedReply{Error: api.ToWire(err)})
		return err
	}
	m, err := New(ctx, Options{StateDir: req.StateDir, CacheDir: req.CacheDir})
	if err != nil {
		answer(detachedReply{Error: api.ToWire(err)})
		return err
	}
	defer m.Close()
	began := false
	_, err = m.Exec(ctx, req.Workspace, api.ExecRequest{
		Argv: req.Argv, Cwd: req.Cwd, Env: req.Env, User: req.User, SecretEnv: req.SecretEnv, Timeout: req.Timeout, Stdout: io.Discard, Stderr: io.Discard,
		Started: func(sequence int64) {
			began = true
			answer(detachedReply{Sequence: sequence})
		},
	})
	if err != nil && !began {
		answer(detachedReply{Error: api.ToWire(err)})
	}
	return err
}
