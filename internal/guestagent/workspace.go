package guestagent

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/archive"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// A place is a path that a request of the file tools names.
type place struct {
	abs guestproto.Path // in its shortest form
	// workspace is the directory that everything is looked up beneath. rel is
	// the path in it, "." for itself.
	workspace *directory
	rel       string
}

// openPlace confines p to the workspace, by its text here and, because of how
// it is used, through links later. The caller closes the place.
func (s *Server) openPlace(p guestproto.Path) (*place, error) {
	abs, err := guestproto.WorkspacePath(p)
	if err != nil {
		return nil, err
	}
	root, err := s.openDir(defaultCwd, true)
	if err != nil {
		return nil, fileError(defaultCwd, err)
	}
	defer root.Close()
	workspace, err := directoryOf(root, ".")
	if err != nil {
		return nil, fileError(defaultCwd, err)
	}
	rel := strings.TrimPrefix(string(abs[len(defaultCwd):]), "/")
	if rel == "" {
		rel = "."
	}
	return &place{abs: abs, workspace: workspace, rel: rel}, nil
}

func (p *place) close() { p.workspace.release() }

// openDirectory opens the place, which must be a directory.
func (p *place) openDirectory() (*directory, error) {
	d, err := p.workspace.openDirectory(p.rel)
	if err != nil {
		return nil, fileError(p.abs, err)
	}
	return d, nil
}

// resolve finds the part of a path below the workspace that exists, which must
// be a directory and is for the caller to release. It returns that part's own
// path without links, "" for the workspace, and the names that are not there.
func (p *place) resolve(rel string) (real string, existing *directory, missing []string, err error) {
	for ; ; rel = path.Dir(rel) {
		real, existing, err = p.existing(rel)
		if err == nil {
			slices.Reverse(missing)
			return real, existing, missing, nil
		}
		if !errors.Is(err, os.ErrNotExist) || rel == "." {
			return "", nil, nil, fileError(p.abs, err)
		}
		missing = append(missing, path.Base(rel))
	}
}

// existing opens the directory rel. A link to nothing is ErrInvalid.
func (p *place) existing(rel string) (real string, d *directory, err error) {
	at, err := p.workspace.beneath(rel, true)
	if err == nil {
		defer at.release()
		d, err = at.dir.sub(at.base)
	}
	if err == nil {
		return at.real(), d, nil
	}
	if errors.Is(err, unix.ENOENT) {
		if at, err := p.workspace.beneath(rel, false); err == nil {
			defer at.release()
			if _, err := at.dir.stat(at.base); err == nil {
				return "", nil, api.Errorf(api.ErrInvalid, "%q leads through a link to nothing", p.abs)
			}
		}
	}
	return "", nil, err
}

// makeDirectory opens the directory rel, which it makes if need be. What it
// makes is given to owner, if that is not nil.
func (p *place) makeDirectory(rel string, owner *archive.Owner) (*directory, error) {
	_, d, missing, err := p.resolve(rel)
	if err != nil {
		return nil, err
	}
	for _, name := range missing {
		made := again(func() error { return unix.Mkdirat(d.fd, name, 0o755) })
		if err = made; err != nil && !errors.Is(err, unix.EEXIST) {
			break
		}
		var sub *directory
		if sub, err = d.sub(name); err != nil {
			break
		}
		if made == nil && owner != nil {
			if err = unix.Fchown(sub.fd, owner.UID, owner.GID); err != nil {
				sub.release()
				break
			}
		}
		d.release()
		d = sub
	}
	if err != nil {
		d.release()
		return nil, fileError(p.abs, err)
	}
	return d, nil
}

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
	case strings.Contains(err.Error(), "escapes"): // errEscapes, or os.Root's unexported error
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
