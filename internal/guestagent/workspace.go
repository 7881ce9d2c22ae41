package guestagent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// A place is a path that a request of the file tools names.
type place struct {
	abs guestproto.Path // in its shortest form
	// workspace is the directory that everything is resolved in; os.Root lets
	// no link lead out of it. rel is the path in it, "." for itself.
	workspace *os.Root
	rel       string
}

// openPlace confines p to the workspace, by its text here and, because of how
// it is used, through links later. The caller closes the workspace.
func (s *Server) openPlace(p guestproto.Path) (*place, error) {
	abs, err := guestproto.WorkspacePath(p)
	if err != nil {
		return nil, err
	}
	root, err := s.openDir(defaultCwd, true)
	if err != nil {
		return nil, fileError(defaultCwd, err)
	}
	rel := strings.TrimPrefix(string(abs[len(defaultCwd):]), "/")
	if rel == "" {
		rel = "."
	}
	return &place{abs: abs, workspace: root, rel: rel}, nil
}

func (p *place) close() { _ = p.workspace.Close() }

// fileError names p in what the file system says about it, and classes it.
func fileError(p guestproto.Path, err error) error {
	var pe *fs.PathError
	var le *os.LinkError
	switch {
	case errors.As(err, &pe):
		err = pe.Err
	case errors.As(err, &le):
		err = le.Err
	}
	class := api.ErrUnavailable
	switch {
	case strings.Contains(err.Error(), "escapes"): // os.Root's unexported error
		return api.WithHint(api.Errorf(api.ErrDenied, "%q leaves %s through a link", p, defaultCwd),
			"file tools follow links only to relative targets in "+defaultCwd)
	case errors.Is(err, fs.ErrNotExist):
		class = api.ErrNotFound
	case errors.Is(err, fs.ErrPermission):
		class = api.ErrDenied
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		class = api.ErrExhausted
	case errors.Is(err, unix.EXDEV):
		class = api.ErrUnsupported
	case errors.Is(err, fs.ErrExist), errors.Is(err, unix.ENOTEMPTY):
		class = api.ErrExists
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.EISDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENAMETOOLONG):
		class = api.ErrInvalid
	}
	return api.Errorf(class, "%q: %w", p, err)
}

// heedHangUp returns a context that ends when the caller hangs up, or sends
// what it has no reason to, and what must be called before the answer is sent.
func (q *request) heedHangUp(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = q.r.ReadByte()
		cancel()
	}()
	return ctx, func() {
		_ = q.conn.SetReadDeadline(time.Unix(1, 0))
		<-done
		cancel()
	}
}

// sendHeader sends v as FrameHeader.
func (q *request) sendHeader(v any) error {
	line, err := guestproto.Encode(v)
	if err != nil {
		return err
	}
	return q.sent(q.frame(guestproto.FrameHeader, line[:len(line)-1]))
}

// endData flushes w and says that all data was sent.
func (q *request) endData(w *dataWriter) error {
	if err := w.flush(); err != nil {
		return q.sent(err)
	}
	return q.sent(q.frame(guestproto.FrameDataEnd, nil))
}

// sent turns a failure to send into the caller being gone.
func (q *request) sent(err error) error {
	if err == nil {
		return nil
	}
	q.gone = true
	return errGone
}

// streamOnly refuses the plain form.
func (q *request) streamOnly(action string) error {
	if q.stream {
		return nil
	}
	return api.Errorf(api.ErrInvalid, "%s needs the streaming form", action)
}

func (q *request) flush() error {
	if err := q.server.flushDisks(); err != nil {
		return err
	}
	return q.reply(guestproto.FlushReply{})
}

// flushDisks writes back what the guest has written. Below a root of its own,
// the agent leaves the file systems of others alone.
func (s *Server) flushDisks() error {
	if s.Root == "/" {
		unix.Sync()
	}
	return syncFS(s.Root)
}

// syncFS writes back the file system that dir lies on, and finds what could
// not be written.
func syncFS(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Syncfs(fd)
		_ = unix.Close(fd)
	}
	if err != nil {
		return api.Errorf(api.ErrUnavailable, "writing back the file system of %s: %w", dir, err)
	}
	return nil
}

// joinPath appends a name to a relative path, "" for none.
func joinPath(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

// dirOf returns the directory of a relative path, "." where it has none.
func dirOf(rel string) (dir, base string) { return path.Dir(rel), path.Base(rel) }
