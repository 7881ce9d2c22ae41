package workspace

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

// A spool holds some files of a guest as of one moment, in one nameless file on
// the host: what the guest calls them never becomes a name here.
type spool struct {
	f       *os.File
	entries map[string]spooled
}

// spooled is one entry: what it is, and where its content lies.
type spooled struct {
	manifest.Entry
	off int64
}

// maxSpool bounds the bytes of one spool.
const maxSpool = 16 << 30

// fetchFiles gets the entries at paths, relative to /workspace, from the guest.
// What is not there is left out.
func (m *Manager) fetchFiles(ctx context.Context, client *guestclient.Client, paths iter.Seq[string]) (_ *spool, err error) {
	f, err := m.namelessFile()
	if err != nil {
		return nil, err
	}
	s := &spool{f: f, entries: map[string]spooled{}}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	r, w := io.Pipe()
	fetched := make(chan error, 1)
	go func() {
		_, err := client.ExportFiles(ctx, api.WorkspacePath, paths, w)
		w.CloseWithError(err)
		fetched <- err
	}()
	readErr := s.read(r)
	r.Close()
	if err := <-fetched; err != nil && !isClosedPipe(err) {
		return nil, err
	}
	if readErr != nil {
		return nil, fmt.Errorf("reading files of the guest: %w", readErr)
	}
	return s, nil
}

// namelessFile makes a file in the state directory that has no name there and so
// goes with this process, however that ends.
func (m *Manager) namelessFile() (*os.File, error) {
	f, err := os.OpenFile(m.state.Path(), os.O_RDWR|unix.O_TMPFILE, 0o600)
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return f, err
	}
	// A file system that cannot; open(2) of Linux names both errors.
	if f, err = os.CreateTemp(m.state.Path(), "spool-"); err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func isClosedPipe(err error) bool { return errors.Is(err, io.ErrClosedPipe) }

// read takes the guest's archive apart.
func (s *spool) read(r io.Reader) error {
	var off int64
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			_, err := io.Copy(io.Discard, r) // the padding
			return err
		}
		if err != nil {
			return api.Errorf(api.ErrDamaged, "%w", err)
		}
		e := spooled{Entry: manifest.Entry{Path: trimSlash(h.Name), Mode: uint32(h.Mode) & 0o777}, off: off}
		if err := manifest.CheckPath(e.Path); err != nil {
			return api.Errorf(api.ErrDamaged, "%w", err)
		}
		switch h.Typeflag {
		case tar.TypeReg:
			e.Type = manifest.File
			if h.Size > maxSpool-off {
				return api.WithHint(api.Errorf(api.ErrExhausted, "the files have more than %d bytes together", int64(maxSpool)), "use pyro workspace export")
			}
			sum := sha256.New()
			if e.Size, err = io.Copy(io.MultiWriter(s.f, sum), tr); err != nil {
				return err
			}
			sum.Sum(e.SHA256[:0])
			off += e.Size
		case tar.TypeDir:
			e.Type = manifest.Directory
		case tar.TypeSymlink:
			e.Type, e.Target, e.Size, e.Mode = manifest.Symlink, h.Linkname, int64(len(h.Linkname)), 0o777
		default:
			return api.Errorf(api.ErrDamaged, "the guest sent an entry of type %q", h.Typeflag)
		}
		s.entries[e.Path] = e
	}
}

func trimSlash(p string) string {
	if len(p) > 1 && p[len(p)-1] == '/' {
		return p[:len(p)-1]
	}
	return p
}

// Open returns the content of a file.
func (s *spool) Open(path string) (io.ReadCloser, error) {
	e, ok := s.entries[path]
	if !ok || e.Type != manifest.File {
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	return io.NopCloser(io.NewSectionReader(s.f, e.off, e.Size)), nil
}

// Close frees the room.
func (s *spool) Close() error {
	if s == nil {
		return nil
	}
	return s.f.Close()
}
