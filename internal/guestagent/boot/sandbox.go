package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// A sandbox's processes cost its host more than its guest sees, and they are
// scheduled without regard for control groups: with 400 that only fork, the
// guest agent waited 15 s for its turn.
const (
	memoryPerProcess = 2 << 20
	minProcesses     = 128
)

// PrepareSandbox gives a sandbox what Run gives a virtual machine. Its first
// process finds the kernel's file systems mounted, the loopback running and the
// host name set; what it cannot make is printed and passed over. In hostDir lies
// what the host has put there for the guest: the machine's ids.
func PrepareSandbox(hostDir string) *System {
	name, err := os.Hostname()
	if err != nil {
		warn(err)
	}
	ids := func() error {
		return errors.Join(machineID(func() error {
			if err := os.WriteFile(inMemoryMachineID, nil, 0o444); err != nil {
				return fmt.Errorf("making the machine id: %w", err)
			}
			if err := unix.Mount(filepath.Join(hostDir, guestproto.MachineIDFile), inMemoryMachineID, "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("mounting the machine id: %w", err)
			}
			return nil
		}), mountBootID(filepath.Join(hostDir, guestproto.BootIDFile)))
	}
	for _, step := range []func() error{func() error { return nameHost(name) }, writeFiles, ids} {
		if err := step(); err != nil {
			warn(err)
		}
	}
	s := &System{}
	s.MemoryMax, s.PIDsMax = shares(memTotal())
	s.PIDsMax = min(s.PIDsMax, max(memTotal()/memoryPerProcess, minProcesses))
	// gVisor has control groups since 2026, and only where its host asks for
	// them; without, commands are found through /proc.
	if err := unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err == nil {
		s.CgroupMount = "/sys/fs/cgroup"
	}
	return s
}
