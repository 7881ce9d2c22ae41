package guestclient_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

var attachRequest = guestproto.AttachNetwork{MTU: 1500, Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.2/24")}}

func dialPort(ctx context.Context, c *guestclient.Client) (*guestclient.Stream, error) {
	return c.DialTCP(ctx, 80)
}

func attachNetwork(ctx context.Context, c *guestclient.Client) (*guestclient.Stream, error) {
	return c.AttachNetwork(ctx, attachRequest)
}

func init() {
	for name, open := range map[string]func(context.Context, *guestclient.Client) (*guestclient.Stream, error){
		"dial_tcp": dialPort, "attach_network": attachNetwork,
	} {
		calls[name] = func(ctx context.Context, c *guestclient.Client) error {
			s, err := open(ctx, c)
			if err == nil {
				s.Close()
			}
			return err
		}
	}
}

// A stream begins with the byte after the answer and has no time limit, also
// when the context that opened it has ended.
func TestStream(t *testing.T) {
	for _, test := range []struct {
		name, answer string
		open         func(context.Context, *guestclient.Client) (*guestclient.Stream, error)
	}{
		{"DialTCP", `{"address":"127.0.0.1:80"}` + "\n", dialPort},
		{"AttachNetwork", frame(guestproto.FrameHeader, `{"device":"eth0"}`), attachNetwork},
	} {
		t.Run(test.name, func(t *testing.T) {
			release := make(chan struct{})
			c := dialPeer(t, quick, func(c net.Conn, _ []byte) {
				_, _ = io.WriteString(c, test.answer+"first")
				<-release
				time.Sleep(2 * quick.Patience) // what is being tested is that nothing happens
				_, _ = io.WriteString(c, " last")
				_ = c.(*net.UnixConn).CloseWrite()
				got, err := io.ReadAll(c)
				if err != nil || string(got) != "from the host" {
					t.Errorf("the guest reads %q, %v", got, err)
				}
			})
			ctx, cancel := context.WithCancel(testContext(t))
			s, err := test.open(ctx, c)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			cancel()
			close(release)
			if _, err := io.WriteString(s, "from the host"); err != nil {
				t.Error(err)
			}
			if err := s.CloseWrite(); err != nil {
				t.Error(err)
			}
			if got, err := io.ReadAll(s); err != nil || string(got) != "first last" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

func TestStreamRefused(t *testing.T) {
	for _, test := range []struct {
		name, answer string
		open         func(context.Context, *guestclient.Client) (*guestclient.Stream, error)
		class        error
	}{
		{"DialError", `{"error":"nobody listens","code":"unavailable"}` + "\n", dialPort, api.ErrUnavailable},
		{"DialOldAgent", `{"error":"the guest agent does not know the action","code":"unsupported"}` + "\n", dialPort, api.ErrUnsupported},
		{"DialLongLine", strings.Repeat("x", guestproto.MaxHeaderLine+1), dialPort, api.ErrDamaged},
		{"AttachError", frame(guestproto.FrameError, `{"code":"unsupported","message":"no device"}`), attachNetwork, api.ErrUnsupported},
		{"AttachPlain", `{"error":"no","code":"busy"}` + "\n", attachNetwork, api.ErrBusy},
		{"AttachPacketsFirst", frame(guestproto.FramePackets, "\x00\x01a"), attachNetwork, api.ErrDamaged},
		{"AttachNoDevice", frame(guestproto.FrameHeader, `{}`), attachNetwork, api.ErrDamaged},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := test.open(testContext(t), dialPeer(t, quick, says(test.answer))); !errors.Is(err, test.class) {
				t.Errorf("got %v", err)
			}
		})
	}
	t.Run("AttachNonsense", func(t *testing.T) {
		c := guestclient.New(func(context.Context) (net.Conn, error) { panic("dialled") }, quick)
		if _, err := c.AttachNetwork(testContext(t), guestproto.AttachNetwork{}); !errors.Is(err, api.ErrInvalid) {
			t.Errorf("got %v", err)
		}
	})
}
