package workspace

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

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
	if err := refuseUser(candidate.Isolation, req.User); err != nil {
		return nil, err
	}
	if _, err := m.environments.Inspect(ctx, req.Environment); err != nil {
		return nil, err
	}
	p, image, err := m.startMachine(ctx, candidate, machineRequest{
		ID: newID(), Environment: req.Environment, VCPUCount: req.VCPUCount, MemMiB: req.MemMiB, DiskMiB: req.DiskMiB,
		Require: req.Require, TTL: req.TTL, Network: req.NetworkPolicy, Ephemeral: true, Progress: req.Progress,
	})
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
	image.User = cmp.Or(req.User, image.User)
	res, err := runCommand(ctx, p, req, image)
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
		return api.WithHint(api.Errorf(api.ErrInvalid, "no command was given"), "put the command after --, as in: pyro run %s -- git --version", cmp.Or(r.Environment, "debian:12"))
	}
	if r.Environment == "" {
		return api.WithHint(api.Errorf(api.ErrInvalid, "no environment was given"), "name one, such as debian:12; pyro env list shows them")
	}
	size := machineSize{&r.VCPUCount, &r.MemMiB, &r.DiskMiB}
	if err := size.fill(); err != nil {
		return err
	}
	if r.User != "" {
		if err := api.CheckUser(r.User); err != nil {
			return err
		}
	}
	switch r.NetworkPolicy {
	case "":
		r.NetworkPolicy = api.NetworkOff
	case api.NetworkOff, api.NetworkEgress:
	default:
		return api.WithHint(api.Errorf(api.ErrInvalid, "unknown network policy %q", r.NetworkPolicy), "use off or egress")
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

// runCommand runs the request's command on a machine that is up, as its image
// says.
func runCommand(ctx context.Context, p *supervisor.Process, req api.RunRequest, image api.ImageConfig) (*api.ExecResult, error) {
	client := guestclient.New(p.DialGuest, guestclient.Options{Patience: patience(p.Status.TimeScale)})
	if !api.IsRoot(image.User) {
		if err := client.OwnWorkspace(ctx, image.User); err != nil {
			return nil, err
		}
	}
	c := command{argv: req.Argv, env: image.Environ(req.Env), user: image.User, cwd: image.WorkingDir, timeout: req.Timeout, stdin: req.Stdin,
		stdout: recorder{to: req.Stdout}, stderr: recorder{to: req.Stderr}}
	return c.run(ctx, client)
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

// patience is how long a guest may take for one answer.
func patience(timeScale int) time.Duration {
	return time.Minute * time.Duration(max(1, min(3, timeScale)))
}

// idLength is how many characters an id has.
const idLength = 12

func newID() string {
	var b [idLength / 2]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	return hex.EncodeToString(b[:])
}
