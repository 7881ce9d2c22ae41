package process

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// CanFreeze reports whether this kernel can stop commands so; gVisor's cannot.
func (w *Workload) CanFreeze() bool {
	_, err := os.Lstat(w.freezeFile())
	return err == nil
}

func (w *Workload) freezeFile() string { return filepath.Join(w.dir, "cgroup.freeze") }

// Freeze stops every command where it stands, and returns when all have.
// Processes that the kernel cannot stop at the moment delay it until ctx ends;
// then all run on. See "cgroup.freeze" in Documentation/admin-guide/cgroup-v2.rst.
func (w *Workload) Freeze(ctx context.Context) error {
	if err := w.setFrozen("1"); err != nil {
		return fmt.Errorf("freezing the commands: %w", err)
	}
	for {
		events, err := os.ReadFile(filepath.Join(w.dir, "cgroup.events"))
		if err == nil && bytes.Contains(events, []byte("frozen 1")) {
			return nil
		}
		if err == nil {
			select {
			case <-time.After(time.Millisecond): // the file's own notice comes no sooner
				continue
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		_ = w.Thaw()
		return fmt.Errorf("freezing the commands: %w", err)
	}
}

// Thaw lets the commands run on. They may not have been frozen.
func (w *Workload) Thaw() error {
	if err := w.setFrozen("0"); err != nil {
		return fmt.Errorf("thawing the commands: %w", err)
	}
	return nil
}

func (w *Workload) setFrozen(value string) error {
	return os.WriteFile(w.freezeFile(), []byte(value), 0)
}
