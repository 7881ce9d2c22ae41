package mcpserver

import (
	"context"
	"io"
	"os"

	"github.com/modelcontextprotocol/go-sdk/mcp"
	"golang.org/x/sys/unix"
)

// maxMessageBytes bounds one message from a client: a patch or a file of the
// largest size, written as JSON.
const maxMessageBytes = 8 << 20

// ServeStdio runs one session over in and out and returns when in ends, out
// fails, or ctx ends. Calls under way are canceled then; at the end of in they
// have lingerTime to be answered.
func (s *Server) ServeStdio(ctx context.Context, in io.ReadCloser, out io.WriteCloser) error {
	return s.serve(ctx, lingering{&mcp.IOTransport{Reader: in, Writer: out, MaxLineLength: maxMessageBytes}})
}

// TakeStdout returns the process's standard output for the protocol alone:
// whatever else writes there from now on, in this process or in one that it
// starts, writes to standard error. It is for the beginning of main.
func TakeStdout() (*os.File, error) {
	fd, err := unix.FcntlInt(os.Stdout.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	if err := unix.Dup3(int(os.Stderr.Fd()), int(os.Stdout.Fd()), 0); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("dup3", err)
	}
	return os.NewFile(uintptr(fd), "protocol"), nil
}
