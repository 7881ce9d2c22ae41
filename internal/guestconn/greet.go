package guestconn

import (
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// A guest that dials its host says a token and hears one of two lines: that a new
// session begins, with the token for the next time, or that the one it has goes
// on.
const (
	beginWord    = "begin "
	continueLine = "continue"
)

// maxToken bounds a token, so that the line with it fits maxHandshake.
const maxToken = maxHandshake - len(beginWord) - 1

// GreetBegin tells a guest whose token was right that a session begins, and what
// to say when it dials next.
func GreetBegin(conn net.Conn, token string) error {
	return greet(conn, beginWord+token)
}

// GreetContinue tells a guest whose token was right that its session goes on.
func GreetContinue(conn net.Conn) error { return greet(conn, continueLine) }

func greet(conn net.Conn, line string) error {
	if _, err := io.WriteString(conn, line+"\n"); err != nil {
		return fmt.Errorf("greeting the guest agent: %w", err)
	}
	return nil
}

// ReadGreeting reads the host's answer to a token: the next token, or "" if the
// session goes on. It reads nothing behind it.
func ReadGreeting(conn net.Conn) (token string, err error) {
	line, err := readLine(conn, maxHandshake)
	if err != nil {
		return "", fmt.Errorf("reading the host's greeting: %w", err)
	}
	if line == continueLine {
		return "", nil
	}
	token, ok := strings.CutPrefix(line, beginWord)
	if !ok || token == "" || len(token) > maxToken {
		return "", api.Errorf(api.ErrDamaged, "the host says %q instead of a greeting", line)
	}
	return token, nil
}
