package workspace

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/all"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/guestkernel"
	"github.com/pyro-mcp/pyro/internal/seed"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// Options configure a Manager. Empty fields mean the defaults, which the
// environment variables named beside them change.
type Options struct {
	StateDir string // PYRO_STATE_DIR
	CacheDir string // PYRO_CACHE_DIR
	// Binary is the pyro program, which runs the supervisors: this program if
	// it is pyro, else found on PATH (PYRO_BINARY).
	Binary string
	// Agent is the guest agent: beside Binary, else on PATH (PYRO_AGENT).
	Agent string
	// Engine is used where a request names none (PYRO_ENGINE), "auto" if empty.
	Engine string
	Logger *slog.Logger
}

// A Manager does the work. Its methods may be called concurrently.
type Manager struct {
	state        *statedir.Dir
	cacheDir     string
	binary       string
	agent        string
	engine       string
	engines      []engine.Engine
	environments *environment.Store
	kernels      *guestkernel.Store
	log          *slog.Logger

	// What only workspaces need is opened with the first of them.
	openOnce  sync.Mutex
	openStore *store.Store
	openSeeds *seed.Store
}

// MCPTokenFile is described at statedir.Dir.
func (m *Manager) MCPTokenFile() string { return m.state.MCPTokenFile() }

// New opens the state and cache directories, clears up after processes that were
// killed, and returns a Manager.
func New(ctx context.Context, o Options) (*Manager, error) {
	m := &Manager{
		engine: cmp.Or(o.Engine, os.Getenv("PYRO_ENGINE"), engine.Auto),
		log:    cmp.Or(o.Logger, slog.New(slog.DiscardHandler)),
		binary: cmp.Or(o.Binary, os.Getenv("PYRO_BINARY")),
		agent:  cmp.Or(o.Agent, os.Getenv("PYRO_AGENT")),
	}
	stateDir, err := orDefault(o.StateDir, statedir.DefaultState)
	if err != nil {
		return nil, err
	}
	if m.cacheDir, err = orDefault(o.CacheDir, statedir.DefaultCache); err != nil {
		return nil, err
	}
	if m.state, err = statedir.Open(stateDir); err != nil {
		return nil, err
	}
	if err := statedir.MakePrivate(m.cacheDir); err != nil {
		return nil, fmt.Errorf("opening cache directory: %w", err)
	}
	mirror := os.Getenv("PYRO_DEBIAN_MIRROR")
	m.environments, err = environment.Open(environment.Options{
		CacheDir: m.cacheDir, Logger: m.log, DebianMirror: mirror, RegistryMirror: os.Getenv("PYRO_REGISTRY_MIRROR"),
	})
	if err != nil {
		return nil, err
	}
	m.kernels, err = guestkernel.Open(guestkernel.Options{
		CacheDir: m.cacheDir, Logger: m.log, DebianMirror: mirror,
		Image: os.Getenv("PYRO_KERNEL"), ModulesDir: os.Getenv("PYRO_KERNEL_MODULES"),
	})
	if err != nil {
		return nil, err
	}
	m.engines = all.Engines(m.state.AcceleratorFile(), m.log)
	m.reap(ctx)
	return m, nil
}

// store returns the database of workspaces, opened. The first call also deletes
// the workspaces whose time is over.
func (m *Manager) store(ctx context.Context) (*store.Store, error) {
	st, opened, err := m.storeOnce(ctx)
	if opened {
		if _, err := m.expire(ctx); err != nil {
			m.log.Warn("deleting workspaces whose time is over", "error", err)
		}
	}
	return st, err
}

func (m *Manager) storeOnce(ctx context.Context) (_ *store.Store, opened bool, _ error) {
	m.openOnce.Lock()
	defer m.openOnce.Unlock()
	if m.openStore != nil {
		return m.openStore, false, nil
	}
	st, err := m.openDatabase(ctx)
	if err != nil {
		return nil, false, err
	}
	m.openStore = st
	return st, true, nil
}

// ballastSize is what SQLite needs to open a database and to delete from it, with
// room to spare: its index of the write-ahead log is some 32 KiB.
const ballastSize = 4 << 20

// openDatabase opens the database of workspaces, on a full disk too: who wants to
// delete some to make room must be able to.
func (m *Manager) openDatabase(ctx context.Context) (*store.Store, error) {
	options := store.Options{WorkspacesDir: m.state.WorkspacesDir(), Logger: m.log}
	// There may be room to open it and none to write.
	if freeBytes(m.state.Path()) < ballastSize/4 {
		_ = os.Remove(m.state.Ballast())
	}
	st, err := store.Open(ctx, m.state.Database(), options)
	if errors.Is(err, api.ErrExhausted) && os.Remove(m.state.Ballast()) == nil {
		return store.Open(ctx, m.state.Database(), options)
	}
	if err == nil && freeBytes(m.state.Path()) > freeFloor {
		m.takeBallast()
	}
	return st, err
}

// takeBallast makes the ballast where it is missing. Without it pyro works, too.
func (m *Manager) takeBallast() {
	f, err := os.OpenFile(m.state.Ballast(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), 0, 0, ballastSize); err != nil {
		m.log.Debug("taking ballast", "error", err)
		_ = os.Remove(f.Name())
	}
}

// seeds returns the store of seeds, opened.
func (m *Manager) seeds() (*seed.Store, error) {
	m.openOnce.Lock()
	defer m.openOnce.Unlock()
	if m.openSeeds == nil {
		s, err := seed.Open(m.state.SeedsDir(), m.log)
		if err != nil {
			return nil, err
		}
		m.openSeeds = s
	}
	return m.openSeeds, nil
}

// Close gives back what the Manager has opened. Its methods must have returned.
func (m *Manager) Close() error {
	m.openOnce.Lock()
	defer m.openOnce.Unlock()
	if m.openStore == nil {
		return nil
	}
	err := m.openStore.Close()
	m.openStore = nil
	return err
}

func orDefault(given string, fallback func(func(string) string) (string, error)) (string, error) {
	if given != "" {
		return filepath.Abs(given)
	}
	return fallback(os.Getenv)
}

// Environments gives the catalog and the images.
func (m *Manager) Environments() *environment.Store { return m.environments }

// RemoveEnvironment takes an installed environment's name away, and its files
// unless a workspace was made from them.
func (m *Manager) RemoveEnvironment(ctx context.Context, name string) (api.PruneResult, error) {
	st, err := m.store(ctx)
	if err != nil {
		return api.PruneResult{}, err
	}
	inUse, err := st.EnvironmentDigests(ctx)
	if err != nil {
		return api.PruneResult{}, err
	}
	return m.environments.Remove(ctx, name, slices.Collect(maps.Keys(inUse)))
}

// Prune removes what nothing uses any more: abandoned machines, and images and
// kernels that are damaged, out of date or left over from interrupted builds;
// with all, every image that no machine uses.
func (m *Manager) Prune(ctx context.Context, all bool) (api.PruneResult, error) {
	m.reap(ctx)
	st, err := m.store(ctx)
	if err != nil {
		return api.PruneResult{}, err
	}
	inUse, err := st.EnvironmentDigests(ctx)
	if err != nil {
		return api.PruneResult{}, err
	}
	images, err := m.environments.Prune(ctx, environment.PruneOptions{All: all, InUse: slices.Collect(maps.Keys(inUse))})
	if err != nil {
		return api.PruneResult{}, err
	}
	kernels, err := m.kernels.Prune(ctx, nil)
	if err != nil {
		return api.PruneResult{}, err
	}
	res := api.PruneResult{
		Removed:    append(images.Removed, kernels.Removed...),
		FreedBytes: images.FreedBytes + kernels.FreedBytes,
	}
	for _, e := range m.engines {
		w, ok := e.(engine.Warmer)
		if !ok {
			continue
		}
		freed, err := w.PruneTemplates(ctx, m.templatesDir(), all)
		if err != nil {
			return res, err
		}
		if freed > 0 {
			res.Removed = append(res.Removed, "templates of "+e.Name())
			res.FreedBytes += freed
		}
	}
	return res, nil
}

// reap clears up after processes that were killed. What it cannot clear up now
// it will meet again: that must not stop what the user asked for.
func (m *Manager) reap(ctx context.Context) {
	removed, err := supervisor.Reap(ctx, m.state)
	if err != nil {
		m.log.Warn("clearing up abandoned machines", "error", err)
	}
	if len(removed) > 0 {
		m.log.Info("cleared up abandoned machines", "machines", removed)
	}
	for _, e := range m.engines {
		if r, ok := e.(engine.Reaper); ok {
			r.Reap()
		}
	}
}

// findBinary returns the pyro program.
func (m *Manager) findBinary() (string, error) {
	return find(m.binary, "pyro", "PYRO_BINARY")
}

// findAgent returns the guest agent's program.
func (m *Manager) findAgent() (string, error) {
	return find(m.agent, "pyro-agent", "PYRO_AGENT")
}

// find returns the program called name: where an option said, in the place of
// this program or beside it, or on PATH.
func find(option, name, variable string) (string, error) {
	if option != "" {
		abs, err := filepath.Abs(option)
		if err == nil {
			_, err = os.Stat(abs)
		}
		if err != nil {
			return "", api.WithHint(api.Errorf(api.ErrNotFound, "%s as configured: %v", name, err), "correct %s", variable)
		}
		return abs, nil
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if st, err := os.Stat(beside); err == nil && st.Mode().IsRegular() {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err == nil {
		return filepath.Abs(path)
	}
	if errors.Is(err, exec.ErrNotFound) {
		return "", api.WithHint(api.Errorf(api.ErrNotFound, "the program %s is neither beside this one nor on PATH", name),
			"install pyro completely (make install), or name it with %s", variable)
	}
	return "", fmt.Errorf("looking for %s: %w", name, err)
}
