package supervisor

import (
	"context"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/engine"
)

// A disk that this host's kernel mounts from an image with holes (engine gvisor)
// takes writes that find no room later on: the guest may have been told that they
// are on the disk. So such a machine ends while there is still room for what the
// kernel has in memory for it.
const (
	// spaceFloor is how little room ends a machine, in bytes.
	spaceFloor = 32 << 20
	// spaceRate is how fast room may go, in bytes per second: what is above the
	// floor says when to look again.
	spaceRate = 1 << 30
	// spaceSoon and spaceLate bound the time between two looks.
	spaceSoon = 20 * time.Millisecond
	spaceLate = 10 * time.Second
)

// watchSpace ends the machine when the disk below its own is about to be full.
func (s *supervisor) watchSpace(ctx context.Context) {
	dir := filepath.Dir(s.cfg.Spec.Disk)
	for {
		pause := spaceLate
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			s.log.Warn("looking how much room there is", "error", err)
		} else {
			left := int64(st.Bavail)*st.Bsize - spaceFloor
			if left <= 0 {
				s.log.Error("ending the machine: the disk below it is nearly full", "dir", dir)
				s.cancel(endedError(engine.ReasonHostDiskFull))
				return
			}
			pause = max(spaceSoon, min(spaceLate, time.Duration(float64(left)/spaceRate*float64(time.Second))))
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}
