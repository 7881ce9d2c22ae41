package guestagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestagent/network"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// attachNetwork makes the guest's network device and carries its packets until
// the caller hangs up.
func (q *request) attachNetwork(ctx context.Context, line []byte) error {
	var req guestproto.AttachNetwork
	if err := decodeRequest(line, &req, "mtu", "addresses"); err != nil {
		return err
	}
	s := q.server
	switch {
	case !s.OwnNetwork:
		return api.Errorf(api.ErrUnsupported, "this guest agent has no network of its own")
	case !q.stream:
		return api.Errorf(api.ErrInvalid, "a network needs the streaming form")
	}
	// The device of a caller that is just being noticed as gone goes first.
	select {
	case s.attached <- struct{}{}:
	case <-time.After(attachWait):
		return api.Errorf(api.ErrBusy, "the guest has a network already")
	case <-ctx.Done():
		return errGone
	}
	defer func() { <-s.attached }()
	device, err := network.Open(req)
	if err != nil {
		return err
	}
	defer device.Close()
	header, err := guestproto.Encode(guestproto.AttachedNetwork{Device: device.Name()})
	if err != nil {
		return err
	}
	if err := q.frame(guestproto.FrameHeader, header[:len(header)-1]); err != nil {
		return err
	}
	q.gone = true // what follows are packets; an end is just that
	sent := make(chan error, 1)
	go func() {
		err := device.Send(q.conn)
		_ = q.conn.SetDeadline(time.Unix(1, 0)) // which ends the receiving
		sent <- err
	}()
	err = device.Receive(guestproto.NewFrameReader(q.r))
	_ = q.conn.SetDeadline(time.Unix(1, 0))
	device.Close()
	serr := <-sent
	if !errors.Is(err, io.EOF) && ctx.Err() == nil {
		s.Logger.Warn("the network has ended", "receiving", err, "sending", serr)
	}
	return nil
}

// attachWait is how long a new caller waits for the network of an older one.
const attachWait = 5 * time.Second

// dialTimeout bounds a connection over the loopback, which waits only for a
// program whose queue is full.
const dialTimeout = 10 * time.Second

// dialTCP connects the caller to a port of the guest's loopback.
func (q *request) dialTCP(ctx context.Context, line []byte) error {
	var req guestproto.DialTCP
	if err := decodeRequest(line, &req, "port"); err != nil {
		return err
	}
	if req.Port < 1 || req.Port > 65535 {
		return api.Errorf(api.ErrInvalid, "the port %d is not between 1 and 65535", req.Port)
	}
	if q.stream {
		return api.Errorf(api.ErrInvalid, "a connection to a port has no streaming form")
	}
	conn, err := dialLoopback(ctx, req.Port)
	if err != nil {
		return api.Errorf(api.ErrUnavailable, "connecting to port %d in the guest: %w", req.Port, err)
	}
	defer conn.Close()
	reply, err := guestproto.Encode(guestproto.DialTCPReply{Address: conn.RemoteAddr().String()})
	if err != nil {
		return err
	}
	if _, err := q.conn.Write(reply); err != nil {
		q.gone = true
		return nil
	}
	q.gone = true // whatever follows is the two peers' business
	q.relay(ctx, conn)
	return nil
}

// dialLoopback tries the two loopback addresses, because a server may listen on
// either alone.
func dialLoopback(ctx context.Context, port int) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	var errs []error
	for _, host := range []string{"127.0.0.1", "::1"} {
		c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err == nil {
			return c.(*net.TCPConn), nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errs[0]
}

// relay joins the caller and conn until both directions have ended. An end of
// data becomes one on the other side, a fault ends both.
func (q *request) relay(ctx context.Context, conn *net.TCPConn) {
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	abort := func() {
		_ = conn.SetLinger(0) // a reset, not an end
		_ = conn.Close()
		_ = q.conn.SetDeadline(time.Unix(1, 0))
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := copyChunks(conn, q.r); err != nil || conn.CloseWrite() != nil {
			abort()
		}
	})
	wg.Go(func() {
		if err := copyChunks(q.conn, conn); err != nil || !q.hangUp() {
			abort()
		}
	})
	wg.Wait()
}

// relayChunk is small because hundreds of connections may wait with one each.
const relayChunk = 16 << 10

var relayChunks = sync.Pool{New: func() any { return new([relayChunk]byte) }}

// copyChunks copies to the end of from.
func copyChunks(to io.Writer, from io.Reader) error {
	buf := relayChunks.Get().(*[relayChunk]byte)
	defer relayChunks.Put(buf)
	for {
		n, err := from.Read(buf[:])
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				return fmt.Errorf("passing data on: %w", werr)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
