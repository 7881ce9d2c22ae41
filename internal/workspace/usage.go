package workspace

import (
	"io/fs"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// diskUsage returns the room that a file or a tree takes on the disk, in bytes,
// as far as it can be seen. Holes take none.
func diskUsage(path string) int64 {
	var sum int64
	_ = filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if info, err := d.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				sum += st.Blocks * 512 // stat(2) counts in these whatever the disk's own
			}
		}
		return nil
	})
	return sum
}

// sinceBoot is the time since the host's boot, time asleep included.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
