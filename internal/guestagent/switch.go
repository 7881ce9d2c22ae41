package guestagent

import (
	"errors"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// What is in a stage of a sync.
const (
	stageNew     = "new"          // what comes, at its place in the workspace
	stageOld     = "old"          // what went, by its number
	stageJournal = "journal"      // the changes, in the order in which they are made
	stageDone    = "journal.done" // its name once all of them are made
)

// The kinds of changes. Whether one was made can be seen, so that it can be
// undone without knowing how far its sync came.
const (
	changeOut   = "out"   // Path went to old/Backup: done if there is a backup
	changeIn    = "in"    // Path came from new: done if it is not there any more
	changeRmdir = "rmdir" // Path, an empty directory, went
	changeMeta  = "meta"  // the directory Path got another mode and time
)

// A change is one step, and what is needed to undo it.
type change struct {
	Kind   string          `json:"kind"`
	Path   guestproto.Path `json:"path"` // relative to the workspace
	Backup int64           `json:"backup,omitzero"`
	// What a directory had before, for rmdir and meta. Time is its
	// modification's in nanoseconds since 1970.
	Mode uint32 `json:"mode,omitzero"`
	UID  int    `json:"uid,omitzero"`
	GID  int    `json:"gid,omitzero"`
	Time int64  `json:"time,omitzero"`

	// What meta gives the directory: moving things out of the stage changes the
	// time there.
	newMode uint32
	newTime int64
}

// A switcher puts what is in a stage into the workspace. Every step is one
// rename or the like; each is in the journal, on the disk, before it is made.
type switcher struct {
	stage    *stage
	dest     string          // below the workspace
	explicit map[string]bool // directories that the archive has entries for

	workspace, fresh, old *tree
	journal               *journal
	log                   []change // all that the journal holds
	backups               int64

	// beforeStep, for tests, may stop the switcher before any step.
	beforeStep func() error
}

// open opens the trees that changes move between. It holds workspace, which
// stays the caller's.
func (w *switcher) open(workspace *directory) error {
	w.workspace = &tree{root: workspace.hold()}
	fresh, err := directoryOf(w.stage.root, stageNew)
	if err != nil {
		return fileError(stageNew, err)
	}
	w.fresh = &tree{root: fresh}
	old, err := directoryOf(w.stage.root, stageOld)
	if err != nil {
		return fileError(stageOld, err)
	}
	w.old = &tree{root: old}
	return nil
}

// close closes everything but the stage. It may be called twice.
func (w *switcher) close() {
	for _, t := range []**tree{&w.workspace, &w.fresh, &w.old} {
		if *t != nil {
			(*t).close()
			*t = nil
		}
	}
	if w.journal != nil {
		w.journal.close()
		w.journal = nil
	}
}

// flush writes the file system of stage and workspace back.
func (w *switcher) flush() error {
	if err := again(func() error { return unix.Syncfs(w.fresh.root.fd) }); err != nil {
		return api.Errorf(api.ErrUnavailable, "writing the files to the disk: %w", err)
	}
	return nil
}

// execute makes the changes of a plan. After an error the caller undoes them.
func (w *switcher) execute(p *syncPlan) error {
	w.backups = p.backups
	var err error
	if w.journal, err = newJournal(w.stage.root); err != nil {
		return err
	}
	// What goes comes first: a directory that cannot be renamed is taken apart
	// by steps that the plan does not know, and the order of the journal is the
	// order of the steps.
	for _, changes := range [][]change{p.gone, p.put} {
		if err := w.record(changes); err != nil {
			return err
		}
		for i := range changes {
			if err := w.make(&changes[i]); err != nil {
				return err
			}
		}
	}
	if err := w.step(); err != nil {
		return err
	}
	if err := w.stage.root.Rename(stageJournal, stageDone); err != nil {
		return fileError(stageJournal, err)
	}
	if err := w.flush(); err != nil {
		// Nobody will be told that this sync was done, so it must not be.
		if renameErr := w.stage.root.Rename(stageDone, stageJournal); renameErr != nil {
			return errors.Join(err, fileError(stageDone, renameErr))
		}
		return err
	}
	return nil
}

func (w *switcher) step() error {
	if w.beforeStep != nil {
		return w.beforeStep()
	}
	return nil
}

// record writes changes to the journal and the journal to the disk.
func (w *switcher) record(changes []change) error {
	if len(changes) == 0 {
		return nil
	}
	w.log = append(w.log, changes...)
	return w.journal.write(changes)
}

// make makes one change.
func (w *switcher) make(c *change) error {
	if err := w.step(); err != nil {
		return err
	}
	defer w.workspace.forget(string(c.Path))
	dir, base, err := w.workspace.at(string(c.Path))
	if err != nil {
		return fileError(c.Path, err)
	}
	switch c.Kind {
	case changeOut:
		err = rename(dir, base, w.old.root, strconv.FormatInt(c.Backup, 10))
		// overlayfs and gVisor's overlay rename no directory of a lower layer:
		// https://docs.kernel.org/filesystems/overlayfs.html, "renaming
		// directories".
		if errors.Is(err, unix.EXDEV) {
			return w.takeApart(c)
		}
	case changeIn:
		var from *directory
		var name string
		if from, name, err = w.fresh.at(string(c.Path)); err == nil {
			err = rename(from, name, dir, base)
		}
	case changeRmdir:
		err = again(func() error { return unix.Unlinkat(dir.fd, base, unix.AT_REMOVEDIR) })
	case changeMeta:
		err = setMeta(dir, base, c.newMode, c.newTime)
	}
	if err != nil {
		return fileError(c.Path, err)
	}
	return nil
}

// takeApart takes a directory away that cannot be renamed, piece by piece.
func (w *switcher) takeApart(c *change) error {
	d, err := w.workspace.directory(string(c.Path))
	if err != nil {
		return fileError(c.Path, err) // a file that is a mount of its own, say
	}
	defer d.release()
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return fileError(c.Path, err)
	}
	entries, err := d.entries()
	if err != nil {
		return fileError(c.Path, err)
	}
	changes := make([]change, 0, len(entries)+1)
	for _, e := range entries {
		changes = append(changes, change{Kind: changeOut, Path: c.Path + "/" + guestproto.Path(e.name), Backup: w.backups})
		w.backups++
	}
	if err := w.record(changes); err != nil {
		return err
	}
	for i := range changes {
		if err := w.make(&changes[i]); err != nil {
			return err
		}
	}
	// Behind the steps by which its directories were taken apart.
	last := []change{{
		Kind: changeRmdir, Path: c.Path,
		Mode: st.Mode & 0o7777, UID: int(st.Uid), GID: int(st.Gid), Time: st.Mtim.Nano(),
	}}
	if err := w.record(last); err != nil {
		return err
	}
	return w.make(&last[0])
}

// rollBack undoes everything and then ends the journal: while there is one, what
// is missing in the stage counts as done, so nothing may be removed from it.
func (w *switcher) rollBack() error {
	if err := w.undo(); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	if err := w.stage.root.Rename(stageJournal, stageDone); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fileError(stageJournal, err)
	}
	return w.flush()
}

// undo goes back to what was there before the first change. It may be repeated
// from any state in which an earlier undo was stopped. It goes on past errors
// and returns them.
func (w *switcher) undo() error {
	var errs []error
	for i := len(w.log) - 1; i >= 0 && len(errs) < 10; i-- {
		c := &w.log[i]
		if err := w.step(); err != nil {
			return err
		}
		if err := w.undoOne(c); err != nil {
			errs = append(errs, fileError(c.Path, err))
		}
		w.workspace.forget(string(c.Path))
		w.fresh.forget(string(c.Path))
	}
	return errors.Join(errs...)
}

func (w *switcher) undoOne(c *change) error {
	switch c.Kind {
	case changeOut:
		name := strconv.FormatInt(c.Backup, 10)
		if _, err := w.old.root.stat(name); errors.Is(err, unix.ENOENT) {
			return nil
		}
		dir, base, err := w.workspace.at(string(c.Path))
		if err != nil {
			return err
		}
		return again(func() error { return unix.Renameat(w.old.root.fd, name, dir.fd, base) })
	case changeIn:
		return w.takeBack(string(c.Path))
	case changeRmdir:
		dir, base, err := w.workspace.at(string(c.Path))
		if err != nil {
			return err
		}
		if err := again(func() error { return unix.Mkdirat(dir.fd, base, 0o700) }); err != nil {
			if errors.Is(err, unix.EEXIST) {
				return nil // it did not go
			}
			return err
		}
		_ = unix.Fchownat(dir.fd, base, c.UID, c.GID, unix.AT_SYMLINK_NOFOLLOW)
		return setMeta(dir, base, c.Mode, c.Time)
	case changeMeta:
		dir, base, err := w.workspace.at(string(c.Path))
		if err == nil {
			err = setMeta(dir, base, c.Mode, c.Time)
		}
		if vanished(err) {
			return nil
		}
		return err
	}
	return nil
}

// takeBack moves what came to path back to "new".
func (w *switcher) takeBack(path string) error {
	to, name, err := w.fresh.at(path)
	if err != nil {
		return err
	}
	if _, err := to.stat(name); !errors.Is(err, unix.ENOENT) {
		return err // it did not come
	}
	dir, base, err := w.workspace.at(path)
	if err == nil {
		err = again(func() error { return unix.Renameat(dir.fd, base, to.fd, name) })
	}
	if vanished(err) {
		// Somebody removed it. A second undo must not take what this one is
		// about to put there for what came.
		return again(func() error { return unix.Mknodat(to.fd, name, unix.S_IFREG|0o600, 0) })
	}
	return err
}

// rename moves a name to one that is free.
func rename(from *directory, name string, to *directory, newName string) error {
	err := again(func() error { return unix.Renameat2(from.fd, name, to.fd, newName, unix.RENAME_NOREPLACE) })
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// A file system without the flag: somebody else's file that has
		// appeared since the plan is lost.
		err = again(func() error { return unix.Renameat(from.fd, name, to.fd, newName) })
	}
	return err
}

// setMeta sets mode and modification time of a directory.
func setMeta(dir *directory, name string, mode uint32, mtime int64) error {
	d, err := dir.sub(name)
	if err != nil {
		return err
	}
	defer d.release()
	if err := unix.Fchmod(d.fd, mode); err != nil {
		return err
	}
	ts := unix.NsecToTimespec(mtime)
	_ = unix.UtimesNanoAt(dir.fd, name, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	return nil
}

// A tree resolves paths below a directory without following links. It keeps the
// directory that was asked for last open, because changes come in its order.
type tree struct {
	root     *directory
	lastPath string // "" where last is nil
	last     *directory
}

func (t *tree) close() {
	t.forget(t.lastPath)
	t.root.release()
}

// at returns the directory that the last part of path lies in, which is the
// tree's own, and that part.
func (t *tree) at(full string) (*directory, string, error) {
	dir, base := path.Split(full)
	dir = strings.TrimSuffix(dir, "/")
	if dir == "" {
		return t.root, base, nil
	}
	if t.last == nil || t.lastPath != dir {
		d, err := t.directory(dir)
		if err != nil {
			return nil, "", err
		}
		t.forget(t.lastPath)
		t.lastPath, t.last = dir, d
	}
	return t.last, base, nil
}

// directory opens the directory path, "" for the tree's root, for the caller to
// release.
func (t *tree) directory(full string) (*directory, error) {
	d := t.root.hold()
	if full == "" {
		// An open directory is read once only.
		sub, err := d.sub(".")
		d.release()
		return sub, err
	}
	for part := range strings.SplitSeq(full, "/") {
		sub, err := d.sub(part)
		d.release()
		if err != nil {
			return nil, err
		}
		d = sub
	}
	return d, nil
}

// forget closes the directory that is kept if it is path or lies in it: there
// may be another in its place.
func (t *tree) forget(full string) {
	if t.last != nil && (t.lastPath == full || strings.HasPrefix(t.lastPath, full+"/")) {
		t.last.release()
		t.last, t.lastPath = nil, ""
	}
}
