package workspace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// Services live in the guest, as shells do; their ports in the supervisor.

func serviceOf(ws *store.Workspace, s guestproto.Service) api.Service {
	out := api.Service{
		WorkspaceID: ws.WorkspaceID, ServiceName: s.ServiceName, Command: s.Command, Cwd: validText(s.Cwd), State: s.State,
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
	user, err := userOf(ws, req.User)
	if err != nil {
		return nil, err
	}
	env, set, err := m.environ(ws, req.Env, req.SecretEnv)
	if err != nil {
		return nil, err
	}
	start := guestproto.StartService{
		ServiceName: name, Command: commandText(req.Argv), Cwd: inWorkspace(req.Cwd), Env: env, User: user, Restart: req.Restart,
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
