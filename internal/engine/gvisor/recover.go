package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/engine"
)

var _ engine.DiskRecoverer = (*Engine)(nil)

// RecoverDisk implements [engine.DiskRecoverer]: it has the kernel replay the
// image's journal. A directory has none.
func (e *Engine) RecoverDisk(ctx context.Context, disk string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("recovering the disk %s: %w", disk, err)
		}
	}()
	f, err := os.OpenFile(disk, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.EISDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	image := &layer{File: f}
	defer func() { err = errors.Join(err, image.release()) }()
	if err := lockWait(ctx, f, unix.LOCK_EX); err != nil {
		return err
	}
	dirty, err := needsRecovery(f)
	if err != nil || !dirty {
		return err
	}
	s, ns, err := newStage()
	if err != nil {
		return err
	}
	defer ns.close()
	if err := ns.do(func() error { return s.recoverImage(f) }); err != nil {
		return err
	}
	return f.Sync()
}
