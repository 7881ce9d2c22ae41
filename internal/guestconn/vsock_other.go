//go:build !linux

package guestconn

import (
	"context"
	"net"

	"github.com/pyro-mcp/pyro/api"
)

// DialVsock is ErrUnsupported on this system.
func DialVsock(context.Context, uint32, uint32) (net.Conn, error) { return nil, vsockUnsupported() }

// ListenVsock is ErrUnsupported on this system.
func ListenVsock(uint32) (net.Listener, error) { return nil, vsockUnsupported() }

func vsockUnsupported() error {
	return api.Errorf(api.ErrUnsupported, "guest access over AF_VSOCK is not supported here: only Linux has it")
}
