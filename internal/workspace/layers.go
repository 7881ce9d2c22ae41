package workspace

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/seed"
	"github.com/pyro-mcp/pyro/internal/store"
)

// A workspace's disk is a chain of layers over its environment's image. Names
// of layers are recorded before their files are made, so that a file that no
// record names is garbage, whatever was killed when.

// newLayer draws the name of a layer.
func newLayer(format engine.DiskFormat) string {
	switch format {
	case engine.DiskQcow2:
		return newID() + ".qcow2"
	case engine.DiskExt4:
		return newID() + ".ext4"
	}
	return newID()
}

// seedPrefix marks the element of a chain that is the image of a seed.
const seedPrefix = "seed:"

func seedLayer(digest string) string { return seedPrefix + digest }

// disk is what a machine's disk consists of, by the names in the records.
type disk struct {
	chain  []string // lowest first
	active string
	memory string // of a machine that is to go on and not to boot; "" mostly
	owner  string // whom /workspace is given to, on a disk that is new; "" for root
	// continues is engine.MachineSpec.Continues.
	continues bool
}

func (h *held) diskOf(ws *store.Workspace) disk {
	return disk{chain: ws.Layers, active: ws.ActiveLayer}
}

// layerPaths returns the files of a chain, and locks on the seeds among them,
// which the caller closes.
func (m *Manager) layerPaths(ctx context.Context, chain []string) (paths []string, locks []*seed.Seed, err error) {
	for _, name := range chain {
		digest, isSeed := strings.CutPrefix(name, seedPrefix)
		if !isSeed {
			paths = append(paths, m.state.Layer(name))
			continue
		}
		seeds, err := m.seeds()
		if err != nil {
			return nil, locks, err
		}
		sd, err := seeds.Get(ctx, digest)
		if err != nil {
			return nil, locks, fmt.Errorf("opening what the workspace was seeded with: %w", err)
		}
		locks = append(locks, sd)
		paths = append(paths, sd.ImagePath)
	}
	return paths, locks, nil
}

// checkLayers refuses one more layer under a disk that its engine could not start
// a machine on any more.
func (h *held) checkLayers() error {
	l, ok := engineAs[engine.LayerLimiter](h)
	if !ok || len(h.Layers) < l.MaxLayers() {
		return nil
	}
	return api.WithHint(api.Errorf(api.ErrExhausted, "its disk stands on %d layers, and engine %s takes no more", len(h.Layers), h.Engine),
		"delete snapshots that you do not need, then pyro workspace stop %s: that merges their layers", refOf(h.Workspace))
}

// removeLayer removes a layer's file or directory; one that is not there is no
// error.
func (m *Manager) removeLayer(ctx context.Context, name string) error {
	if err := gvisor.RemoveDir(ctx, m.state.Layer(name)); err != nil {
		return fmt.Errorf("removing disk layer %s: %w", name, err)
	}
	return nil
}

// collect removes layers and seeds that no record names any more.
func (m *Manager) collect(ctx context.Context) (removed []string, err error) {
	// Files first, records second: what is made in between is in the records.
	files, err := os.ReadDir(m.state.LayersDir())
	if err != nil {
		return nil, err
	}
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	named, err := st.AllLayers(ctx)
	if err != nil {
		return nil, err
	}
	stems := map[string]bool{}
	for name := range named {
		stems[stem(name)] = true
	}
	var errs []error
	for _, f := range files {
		// A layer that is just being made or copied has its name and more.
		if stems[stem(f.Name())] {
			continue
		}
		if err := m.removeLayer(ctx, f.Name()); err != nil {
			errs = append(errs, err)
			continue
		}
		removed = append(removed, f.Name())
	}
	inUse, err := st.SeedDigests(ctx)
	if err != nil {
		return removed, errors.Join(append(errs, err)...)
	}
	seeds, err := m.seeds()
	if err != nil {
		return removed, errors.Join(append(errs, err)...)
	}
	if _, err := seeds.Prune(ctx, slices.Collect(maps.Keys(inUse))); err != nil {
		errs = append(errs, err)
	}
	return removed, errors.Join(errs...)
}

// stem is a layer's name without what an engine hangs on.
func stem(name string) string {
	s, _, _ := strings.Cut(name, ".")
	return s
}

// A frozen layer is one that nobody writes any more, with what it stands on, and
// the name of the machine's memory as of the same instant, "" without.
type frozen struct {
	chain         []string
	layer, memory string
	digest        string // memory's, of one that was saved earlier; "" for a new one
}

// freeze makes what the running machine's disk holds now a frozen layer.
//
// take does it, as supervisor.Client's Snapshot, given the paths of a new
// layer and, unless memory is "", of the memory of that name. keep records the
// result: until it has returned, this workspace's record names the new files.
func (h *held) freeze(ctx context.Context, memory string, take func(ctx context.Context, spare, memory string) (string, error), keep func(frozen) error) error {
	spare := newLayer(engine.DiskFormat(h.DiskFormat))
	intent := h.Intent
	err := h.update(ctx, func(ws *store.Workspace) error {
		ws.PendingLayer, ws.PendingMemory = spare, memory
		if intent == "" {
			ws.Intent = intentSnapshot
		}
		return nil
	})
	if err != nil {
		return err
	}
	failpoint.Hit("snapshot/recorded")
	path, err := take(ctx, h.m.state.Layer(spare), h.m.memoryPath(memory))
	failpoint.Hit("snapshot/frozen")
	f := frozen{chain: slices.Clone(h.Layers), layer: spare, memory: memory}
	copied := path == h.m.state.Layer(spare)
	if err == nil {
		if !copied {
			f.layer = h.ActiveLayer
		}
		err = keep(f)
	}
	if err != nil {
		if h.Intent == intentSnapshot {
			err = errors.Join(err, h.settle(context.WithoutCancel(ctx)))
		}
		return err
	}
	failpoint.Hit("snapshot/kept")
	err = h.update(ctx, func(ws *store.Workspace) error {
		ws.PendingLayer, ws.PendingMemory, ws.Intent = "", "", intent
		if !copied {
			ws.Layers, ws.ActiveLayer = append(ws.Layers, ws.ActiveLayer), spare
		}
		return nil
	})
	failpoint.Hit("snapshot/switched")
	return err
}

// layerSize is the room that a layer takes on the host's disk, in bytes.
func (m *Manager) layerSize(name string) int64 {
	if name == "" {
		return 0
	}
	return diskUsage(m.state.Layer(name))
}

// checkDiskFormat refuses a workspace whose disk another user or another
// version of its engine made.
func checkDiskFormat(ws *store.Workspace, c engine.Candidate) error {
	if ws.DiskFormat == string(c.Disk) {
		return nil
	}
	return api.WithHint(api.Errorf(api.ErrState, "the disk of workspace %s is of format %s, and %s uses %s here now", label(ws), ws.DiskFormat, c.Name(), c.Disk),
		"start it as the user who created it: gVisor keeps disks in another way without root")
}
