package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// recordCopy is the content of a workspace's RecordFile.
type recordCopy struct {
	Workspace *Workspace  `json:"workspace"`
	Snapshots []*Snapshot `json:"snapshots"`
}

// workspaceDir is where the files of the workspace with that id lie.
func (s *Store) workspaceDir(id string) statedir.Workspace {
	return statedir.Workspace(filepath.Join(s.workspacesDir, id))
}

// writeCopy writes the committed record of a workspace into its directory, which
// it makes only if asked to. The change itself is done: what fails here is
// logged, and the next change writes the copy again.
//
// Several processes may do this for one workspace at once, and the last to
// write may be the first to have read. So each looks once more whether what it
// wrote is still what is true: whoever is late corrects its own mistake.
func (s *Store) writeCopy(ctx context.Context, id string, makeDir bool) {
	if s.workspacesDir == "" {
		return
	}
	// The change is committed, whether or not the caller still waits.
	ctx = context.WithoutCancel(ctx)
	st := s.copies.get(id)
	st.Lock()
	defer st.Unlock()
	dir := s.workspaceDir(id)
	if makeDir {
		if err := os.Mkdir(dir.Path(), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			s.log.Warn("making the directory of a workspace", "workspace", id, "err", err)
			return
		}
	}
	for {
		c, generation, err := s.readForCopy(ctx, id)
		if errors.Is(err, api.ErrNotFound) {
			// Deleted in the meantime, maybe before we wrote.
			if err := s.removeCopy(id); err != nil {
				s.log.Warn("cleaning up after a deleted workspace", "err", err)
			}
			return
		}
		if err == nil && generation == st.generation {
			return
		}
		if err == nil {
			err = statedir.WriteJSON(dir.RecordFile(), c)
		}
		if err != nil {
			s.log.Warn("writing the copy of a workspace's record", "workspace", id, "err", err)
			return
		}
		st.generation = generation
	}
}

func (s *Store) readForCopy(ctx context.Context, id string) (c recordCopy, generation int64, err error) {
	err = s.read(ctx, func(tx *sql.Tx) error {
		w, err := getWorkspace(ctx, tx, id)
		if err != nil {
			return err
		}
		c.Workspace, generation = &w.Workspace, w.generation
		c.Snapshots, err = listSnapshots(ctx, tx, id)
		return err
	})
	return c, generation, err
}

// removeCopy removes the copy of a deleted workspace's record, so that Repair
// does not bring it back to life.
func (s *Store) removeCopy(id string) error {
	s.copies.forget(id)
	if s.workspacesDir == "" {
		return nil
	}
	if err := os.Remove(s.workspaceDir(id).RecordFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing the copy of the record of workspace %s: %w", id, err)
	}
	return nil
}
