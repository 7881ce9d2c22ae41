package guestagent

import (
	"os"
	"syscall"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestagent/process"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func openTerminal(size *guestproto.Resize) (master, slave *os.File, err error) {
	master, slave, err = pty.Open()
	if err != nil {
		return nil, nil, api.Errorf(api.ErrUnavailable, "opening a terminal: %w", err)
	}
	if size.Cols > 0 && size.Rows > 0 {
		_ = pty.Setsize(master, &pty.Winsize{Cols: size.Cols, Rows: size.Rows})
	}
	// Reads of the master must be able to end while they wait: give it to the
	// runtime's poller, which the library does not.
	fd, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	_ = master.Close()
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		_ = slave.Close()
		return nil, nil, api.Errorf(api.ErrUnavailable, "opening a terminal: %w", err)
	}
	return os.NewFile(uintptr(fd), "terminal"), slave, nil
}

// resizeTerminal gives the terminal that cmd runs on another size. One without
// columns or rows is ignored.
func resizeTerminal(terminal *os.File, cmd *process.Command, size guestproto.Resize) {
	if size.Cols == 0 || size.Rows == 0 {
		return
	}
	raw, err := terminal.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Cols})
		if _, err := unix.IoctlGetInt(int(fd), unix.TIOCGPGRP); err != nil {
			// gVisor (2026-05) knows no foreground group on a master and sends
			// no SIGWINCH by itself.
			cmd.Signal(unix.SIGWINCH)
		}
	})
}

// signalForeground signals the foreground group of the terminal that cmd runs on
// and reports whether that could be found.
func signalForeground(terminal *os.File, cmd *process.Command, sig syscall.Signal) (sent bool) {
	raw, err := terminal.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) {
		if group, err := unix.IoctlGetInt(int(fd), unix.TIOCGPGRP); err == nil {
			sent = group > 1 && unix.Kill(-group, sig) == nil
			return
		}
		sent = guessForeground(int(fd), cmd, sig)
	})
	return sent
}

// guessForeground is for gVisor (2026-09), which tells the foreground group to
// nobody outside of the session, neither by the terminal nor in /proc.
func guessForeground(terminal int, cmd *process.Command, sig syscall.Signal) (sent bool) {
	modes, err := unix.IoctlGetTermios(terminal, unix.TCGETS)
	if err != nil {
		return false
	}
	if sig == unix.SIGINT && modes.Lflag&unix.ISIG != 0 {
		// What Ctrl-C does: the terminal knows whom to signal.
		_, err := unix.Write(terminal, []byte{modes.Cc[unix.VINTR]})
		return err == nil
	}
	// A shell that edits its command line has turned ICANON off; while it
	// waits for a job it is on. A job that turns it off itself, such as an
	// editor, is taken for the shell.
	if modes.Lflag&unix.ICANON == 0 {
		return false
	}
	job := cmd.NewestJob()
	return job > 1 && unix.Kill(-job, sig) == nil
}
