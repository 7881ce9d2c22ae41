package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
)

type prepareOptions struct {
	req     api.PrepareRequest
	require string
}

func newPrepareCmd(a *app) *cobra.Command {
	o := &prepareOptions{}
	cmd := &cobra.Command{
		Use: "prepare [ENVIRONMENT]", Short: "Get an environment and prove that workspaces work with it here",
		Long: `Prepare builds the environment if it is not there, and proves on a workspace that
it throws away that create, exec, reset and delete work. Later calls only check.`,
		Example:           "  pyro prepare\n  pyro prepare debian:12-build --engine qemu",
		ValidArgsFunction: completeEnvironment(a),
		Args:              args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			if len(given) > 0 {
				o.req.Environment = given[0]
			}
			o.req.Require = api.Require(o.require)
			progress := a.newProgress()
			o.req.Progress = progress.show
			res, err := c.Prepare(ctx, o.req)
			progress.clear()
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(res)
			}
			for _, s := range res.Steps {
				fmt.Fprintf(a.Out, "%-8s %s\n", s.Name, time.Duration(s.DurationMS)*time.Millisecond)
			}
			if !res.Proven {
				fmt.Fprintln(a.Out, "the rest was proven before; --force does it again")
			}
			_, err = fmt.Fprintf(a.Out, "%s is ready on %s (%s)\n", res.Environment, res.Engine, res.Isolation)
			return err
		}),
	}
	f := cmd.Flags()
	f.BoolVar(&o.req.Force, "force", false, "prove it again")
	f.StringVar(&o.req.NetworkPolicy, "network", api.NetworkOff, "network policy of the workspace that proves it")
	f.BoolVar(&a.quiet, "quiet", false, "no progress on stderr")
	addEngineFlags(cmd, &o.req.Engine, &o.require, &o.req.AllowHostCompat)
	return cmd
}

func newDemoCmd(a *app) *cobra.Command {
	o := &prepareOptions{}
	var require string
	cmd := &cobra.Command{
		Use: "demo", Short: "Show in one go what a workspace is",
		Long: `Demo creates a workspace, runs a command in it, changes a file, shows the
difference as a patch, resets, shows that nothing is left of it, and cleans up.`,
		Example: "  pyro demo\n  pyro demo --engine qemu",
		Args:    args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, _ []string) error {
			o.req.Require = api.Require(require)
			return runDemo(ctx, a, c, o)
		}),
	}
	addEngineFlags(cmd, &o.req.Engine, &require, &o.req.AllowHostCompat)
	return cmd
}

// demoResult is what demo prints with --json.
type demoResult struct {
	Engine     string        `json:"engine"`
	Isolation  api.Isolation `json:"isolation"`
	GitVersion string        `json:"git_version"`
	Patch      string        `json:"patch"`
	// Reset is true if nothing differed any more after the reset.
	Reset bool `json:"reset"`
}

func runDemo(ctx context.Context, a *app, c *pyro.Client, o *prepareOptions) (err error) {
	say := func(format string, args ...any) {
		if !a.json {
			fmt.Fprintf(a.Out, format, args...)
		}
	}
	progress := a.newProgress()
	ws, err := c.CreateWorkspace(ctx, api.CreateRequest{
		Environment: "debian:12", Engine: o.req.Engine, Require: o.req.Require, AllowHostCompat: o.req.AllowHostCompat, Progress: progress.show,
	})
	progress.clear()
	if err != nil {
		return err
	}
	defer func() {
		if _, delErr := c.DeleteWorkspace(context.WithoutCancel(ctx), ws.WorkspaceID); err == nil {
			err = delErr
		}
	}()
	res := demoResult{Engine: ws.Engine, Isolation: ws.Isolation}
	say("created workspace %s on %s (%s)\n\n", ws.WorkspaceID, ws.Engine, ws.Isolation)
	version, err := c.Exec(ctx, ws.WorkspaceID, api.ExecRequest{Argv: []string{"git", "--version"}})
	if err != nil {
		return err
	}
	res.GitVersion = version.Stdout
	say("$ git --version\n%s\n", version.Stdout)
	if _, err := c.WriteFile(ctx, ws.WorkspaceID, "hello.txt", []byte("hello from inside\n")); err != nil {
		return err
	}
	d, err := c.Diff(ctx, ws.WorkspaceID, api.DiffRequest{})
	if err != nil {
		return err
	}
	res.Patch = d.Patch
	say("a file was written; the difference, as a patch:\n%s\n", d.Patch)
	if _, err := c.Reset(ctx, ws.WorkspaceID, "", nil); err != nil {
		return err
	}
	if d, err = c.Diff(ctx, ws.WorkspaceID, api.DiffRequest{}); err != nil {
		return err
	}
	res.Reset = !d.Changed
	if !res.Reset {
		return api.Errorf(api.ErrInternal, "something differs after the reset:\n%s", d.Patch)
	}
	say("reset: nothing differs any more. Deleted again.\n")
	if a.json {
		return a.printJSON(res)
	}
	return nil
}
