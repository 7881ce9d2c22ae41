package workspace

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sync/errgroup"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/guestkernel"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// machineRequest says what machine to start.
type machineRequest struct {
	ID          string
	Environment string
	// Digest, if set, is the very image that the machine stands on, whatever
	// the environment's name means by now.
	Digest                     string
	VCPUCount, MemMiB, DiskMiB int
	Disk                       string   // engine.MachineSpec.Disk
	Layers                     []string // engine.MachineSpec.Layers
	Memory                     string   // engine.MachineSpec.Memory
	Continues                  bool     // engine.MachineSpec.Continues
	Require                    api.Require
	TTL                        time.Duration // 0 for none
	Network                    string        // policy; "" is off
	Ephemeral                  bool
	Standby                    *supervisor.Standby
	// Hold are further files that must stay locked while the machine lives.
	Hold     []*os.File
	Progress func(api.Progress)
}

// machineSize are the fields of a request by which a machine's size is chosen.
type machineSize struct{ vcpus, memMiB, diskMiB *int }

// fill checks them and puts the defaults in.
func (s machineSize) fill() error {
	for _, n := range []struct {
		field        *int
		fallback     int
		most         int
		what, remedy string
	}{
		{s.vcpus, api.DefaultVCPUCount, api.MaxVCPUCount, "virtual processors", "--vcpu-count"},
		{s.memMiB, api.DefaultMemMiB, api.MaxMemMiB, "MiB of memory", "--mem-mib"},
		{s.diskMiB, 0, api.MaxDiskMiB, "MiB of disk", "--disk-mib"},
	} {
		if *n.field < 0 || *n.field > n.most {
			return api.WithHint(api.Errorf(api.ErrInvalid, "%d %s asked for", *n.field, n.what), "give %s a number from 1 to %d", n.remedy, n.most)
		}
		if *n.field == 0 {
			*n.field = n.fallback
		}
	}
	return nil
}

// freeFloor is how much space a machine must find for its disk to begin with. A
// guest whose host runs full loses what it writes.
const freeFloor = 64 << 20

// startMachine fetches what the engine needs and starts a supervisor, whose
// machine ends with the returned Process unless that is told to keep it. config
// is how the machine's image says to run things.
func (m *Manager) startMachine(ctx context.Context, c engine.Candidate, req machineRequest) (_ *supervisor.Process, config api.ImageConfig, err error) {
	binary, err := m.findBinary()
	if err != nil {
		return nil, config, err
	}
	agent, err := m.findAgent()
	if err != nil {
		return nil, config, err
	}
	if err := m.checkSpace(freeFloor); err != nil {
		return nil, config, err
	}
	dir := m.state.Machine(req.ID)
	spec := engine.MachineSpec{
		ID: req.ID, Dir: dir.EngineDir(), AgentPath: agent, Hostname: "pyro-" + req.ID, Ephemeral: req.Ephemeral,
		VCPUCount: req.VCPUCount, MemMiB: req.MemMiB, DiskMiB: req.DiskMiB, Disk: req.Disk, Layers: req.Layers, Memory: req.Memory, Continues: req.Continues,
		Templates: m.warmTemplates(),
	}
	image, kernel, err := m.fetch(ctx, c.Capabilities, req)
	if err != nil {
		return nil, config, err
	}
	// The supervisor inherits the locks: closing ours frees nothing that runs.
	defer image.Close()
	defer kernel.Close()
	hold := req.Hold
	if image != nil {
		spec.RootImage, config = image.Path, image.Config
		hold = append(hold, image.Lock)
	}
	if kernel != nil {
		spec.Kernel = kernel.Kernel
		if kernel.Lock != nil {
			hold = append(hold, kernel.Lock)
		}
	}
	var launcher []string
	if l, ok := c.Engine.(engine.Launcher); ok {
		if launcher, err = l.Launcher(); err != nil {
			return nil, config, err
		}
	}
	req.Progress(api.Progress{Phase: "boot", Message: "starting a guest: " + c.Detail})
	p, err := supervisor.Spawn(ctx, supervisor.SpawnOptions{
		Binary: binary, Launcher: launcher, Hold: hold,
		Config: supervisor.Config{
			Dir: dir.Path(), Engine: c.Name(), Require: req.Require, Spec: spec,
			NoteFile: m.state.AcceleratorFile(), TTL: req.TTL, Leased: true, Ephemeral: req.Ephemeral, Standby: req.Standby, Network: req.Network,
		},
	})
	return p, config, err
}

// templatesDir is where engines keep templates of booted guests.
func (m *Manager) templatesDir() string { return filepath.Join(m.cacheDir, "templates") }

// warmTemplates is what machines start from: templatesDir, or "" where
// PYRO_WARM=off forbids it.
func (m *Manager) warmTemplates() string {
	if os.Getenv("PYRO_WARM") == "off" {
		return ""
	}
	return m.templatesDir()
}

// checkSpace refuses to begin where the state directory has less than need left.
func (m *Manager) checkSpace(need int64) error {
	if free := freeBytes(m.state.Path()); free < need {
		return api.WithHint(api.Errorf(api.ErrExhausted, "only %s are free in the state directory %s", humanize.IBytes(uint64(free)), m.state.Path()),
			"free some space, or put it elsewhere with PYRO_STATE_DIR; pyro workspace prune and pyro env prune remove what nothing uses")
	}
	return nil
}

// fetch gets the image and the kernel, both at once, if the engine needs them.
func (m *Manager) fetch(ctx context.Context, caps engine.Capabilities, req machineRequest) (image *environment.Image, kernel *guestkernel.Kernel, err error) {
	g, ctx := errgroup.WithContext(ctx)
	progress := serialized(req.Progress)
	if caps.NeedsImage {
		g.Go(func() (err error) {
			if req.Digest != "" {
				image, err = m.environments.UseDigest(ctx, req.Environment, req.Digest)
				return err
			}
			image, err = m.environments.Use(ctx, req.Environment, progress)
			return err
		})
	}
	if caps.NeedsKernel {
		g.Go(func() (err error) {
			kernel, err = m.kernels.Use(ctx, progress)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		image.Close()
		kernel.Close()
		return nil, nil, err
	}
	return image, kernel, nil
}
