package boot

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Die prints why the machine cannot serve, in one line that the host can find
// at the end of the console, and powers it off. It does not return.
func Die(err error) {
	fmt.Fprintf(os.Stderr, "pyro-agent: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
	drainConsole()
	unix.Sync()
	off()
}

// PowerOff ends every process (TERM, and KILL after grace), writes everything
// to the disk, makes it read-only and powers the machine off. It does not
// return.
func PowerOff(grace time.Duration) {
	if !alone() {
		_ = unix.Kill(-1, unix.SIGTERM)
		_ = unix.Kill(-1, unix.SIGCONT)
		for end := time.Now().Add(grace); !alone() && time.Now().Before(end); {
			time.Sleep(5 * time.Millisecond)
		}
		_ = unix.Kill(-1, unix.SIGKILL)
		// The killed must let go of their files before the disk can be made
		// read-only; one that hangs in the kernel never will.
		for end := time.Now().Add(5 * time.Second); !alone() && time.Now().Before(end); {
			time.Sleep(2 * time.Millisecond)
		}
	}
	unix.Sync()
	// A read-only remount writes the journal out and marks the file system
	// clean, so the host reads a disk that needs no replay.
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		warn(fmt.Errorf("making the root disk read-only: %w", err))
		unix.Sync()
	}
	fmt.Fprintln(os.Stderr, "pyro-agent: powering off")
	drainConsole()
	off()
}

// alone reports whether no process but this one and the kernel's runs. Those
// that ended and were not collected yet do not count.
func alone() bool {
	d, err := os.Open("/proc")
	if err != nil {
		return true
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	for _, name := range names {
		if name[0] < '0' || name[0] > '9' || name == "1" {
			continue
		}
		// The command line of a kernel thread or a dead process is empty.
		if data, err := os.ReadFile("/proc/" + name + "/cmdline"); err == nil && len(data) > 0 {
			return false
		}
	}
	return true
}

func drainConsole() {
	_ = unix.IoctlSetInt(2, unix.TCSBRK, 1) // tcdrain(3)
}

func off() {
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	// A kernel that cannot power off; QEMU runs with -no-reboot.
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}
