package supervisor

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

const guestPort = guestproto.Port

// The control API. curl --unix-socket control.sock http://pyro/v1/status works.
const (
	pathStatus  = "/v1/status"
	pathConsole = "/v1/console"
	pathStop    = "/v1/stop"
)

func (s *supervisor) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pathStatus, func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		status := s.status
		s.mu.Unlock()
		writeJSON(w, http.StatusOK, status)
	})
	mux.HandleFunc("GET "+pathConsole, func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, s.console.Tail(50))
	})
	mux.HandleFunc("POST "+pathStop, func(w http.ResponseWriter, _ *http.Request) {
		s.cancel(errStopped)
		writeJSON(w, http.StatusAccepted, struct{}{})
	})
	return mux
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

// inherited returns the listening socket with that descriptor. Only the user
// that runs the supervisor, and root, may connect: the directory's mode says so
// already, and this holds where somebody widened it.
func inherited(fd uintptr) (net.Listener, error) {
	f := os.NewFile(fd, "listener")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("taking over the inherited socket: %w", err)
	}
	return ownerListener{l}, nil
}

type ownerListener struct{ net.Listener }

func (l ownerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if uc, ok := c.(*net.UnixConn); ok && peerAllowed(uc) {
			return uc, nil
		}
		c.Close()
	}
}

func peerAllowed(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	if raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}) != nil || err != nil {
		return false
	}
	return cred.Uid == 0 || int(cred.Uid) == os.Geteuid()
}

// A Client talks to the supervisor of one machine. Making one contacts nobody.
// A supervisor that is gone is api.ErrUnavailable.
type Client struct {
	dir  statedir.Machine
	http *http.Client
}

// NewClient returns a client for the machine in dir.
func NewClient(dir statedir.Machine) *Client {
	return &Client{dir: dir, http: &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			Proxy:                  nil, // never through somebody's HTTP_PROXY
			DisableKeepAlives:      true,
			DisableCompression:     true,
			MaxResponseHeaderBytes: 16 << 10,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return guestconn.DialUnix(ctx, dir.ControlSocket())
			},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Status asks what the machine is.
func (c *Client) Status(ctx context.Context) (*Status, error) {
	s := new(Status)
	if err := c.call(ctx, http.MethodGet, pathStatus, s); err != nil {
		return nil, err
	}
	return s, nil
}

// Console returns the guest console's last lines.
func (c *Client) Console(ctx context.Context) ([]string, error) {
	var lines []string
	err := c.call(ctx, http.MethodGet, pathConsole, &lines)
	return lines, err
}

// Postmortem returns why the machine has ended and the console's last lines;
// reason is "" if it still runs or nobody can tell. It waits up to a second for
// the end of a machine whose connections have just broken.
func (c *Client) Postmortem(ctx context.Context) (reason string, console []string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	for {
		status, err := c.Status(ctx)
		if err != nil {
			return "", nil
		}
		if status.Exited != "" {
			console, _ = c.Console(ctx)
			return status.Exited, lastWords(console)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return "", nil
		}
	}
}

// Stop asks the supervisor to end its machine and itself. It returns when that
// has begun.
func (c *Client) Stop(ctx context.Context) error {
	return c.call(ctx, http.MethodPost, pathStop, nil)
}

// DialGuest opens a connection to the guest agent.
func (c *Client) DialGuest(ctx context.Context) (net.Conn, error) {
	return guestconn.DialHybrid(ctx, c.dir.GuestSocket(), guestPort)
}

func (c *Client) call(ctx context.Context, method, path string, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://pyro"+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return api.Errorf(api.ErrUnavailable, "asking the supervisor of machine %s: %w", c.dir.ID(), err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		return api.Errorf(api.ErrInternal, "asking the supervisor of machine %s: it answered %s", c.dir.ID(), resp.Status)
	}
	if out == nil {
		return nil
	}
	body := http.MaxBytesReader(nil, resp.Body, 1<<20)
	if err := json.NewDecoder(body).Decode(out); err != nil {
		return fmt.Errorf("reading the answer of the supervisor of machine %s: %w", c.dir.ID(), err)
	}
	return nil
}
