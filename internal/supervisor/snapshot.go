package supervisor

import (
	"context"
	"fmt"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestclient"
)

// flushTimeout bounds how long a guest may take to write its files back. A disk
// of several GiB on a slow host takes a minute.
const flushTimeout = 5 * time.Minute

// snapshot freezes the machine's disk. It goes on if the caller hangs up: half
// a switch of disks helps nobody.
func (s *supervisor) snapshot(ctx context.Context, spare, memory string) (string, error) {
	s.snapshotMu.Lock()
	defer s.snapshotMu.Unlock()
	m := s.current()
	snapshotter, ok := m.(engine.DiskSnapshotter)
	if !ok {
		return "", api.WithHint(api.Errorf(api.ErrUnsupported, "engine %s cannot snapshot a running machine's disk", s.cfg.Engine),
			"stop the workspace first")
	}
	full, ok := m.(engine.FullSnapshotter)
	if memory != "" && !ok {
		return "", api.WithHint(api.Errorf(api.ErrUnsupported, "engine %s cannot save a machine's memory", s.cfg.Engine),
			"leave --memory out: the snapshot then holds the disk; or use --engine qemu")
	}
	ctx = context.WithoutCancel(ctx)
	// What the guest has only in its memory yet is not on the disk.
	flush, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	if err := guestclient.New(m.DialGuest, guestclient.Options{}).Flush(flush); err != nil {
		return "", fmt.Errorf("letting the guest flush its files: %w", err)
	}
	failpoint.Hit("supervise-snapshot/flushed")
	var frozen string
	var err error
	if memory != "" {
		frozen, err = full.SnapshotFull(ctx, spare, memory)
	} else {
		frozen, err = snapshotter.SnapshotDisk(ctx, spare)
	}
	failpoint.Hit("supervise-snapshot/taken")
	if frozen != "" && frozen != spare {
		s.disk = spare
	}
	return frozen, err
}
