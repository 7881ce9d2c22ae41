package cli

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
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
		Args:          args(subcommand),
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
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{flagError(err)} })
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
		newMergeCmd(a),
	)
	return root
}

// args turns what check says of a command's arguments into a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, given []string) error {
		if err := check(cmd, given); err != nil {
			return usageError{err}
		}
		return nil
	}
}

// named wants the arguments that the command's usage line names, up to its first
// flag or parenthesis; those in brackets may be left out.
func named(cmd *cobra.Command, given []string) error {
	var names []string
	required := 0
	for _, word := range strings.Fields(cmd.Use)[1:] {
		if strings.HasPrefix(word, "-") || strings.HasPrefix(word, "(") {
			break
		}
		name := strings.Trim(word, "[]")
		if names = append(names, name); name == word {
			required++
		}
	}
	usage := strings.Join(append([]string{cmd.CommandPath()}, strings.Fields(cmd.Use)[1:]...), " ")
	switch {
	case len(given) < required:
		return fmt.Errorf("%s is missing, as in: %s", names[len(given)], usage)
	case len(given) > len(names):
		return fmt.Errorf("%q is one argument too many for: %s", given[len(names)], usage)
	}
	return nil
}

// subcommand refuses arguments to a command that only holds others: none of
// them is called that.
func subcommand(cmd *cobra.Command, given []string) error {
	if len(given) == 0 {
		return nil
	}
	err := fmt.Errorf("unknown command %q for %q", given[0], cmd.CommandPath())
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(given[0]); len(near) > 0 {
		return fmt.Errorf("%w; there is %s", err, strings.Join(near, ", "))
	}
	return err
}

// swallowed refuses a flag whose value is --: it was written without one, and took
// the word that ends the flags.
func swallowed(cmd *cobra.Command) (err error) {
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if f.Value.String() == "--" {
			err = fmt.Errorf("--%s was given no value, and took the -- before the command for one", f.Name)
		}
	})
	return err
}

// flagError says of a flag's value what is wrong with it in a person's words.
func flagError(err error) error {
	var bad *pflag.InvalidValueError
	if !errors.As(err, &bad) {
		return err
	}
	what := map[string]string{
		"bool": "true or false", "int": "a whole number", "int64": "a whole number", "uint16": "a whole number from 0 to 65535", "float64": "a number",
	}[bad.GetFlag().Value.Type()]
	if what == "" {
		return err
	}
	return fmt.Errorf("--%s is %q and must be %s", bad.GetFlag().Name, bad.GetValue(), what)
}

// group returns a command that only holds others; called with none of them it
// shows its help, with an unknown one it says so.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short,
		Args: args(subcommand),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(subs...)
	return cmd
}
