package gvisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
)

// Name is the engine's word in flags and answers.
const Name = "gvisor"

// Options say how the engine finds its runtime. The zero value is the usual.
type Options struct {
	// Runtime is the runsc to use, "" for the value of PYRO_RUNSC and, where
	// that is empty too, the first that serves: pyro-runsc beside this program,
	// pyro-runsc on PATH, runsc on PATH.
	Runtime string
	// Logger hears what Probe and clean-up meet; nil for nothing. A machine
	// has the logger of its MachineSpec.
	Logger *slog.Logger
}

// Engine starts gVisor sandboxes.
type Engine struct {
	options Options
}

var (
	_ engine.Engine       = (*Engine)(nil)
	_ engine.Reaper       = (*Engine)(nil)
	_ engine.LayerMerger  = (*Engine)(nil)
	_ engine.LayerLimiter = (*Engine)(nil)
)

// New returns the engine. It looks at nothing yet.
func New(o Options) *Engine {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Engine{options: o}
}

// Name implements engine.Engine.
func (e *Engine) Name() string { return Name }

// runtime finds the runsc to use.
func (e *Engine) runtime(ctx context.Context) (runsc, error) {
	explicit := e.options.Runtime
	if explicit == "" {
		explicit = os.Getenv(RuntimeVariable)
	}
	self, err := os.Executable()
	if err != nil {
		self = ""
	}
	return findRuntime(ctx, explicit, self)
}

// Reap removes what machines left behind whose supervisor was killed: their
// cgroups, and in them whatever should still run. It never touches a machine
// whose supervisor lives. Everything else of a machine ends with its processes.
func (e *Engine) Reap() { sweepCgroups() }

// MaxLayers implements [engine.LayerLimiter].
func (e *Engine) MaxLayers() int { return maxLayers }

// validID is what runsc accepts as a container's id and what is safe in the
// name of a cgroup, up to maxID bytes.
var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]*$`)

const maxID = 64

// Start implements engine.Engine.
func (e *Engine) Start(ctx context.Context, spec engine.MachineSpec) (engine.Machine, error) {
	m, err := e.start(ctx, spec)
	if err == nil && spec.Memory != "" {
		if err = m.resumed(ctx, spec); err != nil {
			err = errors.Join(fmt.Errorf("going on from the saved memory: %w", err), m.Stop(context.WithoutCancel(ctx), 0))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("starting a gvisor sandbox: %w", err)
	}
	return m, nil
}

func (e *Engine) start(ctx context.Context, spec engine.MachineSpec) (_ *machine, err error) {
	if len(spec.ID) > maxID || !validID.MatchString(spec.ID) {
		return nil, api.Errorf(api.ErrInvalid, "machine id %q is not up to %d letters, digits, - and _", spec.ID, maxID)
	}
	rt, err := e.runtime(ctx)
	if err != nil {
		return nil, err
	}
	sweepCgroups()

	var undo cleanup
	defer func() {
		if err != nil {
			undo.run()
		}
	}()

	rootImage, err := os.Open(spec.RootImage)
	if err != nil {
		return nil, fmt.Errorf("opening the environment's image: %w", err)
	}
	defer rootImage.Close() // its loop device keeps what it needs
	if os.Geteuid() != 0 {
		return nil, api.WithHint(api.Errorf(api.ErrInternal, "the supervisor was not started behind Engine.Launcher"), "report this as a fault of pyro")
	}
	parts, err := openParts(ctx, rootImage, spec)
	if err != nil {
		return nil, err
	}
	undo.add(parts.close)

	top, err := chooseStage(stageCandidates,
		append([]string{rt.path, spec.AgentPath, spec.Dir, spec.RootImage, parts.layer.Name()}, spec.Layers...))
	if err != nil {
		return nil, err
	}
	lim, err := newLimits(spec.ID, spec.MemMiB, spec.VCPUCount)
	if err != nil {
		return nil, err
	}
	undo.add(lim.remove)
	ns, err := newNamespace()
	if err != nil {
		return nil, err
	}
	undo.add(ns.close)

	stopping, markStopping := context.WithCancel(context.Background())
	m := &machine{
		stopping: stopping, markStopping: markStopping,
		runsc: rt, ns: ns, stage: stage(top), id: spec.ID, ephemeral: spec.Ephemeral, memMiB: spec.MemMiB, limits: lim,
		parts: parts, logger: spec.Logger,
		attached: make(chan struct{}), ended: make(chan struct{}), gone: make(chan struct{}),
	}
	token, how, image, err := m.beginning(spec)
	if err != nil {
		return nil, err
	}
	defer image.Close()
	files, err := guestFiles()
	if err != nil {
		return nil, err
	}
	undo.add(func() { _ = ns.do(m.stage.unmountRoot) })
	var listener net.Listener
	err = ns.do(func() error {
		if err := m.stage.mount(); err != nil {
			return err
		}
		if err := parts.mount(m.stage); err != nil {
			return err
		}
		if err := bindFile(spec.AgentPath, m.stage.agent()); err != nil {
			return fmt.Errorf("giving the guest agent to the sandbox: %w", err)
		}
		if listener, err = m.stage.listen(); err != nil {
			return err
		}
		if err := m.stage.writeIDs(m.ids); err != nil {
			return err
		}
		if err := m.stage.showSize(spec.MemMiB, spec.VCPUCount); err != nil {
			return err
		}
		return m.stage.writeBundle(spec.Hostname, token, files)
	})
	if err != nil {
		return nil, err
	}
	undo.add(func() { listener.Close() })

	out, w, err := newConsole(spec.Console)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	m.console = out
	m.run = rt.command(m.stage, parts.ownMiB, append(how, "--bundle", m.stage.bundle(), "--pid-file", m.stage.pid(), m.id)...)
	if image != nil {
		m.run.ExtraFiles = []*os.File{image}
	}
	m.run.Stdout, m.run.Stderr = w, w
	// A session of its own: a Ctrl-C on our terminal is for us.
	m.run.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := ns.start(m.run, lim); err != nil {
		w.Close()
		out.close()
		return nil, fmt.Errorf("running %s: %w", rt.path, err)
	}
	attachCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	m.detach = cancel
	go func() {
		m.attErr = m.begin(attachCtx, listener, token)
		m.children() // while runsc run, by which they are found, lives
		if err := lim.settle(); err != nil && m.attErr == nil {
			m.logger.Warn("setting the machine's limits", "err", err)
		}
		close(m.attached)
	}()
	go m.watch()
	return m, nil
}

// beginning returns the token that the guest agent will show first and how runsc
// begins: with a new sandbox, or with a saved one, whose directory it needs as its
// descriptor 3.
func (m *machine) beginning(spec engine.MachineSpec) (token string, how []string, image *os.File, err error) {
	m.ids = newIDs()
	if spec.Memory == "" {
		return newToken(), []string{"run"}, nil, nil
	}
	rec, err := m.runsc.readImageRecord(spec.Memory)
	if err != nil {
		return "", nil, nil, err
	}
	if spec.Continues {
		m.ids = rec.IDs
	}
	if image, err = os.Open(spec.Memory); err != nil {
		return "", nil, nil, fmt.Errorf("opening the saved memory: %w", err)
	}
	return rec.Token, []string{"restore", "--image-path=/proc/self/fd/3"}, image, nil
}

// parts are what a machine's root file system is made of besides its
// environment, open and locked.
type parts struct {
	layer  *layer
	lowers []*os.File        // the layers between, the lowest first
	mount  func(stage) error // runs in the namespace
	ownMiB int64             // how large a disk the sandbox keeps for itself in layer, 0 for none
}

// openParts prepares them: images as root, directories in a user namespace.
func openParts(ctx context.Context, rootImage *os.File, spec engine.MachineSpec) (_ parts, err error) {
	var p parts
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if len(spec.Layers) > maxLayers {
		return p, api.Errorf(api.ErrExhausted, "the disk stands on %d layers, the limit is %d", len(spec.Layers), maxLayers)
	}
	sizeMiB, err := layerSize(spec.DiskMiB, rootImage)
	if err != nil {
		return p, err
	}
	if spec.Ephemeral {
		if spec.Disk != "" || len(spec.Layers) > 0 || spec.Memory != "" {
			return p, api.Errorf(api.ErrInvalid, "a machine for one use starts with its environment alone")
		}
		p.ownMiB = sizeMiB
	}
	if inUserNamespace() {
		tree, err := treeOf(ctx, rootImage)
		if err != nil {
			return p, err
		}
		disk := cmp.Or(spec.Disk, filepath.Join(spec.Dir, LayerDir))
		if err := p.openLowers(ctx, disk, spec.Layers, unix.O_DIRECTORY); err != nil {
			return p, err
		}
		if p.layer, err = openLayerDir(ctx, disk); err != nil {
			return p, err
		}
		p.mount = func(s stage) error { return s.mountTree(tree, disk, p.lowers) }
		return p, nil
	}
	if spec.Ephemeral {
		if p.layer, err = openLayerDir(ctx, filepath.Join(spec.Dir, LayerDir)); err != nil {
			return p, err
		}
		p.mount = func(s stage) error { return s.mountEphemeral(rootImage, p.layer) }
		return p, nil
	}
	disk := cmp.Or(spec.Disk, filepath.Join(spec.Dir, LayerFile))
	if err := p.openLowers(ctx, disk, spec.Layers, 0); err != nil {
		return p, err
	}
	for _, f := range p.lowers {
		if err := checkFrozen(f); err != nil {
			return p, err
		}
	}
	if p.layer, err = openLayer(ctx, disk, sizeMiB); err != nil {
		return p, err
	}
	p.mount = func(s stage) error { return s.mountRoot(rootImage, p.layer, p.lowers) }
	return p, nil
}

// openLowers opens the layers that disk stands on, and locks them against being
// somebody's disk.
func (p *parts) openLowers(ctx context.Context, disk string, paths []string, flags int) error {
	for i, path := range paths {
		if path == disk || slices.Contains(paths[:i], path) {
			return api.Errorf(api.ErrInvalid, "the layer %s is in the disk twice", path)
		}
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|flags, 0)
		if err != nil {
			return fmt.Errorf("opening layer %d of the disk: %w", i+1, err)
		}
		p.lowers = append(p.lowers, f)
		st, err := f.Stat()
		if err != nil {
			return fmt.Errorf("opening layer %d of the disk: %w", i+1, err)
		}
		if flags == 0 && !st.Mode().IsRegular() {
			return api.Errorf(api.ErrDamaged, "layer %d of the disk, %s, is not a file", i+1, path)
		}
		if err := lockWait(ctx, f, unix.LOCK_SH); err != nil {
			return err
		}
	}
	return nil
}

// checkFrozen refuses an image that is no layer to stand on: it must be as an
// unmount leaves it, because nobody will replay its journal.
func checkFrozen(f *os.File) error {
	dirty, err := needsRecovery(f)
	if err != nil {
		return fmt.Errorf("reading a layer of the disk: %w", err)
	}
	if dirty {
		return api.Errorf(api.ErrDamaged, "the layer %s was not frozen: its journal needs recovery", f.Name())
	}
	return nil
}

// close gives the layers up and waits for the kernel to do so with the writable
// one.
func (p *parts) close() {
	for _, f := range p.lowers {
		f.Close()
	}
	if p.layer != nil {
		_ = p.layer.release()
	}
}

// bindFile makes the file at path visible at target, where its mount keeps it
// whatever happens to path later. By path, because a descriptor opened outside
// the namespace is of another namespace's mount and cannot be bound.
func bindFile(path, target string) error {
	if err := os.WriteFile(target, nil, 0o500); err != nil {
		return err
	}
	return unix.Mount(path, target, "", unix.MS_BIND, "")
}

// cleanup is a stack of what to undo when a start fails half-way.
type cleanup []func()

func (c *cleanup) add(f func()) { *c = append(*c, f) }

func (c *cleanup) run() {
	for i := len(*c) - 1; i >= 0; i-- {
		(*c)[i]()
	}
}

// Runtime returns the path of the runsc that Start would use.
func (e *Engine) Runtime(ctx context.Context) (string, error) {
	rt, err := e.runtime(ctx)
	return rt.path, err
}
