package cli

import (
	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro/internal/engine/all"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// newSuperviseCmd is the one command that is no face: the process behind one
// machine.
func newSuperviseCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use: supervisor.Command, Hidden: true,
		Short: "Run the supervisor of one machine; started by pyro itself",
		Args:  args(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			a.status = supervisor.Main(all.Engines)
			return nil
		},
	}
}
