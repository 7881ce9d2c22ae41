// Package guestclient is the host's side of the guest protocol. A Client asks a
// guest agent for commands, archives, shells and services, each over a
// connection of its own that the given dialer opens.
//
// The guest is hostile: it may have replaced the agent and answer itself. So
// nothing is allocated from a length that it sends, every reply is decoded
// strictly and bounded, and what it claims (exit codes, sizes, counts) comes
// back as a claim that no decision of the host's safety may rest on.
//
// Time: a ctx that ends closes the connection, which ends the request in the
// guest too. Apart from that each reply, frame, or piece of an archive must be
// complete within Options.Patience of its first byte, while a quiet guest
// between frames is waited for as long as the command may run.
package guestclient

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// A Dialer opens one connection to the guest agent.
type Dialer func(ctx context.Context) (net.Conn, error)

// Options changes a Client's bounds; zero fields mean the defaults.
type Options struct {
	// Patience is how long the guest may take for one answer or one piece of
	// it. Default 60 s; emulated guests want more.
	Patience time.Duration
	// MaxArchive caps the bytes of an exported archive. Default 64 GiB.
	MaxArchive int64
}

const (
	defaultPatience   = 60 * time.Second
	defaultMaxArchive = 64 << 30
	// progress is how much of an archive must arrive within Patience for the
	// guest to get more time; one that drips slower is given up.
	progress = 4 << 10
)

// A Client talks to one guest. It keeps no connection between requests; its
// methods may be called concurrently.
type Client struct {
	dial Dialer
	opts Options
}

// New returns a client that reaches its guest through dial.
func New(dial Dialer, opts Options) *Client {
	if opts.Patience <= 0 {
		opts.Patience = defaultPatience
	}
	if opts.MaxArchive <= 0 {
		opts.MaxArchive = defaultMaxArchive
	}
	return &Client{dial: dial, opts: opts}
}

// Hello asks the agent who it is, and fails with ErrUnsupported and both
// numbers when it speaks an older protocol than this build needs.
func (c *Client) Hello(ctx context.Context) (guestproto.Hello, error) {
	var h guestproto.Hello
	req := struct {
		guestproto.Envelope
	}{guestproto.Envelope{Action: guestproto.ActionHello}}
	if err := c.ask(ctx, "greeting the guest agent", c.opts.Patience, req, &h, "protocol"); err != nil {
		return guestproto.Hello{}, err
	}
	if err := checkHello(&h); err != nil {
		return guestproto.Hello{}, fmt.Errorf("greeting the guest agent: %w", err)
	}
	return h, nil
}

// oldestProtocol is the lowest version of the protocol that this package can
// talk to.
const oldestProtocol = 1

// maxHelloText bounds each text in a hello, maxCapabilities their number.
const (
	maxHelloText    = 256
	maxCapabilities = 64
)

func checkHello(h *guestproto.Hello) error {
	if h.Protocol < oldestProtocol {
		return api.WithHint(api.Errorf(api.ErrUnsupported,
			"the guest agent speaks protocol version %d, this pyro needs at least %d", h.Protocol, oldestProtocol),
			"install pyro and pyro-agent of the same release, then start the workspace anew")
	}
	texts := append([]string{h.AgentVersion, h.BootID, h.Kernel}, h.Capabilities...)
	if len(texts) > maxCapabilities+3 {
		return api.Errorf(api.ErrDamaged, "the guest lists %d capabilities", len(h.Capabilities))
	}
	for _, text := range texts {
		if len(text) > maxHelloText {
			return api.Errorf(api.ErrDamaged, "the guest's hello holds a text of %d bytes", len(text))
		}
	}
	return nil
}

// Shutdown asks the guest to stop its workload within grace, flush its disks
// and power off. It returns when the agent has agreed, not when it is done.
func (c *Client) Shutdown(ctx context.Context, grace time.Duration) error {
	req := guestproto.Shutdown{
		Envelope: guestproto.Envelope{Action: guestproto.ActionShutdown},
		GraceMS:  grace.Milliseconds(),
	}
	var r guestproto.ShutdownReply
	if err := c.ask(ctx, "asking the guest to shut down", c.opts.Patience, req, &r, "ok"); err != nil {
		return err
	}
	if !r.OK {
		return api.Errorf(api.ErrUnavailable, "asking the guest to shut down: it declines")
	}
	return nil
}

// ask sends one request in the plain form and decodes the one reply, which
// must arrive within limit.
func (c *Client) ask(ctx context.Context, doing string, limit time.Duration, req, reply any, required ...string) error {
	l, err := c.open(ctx, req)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	defer l.close()
	_ = l.conn.SetReadDeadline(time.Now().Add(limit))
	if err := l.readReply(reply, required...); err != nil {
		return fmt.Errorf("%s: %w", doing, l.cause(ctx, err))
	}
	return nil
}

// A link is one connection with its request sent.
type link struct {
	conn     net.Conn
	r        *bufio.Reader
	patience time.Duration
	stop     func() bool
}

// open dials and sends the request line. The connection is closed when ctx
// ends, or by close.
func (c *Client) open(ctx context.Context, req any) (*link, error) {
	line, err := guestproto.Encode(req)
	if err != nil {
		return nil, err
	}
	if len(line) > guestproto.MaxLine {
		return nil, api.WithHint(
			api.Errorf(api.ErrInvalid, "the request has %d bytes, the limit is %d", len(line), guestproto.MaxLine),
			"pass large data on stdin or as a file")
	}
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	l := &link{conn: conn, patience: c.opts.Patience}
	l.stop = context.AfterFunc(ctx, func() { _ = conn.Close() })
	l.r = bufio.NewReaderSize(conn, 32<<10)
	if err := l.write(line); err != nil {
		// The guest may have answered and hung up without reading it all.
		_ = conn.SetReadDeadline(time.Now().Add(time.Second))
		if early := l.earlyError(); early != nil {
			err = early
		}
		l.close()
		return nil, fmt.Errorf("sending the request: %w", l.cause(ctx, err))
	}
	return l, nil
}

func (l *link) close() {
	l.stop()
	_ = l.conn.Close()
}

// write sends b; a guest that takes nothing for Patience is an error.
func (l *link) write(b []byte) error {
	_ = l.conn.SetWriteDeadline(time.Now().Add(l.patience))
	_, err := l.conn.Write(b)
	return err
}

// readReply reads to the connection's end, bounded, and decodes it. The deadline
// that is set holds for the first byte; the rest must follow within patience.
func (l *link) readReply(reply any, required ...string) error {
	if _, err := l.r.Peek(1); err == nil {
		_ = l.conn.SetReadDeadline(time.Now().Add(l.patience))
	}
	data, err := io.ReadAll(io.LimitReader(l.r, guestproto.MaxReply+1))
	if len(data) > guestproto.MaxReply {
		return api.Errorf(api.ErrDamaged, "the guest's reply is longer than %d bytes", guestproto.MaxReply)
	}
	// A guest that hangs up with bytes of ours unread resets the connection; if
	// its answer is whole, that is as good an end as any.
	if err != nil && !hungUp(err) {
		return err
	}
	return guestproto.DecodeReply(data, reply, required...)
}

// earlyError returns the error that the guest has sent instead of reading on,
// or nil.
func (l *link) earlyError() error {
	data, _ := io.ReadAll(io.LimitReader(l.r, guestproto.MaxHeaderLine))
	var none struct{}
	err := guestproto.DecodeReply(data, &none)
	if errors.Is(err, api.ErrDamaged) {
		return nil
	}
	return err
}

// cause turns what a read or write met into the reason that the caller should
// read: a context that ended, a time limit, or a guest that hung up.
func (l *link) cause(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return api.WithHint(
			api.Errorf(api.ErrDeadline, "the guest did not complete its answer in time"),
			"the guest may be overloaded or its agent replaced; stop and start the workspace if this persists")
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return api.Errorf(api.ErrUnavailable, "the guest hung up in the middle of its answer")
	case api.Code(err) == api.Code(api.ErrInternal) && !errors.Is(err, api.ErrInternal):
		return api.Errorf(api.ErrUnavailable, "the connection to the guest broke: %w", err)
	}
	return err
}
