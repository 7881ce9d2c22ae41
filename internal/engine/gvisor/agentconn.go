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
	"sync"
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

// The bounds on what may connect in the guest agent's place. Before a machine's
// first answer the agent is its only process; later any of them may try, and hold
// a connection without a word.
const (
	maxStrangers = 64
	tokenTimeout = 10 * time.Second
)

// acceptAgent takes the first connection that begins with the token. Others are
// looked at meanwhile; of too many the oldest is given up, because the agent says
// its token at once. It closes l in every case: nothing that starts in the guest
// later finds a socket to dial.
func acceptAgent(ctx context.Context, l net.Listener, token string, logger *slog.Logger) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // which ends all that are being looked at
	found := make(chan net.Conn)
	go func() {
		defer close(found)
		var looks sync.WaitGroup
		defer looks.Wait()
		var strangers []context.CancelFunc
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			look, giveUp := context.WithTimeout(ctx, tokenTimeout)
			if strangers = append(strangers, giveUp); len(strangers) > maxStrangers {
				strangers[0]()
				strangers = strangers[1:]
			}
			looks.Go(func() {
				defer giveUp()
				if err := readToken(look, conn, token); err != nil {
					logger.Debug("refusing a connection that is not the guest agent's", "err", err)
					conn.Close()
					return
				}
				select {
				case found <- conn:
				case <-ctx.Done():
					conn.Close()
				}
			})
		}
	}()
	defer l.Close()
	select {
	case conn, ok := <-found:
		if ok {
			return conn, nil
		}
		return nil, api.Errorf(api.ErrUnavailable, "waiting for the guest agent: its socket was closed")
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for the guest agent: %w", ctx.Err())
	}
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
	if !stop() {
		return ctx.Err()
	}
	return nil
}
