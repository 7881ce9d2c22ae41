package guestclient

import (
	"context"
	"crypto/rand"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// NewResume returns what to tell a guest of that name that goes on now. Whether it
// is a copy is the caller's to say.
func NewResume(hostname string) (guestproto.Resume, error) {
	r := guestproto.Resume{
		Envelope: guestproto.Envelope{Action: guestproto.ActionResume},
		Hostname: hostname, Entropy: make([]byte, 64),
	}
	if _, err := rand.Read(r.Entropy); err != nil {
		return r, api.Errorf(api.ErrInternal, "drawing entropy for the guest: %w", err)
	}
	r.TimeNS = time.Now().UnixNano()
	return r, nil
}

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
