package gvisor

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestconn"
)

// newToken returns the word by which the guest agent is told from any other
// process in the guest: 128 random bits as hex.
func newToken() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails, crypto/rand
	return hex.EncodeToString(b)
}

// listen returns a listener on the guest agent's socket, made anew. It runs in the
// namespace. Closing the listener leaves the socket's file: whoever does that sees
// other mounts.
func (s stage) listen() (net.Listener, error) {
	if err := os.Remove(s.agentSocket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listening for the guest agent: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.agentSocket(), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listening for the guest agent: %w", err)
	}
	l.SetUnlinkOnClose(false)
	return l, nil
}

// The bounds on what may connect before the guest agent has: it is the guest's
// only process then, so anything else is a fault.
const (
	maxStrangers = 16
	tokenTimeout = 10 * time.Second
)

// acceptAgent takes the first connection that begins with the token. It closes l
// in every case: nothing that starts in the guest later finds a socket to dial.
func acceptAgent(ctx context.Context, l net.Listener, token string, logger *slog.Logger) (net.Conn, error) {
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for range maxStrangers {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return nil, fmt.Errorf("waiting for the guest agent: %w", err)
		}
		if err := readToken(ctx, conn, token); err != nil {
			logger.Warn("refusing a connection that is not the guest agent's", "err", err)
			conn.Close()
			continue
		}
		return conn, nil
	}
	return nil, api.Errorf(api.ErrUnavailable, "waiting for the guest agent: %d connections came without its token", maxStrangers)
}

// begin waits for the guest agent and makes its connection the first of the
// machine's session. It closes l.
func (m *machine) begin(ctx context.Context, l net.Listener, token string) error {
	conn, err := acceptAgent(ctx, l, token, m.logger)
	if err != nil {
		return err
	}
	m.token = newToken()
	if err := guestconn.GreetBegin(conn, m.token); err != nil {
		conn.Close()
		return err
	}
	m.pipe = guestconn.NewSplicedPipe(conn, guestconn.Host)
	m.mux, err = guestconn.NewMux(ctx, m.pipe, guestconn.Host)
	return err
}

// readToken reads exactly the token and its newline, not a byte more.
func readToken(ctx context.Context, conn net.Conn, token string) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := conn.SetReadDeadline(time.Now().Add(tokenTimeout)); err != nil {
		return err
	}
	want := []byte(token + "\n")
	got := make([]byte, len(want))
	for n := 0; n < len(got); {
		m, err := conn.Read(got[n:])
		if err != nil {
			return fmt.Errorf("reading the token: %w", err)
		}
		n += m
	}
	if subtle.ConstantTimeCompare(got, want) != 1 {
		return errors.New("wrong token")
	}
	return conn.SetReadDeadline(time.Time{})
}
