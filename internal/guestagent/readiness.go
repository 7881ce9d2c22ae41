package guestagent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestagent/process"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// attemptLimit bounds one attempt of a readiness check. A service that accepts
// and never answers is tried again.
const attemptLimit = 5 * time.Second

// A probe checks whether a service is ready.
type probe struct {
	runner   *process.Runner
	check    guestproto.Readiness
	spec     process.Spec // of the service: where and with what commands run
	root     string
	timeout  time.Duration
	interval time.Duration
}

// wait returns nil once the check succeeds. At the time limit it is ErrDeadline
// with what the last attempt met.
func (p *probe) wait(ctx context.Context) error {
	deadline := time.Now().Add(p.timeout)
	limited, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	var failed error
	for {
		attempt, cancelAttempt := context.WithTimeout(limited, attemptLimit)
		err := p.attempt(attempt)
		cancelAttempt()
		if err == nil {
			return nil
		}
		// An attempt that the time limit cut short tells less than the one
		// before. The clock decides: a dial gives up by the clock, and
		// limited.Err comes by a timer that may be later.
		if failed == nil || time.Now().Before(deadline) {
			failed = err
		}
		t := time.NewTimer(p.interval)
		select {
		case <-t.C:
		case <-limited.Done():
		}
		t.Stop()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case limited.Err() != nil:
			return api.Errorf(api.ErrDeadline, "it was not ready within %v: %v", p.timeout, failed)
		}
	}
}

func (p *probe) attempt(ctx context.Context) error {
	switch p.check.Type {
	case "file":
		return p.file()
	case "tcp":
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", p.check.Address)
		if err != nil {
			return err
		}
		return c.Close()
	case "http":
		return p.http(ctx)
	}
	return p.command(ctx)
}

func (p *probe) file() error {
	path := p.check.Path
	if filepath.IsAbs(path) {
		path = filepath.Join(p.root, path)
	} else {
		path = filepath.Join(p.spec.Dir, path)
	}
	_, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%s: %w", p.check.Path, errors.Unwrap(err))
	}
	return nil
}

// maxStatusLine bounds what is read of an HTTP answer.
const maxStatusLine = 4 << 10

// http asks for the URL and wants a status below 400. The whole of net/http
// would double the agent's size for this one line.
func (p *probe) http(ctx context.Context) error {
	u, err := url.Parse(p.check.URL)
	if err != nil {
		return err
	}
	address := u.Host
	if u.Port() == "" {
		address = net.JoinHostPort(u.Hostname(), "80")
	}
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	// Minimal by RFC 9112. RequestURI and Host escape what could end a line.
	request := "GET " + u.RequestURI() + " HTTP/1.1\r\nHost: " + u.Host + "\r\nUser-Agent: pyro\r\nAccept: */*\r\nConnection: close\r\n\r\n"
	if _, err := io.WriteString(c, request); err != nil {
		return err
	}
	line, err := bufio.NewReader(io.LimitReader(c, maxStatusLine)).ReadString('\n')
	if err != nil {
		return fmt.Errorf("reading the answer of %s: %w", p.check.URL, err)
	}
	words := strings.Fields(line)
	if len(words) < 2 || !strings.HasPrefix(words[0], "HTTP/") {
		return fmt.Errorf("%s does not answer in HTTP", p.check.URL)
	}
	if status, err := strconv.Atoi(words[1]); err != nil || status < 200 || status >= 400 {
		return fmt.Errorf("%s answers with status %.40s", p.check.URL, words[1])
	}
	return nil
}

// command runs a shell command and wants the status 0. All that it started is
// gone afterwards.
func (p *probe) command(ctx context.Context) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	spec := p.spec
	spec.Argv = []string{"/bin/sh", "-c", p.check.Command}
	spec.Files = [3]*os.File{null, null, null}
	cmd, err := p.runner.Start(spec)
	if err != nil {
		return err
	}
	defer cmd.Release()
	select {
	case <-cmd.Done():
	case <-ctx.Done():
		cmd.Kill()
		return fmt.Errorf("the command %q takes too long", p.check.Command)
	}
	cmd.Kill()
	if code := cmd.ExitCode(); code != 0 {
		return fmt.Errorf("the command %q ends with status %d", p.check.Command, code)
	}
	return nil
}
