package workspacedisk

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// nobody is the conventional user without rights on every Linux.
const nobody = 65534

// confine prepares cmd to parse a hostile image: in a session of its own, and,
// where we are root, as nobody, without a network, and with the image as the
// only file of its own. release takes the image back.
func confine(cmd *exec.Cmd, image *os.File) (release func(), err error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if os.Geteuid() != 0 {
		return func() {}, nil
	}
	info, err := image.Stat()
	if err != nil {
		return nil, err
	}
	owner := info.Sys().(*syscall.Stat_t)
	if err := image.Chown(nobody, nobody); err != nil {
		return nil, fmt.Errorf("handing the image to the tool's user: %w", err)
	}
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC
	// If taking it back fails, the caller's next step on the file does, too.
	return func() { _ = image.Chown(int(owner.Uid), int(owner.Gid)) }, nil
}

// limitProcess bounds what a started tool may take. It comes a moment after
// the start; all these limits count from the process's beginning.
func limitProcess(pid int) {
	for resource, limit := range map[int]uint64{
		unix.RLIMIT_CPU:    60,      // seconds
		unix.RLIMIT_AS:     2 << 30, // bytes
		unix.RLIMIT_CORE:   0,
		unix.RLIMIT_NOFILE: 32,
	} {
		// A tool that has ended already needs no limit.
		_ = unix.Prlimit(pid, resource, &unix.Rlimit{Cur: limit, Max: limit}, nil)
	}
}
