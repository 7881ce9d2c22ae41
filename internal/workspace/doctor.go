package workspace

import (
	"context"
	"errors"
	"fmt"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// lowSpace is how little free space is worth a word: an environment with room
// to build it, some 1.5 GiB for debian:12-build.
const lowSpace = 2 << 30

// Doctor reports what works here and what does not. It changes nothing.
// environmentName may be "".
func (m *Manager) Doctor(ctx context.Context, environmentName string) (*api.DoctorReport, error) {
	candidates := engine.ProbeAll(ctx, m.engines)
	best, err := engine.Choose(candidates, engine.Choice{})
	r := &api.DoctorReport{
		OK: err == nil, StateDir: m.state.Path(), CacheDir: m.cacheDir,
		StateFreeBytes: freeBytes(m.state.Path()), CacheFreeBytes: freeBytes(m.cacheDir),
		KernelInstalled: m.kernels.Installed(),
	}
	if err == nil {
		r.Selected = best.Name()
	}
	for _, c := range candidates {
		facts := append([]api.Fact{}, c.Facts...)
		if d, ok := c.Engine.(engine.Describer); ok {
			facts = append(d.Describe(ctx), facts...)
		}
		r.Engines = append(r.Engines, api.EngineReport{
			Engine: c.Name(), Available: c.Available, Isolation: c.Isolation, Detail: c.Detail, Remedy: c.Remedy,
			Facts: facts, Selected: r.OK && c.Name() == r.Selected,
		})
	}
	r.Facts = []api.Fact{
		spaceFact("cache", m.cacheDir, r.CacheFreeBytes),
		spaceFact("state", m.state.Path(), r.StateFreeBytes),
		programFact("pyro", m.findBinary),
		programFact("pyro-agent", m.findAgent),
		m.databaseFact(ctx),
	}
	if environmentName != "" {
		report, err := m.examine(ctx, environmentName)
		if err != nil {
			return nil, err
		}
		r.Environment = report
	}
	return r, nil
}

// databaseFact says whether the records of workspaces can be read.
func (m *Manager) databaseFact(ctx context.Context) api.Fact {
	f := api.Fact{Name: "workspaces"}
	st, _, err := m.storeOnce(ctx)
	var all []*store.Workspace
	if err == nil {
		all, err = st.List(ctx)
	}
	if err != nil {
		f.Value, f.Remedy = err.Error(), api.Hint(err)
		return f
	}
	running := 0
	for _, ws := range all {
		if supervisor.Alive(m.state.Machine(ws.WorkspaceID)) {
			running++
		}
	}
	f.OK, f.Value = true, fmt.Sprintf("%d, of which %d run", len(all), running)
	return f
}

// RepairState makes the database of workspaces again from the copies of their
// records, if it is damaged or lost.
func (m *Manager) RepairState(ctx context.Context) (*api.RepairResult, error) {
	if err := m.Close(); err != nil {
		return nil, err
	}
	r, err := store.Repair(ctx, m.state.Database(), store.Options{WorkspacesDir: m.state.WorkspacesDir(), Logger: m.log})
	if err != nil {
		return nil, fmt.Errorf("repairing the records of workspaces: %w", err)
	}
	out := &api.RepairResult{Repaired: !r.Healthy, MovedTo: r.MovedTo, Workspaces: r.Workspaces, Skipped: r.Skipped}
	if r.Damage != nil {
		out.Damage = r.Damage.Error()
	}
	if out.Skipped == nil {
		out.Skipped = []api.SkippedEntry{}
	}
	return out, nil
}

func (m *Manager) examine(ctx context.Context, name string) (*api.EnvironmentReport, error) {
	env, err := m.environments.Inspect(ctx, name)
	r := &api.EnvironmentReport{Name: name}
	switch {
	case errors.Is(err, api.ErrDamaged):
		r.State, r.Detail = api.EnvironmentStale, err.Error()
	case err != nil:
		return nil, err
	case !env.Installed:
		r.State, r.Detail = api.EnvironmentCold, "not built yet; pyro env pull "+name+" builds it"
	default:
		r.State = api.EnvironmentWarm
		r.Detail = fmt.Sprintf("installed, %s on disk", humanize.IBytes(uint64(env.SizeBytes)))
		if image, err := m.environments.UseDigest(ctx, name, env.Digest); err != nil {
			r.State, r.Detail = api.EnvironmentStale, err.Error()
		} else {
			image.Close()
		}
	}
	return r, nil
}

func spaceFact(what, path string, free int64) api.Fact {
	f := api.Fact{Name: what + " directory", OK: free >= lowSpace, Value: fmt.Sprintf("%s, %s free", path, humanize.IBytes(uint64(free)))}
	if !f.OK {
		f.Remedy = "free some space, or put it elsewhere with PYRO_CACHE_DIR and PYRO_STATE_DIR; pyro env prune removes what nothing uses"
	}
	return f
}

func programFact(name string, find func() (string, error)) api.Fact {
	path, err := find()
	if err != nil {
		return api.Fact{Name: name, Value: err.Error(), Remedy: api.Hint(err)}
	}
	return api.Fact{Name: name, Value: path, OK: true}
}

func freeBytes(path string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return 0
	}
	return int64(st.Bavail) * st.Bsize
}
