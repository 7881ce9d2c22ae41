package guestconn

import "github.com/pyro-mcp/pyro/api"

// The two ways in which a guest does not answer. Both belong to
// api.ErrUnavailable; a caller tells them apart because only the first means
// that the machine's process is gone.
var (
	// ErrNobody means nobody listens on the host's socket.
	ErrNobody = api.Errorf(api.ErrUnavailable, "nobody listens there")
	// ErrRefused means the host's side answered and could not reach the port
	// in the guest: the guest agent is not up yet, or no more.
	ErrRefused = api.Errorf(api.ErrUnavailable, "the guest does not answer")
)
