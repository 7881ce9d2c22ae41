package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/engine/host"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// Reap clears up what died without clearing up itself: every ephemeral machine
// whose lock nobody holds is ended for good and its directory removed. It
// returns the ids it removed, and goes on after an error. Every command that
// starts machines calls it first; on a directory with nothing to do it costs
// one directory read, and the record of every machine that is not ephemeral.
func Reap(ctx context.Context, state *statedir.Dir) (removed []string, err error) {
	entries, err := os.ReadDir(state.MachinesDir())
	if err != nil {
		return nil, fmt.Errorf("looking for abandoned machines: %w", err)
	}
	var errs []error
	for _, e := range entries {
		dir := state.Machine(e.Name())
		done, err := reapOne(ctx, dir)
		if err != nil {
			errs = append(errs, fmt.Errorf("clearing up machine %s: %w", dir.ID(), err))
		} else if done {
			removed = append(removed, dir.ID())
		}
	}
	return removed, errors.Join(errs...)
}

func reapOne(ctx context.Context, dir statedir.Machine) (bool, error) {
	// Workspaces' machines are none of Reap's: their locks, which a command that
	// starts one wants, are left alone. A record never becomes ephemeral.
	var rec record
	if err := statedir.ReadJSON(dir.RecordFile(), &rec); err == nil && !rec.Ephemeral {
		return false, nil
	}
	if err := seizable(dir); err != nil {
		if errors.Is(err, api.ErrBusy) || errors.Is(err, os.ErrNotExist) {
			return false, nil
		}
		return false, err
	}
	lock, err := hostproc.TryLock(dir.LockFile())
	if errors.Is(err, api.ErrBusy) || errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer lock.Close()
	// Once more: the record may have been written since.
	if err := statedir.ReadJSON(dir.RecordFile(), &rec); err == nil && !rec.Ephemeral {
		return false, nil
	}
	return true, removeMachine(ctx, dir)
}

// seizable keeps Reap from a directory that is just being made: between its
// mkdir and its lock there is no lock file yet.
func seizable(dir statedir.Machine) error {
	_, err := os.Lstat(dir.LockFile())
	if err == nil || !errors.Is(err, os.ErrNotExist) {
		return err
	}
	st, err := os.Lstat(dir.Path())
	if err != nil {
		return err
	}
	if age := timeSince(st.ModTime()); age < abandonedAfter {
		return api.ErrBusy
	}
	return nil
}

// removeMachine ends the processes on record that still run and removes the
// directory. The caller holds the lock or has made the directory.
func removeMachine(ctx context.Context, dir statedir.Machine) error {
	if err := killRecorded(ctx, dir); err != nil {
		return err
	}
	var err error
	// Another command that looks for abandoned machines may make the lock's file
	// once more while this goes on.
	for range 10 {
		if err = gvisor.RemoveDir(ctx, dir.Path()); !errors.Is(err, unix.ENOTEMPTY) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("removing %s: %w", filepath.Base(dir.Path()), err)
	}
	return nil
}

// clearMachine ends the processes on record that still run and removes what
// only a running machine needs. Logs, the record and how the machine ended
// stay. The caller holds the lock.
func clearMachine(ctx context.Context, dir statedir.Machine) error {
	if err := killRecorded(ctx, dir); err != nil {
		return err
	}
	if err := gvisor.RemoveDir(ctx, dir.EngineDir()); err != nil {
		return fmt.Errorf("removing what a machine's last run left: %w", err)
	}
	for _, sock := range []string{dir.ControlSocket(), dir.GuestSocket()} {
		if err := os.Remove(sock); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// killRecorded ends the machine's processes, the supervisor first.
func killRecorded(ctx context.Context, dir statedir.Machine) error {
	var rec record
	if err := statedir.ReadJSON(dir.RecordFile(), &rec); err == nil {
		ids := rec.Processes
		if rec.Supervisor != nil {
			ids = append([]hostproc.Identity{*rec.Supervisor}, ids...)
		}
		for _, id := range ids {
			if id.PID == os.Getpid() {
				continue
			}
			if err := id.KillLadder(ctx, 0); err != nil {
				return err
			}
		}
	}
	if rec.Engine == engine.HostName {
		return hostproc.KillMarked(ctx, host.Marker(dir.ID()))
	}
	return nil
}

// Ephemeral reports whether the machine in dir is one whose directory goes with
// it, and so Reap's to clear up, or is only just being made.
func Ephemeral(dir statedir.Machine) bool {
	var rec record
	return statedir.ReadJSON(dir.RecordFile(), &rec) != nil || rec.Ephemeral
}

// Alive reports whether the supervisor of the machine in dir runs. It only
// looks: a machine that is just being started is not alive yet.
func Alive(dir statedir.Machine) bool {
	var rec record
	return statedir.ReadJSON(dir.RecordFile(), &rec) == nil && rec.Supervisor != nil && rec.Supervisor.Alive()
}

// ReadEnding returns how the machine's last run ended; api.ErrNotFound if its
// supervisor could not write that down.
func ReadEnding(dir statedir.Machine) (*Ending, error) {
	e := new(Ending)
	err := statedir.ReadJSON(dir.EndingFile(), e)
	if errors.Is(err, os.ErrNotExist) {
		return nil, api.Errorf(api.ErrNotFound, "nobody wrote down how machine %s ended", dir.ID())
	}
	if err != nil {
		return nil, err
	}
	return e, nil
}

// WaitGone returns when no supervisor holds the machine any more, and so
// nothing of it runs.
func WaitGone(ctx context.Context, dir statedir.Machine) error {
	patience := time.Hour
	if deadline, ok := ctx.Deadline(); ok {
		patience = time.Until(deadline)
	}
	lock, err := hostproc.LockWithin(ctx, dir.LockFile(), patience)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	lock.Close()
	return err
}

// Kill ends whatever runs of the machine in dir, by force, and clears up. It is
// for a supervisor that does not answer or is gone.
func Kill(ctx context.Context, dir statedir.Machine) error {
	if _, err := os.Lstat(dir.Path()); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err := killRecorded(ctx, dir); err != nil {
		return err
	}
	if err := WaitGone(ctx, dir); err != nil {
		return err
	}
	return clearMachine(ctx, dir)
}

// Remove is Kill, and removes the directory.
func Remove(ctx context.Context, dir statedir.Machine) error {
	if _, err := os.Lstat(dir.Path()); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err := Kill(ctx, dir); err != nil {
		return err
	}
	return removeMachine(ctx, dir)
}

// abandonedAfter is how old a directory without a lock file must be to count as
// left behind; making the lock follows the mkdir within microseconds.
const abandonedAfter = time.Minute

var timeSince = time.Since
