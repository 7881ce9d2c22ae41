package guestagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/archive"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// sync unpacks an archive over a directory and removes paths, all or nothing:
// unpacked into a stage, written to the disk, and only then switched in, under a
// journal that a crash leaves behind.
func (q *request) sync(ctx context.Context, line []byte) error {
	var req guestproto.SyncRequest
	if err := decodeRequest(line, &req, "destination"); err != nil {
		return err
	}
	if err := q.streamOnly(guestproto.ActionSync); err != nil {
		return err
	}
	p, err := q.server.openPlace(req.Destination)
	if err != nil {
		return err
	}
	defer p.close()
	reply, err := q.server.sync(ctx, p, &req, &dataReader{fr: guestproto.NewFrameReader(q.r)})
	if err != nil {
		return fmt.Errorf("syncing into %s: %w", p.abs, err)
	}
	return q.reply(reply)
}

func (s *Server) sync(ctx context.Context, p *place, req *guestproto.SyncRequest, src io.Reader) (guestproto.SyncReply, error) {
	w, reply, err := s.unpack(ctx, p, src)
	if err != nil {
		return reply, err
	}
	defer w.close()
	// One at a time: what a plan found must still be so when it is carried out.
	select {
	case s.switching <- struct{}{}:
		defer func() { <-s.switching }()
	case <-ctx.Done():
		w.stage.remove(s.Logger)
		return reply, ctx.Err()
	}
	plan, err := w.plan(req)
	if err != nil {
		w.stage.remove(s.Logger)
		return reply, err
	}
	reply.RemovedCount = plan.removed
	if err := w.execute(plan); err != nil {
		if undoErr := w.rollBack(); undoErr != nil {
			// The stage stays: it holds what was there before.
			s.Logger.Error("rolling back a sync", "err", undoErr)
			return reply, api.WithHint(api.Errorf(api.ErrInternal, "%w; going back failed too: %w", err, undoErr),
				"stop and start the workspace: that goes back to what was there before")
		}
		w.stage.remove(s.Logger)
		return reply, err
	}
	w.stage.remove(s.Logger)
	return reply, nil
}

// unpack unpacks src into a new stage, in which "new" stands for the workspace.
// When it returns an error there is no stage.
func (s *Server) unpack(ctx context.Context, p *place, src io.Reader) (*switcher, guestproto.SyncReply, error) {
	reply := guestproto.SyncReply{Destination: p.abs}
	real, existing, missing, err := p.resolve(p.rel)
	if err != nil {
		return nil, reply, err
	}
	defer existing.release()
	dest := joinPath(real, path.Join(missing...))
	if len(missing) == 0 {
		dest = real
	}
	owner, err := s.owner(p.workspace)
	if err != nil {
		return nil, reply, err
	}
	st, err := newStage(s.Root, existing)
	if err != nil {
		return nil, reply, err
	}
	w := &switcher{stage: st, dest: dest, explicit: make(map[string]bool)}
	res, err := w.extract(ctx, src, owner)
	if err == nil {
		err = w.open(p.workspace)
	}
	if err == nil {
		// What is acknowledged is on the disk.
		err = w.flush()
	}
	if err != nil {
		w.close()
		st.remove(s.Logger)
		return nil, reply, err
	}
	reply.EntryCount, reply.BytesWritten = res.Entries, res.Bytes
	return w, reply, nil
}

// extract unpacks src into the stage, at the destination's place in "new".
func (w *switcher) extract(ctx context.Context, src io.Reader, owner *archive.Owner) (archive.Result, error) {
	dir := path.Join(stageNew, w.dest)
	if err := w.stage.root.MkdirAll(dir, 0o755); err != nil {
		return archive.Result{}, fileError(guestproto.Path(dir), err)
	}
	for at := dir; owner != nil && at != "."; at = path.Dir(at) {
		if err := w.stage.root.Lchown(at, owner.UID, owner.GID); err != nil {
			return archive.Result{}, fileError(guestproto.Path(at), err)
		}
	}
	if err := w.stage.root.Mkdir(stageOld, 0o700); err != nil {
		return archive.Result{}, fileError(stageOld, err)
	}
	root, err := w.stage.root.OpenRoot(dir)
	if err != nil {
		return archive.Result{}, fileError(guestproto.Path(dir), err)
	}
	defer root.Close()
	res, err := archive.Extract(ctx, root, src, archive.ExtractOptions{
		Limits:      archive.Limits{Entries: guestproto.MaxFileEntries},
		Owner:       owner,
		OnDirectory: func(name string) { w.explicit[joinPath(w.dest, name)] = true },
	})
	if err != nil {
		return res, err
	}
	// What follows the archive's end marker is padding, but must be there: a
	// transfer that was cut must not look complete.
	_, err = io.Copy(io.Discard, src)
	return res, err
}

// A syncPlan is what a sync has to do, found out before anything is done.
type syncPlan struct {
	gone []change // directories and files that go
	put  []change // what comes, and the files whose place it takes
	// without are the paths that gone takes away, so that their places count
	// as free.
	without map[string]bool
	removed int64
	backups int64 // how many backups the plan has numbered
}

// plan compares the stage with the workspace. It changes nothing.
func (w *switcher) plan(req *guestproto.SyncRequest) (*syncPlan, error) {
	p := &syncPlan{without: make(map[string]bool)}
	if err := w.planRemovals(p, req.Remove); err != nil {
		return nil, err
	}
	fresh, err := w.fresh.directory("")
	if err != nil {
		return nil, fileError(stageNew, err)
	}
	defer fresh.release()
	current, err := w.workspace.directory("")
	if err != nil {
		return nil, fileError(defaultCwd, err)
	}
	defer current.release()
	return p, w.planMerge(p, fresh, current, "", req.ReplaceKinds)
}

func (p *syncPlan) out(path string, gone bool) {
	c := change{Kind: changeOut, Path: guestproto.Path(path), Backup: p.backups}
	p.backups++
	if gone {
		p.gone = append(p.gone, c)
		p.without[path] = true
	} else {
		p.put = append(p.put, c)
	}
}

func (w *switcher) planRemovals(p *syncPlan, remove []guestproto.Path) error {
	for _, r := range remove {
		local, err := r.Local()
		if err != nil {
			return fmt.Errorf("removing: %w", err)
		}
		full := joinPath(w.dest, string(local))
		if len(full) > guestproto.MaxPath {
			return api.Errorf(api.ErrInvalid, "removing %q: the path is longer than %d bytes", local, guestproto.MaxPath)
		}
		there, err := w.lookForRemoval(full)
		if err != nil {
			return fmt.Errorf("removing: %w", err)
		}
		if there && !p.without[full] {
			p.out(full, true)
			p.removed++
		}
	}
	// What goes with a directory needs no step of its own, but counts.
	kept := p.gone[:0]
	for _, c := range p.gone {
		if !p.withinGone(string(c.Path)) {
			kept = append(kept, c)
		}
	}
	p.gone = kept
	return nil
}

// withinGone reports whether a directory around path goes.
func (p *syncPlan) withinGone(full string) bool {
	for dir := path.Dir(full); dir != "."; dir = path.Dir(dir) {
		if p.without[dir] {
			return true
		}
	}
	return false
}

// lookForRemoval reports whether there is something at path. A link on the way
// is refused: it would lead to what the caller did not name.
func (w *switcher) lookForRemoval(full string) (bool, error) {
	dir, base, err := w.workspace.at(full)
	if err == nil {
		_, err = dir.stat(base)
	}
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		for part := path.Dir(full); part != "."; part = path.Dir(part) {
			dir, base, err := w.workspace.at(part)
			if err != nil {
				continue
			}
			if st, err := dir.stat(base); err == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
				return false, api.Errorf(api.ErrDenied, "%q: %q is a symbolic link", full, part)
			}
			return false, nil // below a file there is nothing
		}
		return false, nil
	}
	return false, fileError(guestproto.Path(full), err)
}

// planMerge plans how what is in fresh comes into current, both being path.
func (w *switcher) planMerge(p *syncPlan, fresh, current *directory, at string, replaceKinds bool) error {
	entries, err := fresh.entries()
	if err != nil {
		return fileError(stageNew, err)
	}
	for _, e := range entries {
		full := joinPath(at, e.name)
		if len(full) > guestproto.MaxPath {
			return api.Errorf(api.ErrInvalid, "%q: the path is longer than %d bytes", full[:200]+"…", guestproto.MaxPath)
		}
		if at == "" && isStageName(e.name) {
			return api.Errorf(api.ErrDenied, "%q is the guest agent's own name", full)
		}
		st, err := current.stat(e.name)
		if errors.Is(err, unix.ENOENT) || err == nil && p.without[full] {
			p.put = append(p.put, change{Kind: changeIn, Path: guestproto.Path(full)})
			continue
		}
		if err != nil {
			return fileError(guestproto.Path(full), err)
		}
		isDir, wasDir := e.kind == unix.S_IFDIR, st.Mode&unix.S_IFMT == unix.S_IFDIR
		switch {
		case isDir && wasDir:
			err = w.planDirectory(p, fresh, current, e.name, full, st, replaceKinds)
		case isDir != wasDir && !replaceKinds:
			is, was := "a file or link", "a directory"
			if isDir {
				is, was = was, is
			}
			err = api.Errorf(api.ErrExists, "%q is %s, and %s is to take its place", full, was, is)
		default:
			p.out(full, wasDir)
			p.put = append(p.put, change{Kind: changeIn, Path: guestproto.Path(full)})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *switcher) planDirectory(p *syncPlan, fresh, current *directory, name, full string, st unix.Stat_t, replaceKinds bool) error {
	subFresh, err := fresh.sub(name)
	if err != nil {
		return fileError(guestproto.Path(full), err)
	}
	defer subFresh.release()
	subCurrent, err := current.sub(name)
	if err != nil {
		return fileError(guestproto.Path(full), err)
	}
	defer subCurrent.release()
	if err := w.planMerge(p, subFresh, subCurrent, full, replaceKinds); err != nil {
		return err
	}
	if w.explicit[full] { // the archive's own mode and time
		var to unix.Stat_t
		if err := unix.Fstat(subFresh.fd, &to); err != nil {
			return fileError(guestproto.Path(full), err)
		}
		p.put = append(p.put, change{
			Kind: changeMeta, Path: guestproto.Path(full),
			Mode: st.Mode & 0o7777, Time: st.Mtim.Nano(),
			newMode: to.Mode & 0o7777, newTime: to.Mtim.Nano(),
		})
	}
	return nil
}
