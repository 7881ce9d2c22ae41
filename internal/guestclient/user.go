package guestclient

import (
	"context"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// usersProtocol is the version of the protocol that knows users.
const usersProtocol = 5

// userVersion is the protocol version that a request for a user needs. An agent
// that does not know users would run it as root.
func userVersion(user string) int {
	if user == "" {
		return 0
	}
	return usersProtocol
}

// OwnWorkspace makes /workspace, not what is in it, a user's: a name or number
// with an optional group. One that the guest does not have is ErrInvalid.
func (c *Client) OwnWorkspace(ctx context.Context, user string) error {
	req := guestproto.OwnWorkspace{Envelope: guestproto.Envelope{Action: guestproto.ActionOwnWorkspace, Version: usersProtocol}, User: user}
	var r guestproto.OwnWorkspaceReply
	return c.ask(ctx, "giving the workspace to its user", c.opts.Patience, req, &r, "uid", "gid")
}
