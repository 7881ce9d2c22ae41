package guestclient

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// A Stream is a connection to the guest that a request has turned into something
// else. Its bytes are the guest's: whatever they claim, they are bounded by
// nothing. The caller closes it.
type Stream struct {
	net.Conn
	r *bufio.Reader
}

// Read reads what the guest sends.
func (s *Stream) Read(b []byte) (int, error) { return s.r.Read(b) }

// CloseWrite ends the data to the guest, which may go on sending.
func (s *Stream) CloseWrite() error {
	w, ok := s.Conn.(interface{ CloseWrite() error })
	if !ok {
		return api.Errorf(api.ErrUnsupported, "the connection to the guest cannot be closed in one direction")
	}
	return w.CloseWrite()
}

// stream lets go of the link; ctx no longer ends it.
func (l *link) stream() (*Stream, error) {
	if !l.stop() {
		return nil, net.ErrClosed // ctx has just ended
	}
	_ = l.conn.SetDeadline(time.Time{})
	return &Stream{Conn: l.conn, r: l.r}, nil
}

// DialTCP connects to a port of the guest's loopback. ctx bounds the connecting
// only. A port on which nobody listens is ErrUnavailable.
func (c *Client) DialTCP(ctx context.Context, port int) (*Stream, error) {
	req := guestproto.DialTCP{Envelope: guestproto.Envelope{Action: guestproto.ActionDialTCP}, Port: port}
	s, err := c.dialTCP(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("connecting to port %d of the guest: %w", port, err)
	}
	return s, nil
}

func (c *Client) dialTCP(ctx context.Context, req guestproto.DialTCP) (*Stream, error) {
	l, err := c.open(ctx, req)
	if err != nil {
		return nil, err
	}
	_ = l.conn.SetReadDeadline(time.Now().Add(l.patience))
	line, err := guestproto.ReadLine(l.r, guestproto.MaxHeaderLine)
	if err != nil {
		l.close()
		return nil, l.cause(ctx, err)
	}
	var r guestproto.DialTCPReply
	if err := guestproto.DecodeReply(line, &r, "address"); err != nil {
		l.close()
		return nil, err
	}
	s, err := l.stream()
	if err != nil {
		l.close()
		return nil, l.cause(ctx, err)
	}
	return s, nil
}

// AttachNetwork gives the guest a network device, whose packets travel over the
// stream as guestproto.FramePackets. ctx bounds the making only; the device ends
// with the stream.
func (c *Client) AttachNetwork(ctx context.Context, req guestproto.AttachNetwork) (*Stream, error) {
	req.Action, req.Stream = guestproto.ActionAttachNetwork, true
	s, err := c.attachNetwork(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("giving the guest a network: %w", err)
	}
	return s, nil
}

func (c *Client) attachNetwork(ctx context.Context, req guestproto.AttachNetwork) (*Stream, error) {
	if err := req.Check(); err != nil {
		return nil, err
	}
	l, err := c.open(ctx, req)
	if err != nil {
		return nil, err
	}
	if err := l.readAttached(); err != nil {
		l.close()
		return nil, l.cause(ctx, err)
	}
	s, err := l.stream()
	if err != nil {
		l.close()
		return nil, l.cause(ctx, err)
	}
	return s, nil
}

// readAttached reads the answer to an AttachNetwork and nothing of what follows.
func (l *link) readAttached() error {
	kind, payload, err := newFrames(l).next(l.patience)
	if err != nil {
		return err
	}
	switch kind {
	case guestproto.FrameHeader:
		var a guestproto.AttachedNetwork
		return guestproto.Decode(payload, &a, "device")
	case guestproto.FrameError:
		return remoteError(payload)
	}
	return unexpectedFrame(kind)
}
