package workspacedisk

import (
	"context"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// readDir calls fn for every entry of dir but those that skip reports, until fn
// returns an error, which it returns. The order is the disk's.
func (t *tree) readDir(ctx context.Context, dir file, budget *ext4.Budget, skip func(name string) bool, fn func(name string, f file) error) error {
	if dir.layer > 0 {
		return t.merge(ctx, dir, budget, skip, fn)
	}
	// The lowest layer alone: no mark in it leads anywhere.
	return dir.fs.ReadDir(ctx, dir.Inode, budget, func(e ext4.Dirent) error {
		if skip(e.Name) {
			return nil
		}
		s := search{t: t, budget: budget}
		ino, err := s.step(0, e.Name, 0, "", func(string) (uint32, bool, error) { return e.Inode, true, nil })
		if ino == nil || err != nil {
			return err
		}
		return fn(e.Name, file{Inode: ino, fs: dir.fs})
	})
}

// merge is readDir for a directory of any layer but the lowest. A lookup of each
// entry in the parts below would read those again and again, so the names of
// all are gathered first.
func (t *tree) merge(ctx context.Context, dir file, budget *ext4.Budget, skip func(name string) bool, fn func(name string, f file) error) error {
	parts := dir.parts()
	names := make([]map[string]uint32, len(parts))
	count := 0         // of all of them
	var order []string // each name once
	seen := map[string]bool{}
	for i, p := range parts {
		names[i] = map[string]uint32{}
		err := t.layers[p.layer].fs.ReadDir(ctx, p.dir, budget, func(e ext4.Dirent) error {
			if _, twice := names[i][e.Name]; twice {
				return api.Errorf(api.ErrDamaged, "a directory has two entries of the name %q", e.Name)
			}
			names[i][e.Name] = e.Inode
			if !seen[e.Name] {
				seen[e.Name] = true
				order = append(order, e.Name)
			}
			count++
			return t.checkNames(count)
		})
		if err != nil {
			return err
		}
	}
	entry := func(i int, name string) (uint32, bool, error) {
		n, ok := names[i][name]
		return n, ok, nil
	}
	for _, name := range order {
		if skip(name) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		s := search{t: t, budget: budget}
		f, ok, err := s.find(ctx, parts, name, entry)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if err := fn(name, f); err != nil {
			return err
		}
	}
	return nil
}

func (t *tree) checkNames(n int) error {
	if n > t.maxNames {
		return api.Errorf(api.ErrExhausted, "a directory has more than %d entries", t.maxNames)
	}
	return nil
}
