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
// a switch of disks helps nobody. ctx is the machine's life.
func (s *supervisor) snapshot(ctx context.Context, req snapshotRequest) (frozen string, err error) {
	s.snapshotMu.Lock()
	defer s.snapshotMu.Unlock()
	s.mu.Lock()
	m := s.machine
	s.mu.Unlock()
	snapshotter, ok := m.(engine.DiskSnapshotter)
	if !ok {
		return "", api.WithHint(api.Errorf(api.ErrUnsupported, "engine %s cannot snapshot a running machine's disk", s.cfg.Engine),
			"stop the workspace first")
	}
	full, ok := m.(engine.FullSnapshotter)
	if req.Memory != "" && !ok {
		hint := "leave --memory out: the snapshot then holds the disk; or use --engine qemu or gvisor"
		if req.Sleep {
			hint = "pause it without --to-disk, or stop it: its files are kept"
		}
		return "", api.WithHint(api.Errorf(api.ErrUnsupported, "engine %s cannot save a machine's memory", s.cfg.Engine), "%s", hint)
	}
	life := ctx
	ctx = context.WithoutCancel(ctx)
	// What the guest has only in its memory yet is not on the disk.
	flush, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	if err := guestclient.New(m.DialGuest, guestclient.Options{}).Flush(flush); err != nil {
		return "", fmt.Errorf("letting the guest flush its files: %w", err)
	}
	failpoint.Hit("supervise-snapshot/flushed")
	if req.Sleep {
		// The engine lets the machine go on for a moment after it is saved, which
		// is forgotten. What it sends then it will send again.
		s.stopNetwork(ctx)
		defer func() {
			if err != nil {
				if netErr := s.startNetwork(life); netErr != nil {
					s.log.Warn("giving the guest its network back", "error", netErr)
				}
			}
		}()
	}
	if req.Memory != "" {
		frozen, err = s.save(ctx, full, req)
	} else {
		frozen, err = snapshotter.SnapshotDisk(ctx, req.Spare)
	}
	failpoint.Hit("supervise-snapshot/taken")
	if frozen != "" && frozen != req.Spare {
		s.disk = req.Spare
	}
	if err != nil || !req.Sleep {
		return frozen, err
	}
	s.cancel(sleepError(frozen))
	if err := m.Stop(ctx, 0); err != nil {
		s.log.Error("stopping a machine that was saved", "error", err)
	}
	return frozen, nil
}

// save saves the machine with its memory.
func (s *supervisor) save(ctx context.Context, m engine.FullSnapshotter, req snapshotRequest) (frozen string, err error) {
	if s.dropsNetwork && !req.Sleep {
		giveBack, err := s.takeNetworkAway(ctx)
		defer giveBack()
		if err != nil {
			return "", err
		}
	}
	return m.SnapshotFull(ctx, req.Spare, req.Memory)
}

// A sleepError is the cause of the end of a machine that was put to sleep: the
// path of the layer that is its disk.
type sleepError string

func (e sleepError) Error() string { return "paused to disk" }
