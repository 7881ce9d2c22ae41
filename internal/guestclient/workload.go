package guestclient

import (
	"context"
	"fmt"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// OpenShell starts a shell on a terminal in the guest.
func (c *Client) OpenShell(ctx context.Context, req guestproto.OpenShell) (guestproto.Shell, error) {
	req.Action, req.Version = guestproto.ActionOpenShell, userVersion(req.User)
	var r guestproto.Shell
	if err := c.askShell(ctx, "opening a shell in the guest", req, &r, &r, req.ShellID); err != nil {
		return guestproto.Shell{}, err
	}
	return r, nil
}

// ReadShell reads a shell's output from a cursor on, and waits for it as the
// request says.
func (c *Client) ReadShell(ctx context.Context, req guestproto.ReadShell) (guestproto.ReadShellReply, error) {
	req.Action = guestproto.ActionReadShell
	const doing = "reading a shell in the guest"
	limit := c.opts.Patience
	if req.WaitMS > 0 || req.WaitForIdleMS > 0 {
		limit += guestproto.MaxShellWait
	}
	var r guestproto.ReadShellReply
	if err := c.askShellWithin(ctx, limit, doing, req, &r, &r.Shell, req.ShellID, "cursor", "next_cursor", "output"); err != nil {
		return guestproto.ReadShellReply{}, err
	}
	if r.Cursor < 0 || r.NextCursor < r.Cursor || r.MissedBytes < 0 {
		return guestproto.ReadShellReply{}, api.Errorf(api.ErrDamaged, "%s: the guest reports the cursors %d and %d", doing, r.Cursor, r.NextCursor)
	}
	return r, nil
}

// ResizeShell gives a shell's terminal another size.
func (c *Client) ResizeShell(ctx context.Context, req guestproto.ResizeShell) (guestproto.Shell, error) {
	req.Action = guestproto.ActionResizeShell
	var r guestproto.Shell
	if err := c.askShell(ctx, "resizing a shell in the guest", req, &r, &r, req.ShellID); err != nil {
		return guestproto.Shell{}, err
	}
	return r, nil
}

// ListShells returns the guest's shells, the oldest first, those that have ended
// by themselves included.
func (c *Client) ListShells(ctx context.Context) ([]guestproto.Shell, error) {
	const doing = "listing the shells in the guest"
	var r guestproto.ListShells
	req := struct{ guestproto.Envelope }{guestproto.Envelope{Action: guestproto.ActionListShells}}
	if err := c.ask(ctx, doing, c.opts.Patience, req, &r, "shells"); err != nil {
		return nil, err
	}
	if len(r.Shells) > guestproto.MaxShells {
		return nil, api.Errorf(api.ErrDamaged, "%s: the guest lists %d", doing, len(r.Shells))
	}
	for i := range r.Shells {
		if err := checkShell(&r.Shells[i], r.Shells[i].ShellID); err != nil {
			return nil, wrap(doing, err)
		}
	}
	return r.Shells, nil
}

// WriteShell types into a shell.
func (c *Client) WriteShell(ctx context.Context, req guestproto.WriteShell) (guestproto.WriteShellReply, error) {
	req.Action = guestproto.ActionWriteShell
	var r guestproto.WriteShellReply
	if err := c.askShell(ctx, "writing to a shell in the guest", req, &r, &r.Shell, req.ShellID, "input_length"); err != nil {
		return guestproto.WriteShellReply{}, err
	}
	return r, nil
}

// SignalShell sends a signal to a shell's foreground.
func (c *Client) SignalShell(ctx context.Context, req guestproto.SignalShell) (guestproto.SignalShellReply, error) {
	req.Action = guestproto.ActionSignalShell
	var r guestproto.SignalShellReply
	if err := c.askShell(ctx, "signalling a shell in the guest", req, &r, &r.Shell, req.ShellID, "signal"); err != nil {
		return guestproto.SignalShellReply{}, err
	}
	return r, nil
}

// CloseShell ends a shell.
func (c *Client) CloseShell(ctx context.Context, req guestproto.CloseShell) (guestproto.CloseShellReply, error) {
	req.Action = guestproto.ActionCloseShell
	var r guestproto.CloseShellReply
	if err := c.askShell(ctx, "closing a shell in the guest", req, &r, &r.Shell, req.ShellID, "closed"); err != nil {
		return guestproto.CloseShellReply{}, err
	}
	return r, nil
}

// askShell asks and checks that the answer is about the shell asked for.
func (c *Client) askShell(ctx context.Context, doing string, req, reply any, shell *guestproto.Shell, id string, required ...string) error {
	return c.askShellWithin(ctx, c.opts.Patience, doing, req, reply, shell, id, required...)
}

func (c *Client) askShellWithin(ctx context.Context, limit time.Duration, doing string, req, reply any, shell *guestproto.Shell, id string, required ...string) error {
	if err := c.ask(ctx, doing, limit, req, reply, append(required, "shell_id", "state")...); err != nil {
		return err
	}
	return wrap(doing, checkShell(shell, id))
}

func checkShell(shell *guestproto.Shell, id string) error {
	switch {
	case shell.ShellID != id || guestproto.CheckWorkloadName(id) != nil:
		return api.Errorf(api.ErrDamaged, "the guest answers for another shell")
	case shell.State != "running" && shell.State != "stopped":
		return api.Errorf(api.ErrDamaged, "the guest reports an unknown state")
	}
	return nil
}

// StartService starts a service and waits until it is ready, fails or the
// request's ready time is over.
func (c *Client) StartService(ctx context.Context, req guestproto.StartService) (guestproto.Service, error) {
	req.Action, req.Version = guestproto.ActionStartService, userVersion(req.User)
	const doing = "starting a service in the guest"
	ready, err := req.ReadyTimeout()
	if err != nil {
		return guestproto.Service{}, fmt.Errorf("%s: %w", doing, err)
	}
	var r guestproto.Service
	// One that does not become ready is ended before the answer.
	if err := c.askService(ctx, doing, ready+execSlack+c.opts.Patience, req, &r, &r, req.ServiceName); err != nil {
		return guestproto.Service{}, err
	}
	return r, nil
}

// StatusService says how a service is.
func (c *Client) StatusService(ctx context.Context, name string) (guestproto.Service, error) {
	return c.namedService(ctx, "asking for a service in the guest", guestproto.ActionStatusService, name)
}

// StopService stops a service and returns when it is gone. A grace below 0 is the
// guest's default.
func (c *Client) StopService(ctx context.Context, name string, grace time.Duration) (guestproto.Service, error) {
	const doing = "stopping a service in the guest"
	req := guestproto.StopService{Envelope: guestproto.Envelope{Action: guestproto.ActionStopService}, ServiceName: name}
	if grace >= 0 {
		ms := grace.Milliseconds()
		req.GraceMS = &ms
	}
	limit, err := req.Grace()
	if err != nil {
		return guestproto.Service{}, fmt.Errorf("%s: %w", doing, err)
	}
	var r guestproto.Service
	if err := c.askService(ctx, doing, limit+execSlack+c.opts.Patience, req, &r, &r, name); err != nil {
		return guestproto.Service{}, err
	}
	return r, nil
}

// ListServices returns the guest's services by name, those that have ended
// included.
func (c *Client) ListServices(ctx context.Context) ([]guestproto.Service, error) {
	const doing = "listing the services in the guest"
	var r guestproto.ListServices
	req := struct{ guestproto.Envelope }{guestproto.Envelope{Action: guestproto.ActionListServices}}
	if err := c.ask(ctx, doing, c.opts.Patience, req, &r, "services"); err != nil {
		return nil, err
	}
	if len(r.Services) > guestproto.MaxServices {
		return nil, api.Errorf(api.ErrDamaged, "%s: the guest lists %d", doing, len(r.Services))
	}
	for i := range r.Services {
		if err := checkService(&r.Services[i], r.Services[i].ServiceName); err != nil {
			return nil, wrap(doing, err)
		}
	}
	return r.Services, nil
}

// LogsService reads a service's output; tail nil means all that is kept.
func (c *Client) LogsService(ctx context.Context, name string, tail *int64) (guestproto.ServiceLogs, error) {
	req := guestproto.LogsService{
		Envelope:    guestproto.Envelope{Action: guestproto.ActionLogsService},
		ServiceName: name,
		TailLines:   tail,
	}
	var r guestproto.ServiceLogs
	if err := c.askService(ctx, "reading a service's log in the guest", c.opts.Patience, req, &r, &r.Service, name, "stdout", "stderr"); err != nil {
		return guestproto.ServiceLogs{}, err
	}
	return r, nil
}

func (c *Client) namedService(ctx context.Context, doing, action, name string) (guestproto.Service, error) {
	req := guestproto.NamedService{Envelope: guestproto.Envelope{Action: action}, ServiceName: name}
	var r guestproto.Service
	if err := c.askService(ctx, doing, c.opts.Patience, req, &r, &r, name); err != nil {
		return guestproto.Service{}, err
	}
	return r, nil
}

func (c *Client) askService(ctx context.Context, doing string, limit time.Duration, req, reply any, service *guestproto.Service, name string, required ...string) error {
	if err := c.ask(ctx, doing, limit, req, reply, append(required, "service_name", "state")...); err != nil {
		return err
	}
	return wrap(doing, checkService(service, name))
}

func checkService(service *guestproto.Service, name string) error {
	if service.ServiceName != name || guestproto.CheckWorkloadName(name) != nil {
		return api.Errorf(api.ErrDamaged, "the guest answers for another service")
	}
	switch service.State {
	case "starting", "running", "exited", "stopped", "failed":
		return nil
	}
	return api.Errorf(api.ErrDamaged, "the guest reports an unknown state")
}

// wrap says what was being done, unless err is nil.
func wrap(doing string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", doing, err)
}
