package guestagent

import (
	"bytes"
	"encoding/binary"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// A directory is an open directory that several goroutines may use. Everything
// is looked up relative to it, without following links: in a sandbox every path
// that has to be resolved costs more than reading a small file.
type directory struct {
	fd   int
	refs atomic.Int32
}

// directoryOf opens a directory in root, which stays the caller's. The name must
// be one of the guest agent's own.
func directoryOf(root *os.Root, name string) (*directory, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return newDirectory(fd), nil
}

func newDirectory(fd int) *directory {
	d := &directory{fd: fd}
	d.refs.Store(1)
	return d
}

// sub opens a directory in d, and no link to one.
func (d *directory) sub(name string) (*directory, error) {
	// Twice, because gVisor takes O_DIRECTORY for leave to follow a link; see
	// beneath.go. The first looks and opens nothing that would notice.
	fd, err := openAt(d.fd, name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	_ = unix.Close(fd)
	if fd, err = openAt(d.fd, name, unix.O_RDONLY|unix.O_NONBLOCK); err != nil {
		return nil, err
	}
	return newDirectory(fd), nil
}

func (d *directory) hold() *directory {
	d.refs.Add(1)
	return d
}

// release closes d with its last holder.
func (d *directory) release() {
	if d.refs.Add(-1) == 0 {
		_ = unix.Close(d.fd)
	}
}

// stat looks at an entry of d without following it.
func (d *directory) stat(name string) (unix.Stat_t, error) {
	var st unix.Stat_t
	err := again(func() error { return unix.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW) })
	return st, err
}

// readlink returns the target of a link in d.
func (d *directory) readlink(name string) (string, error) {
	buf := make([]byte, guestproto.MaxPath+1)
	n, err := unix.Readlinkat(d.fd, name, buf)
	if err != nil {
		return "", err
	}
	if n > guestproto.MaxPath {
		return "", unix.ENAMETOOLONG
	}
	return string(buf[:n]), nil
}

// openAt is openat without following a link at the end.
func openAt(dir int, name string, flags int) (int, error) {
	fd := -1
	err := again(func() (err error) {
		fd, err = unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		return err
	})
	return fd, err
}

// again repeats a call that a signal interrupted, such as the runtime's own.
func again(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}

// A dirent is a name in a directory and what it is, as S_IFMT has it.
type dirent struct {
	name string
	kind uint32
}

// offsets in struct linux_dirent64, getdents64(2).
const (
	direntReclen = 16
	direntType   = 18
	direntName   = 19
)

// direntBuffer is how much of a directory is read at once.
const direntBuffer = 32 << 10

// entries returns what is in d, unsorted, without "." and "..". It returns what
// it has read also when it fails; more than MaxFileEntries names are
// ErrExhausted. It is to be called once.
func (d *directory) entries() ([]dirent, error) {
	var out []dirent
	buf := make([]byte, direntBuffer)
	for {
		n := 0
		err := again(func() (err error) {
			n, err = unix.Getdents(d.fd, buf)
			return err
		})
		if err != nil {
			return out, err
		}
		if n <= 0 {
			return out, nil
		}
		for b := buf[:n]; len(b) > direntName; {
			size := int(binary.NativeEndian.Uint16(b[direntReclen:]))
			if size <= direntName || size > len(b) {
				return out, unix.EIO
			}
			name, _, _ := bytes.Cut(b[direntName:size], []byte{0})
			kind := uint32(b[direntType]) << 12 // DT_* is S_IFMT's four bits, stat(2)
			b = b[size:]
			if s := string(name); s != "." && s != ".." && s != "" {
				if kind == 0 { // DT_UNKNOWN
					st, err := d.stat(s)
					if err != nil {
						continue // gone
					}
					kind = st.Mode & unix.S_IFMT
				}
				out = append(out, dirent{s, kind})
			}
		}
		if len(out) > guestproto.MaxFileEntries {
			return out, api.Errorf(api.ErrExhausted, "there are more than %d entries", guestproto.MaxFileEntries)
		}
	}
}
