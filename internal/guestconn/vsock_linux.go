package guestconn

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// DialVsock connects to port of the guest with this context id. A host without
// vhost-vsock is ErrUnsupported with the reason; a guest that refuses is
// [ErrRefused].
func DialVsock(ctx context.Context, cid, port uint32) (net.Conn, error) {
	// A host's kernel may have AF_VSOCK and no transport to any guest.
	if _, err := os.Stat("/dev/vhost-vsock"); err != nil {
		return nil, vsockUnsupported("this host has no /dev/vhost-vsock")
	}
	type result struct {
		c   *vsock.Conn
		err error
	}
	done := make(chan result, 1)
	// Dial takes no context. The kernel gives up by itself after two seconds
	// (VSOCK_DEFAULT_CONNECT_TIMEOUT), so the goroutine ends soon.
	go func() {
		c, err := vsock.Dial(cid, port, nil)
		done <- result{c, err}
	}()
	select {
	case r := <-done:
		if r.err == nil {
			return r.c, nil
		}
		cause := rootCause(r.err)
		if errors.Is(r.err, unix.EAFNOSUPPORT) || errors.Is(r.err, unix.ENODEV) {
			return nil, vsockUnsupported(cause.Error())
		}
		return nil, fmt.Errorf("connecting to vsock %d:%d: %w (%w)", cid, port, ErrRefused, cause)
	case <-ctx.Done():
		go func() {
			if r := <-done; r.err == nil {
				_ = r.c.Close()
			}
		}()
		return nil, fmt.Errorf("connecting to vsock %d:%d: %w", cid, port, ctx.Err())
	}
}

// ListenVsock listens on port of AF_VSOCK in a guest. Without the transport it
// is ErrUnsupported with the reason.
func ListenVsock(port uint32) (net.Listener, error) {
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	if err != nil {
		return nil, vsockUnsupported(rootCause(err).Error())
	}
	return l, nil
}

func vsockUnsupported(why string) error {
	return api.WithHint(api.Errorf(api.ErrUnsupported, "guest access over AF_VSOCK is not supported here: %s", why),
		"load the module vhost_vsock, or use an engine that reaches its guest through a socket")
}
