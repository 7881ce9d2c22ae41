package guestconn

import (
	"context"
	"net"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// An Address says where a guest can be reached. The first way that is set is
// taken: the engine's own stream, then the hybrid socket, then vsock.
type Address struct {
	// Dial is the engine's own way to a stream.
	Dial func(ctx context.Context) (net.Conn, error)
	// Socket is the path of a Unix socket with the hybrid vsock handshake.
	Socket string
	// CID is the guest's AF_VSOCK address; 0 means it has none.
	CID uint32
}

// Dial connects to the guest agent at a. An address without any way, or with
// AF_VSOCK alone on a host that lacks it, is ErrUnsupported with the reason.
func Dial(ctx context.Context, a Address) (net.Conn, error) {
	switch {
	case a.Dial != nil:
		return a.Dial(ctx)
	case a.Socket != "":
		return DialHybrid(ctx, a.Socket, guestproto.Port)
	case a.CID != 0:
		return DialVsock(ctx, a.CID, guestproto.Port)
	}
	return nil, api.WithHint(
		api.Errorf(api.ErrUnsupported, "guest access is not supported here: the machine has neither a guest socket nor a vsock address"),
		"start the workspace with an engine that gives one, such as qemu or gvisor")
}
