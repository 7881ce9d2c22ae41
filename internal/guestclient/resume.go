package guestclient

import (
	"context"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// Resume tells the guest that time has passed without it. When it returns, the
// guest's clock is right and its random generator has a new key. An agent that
// is not a virtual machine's is ErrUnsupported.
func (c *Client) Resume(ctx context.Context, req guestproto.Resume) error {
	req.Action = guestproto.ActionResume
	if err := req.Check(); err != nil {
		return err
	}
	var r guestproto.ResumeReply
	if err := c.ask(ctx, "resuming the guest", c.opts.Patience, req, &r, "ok"); err != nil {
		return err
	}
	if !r.OK {
		return api.Errorf(api.ErrUnavailable, "resuming the guest: it declines")
	}
	return nil
}

// Suspend makes every command of the guest stand still until Resume.
func (c *Client) Suspend(ctx context.Context) error {
	req := guestproto.Envelope{Action: guestproto.ActionSuspend}
	var r guestproto.SuspendReply
	if err := c.ask(ctx, "suspending the guest", c.opts.Patience, req, &r, "ok"); err != nil {
		return err
	}
	if !r.OK {
		return api.Errorf(api.ErrUnavailable, "suspending the guest: it declines")
	}
	return nil
}
