package workspace

import (
	"cmp"
	"context"
	"errors"
	"io"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/redact"
	"github.com/pyro-mcp/pyro/internal/store"
)

// command is one command on its way through a guest.
type command struct {
	argv    []string // a single word is run by sh -c
	env     map[string]string
	user    string
	cwd     string
	timeout time.Duration
	stdin   io.Reader
	tty     *api.TerminalSize
	resize  <-chan api.TerminalSize

	// redact, which may be nil, is taken out of what the command writes.
	redact         *redact.Set
	stdout, stderr recorder
}

// run returns when the command has ended. What it wrote is in the result where
// nobody else took it.
func (c *command) run(ctx context.Context, client *guestclient.Client) (*api.ExecResult, error) {
	ex := guestproto.ExecRequest{Argv: c.argv, Env: c.env, Cwd: c.cwd, User: c.user, TimeoutSeconds: c.timeout.Seconds(), Stdin: c.stdin != nil}
	if len(c.argv) == 1 {
		ex.Argv, ex.Command = nil, c.argv[0]
	}
	streams := guestclient.ExecIO{Stdin: c.stdin, Stdout: &c.stdout, Stderr: &c.stderr}
	flush := func() error { return nil }
	if c.redact != nil {
		out, errOut := c.redact.Writer(&c.stdout), c.redact.Writer(&c.stderr)
		streams.Stdout, streams.Stderr = out, errOut
		flush = func() error { return errors.Join(out.Flush(), errOut.Flush()) }
	}
	if c.tty != nil {
		ex.TTY = &guestproto.Resize{Cols: c.tty.Cols, Rows: c.tty.Rows}
		var stop func()
		streams.Resize, stop = resizes(c.resize)
		defer stop()
	}
	reply, err := client.Exec(ctx, ex, streams)
	// What was held back is part of the output, also of a command cut off.
	if flushErr := flush(); err == nil {
		err = flushErr
	}
	if err != nil {
		return nil, err
	}
	res := &api.ExecResult{
		Command: commandText(c.argv), Cwd: c.cwd,
		ExitCode: reply.ExitCode, TimedOut: reply.TimedOut, OOMKilled: reply.OOMKilled, DurationMS: reply.DurationMS,
	}
	if res.Cwd == "" {
		res.Cwd = api.WorkspacePath
	}
	if c.stdout.to == nil {
		res.Stdout, res.StdoutTruncated = c.stdout.String(), c.stdout.truncated()
	}
	if c.stderr.to == nil {
		res.Stderr, res.StderrTruncated = c.stderr.String(), c.stderr.truncated()
	}
	return res, nil
}

// resizes passes terminal sizes on in the guest protocol's form until stop.
func resizes(in <-chan api.TerminalSize) (out <-chan guestproto.Resize, stop func()) {
	ch, done := make(chan guestproto.Resize), make(chan struct{})
	go func() {
		for {
			select {
			case size, ok := <-in:
				if !ok {
					return
				}
				select {
				case ch <- guestproto.Resize{Cols: size.Cols, Rows: size.Rows}:
				case <-done:
					return
				}
			case <-done:
				return
			}
		}
	}()
	return ch, func() { close(done) }
}

// refuseUser refuses to take a user where commands run as whoever calls pyro.
func refuseUser(isolation api.Isolation, user string) error {
	if user == "" || isolation != api.IsolationNone {
		return nil
	}
	return api.WithHint(api.Errorf(api.ErrUnsupported, "commands on this host run as you, not as %q", user),
		"leave --user out, or take an engine that isolates")
}

// userOf returns who a command in a workspace runs as: who was asked for, else
// the workspace's own.
func userOf(ws *store.Workspace, given string) (string, error) {
	if given != "" {
		if err := api.CheckUser(given); err != nil {
			return "", err
		}
	}
	return cmp.Or(given, ws.User), refuseUser(ws.Isolation, given)
}
