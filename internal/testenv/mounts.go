package testenv

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// mountsVariable says to the program that [PrivateMounts] starts that it has.
const mountsVariable = "PYRO_TEST_PRIVATE_MOUNTS"

// PrivateMounts gives this process and what it starts a mount namespace of their
// own, where it may. Without one every program on the machine that makes a
// namespace meanwhile takes a copy of the test's mounts along, and a file system
// that the test has unmounted lives on there, unclean on its disk. A TestMain
// calls it first: it starts the program anew, with the same process id.
func PrivateMounts() {
	if os.Geteuid() != 0 || os.Getenv(mountsVariable) != "" {
		return
	}
	if err := startPrivately(); err != nil {
		fmt.Fprintln(os.Stderr, "no mounts of one's own:", err)
	}
}

// startPrivately returns only if it cannot.
func startPrivately() error {
	// A namespace belongs to one thread, which alone goes on into the new program.
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return unix.Exec(self, os.Args, append(os.Environ(), mountsVariable+"=1"))
}
