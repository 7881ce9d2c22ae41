package cli

import (
	"github.com/spf13/cobra"
)

// Tree is the tree of commands, for what describes it.
func Tree() *cobra.Command { return newRoot(&app{}) }

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "pyro",
		Short: "Disposable isolated Linux workspaces for coding agents",
		Long: `pyro gives coding agents, and the people who run them, disposable isolated Linux
workspaces: hand over a copy of a project, let the agent work in a guest that
cannot touch this host, and take back exactly the changes you approve.

Start with:            pyro run debian:12 -- git --version
Work on a project:     pyro workspace create debian:12 --seed-path . --name fix
If it does not work:   pyro doctor`,
		Version:       Version,
		Args:          args(cobra.NoArgs),
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceUsage:  true,
		SilenceErrors: true,
		CompletionOptions: cobra.CompletionOptions{
			HiddenDefaultCmd: false,
		},
	}
	root.SetVersionTemplate("pyro {{.Version}}\n")
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print one JSON document instead of text for people")
	root.PersistentFlags().BoolVar(&a.debug, "debug", false, "log what pyro does to stderr")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(
		newRunCmd(a),
		newWorkspaceCmd(a),
		newPrepareCmd(a),
		newDemoCmd(a),
		newEnvCmd(a),
		newDoctorCmd(a),
		newDiskCmd(a),
		newMCPCmd(a),
		newHostCmd(a),
		newSuperviseCmd(a),
		newDetachedCmd(a),
	)
	return root
}

// args turns what cobra says of a wrong number of arguments into a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if err := check(cmd, given); err != nil {
			return usageError{err}
		}
		return nil
	}
}

// group returns a command that only holds others; called with none of them it
// shows its help, with an unknown one it says so.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(subs...)
	return cmd
}
