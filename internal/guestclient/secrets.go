package guestclient

import (
	"context"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// SetSecrets gives the guest its secrets in place of those that it has. It
// reports whether the guest keeps them as files.
func (c *Client) SetSecrets(ctx context.Context, secrets map[string][]byte) (stored bool, err error) {
	req := guestproto.SetSecrets{Envelope: guestproto.Envelope{Action: guestproto.ActionSetSecrets, Version: 4}, Secrets: secrets}
	var r guestproto.SetSecretsReply
	if err := c.ask(ctx, "giving the guest its secrets", c.opts.Patience, req, &r, "stored"); err != nil {
		return false, err
	}
	return r.Stored, nil
}
