// Package pyro gives programs disposable isolated Linux workspaces.
//
// A [Client] is the whole interface; the pyro command line is written on
// top of nothing else. Methods are named after the commands, take a context
// first, and return types of package api, whose JSON is the product's JSON.
//
//	client, err := pyro.Open(ctx, nil)
//	...
//	result, err := client.Run(ctx, api.RunRequest{
//		Environment: "debian:12",
//		Argv:        []string{"git", "--version"},
//	})
//
// Machines are run by supervisors, which are processes of the pyro program: a
// program that embeds this package needs pyro and pyro-agent installed, and
// says where with [Options] if they are not on PATH.
//
// Errors belong to the classes of package api and may carry a hint, [api.Hint].
package pyro

import (
	"context"
	"log/slog"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspace"
)

// Options configure a Client. The zero value, and nil, mean the defaults: the
// directories of the XDG base directory specification and programs on PATH.
type Options struct {
	// StateDir keeps what runs (default PYRO_STATE_DIR), CacheDir what can be
	// built anew (default PYRO_CACHE_DIR).
	StateDir, CacheDir string
	// Binary is the pyro program (default PYRO_BINARY, then beside this
	// program, then PATH), Agent the guest agent (default PYRO_AGENT, likewise).
	Binary, Agent string
	// Engine is used where a request names none: "auto" (default, or
	// PYRO_ENGINE), "qemu", "host".
	Engine string
	// Logger takes what is worth knowing but not the caller's business;
	// default is to discard it.
	Logger *slog.Logger
}

// A Client is pyro on this host. Its methods may be called concurrently, and
// several clients, in other processes too, may share the directories.
type Client struct {
	m *workspace.Manager
}

// Open makes the state and cache directories if they are not there, clears up
// what killed processes left behind, and returns a Client. Nothing runs on
// behalf of a Client but during its calls and the machines of workspaces.
func Open(ctx context.Context, o *Options) (*Client, error) {
	if o == nil {
		o = &Options{}
	}
	m, err := workspace.New(ctx, workspace.Options{
		StateDir: o.StateDir, CacheDir: o.CacheDir, Binary: o.Binary, Agent: o.Agent, Engine: o.Engine, Logger: o.Logger,
	})
	if err != nil {
		return nil, err
	}
	return &Client{m}, nil
}

// Close gives back what the Client has opened. Workspaces run on. The Client's
// methods must have returned.
func (c *Client) Close() error { return c.m.Close() }

// MCPTokenFile is the path of the file in the state directory that keeps the
// token of the MCP server over HTTP. It need not exist.
func (c *Client) MCPTokenFile() string { return c.m.MCPTokenFile() }

// Run runs one command in a fresh guest and removes the guest again, whatever
// happens. A command that exits non-zero or times out is a result, not an
// error. The environment is built first if it is not there, which takes a
// minute or two; req.Progress hears about it.
func (c *Client) Run(ctx context.Context, req api.RunRequest) (*api.ExecResult, error) {
	return c.m.Run(ctx, req)
}

// Environments lists the catalog, and the images that were pulled behind it.
func (c *Client) Environments(ctx context.Context) ([]api.Environment, error) {
	return c.m.Environments().List(ctx)
}

// PullEnvironment builds or repairs an environment: a curated one by its name,
// or one from an OCI image by a reference such as docker://python:3.13-slim.
// progress may be nil.
func (c *Client) PullEnvironment(ctx context.Context, name string, progress func(api.Progress)) (api.Environment, error) {
	return c.m.Environments().Pull(ctx, name, progress)
}

// PullEnvironmentAs is PullEnvironment, and calls what is pulled from an OCI
// image alias, unless that is "".
func (c *Client) PullEnvironmentAs(ctx context.Context, reference, alias string, progress func(api.Progress)) (api.Environment, error) {
	return c.m.Environments().PullAs(ctx, reference, alias, progress)
}

// RemoveEnvironment takes an installed environment's name away, and its files
// as soon as no workspace was made from them.
func (c *Client) RemoveEnvironment(ctx context.Context, name string) (api.PruneResult, error) {
	return c.m.RemoveEnvironment(ctx, name)
}

// InspectEnvironment describes one environment.
func (c *Client) InspectEnvironment(ctx context.Context, name string) (api.Environment, error) {
	return c.m.Environments().Inspect(ctx, name)
}

// Prune removes from the cache what nothing can use any more, and with all
// also what nothing uses at the moment.
func (c *Client) Prune(ctx context.Context, all bool) (api.PruneResult, error) {
	return c.m.Prune(ctx, all)
}

// Doctor reports what works on this host and what does not. environment, if
// not "", is examined too.
func (c *Client) Doctor(ctx context.Context, environment string) (*api.DoctorReport, error) {
	return c.m.Doctor(ctx, environment)
}

// RepairState makes lost or damaged records of workspaces again, from the copies
// that lie with the workspaces. Nothing that is whole is touched.
func (c *Client) RepairState(ctx context.Context) (*api.RepairResult, error) {
	return c.m.RepairState(ctx)
}
