package supervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
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
	pathStatus   = "/v1/status"
	pathConsole  = "/v1/console"
	pathStop     = "/v1/stop"
	pathKeep     = "/v1/keep"
	pathExpiry   = "/v1/expiry"
	pathSnapshot = "/v1/snapshot"
	pathDisk     = "/v1/disk"
	pathPublish  = "/v1/publish"
)

// expiryRequest is the body of a POST to pathExpiry.
type expiryRequest struct {
	TTL time.Duration `json:"ttl"` // from now; 0 for never
}

// snapshotRequest is the body of a POST to pathSnapshot.
type snapshotRequest struct {
	Spare string `json:"spare"`
	// Memory, if set, is where the memory is saved too.
	Memory string `json:"memory,omitempty"`
	// Sleep ends the machine with that.
	Sleep bool `json:"sleep,omitempty"`
}

// snapshotReply answers it.
type snapshotReply struct {
	Frozen string         `json:"frozen"`
	Error  *api.WireError `json:"error,omitempty"`
}

// handler answers the control API until ctx, the machine's life, ends.
func (s *supervisor) handler(ctx context.Context) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pathStatus, func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		status, egress := s.status, s.egress
		s.mu.Unlock()
		if egress != nil {
			status.Network = egress.status(s.cfg.Network)
		}
		status.Published = s.published.list()
		writeJSON(w, http.StatusOK, status)
	})
	mux.HandleFunc("GET "+pathConsole, func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, s.console.Tail(50))
	})
	mux.HandleFunc("POST "+pathStop, func(w http.ResponseWriter, _ *http.Request) {
		s.cancel(errStopped)
		writeJSON(w, http.StatusAccepted, struct{}{})
	})
	mux.HandleFunc("POST "+pathKeep, func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		s.kept = true
		ended := s.status.Exited
		s.mu.Unlock()
		if ended != "" {
			s.cancel(endedError(ended))
		}
		writeJSON(w, http.StatusOK, struct{}{})
	})
	mux.HandleFunc("POST "+pathExpiry, func(w http.ResponseWriter, r *http.Request) {
		var req expiryRequest
		if !readJSON(w, r, &req) {
			return
		}
		s.setExpiry(req.TTL)
		writeJSON(w, http.StatusOK, struct{}{})
	})
	mux.HandleFunc("POST "+pathSnapshot, func(w http.ResponseWriter, r *http.Request) {
		var req snapshotRequest
		if !readJSON(w, r, &req) {
			return
		}
		frozen, err := s.snapshot(ctx, req)
		writeJSON(w, http.StatusOK, snapshotReply{Frozen: frozen, Error: api.ToWire(err)})
	})
	mux.HandleFunc("GET "+pathDisk, func(w http.ResponseWriter, _ *http.Request) {
		s.snapshotMu.Lock()
		defer s.snapshotMu.Unlock()
		writeJSON(w, http.StatusOK, s.disk)
	})
	s.handlePublish(mux)
	s.handleWatch(mux)
	s.handlePause(mux)
	s.handleWake(mux)
	return mux
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}

func readJSON(w http.ResponseWriter, r *http.Request, v any) bool {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(v); err != nil {
		writeJSON(w, http.StatusBadRequest, api.ToWire(api.Errorf(api.ErrInvalid, "reading the request: %v", err)))
		return false
	}
	return true
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
	if err := c.call(ctx, http.MethodGet, pathStatus, nil, s); err != nil {
		return nil, err
	}
	return s, nil
}

// Console returns the guest console's last lines.
func (c *Client) Console(ctx context.Context) ([]string, error) {
	var lines []string
	err := c.call(ctx, http.MethodGet, pathConsole, nil, &lines)
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
	return c.call(ctx, http.MethodPost, pathStop, nil, nil)
}

// Keep lets go of a leased machine: from now on it outlives its caller. It ends
// at once if its guest has ended already.
func (c *Client) Keep(ctx context.Context) error {
	return c.call(ctx, http.MethodPost, pathKeep, nil, nil)
}

// SetExpiry lets the machine end after ttl from now; 0 means never.
func (c *Client) SetExpiry(ctx context.Context, ttl time.Duration) error {
	return c.call(ctx, http.MethodPost, pathExpiry, expiryRequest{TTL: ttl}, nil)
}

// SnapshotDisk lets the guest flush its files and freezes the machine's disk,
// by the contract of engine.DiskSnapshotter. An engine that cannot is
// api.ErrUnsupported. It takes as long as ctx allows.
func (c *Client) SnapshotDisk(ctx context.Context, spare string) (frozen string, err error) {
	return c.Snapshot(ctx, spare, "")
}

// Snapshot is SnapshotDisk that, unless memory is "", also saves the machine's
// memory at that path, by the contract of engine.FullSnapshotter.
func (c *Client) Snapshot(ctx context.Context, spare, memory string) (frozen string, err error) {
	return c.snapshot(ctx, snapshotRequest{Spare: spare, Memory: memory})
}

// Sleep is a Snapshot with the memory that ends the machine: what runs in it gets
// no further, and its last run's Ending says which layer its disk is. It returns
// when the supervisor is ending, too. On an error the machine goes on.
func (c *Client) Sleep(ctx context.Context, spare, memory string) error {
	_, err := c.snapshot(ctx, snapshotRequest{Spare: spare, Memory: memory, Sleep: true})
	return err
}

func (c *Client) snapshot(ctx context.Context, req snapshotRequest) (frozen string, err error) {
	var reply snapshotReply
	if err := c.call(ctx, http.MethodPost, pathSnapshot, req, &reply); err != nil {
		return "", err
	}
	return reply.Frozen, reply.Error.Err()
}

// dialTimeout bounds how long the guest of a machine that is up may take to
// accept a connection: far more than a busy emulated one needs.
const dialTimeout = 30 * time.Second

// DialGuest opens a connection to the guest agent.
func (c *Client) DialGuest(ctx context.Context) (net.Conn, error) {
	limited, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := guestconn.DialHybrid(limited, c.dir.GuestSocket(), guestPort)
	if err != nil && limited.Err() != nil && ctx.Err() == nil {
		return nil, api.Errorf(api.ErrUnavailable, "machine %s has not answered for %v", c.dir.ID(), dialTimeout)
	}
	return conn, err
}

// Disk returns the path of the layer that the machine writes to. It waits for a
// snapshot that is just being taken.
func (c *Client) Disk(ctx context.Context) (string, error) {
	var disk string
	err := c.call(ctx, http.MethodGet, pathDisk, nil, &disk)
	return disk, err
}

// callTimeout bounds the questions that a supervisor answers at once. Those that
// a snapshot or a boot is part of take as long as their caller allows.
const callTimeout = 10 * time.Second

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	if path != pathSnapshot && path != pathDisk && path != pathWake {
		limited, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		ctx = limited
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://pyro"+path, body)
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
	if err := json.NewDecoder(http.MaxBytesReader(nil, resp.Body, 1<<20)).Decode(out); err != nil {
		return fmt.Errorf("reading the answer of the supervisor of machine %s: %w", c.dir.ID(), err)
	}
	return nil
}
