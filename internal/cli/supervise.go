package cli

import (
	"context"
	"os"

	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/internal/engine/all"
	"github.com/pyro-mcp/pyro/internal/supervisor"
	"github.com/pyro-mcp/pyro/internal/workspace"
)

// newDetachedCmd is the process behind one command that outlives its caller.
func newDetachedCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use: workspace.DetachedCommand, Hidden: true,
		Short: "Stay with one detached command; started by pyro itself",
		Args:  args(named),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return workspace.MainDetached(cmd.Context(), a.In, os.Stdout)
		},
	}
}

// newMergeCmd merges two layers of a disk where this process may not.
func newMergeCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use: workspace.MergeCommand, Hidden: true,
		Short: "Merge two layers of a disk; started by pyro itself",
		Args:  args(named),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return workspace.MainMerge(cmd.Context(), all.Engines("", a.logger()), a.In, os.Stdout)
		},
	}
}

// newSuperviseCmd is the one command that is no face: the process behind one
// machine.
func newSuperviseCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use: supervisor.Command, Hidden: true,
		Short: "Run the supervisor of one machine; started by pyro itself",
		Args:  args(named),
		RunE: func(*cobra.Command, []string) error {
			status, expiredIn := supervisor.Main(all.Engines)
			a.status = status
			if expiredIn == "" {
				return nil
			}
			// A workspace deletes itself when its time is over.
			ctx := context.Background()
			client, err := pyro.Open(ctx, &pyro.Options{StateDir: expiredIn, Logger: a.logger()})
			if err != nil {
				return err
			}
			defer client.Close()
			return client.Expire(ctx)
		},
	}
}
