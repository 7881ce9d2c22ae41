package workspace

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sync/errgroup"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestkernel"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// maxCapture is how much of stdout and of stderr each a result carries where
// the caller gave no writer for it.
const maxCapture = 1 << 20

// Run starts a machine, runs one command in it, and ends the machine again,
// whatever happens, also when ctx ends or this process is killed. A command
// that fails or times out is a result.
func (m *Manager) Run(ctx context.Context, req api.RunRequest) (_ *api.ExecResult, err error) {
	if err := fill(&req, m.engine); err != nil {
		return nil, err
	}
	m.reap(ctx)
	candidate, err := engine.Pick(ctx, m.engines, engine.Choice{
		Engine: req.Engine, Require: req.Require, AllowHostCompat: req.AllowHostCompat,
	})
	if err != nil {
		return nil, err
	}
	if _, err := m.environments.Inspect(ctx, req.Environment); err != nil {
		return nil, err
	}
	p, err := m.startMachine(ctx, candidate, req)
	if err != nil {
		return nil, err
	}
	defer func() {
		// Ending takes milliseconds; the limit is for a supervisor that hangs.
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		err = errors.Join(err, p.Shutdown(end))
	}()
	for _, note := range p.Status.Notes {
		req.Progress(api.Progress{Phase: "note", Message: note})
	}
	req.Progress(api.Progress{Phase: "ready", Message: fmt.Sprintf("guest ready in %.1f s", float64(p.Status.BootMS)/1000)})
	res, err := runCommand(ctx, p, req)
	if err != nil {
		return nil, explain(ctx, p, err)
	}
	res.Environment = req.Environment
	res.Engine, res.Isolation, res.ExecutionMode = p.Status.Engine, p.Status.Isolation, executionMode(p.Status.Isolation)
	return res, nil
}

// fill checks a request and puts the defaults in.
func fill(r *api.RunRequest, defaultEngine string) error {
	if len(r.Argv) == 0 || r.Argv[0] == "" {
		return api.WithHint(api.Errorf(api.ErrInvalid, "no command was given"), "put the command after --, as in: pyro run %s -- git --version", orText(r.Environment, "debian:12"))
	}
	if r.Environment == "" {
		return api.WithHint(api.Errorf(api.ErrInvalid, "no environment was given"), "name one, such as debian:12; pyro env list shows them")
	}
	for _, n := range []struct {
		field        *int
		fallback     int
		what, remedy string
	}{
		{&r.VCPUCount, api.DefaultVCPUCount, "virtual processors", "--vcpu-count"},
		{&r.MemMiB, api.DefaultMemMiB, "MiB of memory", "--mem-mib"},
		{&r.DiskMiB, 0, "MiB of disk", "--disk-mib"},
	} {
		if *n.field < 0 {
			return api.WithHint(api.Errorf(api.ErrInvalid, "%d %s asked for", *n.field, n.what), "give %s a positive number", n.remedy)
		}
		if *n.field == 0 {
			*n.field = n.fallback
		}
	}
	if r.Timeout == 0 {
		r.Timeout = api.DefaultTimeout
	}
	if r.TTL == 0 {
		r.TTL = api.DefaultTTL
	}
	r.Timeout, r.TTL = max(r.Timeout, 0), max(r.TTL, 0)
	if r.Engine == "" {
		r.Engine = defaultEngine
	}
	if r.Progress == nil {
		r.Progress = func(api.Progress) {}
	}
	return nil
}

// freeFloor is how much space a machine must find for its disk to begin with. A
// guest whose host runs full loses what it writes.
const freeFloor = 64 << 20

// startMachine fetches what the engine needs and starts a supervisor.
func (m *Manager) startMachine(ctx context.Context, c engine.Candidate, req api.RunRequest) (*supervisor.Process, error) {
	binary, err := m.findBinary()
	if err != nil {
		return nil, err
	}
	agent, err := m.findAgent()
	if err != nil {
		return nil, err
	}
	if free := freeBytes(m.state.Path()); free < freeFloor {
		return nil, api.WithHint(api.Errorf(api.ErrExhausted, "only %s are free in the state directory %s", humanize.IBytes(uint64(free)), m.state.Path()),
			"free some space, or put it elsewhere with PYRO_STATE_DIR; pyro env prune removes what nothing uses")
	}
	id := newID()
	dir := m.state.Machine(id)
	spec := engine.MachineSpec{
		ID: id, Dir: dir.EngineDir(), AgentPath: agent, Hostname: "pyro-" + id, Ephemeral: true,
		VCPUCount: req.VCPUCount, MemMiB: req.MemMiB, DiskMiB: req.DiskMiB,
	}
	image, kernel, err := m.fetch(ctx, c.Capabilities, req)
	if err != nil {
		return nil, err
	}
	// The supervisor inherits the locks: closing ours frees nothing that runs.
	defer image.Close()
	defer kernel.Close()
	var hold []*os.File
	if image != nil {
		spec.RootImage = image.Path
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
			return nil, err
		}
	}
	req.Progress(api.Progress{Phase: "boot", Message: "starting a guest: " + c.Detail})
	return supervisor.Spawn(ctx, supervisor.SpawnOptions{
		Binary: binary, Launcher: launcher, Hold: hold,
		Config: supervisor.Config{
			Dir: dir.Path(), Engine: c.Name(), Require: req.Require, Spec: spec,
			NoteFile: m.state.AcceleratorFile(), TTL: req.TTL, Leased: true, Ephemeral: true,
		},
	})
}

// fetch gets the image and the kernel, both at once, if the engine needs them.
func (m *Manager) fetch(ctx context.Context, caps engine.Capabilities, req api.RunRequest) (image *environment.Image, kernel *guestkernel.Kernel, err error) {
	g, ctx := errgroup.WithContext(ctx)
	progress := serialized(req.Progress)
	if caps.NeedsImage {
		g.Go(func() (err error) {
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

// runCommand runs the request's command on a machine that is up.
func runCommand(ctx context.Context, p *supervisor.Process, req api.RunRequest) (*api.ExecResult, error) {
	stdout, stderr := &capture{to: req.Stdout}, &capture{to: req.Stderr}
	ex := guestproto.ExecRequest{Argv: req.Argv, Env: req.Env, TimeoutSeconds: req.Timeout.Seconds(), Stdin: req.Stdin != nil}
	if len(req.Argv) == 1 {
		ex.Argv, ex.Command = nil, req.Argv[0]
	}
	client := guestclient.New(p.DialGuest, guestclient.Options{Patience: time.Minute * time.Duration(min(3, p.Status.TimeScale))})
	reply, err := client.Exec(ctx, ex, guestclient.ExecIO{Stdin: req.Stdin, Stdout: stdout, Stderr: stderr})
	if err != nil {
		return nil, err
	}
	return &api.ExecResult{
		Command: commandText(req.Argv), Cwd: "/workspace",
		ExitCode: reply.ExitCode, TimedOut: reply.TimedOut, OOMKilled: reply.OOMKilled, DurationMS: reply.DurationMS,
		Stdout: stdout.String(), StdoutTruncated: stdout.truncated,
		Stderr: stderr.String(), StderrTruncated: stderr.truncated,
	}, nil
}

// explain finds out why a command's connection broke: most often the machine
// died, and its console knows more than the connection.
func explain(ctx context.Context, p *supervisor.Process, err error) error {
	if ctx.Err() != nil || !errors.Is(err, api.ErrUnavailable) {
		return err
	}
	if reason, tail := p.Postmortem(ctx); reason != "" {
		text := "the guest ended while the command ran: " + reason
		if len(tail) > 0 {
			text += "; its console ends:\n  " + strings.Join(tail, "\n  ")
		}
		return api.WithHint(api.Errorf(api.ErrUnavailable, "%s", text), "%s", endHint(reason))
	}
	return err
}

func endHint(reason string) string {
	switch reason {
	case supervisor.ReasonExpired:
		return "raise --ttl-seconds"
	case engine.ReasonHostDiskFull:
		return "free space on the host, where PYRO_STATE_DIR lies"
	}
	return "run it again; if it ran out of memory, raise --mem-mib"
}

func executionMode(i api.Isolation) string {
	if i == api.IsolationNone {
		return api.ModeHostCompat
	}
	return api.ModeGuest
}

func newID() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b[:])
}

func orText(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}
