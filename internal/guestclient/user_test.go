package guestclient_test

import (
	"context"
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// TestUserNeedsVersion: a request for a user says so in a way that an agent from
// before users refuses, instead of doing it as root.
func TestUserNeedsVersion(t *testing.T) {
	for _, tt := range []struct {
		want string
		call func(context.Context, *guestclient.Client) error
	}{
		{`{"action":"exec","stream":true,"version":5,"command":"x","user":"app:1000"}`, func(ctx context.Context, c *guestclient.Client) error {
			_, err := c.Exec(ctx, guestproto.ExecRequest{Command: "x", User: "app:1000"}, guestclient.ExecIO{})
			return err
		}},
		{`{"action":"exec","version":5,"command":"x","user":"app"}`, func(ctx context.Context, c *guestclient.Client) error {
			_, err := c.ExecPlain(ctx, guestproto.ExecRequest{Command: "x", User: "app"})
			return err
		}},
		{`{"action":"exec","stream":true,"command":"x"}`, func(ctx context.Context, c *guestclient.Client) error {
			_, err := c.Exec(ctx, guestproto.ExecRequest{Command: "x"}, guestclient.ExecIO{})
			return err
		}},
		{`{"action":"open_shell","version":5,"shell_id":"s","user":"app"}`, func(ctx context.Context, c *guestclient.Client) error {
			_, err := c.OpenShell(ctx, guestproto.OpenShell{ShellID: "s", User: "app"})
			return err
		}},
		{`{"action":"start_service","version":5,"service_name":"s","command":"x","user":"app"}`, func(ctx context.Context, c *guestclient.Client) error {
			_, err := c.StartService(ctx, guestproto.StartService{ServiceName: "s", Command: "x", User: "app"})
			return err
		}},
		{`{"action":"own_workspace","version":5,"user":"app"}`, func(ctx context.Context, c *guestclient.Client) error {
			return c.OwnWorkspace(ctx, "app")
		}},
	} {
		asked := make(chan string, 1)
		c := dialPeer(t, quick, func(_ net.Conn, request []byte) { asked <- string(request) })
		if err := tt.call(testContext(t), c); err == nil {
			t.Errorf("%s: a guest that hangs up is no error", tt.want)
		}
		if d := cmp.Diff(tt.want, <-asked); d != "" {
			t.Errorf("request (-want +got):\n%s", d)
		}
	}
}
