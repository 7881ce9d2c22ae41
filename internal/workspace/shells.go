package workspace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/redact"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
	"github.com/pyro-mcp/pyro/internal/termtext"
)

// Shells live in the guest: its agent holds them and their output. They end
// with it.

// inGuest runs a request on the guest of a running workspace, and explains what
// broke it.
func inGuest[T any](ctx context.Context, m *Manager, ref string, do func(ws *store.Workspace, c *guestclient.Client) (T, error)) (T, error) {
	var none T
	ws, err := m.running(ctx, ref)
	if err != nil {
		return none, err
	}
	sup, client := m.guest(ws)
	out, err := do(ws, client)
	if err != nil {
		return none, m.whyBroken(ctx, ws, sup, err)
	}
	return out, nil
}

// active records that somebody is using the workspace.
func (m *Manager) active(ctx context.Context, ws *store.Workspace) error {
	st, err := m.store(ctx)
	if err != nil {
		return err
	}
	return st.Touch(ctx, ws.WorkspaceID, time.Now().UTC())
}

func shellOf(ws *store.Workspace, s guestproto.Shell) api.Shell {
	return api.Shell{
		WorkspaceID: ws.WorkspaceID, ShellID: s.ShellID, Cwd: printablePath(s.Cwd), Cols: s.Cols, Rows: s.Rows,
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
		env, _, err := m.withSecrets(ws, req.Env, req.SecretEnv)
		if err != nil {
			return nil, err
		}
		s, err := c.OpenShell(ctx, guestproto.OpenShell{
			ShellID: newID(), Cwd: orText(req.Cwd, api.WorkspacePath), Cols: req.Size.Cols, Rows: req.Size.Rows, Env: env,
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
	signal = strings.TrimPrefix(strings.ToUpper(orText(signal, "INT")), "SIG")
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
		defer w.Flush() //nolint:errcheck // the terminal is gone then
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

func serviceOf(ws *store.Workspace, s guestproto.Service) api.Service {
	out := api.Service{
		WorkspaceID: ws.WorkspaceID, ServiceName: s.ServiceName, Command: s.Command, Cwd: printablePath(s.Cwd), State: s.State,
		StartedAt: unixTime(s.StartedAt), ReadyAt: optionalTime(s.ReadyAt), EndedAt: optionalTime(s.EndedAt), ExitCode: s.ExitCode, PID: s.PID,
		StopReason: s.StopReason, Restarts: s.Restarts, PublishedPorts: []api.PublishedPort{},
	}
	if r := s.Readiness; r != nil {
		out.Readiness = &api.Readiness{Type: r.Type, Path: r.Path, Address: r.Address, URL: r.URL, Command: r.Command}
	}
	if s.State == api.ServiceRunning || s.State == api.ServiceStarting {
		out.PublishedPorts = append(out.PublishedPorts, ws.Published[s.ServiceName]...)
	}
	return out
}

// StartService starts a named long-running command and returns when it is
// ready, or has failed, which is a result. Its ports are published while it
// lives.
func (m *Manager) StartService(ctx context.Context, ref, name string, req api.StartServiceRequest) (*api.Service, error) {
	if len(req.Argv) == 0 || req.Argv[0] == "" {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "no command was given"), "put the command after --, as in: pyro workspace service start ID web -- ./serve")
	}
	ws, err := m.running(ctx, ref)
	if err != nil {
		return nil, err
	}
	if len(req.Publish) > 0 && ws.NetworkPolicy != api.NetworkEgressPublishing {
		return nil, api.WithHint(api.Errorf(api.ErrDenied, "workspace %s has the network policy %s, which publishes no ports", label(ws), ws.NetworkPolicy),
			"create it with --network-policy %s", api.NetworkEgressPublishing)
	}
	env, set, err := m.withSecrets(ws, req.Env, req.SecretEnv)
	if err != nil {
		return nil, err
	}
	start := guestproto.StartService{
		ServiceName: name, Command: commandText(req.Argv), Cwd: orText(req.Cwd, api.WorkspacePath), Env: env, Restart: req.Restart,
		ReadyTimeoutSeconds: req.ReadyTimeout.Seconds(), ReadyIntervalMS: req.ReadyInterval.Milliseconds(),
	}
	if len(req.Argv) > 1 {
		start.Argv = req.Argv
	}
	if r := req.Readiness; r != nil {
		start.Readiness = &guestproto.Readiness{Type: r.Type, Path: r.Path, Address: r.Address, URL: r.URL, Command: r.Command}
	}
	sup, client := m.guest(ws)
	// Ports first: a taken one is known before anything runs.
	ports, err := publish(ctx, sup, name, req.Publish)
	if err != nil {
		return nil, err
	}
	s, err := client.StartService(ctx, start)
	if err != nil || s.State != api.ServiceRunning {
		unpublish(ctx, sup, ports)
		ports = nil
	}
	if err == nil && len(ports) > 0 {
		// From now on it is the supervisor that closes them with the service.
		err = sup.WatchService(ctx, name)
	}
	if err != nil {
		return nil, set.Error(m.whyBroken(ctx, ws, sup, err))
	}
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	total, running := countServices(ctx, client)
	ws, err = st.Update(ctx, ws.WorkspaceID, func(ws *store.Workspace) error {
		if ws.Published == nil {
			ws.Published = map[string][]api.PublishedPort{}
		}
		ws.Published[name] = ports
		ws.ServiceCount, ws.RunningServiceCount = total, running
		ws.LastActivityAt = time.Now().UTC()
		return nil
	}, store.Event{Kind: eventService, Detail: map[string]any{"service": name, "state": s.State}})
	if err != nil {
		return nil, err
	}
	out := serviceOf(ws, s)
	return &out, nil
}

// countServices returns how many services the guest has, and how many of them
// run. One that cannot say has none.
func countServices(ctx context.Context, c *guestclient.Client) (total, running int64) {
	all, err := c.ListServices(ctx)
	if err != nil {
		return 0, 0
	}
	for _, s := range all {
		if s.State == api.ServiceRunning || s.State == api.ServiceStarting {
			running++
		}
	}
	return int64(len(all)), running
}

// publish opens the ports for a service, all or none.
func publish(ctx context.Context, sup *supervisor.Client, service string, wanted []api.PublishedPort) (opened []api.PublishedPort, err error) {
	for _, p := range wanted {
		if p.Host == "" {
			p.Host = "127.0.0.1"
		}
		p.Protocol = "tcp"
		port, err := sup.Publish(ctx, supervisor.PublishedPort{Host: p.Host, HostPort: p.HostPort, GuestPort: p.GuestPort, Service: service})
		if err != nil {
			unpublish(ctx, sup, opened)
			return nil, fmt.Errorf("publishing port %d of service %s: %w", p.GuestPort, service, err)
		}
		p.HostPort = port
		opened = append(opened, p)
	}
	return opened, nil
}

// unpublish closes ports. One that is closed already is what was wanted.
func unpublish(ctx context.Context, sup *supervisor.Client, ports []api.PublishedPort) {
	for _, p := range ports {
		_ = sup.Unpublish(context.WithoutCancel(ctx), supervisor.PublishedPort{Host: p.Host, HostPort: p.HostPort, GuestPort: p.GuestPort})
	}
}

// Services lists a workspace's services by name.
func (m *Manager) Services(ctx context.Context, ref string) ([]api.Service, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) ([]api.Service, error) {
		all, err := c.ListServices(ctx)
		out := []api.Service{}
		for _, s := range all {
			out = append(out, serviceOf(ws, s))
		}
		return out, err
	})
}

// Service says how one service is.
func (m *Manager) Service(ctx context.Context, ref, name string) (*api.Service, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.Service, error) {
		s, err := c.StatusService(ctx, name)
		if err != nil {
			return nil, err
		}
		out := serviceOf(ws, s)
		return &out, nil
	})
}

// StopService ends a service: TERM to all of it, then KILL. Its ports close.
func (m *Manager) StopService(ctx context.Context, ref, name string) (*api.Service, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.Service, error) {
		s, err := c.StopService(ctx, name, -1)
		if err != nil {
			return nil, err
		}
		sup, _ := m.guest(ws)
		unpublish(ctx, sup, ws.Published[name])
		out := serviceOf(ws, s)
		return &out, m.active(ctx, ws)
	})
}

// ServiceLogs returns a service's output: its last tail lines, nil for all that
// is kept.
func (m *Manager) ServiceLogs(ctx context.Context, ref, name string, tail *int64) (*api.ServiceLogs, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.ServiceLogs, error) {
		values, err := m.secretsOf(ws)
		if err != nil {
			return nil, err
		}
		l, err := c.LogsService(ctx, name, tail)
		if err != nil {
			return nil, err
		}
		set := redactions(values)
		return &api.ServiceLogs{
			Service: serviceOf(ws, l.Service), Stdout: set.String(l.Stdout), Stderr: set.String(l.Stderr),
			TailLines: l.TailLines, Truncated: l.Truncated,
		}, nil
	})
}

// FollowService writes a service's output as it comes, from the last tail lines
// on, until the service has ended, which is returned.
func (m *Manager) FollowService(ctx context.Context, ref, name string, tail *int64, stdout, stderr io.Writer) (*api.Service, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.Service, error) {
		values, err := m.secretsOf(ws)
		if err != nil {
			return nil, err
		}
		set := redactions(values)
		out, errOut := set.Writer(stdout), set.Writer(stderr)
		s, err := c.StreamLogs(ctx, name, tail, true, out, errOut)
		if err := errors.Join(err, out.Flush(), errOut.Flush()); err != nil {
			return nil, err
		}
		service := serviceOf(ws, s)
		return &service, nil
	})
}
