package workspace

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// proof is what a prepare remembers of having worked.
type proof struct {
	Environment string    `json:"environment"`
	Digest      string    `json:"digest"`
	Engine      string    `json:"engine"`
	At          time.Time `json:"at"`
}

// Prepare gets an environment and proves on a workspace that it throws away that
// create, exec, reset and delete work with it here. What an earlier call has
// proven it does not prove again.
func (m *Manager) Prepare(ctx context.Context, req api.PrepareRequest) (*api.PrepareResult, error) {
	req.Environment = cmp.Or(req.Environment, environment.Default)
	progress := orSilent(req.Progress)
	if _, err := m.environments.Inspect(ctx, req.Environment); err != nil {
		return nil, err
	}
	c, err := engine.Pick(ctx, m.engines, engine.Choice{
		Engine: cmp.Or(req.Engine, m.engine), Require: req.Require, AllowHostCompat: req.AllowHostCompat,
	})
	if err != nil {
		return nil, err
	}
	res := &api.PrepareResult{Environment: req.Environment, Engine: c.Name(), Isolation: c.Isolation, Steps: []api.PrepareStep{}}
	step := func(name string, do func() error) error {
		began := time.Now()
		err := do()
		res.Steps = append(res.Steps, api.PrepareStep{Name: name, DurationMS: time.Since(began).Milliseconds()})
		if err != nil {
			return fmt.Errorf("preparing %s: %s: %w", req.Environment, name, err)
		}
		return nil
	}
	if c.NeedsImage {
		err := step("pull", func() error {
			env, err := m.environments.Pull(ctx, req.Environment, progress)
			res.Digest = env.Digest
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	var known proof
	file := m.state.ProofFile(c.Name(), res.Digest)
	if !req.Force && statedir.ReadJSON(file, &known) == nil && known.Digest == res.Digest && known.Engine == c.Name() {
		return res, nil
	}
	res.Proven = true
	if err := m.prove(ctx, c, req, progress, step); err != nil {
		return nil, err
	}
	if err := statedir.MakePrivate(filepath.Dir(file)); err != nil {
		return nil, err
	}
	return res, statedir.WriteJSON(file, proof{req.Environment, res.Digest, c.Name(), time.Now().UTC()})
}

// prove walks a workspace through its life.
func (m *Manager) prove(ctx context.Context, c engine.Candidate, req api.PrepareRequest, progress func(api.Progress), step func(string, func() error) error) (err error) {
	var id string
	err = step("create", func() error {
		ws, err := m.CreateWorkspace(ctx, api.CreateRequest{
			Environment: req.Environment, NetworkPolicy: req.NetworkPolicy, Engine: c.Name(), Require: req.Require, AllowHostCompat: req.AllowHostCompat, Progress: progress,
		})
		if err == nil {
			id = ws.WorkspaceID
		}
		return err
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_, _ = m.DeleteWorkspace(context.WithoutCancel(ctx), id)
		}
	}()
	for _, s := range []struct {
		name string
		do   func() error
	}{
		{"exec", func() error {
			r, err := m.Exec(ctx, id, api.ExecRequest{Argv: []string{"echo prepared > proof && cat proof"}})
			if err == nil && (r.ExitCode != 0 || strings.TrimSpace(r.Stdout) != "prepared") {
				err = api.Errorf(api.ErrUnavailable, "a command exited with %d and printed %q", r.ExitCode, r.Stdout+r.Stderr)
			}
			return err
		}},
		{"reset", func() error {
			if _, err := m.Reset(ctx, id, "", progress); err != nil {
				return err
			}
			_, err := m.ReadFile(ctx, id, "proof", 0, 1)
			if err == nil {
				return api.Errorf(api.ErrInternal, "a file of before the reset is still there")
			}
			return nil
		}},
		{"delete", func() error {
			_, err := m.DeleteWorkspace(ctx, id)
			return err
		}},
	} {
		if err := step(s.name, s.do); err != nil {
			return err
		}
	}
	return nil
}
