package archive

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// readError classes what reading the archive met.
func readError(err error) error {
	if api.Code(err) != api.Code(api.ErrInternal) {
		return err // a bound of ours, or of the connection it comes from
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) ||
		errors.Is(err, gzip.ErrChecksum) || errors.Is(err, gzip.ErrHeader) {
		return api.Errorf(api.ErrDamaged, "reading the archive: %w", err)
	}
	return api.Errorf(api.ErrDamaged, "reading the archive: %w", err)
}

// pathCause classes a failure of the file system and drops the path, which the
// caller names in its own way.
func pathCause(err error) error {
	cause := err
	var pe *fs.PathError
	var le *os.LinkError
	switch {
	case errors.As(err, &pe):
		cause = pe.Err
	case errors.As(err, &le):
		cause = le.Err
	}
	switch {
	case isFull(cause):
		return api.Errorf(api.ErrExhausted, "%w", cause)
	case errors.Is(cause, fs.ErrPermission):
		return api.Errorf(api.ErrDenied, "%w", cause)
	case errors.Is(cause, fs.ErrExist):
		return api.Errorf(api.ErrExists, "%w", cause)
	case errors.Is(cause, fs.ErrNotExist):
		return api.Errorf(api.ErrNotFound, "%w", cause)
	case strings.Contains(cause.Error(), "escapes"): // os.Root's unexported error
		return api.Errorf(api.ErrDenied, "%w", cause)
	}
	return api.Errorf(api.ErrUnavailable, "%w", cause)
}

func shorten(name string) string {
	if len(name) > 200 {
		return name[:200] + "…"
	}
	return name
}
