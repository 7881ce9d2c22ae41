package guestconn

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"

	"github.com/pyro-mcp/pyro/api"
)

// maxSocketPath is the longest path that fits sockaddr_un.sun_path with its
// closing NUL, unix(7).
const maxSocketPath = 107

// DialUnix connects to the Unix socket at path, which may be longer than a
// socket address holds. A socket behind which nobody listens, or no socket at
// all, is [ErrNobody].
func DialUnix(ctx context.Context, path string) (*net.UnixConn, error) {
	addr, release, err := shortPath(path)
	if err != nil {
		return nil, fmt.Errorf("connecting to %s: %w", path, err)
	}
	defer release()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", addr)
	if err != nil {
		cause := rootCause(err)
		switch {
		case ctx.Err() != nil:
			return nil, fmt.Errorf("connecting to %s: %w", path, ctx.Err())
		case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("connecting to %s: %w (%w)", path, ErrNobody, cause)
		case errors.Is(err, fs.ErrPermission):
			return nil, api.Errorf(api.ErrDenied, "connecting to %s: %w", path, cause)
		}
		return nil, api.Errorf(api.ErrUnavailable, "connecting to %s: %w", path, cause)
	}
	return c.(*net.UnixConn), nil
}

// ListenUnix listens on a Unix socket at path, which may be longer than a
// socket address holds, with mode 0600. A socket file that a dead process left
// is replaced; one that somebody answers on is ErrBusy. The caller holds
// whatever lock keeps two processes from doing this at once. Close removes the
// socket file.
func ListenUnix(path string) (net.Listener, error) {
	addr, release, err := shortPath(path)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	defer release()
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode().Type() != fs.ModeSocket {
			return nil, api.Errorf(api.ErrExists, "listening on %s: something that is no socket is there", path)
		}
		if c, err := net.Dial("unix", addr); err == nil {
			_ = c.Close()
			return nil, api.Errorf(api.ErrBusy, "listening on %s: another process answers there", path)
		} else if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, api.Errorf(api.ErrUnavailable, "listening on %s: trying whether another process answers: %w", path, rootCause(err))
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listening on %s: removing the stale socket: %w", path, err)
		}
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: addr, Net: "unix"})
	if err != nil {
		return nil, api.Errorf(api.ErrUnavailable, "listening on %s: %w", path, rootCause(err))
	}
	// The address may go through a descriptor that is closed below, so the
	// file is removed by its real path instead.
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	return &unixListener{UnixListener: l, path: path}, nil
}

type unixListener struct {
	*net.UnixListener
	path string
	once sync.Once
}

func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

func (l *unixListener) Close() error {
	l.once.Do(func() { _ = os.Remove(l.path) })
	return l.UnixListener.Close()
}

// shortPath returns an address for the socket at path that fits a socket
// address: path itself, or one that goes through an open descriptor of its
// directory. The address works until release is called.
func shortPath(path string) (addr string, release func(), err error) {
	if path == "" {
		return "", nil, api.Errorf(api.ErrInvalid, "the socket path is empty")
	}
	if len(path) <= maxSocketPath {
		return path, func() {}, nil
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", nil, fmt.Errorf("%w (%w)", ErrNobody, rootCause(err))
		}
		return "", nil, api.Errorf(api.ErrUnavailable, "opening its directory: %w", rootCause(err))
	}
	addr = "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + filepath.Base(path)
	if len(addr) > maxSocketPath {
		_ = dir.Close()
		return "", nil, api.Errorf(api.ErrInvalid, "the socket's name is %d bytes long, at most about 85 are possible", len(filepath.Base(path)))
	}
	return addr, func() { _ = dir.Close() }, nil
}

// rootCause drops the layers of package net and os that repeat an address the
// user never gave.
func rootCause(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}
