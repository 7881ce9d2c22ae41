package gvisor

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// minGuestCPUs is the fewest processors that runsc shows a guest.
const minGuestCPUs = 2

// sizeGroup is the name of the control group that runsc is told to put the
// sandbox into.
const sizeGroup = "/guest"

// canShowSize reports whether there is a place for [stage.showSize] to use. Where
// there is none, in a container without /sys, guests see all of the host.
func canShowSize() bool {
	_, err := os.Stat(cgroupMount)
	return err == nil
}

// showSize tells runsc how large the guest is to be. runsc has no flag for that:
// it shows a guest the limits of the control group it is put into, and all of the
// host's memory where there is none. So the namespace gets plain files in the
// place of the host's control groups, in which runsc finds what the guest is to
// see, and which it joins by writing its pid where nobody reads it. What holds
// the guest are the groups of [limits], which runsc is started in. showSize runs
// in the namespace.
func (s stage) showSize(memMiB, vcpus int) error {
	if !canShowSize() {
		return nil
	}
	vcpus = max(vcpus, minGuestCPUs)
	for _, f := range []struct{ controller, name, value string }{
		{"memory", "memory.limit_in_bytes", strconv.FormatInt(int64(memMiB)<<20, 10)},
		{"memory", "cgroup.procs", ""},
		{"cpu", "cpu.cfs_quota_us", strconv.Itoa(vcpus * cpuPeriod)},
		{"cpu", "cpu.cfs_period_us", strconv.Itoa(cpuPeriod)},
		{"cpu", "cgroup.procs", ""},
		{"cpuset", "cpuset.cpus", fmt.Sprintf("0-%d", min(vcpus, runtime.NumCPU())-1)},
	} {
		dir := filepath.Join(s.size(), f.controller, sizeGroup)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("writing the guest's size: %w", err)
		}
		if err := os.WriteFile(filepath.Join(dir, f.name), []byte(f.value), 0o600); err != nil {
			return fmt.Errorf("writing the guest's size: %w", err)
		}
	}
	if err := unix.Mount(s.size(), cgroupMount, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("showing the guest's size on %s: %w", cgroupMount, err)
	}
	return nil
}
