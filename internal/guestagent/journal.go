package guestagent

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// maxChanges bounds a journal that is read.
const maxChanges = 4 * guestproto.MaxFileEntries

// A journal holds the changes of a sync, one as JSON on each line. A last line
// that a crash has cut stands for a step that was not made.
type journal struct {
	f *os.File
}

// newJournal makes an empty journal in a stage, on the disk.
func newJournal(stage *os.Root) (*journal, error) {
	f, err := stage.OpenFile(stageJournal, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fileError(stageJournal, err)
	}
	dir, err := stage.Open(".")
	if err == nil {
		err = errors.Join(f.Sync(), dir.Sync(), dir.Close())
	}
	if err != nil {
		_ = f.Close()
		return nil, api.Errorf(api.ErrUnavailable, "writing the journal of a sync: %w", err)
	}
	return &journal{f}, nil
}

// write adds changes. When it returns they are on the disk.
func (j *journal) write(changes []change) error {
	w := bufio.NewWriterSize(j.f, 64<<10)
	for i := range changes {
		line, err := guestproto.Encode(&changes[i])
		if err != nil {
			return err
		}
		if _, err := w.Write(line); err != nil {
			return fileError(stageJournal, err)
		}
	}
	if err := w.Flush(); err != nil {
		return fileError(stageJournal, err)
	}
	if err := j.f.Sync(); err != nil {
		return fileError(stageJournal, err)
	}
	return nil
}

func (j *journal) close() { _ = j.f.Close() }

// readJournal returns the changes of a stage's journal up to its end or the
// first that is none.
func readJournal(r io.Reader) []change {
	var log []change
	br := bufio.NewReaderSize(r, 64<<10)
	for len(log) < maxChanges {
		line, err := guestproto.ReadLine(br, guestproto.MaxEntryLine)
		if err != nil {
			return log
		}
		var c change
		if guestproto.Decode(line, &c, "kind", "path") != nil {
			return log
		}
		if local, err := c.Path.Local(); err != nil || local != c.Path || c.Backup < 0 || c.Mode > 0o7777 {
			return log
		}
		log = append(log, c)
	}
	return log
}

// recoverStages removes the stages that an agent left when it died, and rolls
// back the syncs that it was in the middle of. What cannot be rolled back stays
// as it is, stage included.
func recoverStages(root string, logger *slog.Logger) {
	top, err := os.OpenRoot(root)
	if err != nil {
		return // nothing below it can be served either
	}
	defer top.Close()
	for _, dir := range stageParents {
		names, err := stagesIn(top, dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			logger.Warn("looking for stages", "err", err)
		}
		for _, name := range names {
			if err := recoverStage(top, dir, name, logger); err != nil {
				logger.Error("rolling back an unfinished sync", "stage", name, "err", err)
			}
		}
	}
}

// stagesIn returns the names of this user's stages in a directory.
func stagesIn(top *os.Root, dir string) ([]string, error) {
	d, err := directoryOf(top, dir)
	if err != nil {
		return nil, err
	}
	defer d.release()
	entries, err := d.entries()
	var names []string
	for _, e := range entries {
		if e.kind != unix.S_IFDIR || !isStageName(e.name) {
			continue
		}
		// Nobody but this user may have written a journal to be believed.
		if st, err := d.stat(e.name); err == nil && int(st.Uid) == syscall.Geteuid() && st.Mode&0o7777 == 0o700 {
			names = append(names, e.name)
		}
	}
	return names, err
}

func recoverStage(top *os.Root, dir, name string, logger *slog.Logger) error {
	parent, err := top.OpenRoot(dir)
	if err != nil {
		return err
	}
	root, err := parent.OpenRoot(name)
	if err != nil {
		_ = parent.Close()
		return err
	}
	w := &switcher{stage: &stage{root: root, parent: parent, name: name}}
	if err := w.recover(top, logger); err != nil {
		_ = root.Close()
		_ = parent.Close()
		return err
	}
	w.stage.remove(logger)
	return nil
}

// recover undoes what the stage's journal says, if it was not completed.
func (w *switcher) recover(top *os.Root, logger *slog.Logger) error {
	f, err := w.stage.root.OpenFile(stageJournal, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // it had not begun, or was complete
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return api.Errorf(api.ErrDamaged, "the journal is no regular file")
	}
	w.log = readJournal(f)
	workspace, err := directoryOf(top, defaultCwd[1:])
	if err != nil {
		return err
	}
	defer workspace.release()
	if err := w.open(workspace); err != nil {
		return err
	}
	defer w.close()
	logger.Warn("rolling back a sync that was not completed", "steps", len(w.log))
	return w.rollBack()
}
