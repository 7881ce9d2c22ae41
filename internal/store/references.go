package store

import (
	"context"
	"database/sql"
)

// References is what workspaces and snapshots need of the files that they
// share; everything else of that kind is garbage.
type References struct {
	Layers       map[string]bool // file names
	Seeds        map[string]bool // digests
	Environments map[string]bool // digests
}

// References returns what is needed, all as of one moment.
func (s *Store) References(ctx context.Context) (*References, error) {
	return s.references(ctx, "")
}

// LayersOfOthers returns the file name of every layer that a workspace other than
// the one with that id needs, or a snapshot of another one.
func (s *Store) LayersOfOthers(ctx context.Context, id string) (map[string]bool, error) {
	r, err := s.references(ctx, id)
	if err != nil {
		return nil, err
	}
	return r.Layers, nil
}

// references leaves what the workspace called except needs out.
func (s *Store) references(ctx context.Context, except string) (*References, error) {
	r := &References{map[string]bool{}, map[string]bool{}, map[string]bool{}}
	add := func(set map[string]bool, names ...string) {
		for _, n := range names {
			if n != "" {
				set[n] = true
			}
		}
	}
	err := s.read(ctx, func(tx *sql.Tx) error {
		err := collect(ctx, tx, func(rows *sql.Rows) error {
			w, err := scanWorkspace(rows.Scan)
			if err != nil || w.WorkspaceID == except {
				return err
			}
			add(r.Layers, w.ActiveLayer, w.PendingLayer, w.Memory, w.PendingMemory)
			add(r.Layers, w.Layers...)
			add(r.Seeds, w.SeedDigest)
			add(r.Environments, w.EnvironmentDigest)
			return nil
		}, "SELECT "+workspaceColumns+" FROM workspaces")
		if err != nil {
			return err
		}
		return collect(ctx, tx, func(rows *sql.Rows) error {
			var record string
			if err := rows.Scan(&record); err != nil {
				return err
			}
			sn, err := decodeSnapshot(record)
			if err != nil || sn.WorkspaceID == except {
				return err
			}
			add(r.Layers, sn.Layer, sn.Memory)
			add(r.Layers, sn.Chain...)
			add(r.Seeds, sn.SeedDigest)
			return nil
		}, "SELECT record FROM snapshots")
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

// AllLayers returns the file name of every layer that is needed.
func (s *Store) AllLayers(ctx context.Context) (map[string]bool, error) {
	r, err := s.References(ctx)
	if err != nil {
		return nil, err
	}
	return r.Layers, nil
}

// SeedDigests returns every seed that is needed.
func (s *Store) SeedDigests(ctx context.Context) (map[string]bool, error) {
	r, err := s.References(ctx)
	if err != nil {
		return nil, err
	}
	return r.Seeds, nil
}

// EnvironmentDigests returns every environment's image that is needed.
func (s *Store) EnvironmentDigests(ctx context.Context) (map[string]bool, error) {
	r, err := s.References(ctx)
	if err != nil {
		return nil, err
	}
	return r.Environments, nil
}
