package guestconn

import (
	"fmt"
	"os"
)

// ListenFile listens like [ListenUnix] and returns the socket as a file for
// another process to inherit. The caller closes it; the socket's file stays
// until somebody removes it.
func ListenFile(path string) (*os.File, error) {
	l, err := ListenUnix(path)
	if err != nil {
		return nil, err
	}
	ul := l.(*unixListener).UnixListener
	// Not the wrapper's Close, which removes the socket's file.
	defer ul.Close()
	f, err := ul.File()
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	return f, nil
}
