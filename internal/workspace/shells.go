package workspace

import (
	"cmp"
	"context"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/redact"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/termtext"
)

// Shells live in the guest: its agent holds them and their output. They end
// with it.

func shellOf(ws *store.Workspace, s guestproto.Shell) api.Shell {
	return api.Shell{
		WorkspaceID: ws.WorkspaceID, ShellID: s.ShellID, Cwd: validText(s.Cwd), Cols: s.Cols, Rows: s.Rows,
		State: s.State, StartedAt: unixTime(s.StartedAt), EndedAt: optionalTime(s.EndedAt), ExitCode: s.ExitCode,
	}
}

// unixTime converts the guest's seconds since 1970. They are its claim: what no
// RFC 3339 time can be becomes 1970.
func unixTime(seconds float64) time.Time {
	const year9999 = 253402300799
	if !(seconds >= 0 && seconds < year9999) {
		seconds = 0
	}
	return time.UnixMicro(int64(seconds * 1e6)).UTC()
}

func optionalTime(seconds *float64) *time.Time {
	if seconds == nil {
		return nil
	}
	t := unixTime(*seconds)
	return &t
}

// OpenShell starts an interactive session in a running workspace.
func (m *Manager) OpenShell(ctx context.Context, ref string, req api.OpenShellRequest) (*api.Shell, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.Shell, error) {
		user, err := userOf(ws, req.User)
		if err != nil {
			return nil, err
		}
		env, _, err := m.environ(ws, req.Env, req.SecretEnv)
		if err != nil {
			return nil, err
		}
		s, err := c.OpenShell(ctx, guestproto.OpenShell{
			ShellID: newID(), Cwd: inWorkspace(req.Cwd), Cols: req.Size.Cols, Rows: req.Size.Rows, Env: env, User: user,
		})
		if err != nil {
			return nil, err
		}
		shell := shellOf(ws, s)
		return &shell, m.active(ctx, ws)
	})
}

// Shells lists a workspace's shells, oldest first.
func (m *Manager) Shells(ctx context.Context, ref string) ([]api.Shell, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) ([]api.Shell, error) {
		all, err := c.ListShells(ctx)
		out := []api.Shell{}
		for _, s := range all {
			out = append(out, shellOf(ws, s))
		}
		return out, err
	})
}

// redactReach is how far before a cursor is looked for a secret that begins
// there: no value may be longer, see maxSecretBytes.
const redactReach = maxSecretBytes

// ReadShell reads a shell's output from a cursor on. Reading consumes nothing
// and does not count as activity.
func (m *Manager) ReadShell(ctx context.Context, ref, id string, req api.ReadShellRequest) (*api.ShellRead, error) {
	if req.Cursor < 0 {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "the cursor is %d", req.Cursor), "give --cursor 0, or the next_cursor of an earlier read")
	}
	if req.MaxChars == 0 {
		req.MaxChars = api.DefaultShellChars
	}
	if req.MaxChars < 1 || req.MaxChars > api.MaxShellChars {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "max_chars is %d, not between 1 and %d", req.MaxChars, int64(api.MaxShellChars)), "change --max-chars")
	}
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.ShellRead, error) {
		values, err := m.secretsOf(ws)
		if err != nil {
			return nil, err
		}
		r, err := c.ReadShell(ctx, guestproto.ReadShell{
			ShellID: id, Cursor: req.Cursor, MaxChars: req.MaxChars,
			WaitForIdleMS: min(req.WaitForIdle, guestproto.MaxShellWait).Milliseconds(),
		})
		if err != nil {
			return nil, err
		}
		set := redactions(values)
		if err := redactRead(ctx, c, id, set, &r); err != nil {
			return nil, err
		}
		out := &api.ShellRead{
			Shell: shellOf(ws, r.Shell), Cursor: r.Cursor, NextCursor: r.NextCursor, Output: r.Output, Truncated: r.Truncated, Plain: req.Plain,
		}
		if req.Plain {
			// Once more: a program may have broken or coloured a value.
			out.Output = set.String(termtext.Plain([]byte(out.Output), int(r.Cols), int(r.Rows)))
		}
		return out, nil
	})
}

// redactRead takes secrets out of what was read, also one that began before it.
// One that may begin at its end is left for the next read, unless the shell is
// quiet there: then it is not the secret, as far as there is any more to come.
func redactRead(ctx context.Context, c *guestclient.Client, id string, set *redact.Set, r *guestproto.ReadShellReply) error {
	if set.Empty() || r.Output == "" {
		return nil
	}
	var before string
	if from := max(0, r.Cursor-redactReach); from < r.Cursor {
		prev, err := c.ReadShell(ctx, guestproto.ReadShell{ShellID: id, Cursor: from, MaxChars: r.Cursor - from})
		if err != nil {
			return err
		}
		if prev.NextCursor == r.Cursor {
			before = prev.Output
		}
	}
	clean, used := set.Window([]byte(before), []byte(r.Output), r.State != api.ShellRunning)
	if used < len(r.Output) {
		// Cursors count the guest's bytes; what was no UTF-8 there came as more.
		r.NextCursor -= int64(len(r.Output) - used)
		r.Truncated = true
	}
	r.Output = string(clean)
	return nil
}

// WriteShell types text into a shell.
func (m *Manager) WriteShell(ctx context.Context, ref, id, input string, newline bool) (*api.ShellWrite, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.ShellWrite, error) {
		r, err := c.WriteShell(ctx, guestproto.WriteShell{ShellID: id, Input: input, AppendNewline: newline})
		if err != nil {
			return nil, err
		}
		return &api.ShellWrite{Shell: shellOf(ws, r.Shell), InputLength: r.InputLength, AppendNewline: r.AppendNewline}, m.active(ctx, ws)
	})
}

// SignalShell sends a signal to a shell's foreground: HUP, INT, TERM or KILL.
func (m *Manager) SignalShell(ctx context.Context, ref, id, signal string) (*api.ShellSignal, error) {
	signal = strings.TrimPrefix(strings.ToUpper(cmp.Or(signal, "INT")), "SIG")
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.ShellSignal, error) {
		r, err := c.SignalShell(ctx, guestproto.SignalShell{ShellID: id, Signal: signal})
		if err != nil {
			return nil, err
		}
		return &api.ShellSignal{Shell: shellOf(ws, r.Shell), Signal: r.Signal}, m.active(ctx, ws)
	})
}

// CloseShell ends a shell with everything that runs in it.
func (m *Manager) CloseShell(ctx context.Context, ref, id string) (*api.ShellClose, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.ShellClose, error) {
		r, err := c.CloseShell(ctx, guestproto.CloseShell{ShellID: id})
		if err != nil {
			return nil, err
		}
		return &api.ShellClose{Shell: shellOf(ws, r.Shell), Closed: r.Closed}, m.active(ctx, ws)
	})
}

// AttachShell connects a terminal with a shell until the shell ends, which is
// returned, or ctx does, which leaves it running.
func (m *Manager) AttachShell(ctx context.Context, ref, id string, req api.AttachRequest) (*api.Shell, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.Shell, error) {
		values, err := m.secretsOf(ws)
		if err != nil {
			return nil, err
		}
		streams := guestclient.ExecIO{Stdin: req.Stdin, Stdout: req.Stdout}
		w := redactions(values).Writer(req.Stdout)
		defer func() { _ = w.Flush() }() // the terminal is gone then
		streams.Stdout = w
		var stop func()
		streams.Resize, stop = resizes(req.Resize)
		defer stop()
		s, err := c.AttachShell(ctx, guestproto.AttachShell{ShellID: id, Cols: req.Size.Cols, Rows: req.Size.Rows}, streams, nil)
		if err != nil {
			return nil, err
		}
		shell := shellOf(ws, s)
		return &shell, m.active(ctx, ws)
	})
}
