package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro/api"
)

func newEnvCmd(a *app) *cobra.Command {
	cmd := group("env", "Environments: the images that guests start from",
		&cobra.Command{
			Use: "list", Short: "List the environments that can be used",
			Example: "  pyro env list\n  pyro env list --json",
			Args:    args(cobra.NoArgs),
			RunE:    func(cmd *cobra.Command, _ []string) error { return runEnvList(cmd.Context(), a) },
		},
		&cobra.Command{
			Use: "inspect ENVIRONMENT", Short: "Show one environment in full",
			Example: "  pyro env inspect debian:12",
			Args:    args(cobra.ExactArgs(1)),
			RunE:    func(cmd *cobra.Command, given []string) error { return runEnvInspect(cmd.Context(), a, given[0]) },

			ValidArgsFunction: completeEnvironment(a),
		},
		newEnvPullCmd(a),
		newEnvPruneCmd(a),
	)
	cmd.Aliases = []string{"environment"}
	return cmd
}

func newEnvPullCmd(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "pull ENVIRONMENT", Short: "Build an environment, or check and repair an installed one",
		Long: `Pull builds an environment from Debian's signed packages into an image in the
cache. An installed environment is checked byte for byte and built anew if it is
damaged. An interrupted pull leaves nothing half done; the next one goes on with
the packages that were already fetched. If another pull of the same environment
is under way this one waits for it and uses the result.`,
		Example: "  pyro env pull debian:12-build",
		Args:    args(cobra.ExactArgs(1)),
		RunE:    func(cmd *cobra.Command, given []string) error { return runEnvPull(cmd.Context(), a, given[0]) },

		ValidArgsFunction: completeEnvironment(a),
	}
	cmd.Flags().BoolVar(&a.quiet, "quiet", false, "no progress on stderr")
	return cmd
}

func newEnvPruneCmd(a *app) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "prune", Short: "Remove from the cache what nothing can use any more",
		Long: `Prune removes damaged and outdated images, what interrupted builds left behind,
and machines whose pyro was killed. With --all it removes every image that no
guest uses at the moment; the next use builds it again.`,
		Example: "  pyro env prune\n  pyro env prune --all",
		Args:    args(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return runEnvPrune(cmd.Context(), a, all) },
	}
	cmd.Flags().BoolVar(&all, "all", false, "also remove what merely nobody uses right now")
	return cmd
}

func runEnvList(ctx context.Context, a *app) error {
	client, err := a.client(ctx)
	if err != nil {
		return err
	}
	envs, err := client.Environments(ctx)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(map[string]any{"environments": envs})
	}
	var rows [][]string
	for _, e := range envs {
		rows = append(rows, []string{e.Name, installed(e), e.Description})
	}
	return a.table([]string{"NAME", "INSTALLED", "DESCRIPTION"}, rows)
}

func installed(e api.Environment) string {
	if !e.Installed {
		return "no"
	}
	return humanize.IBytes(uint64(e.SizeBytes))
}

func runEnvInspect(ctx context.Context, a *app, name string) error {
	client, err := a.client(ctx)
	if err != nil {
		return err
	}
	e, err := client.InspectEnvironment(ctx, name)
	if err != nil {
		return err
	}
	return a.printEnvironment(e)
}

func runEnvPull(ctx context.Context, a *app, name string) error {
	client, err := a.client(ctx)
	if err != nil {
		return err
	}
	progress := a.newProgress()
	e, err := client.PullEnvironment(ctx, name, progress.show)
	progress.clear()
	if err != nil {
		return err
	}
	return a.printEnvironment(e)
}

func (a *app) printEnvironment(e api.Environment) error {
	if a.json {
		return a.printJSON(e)
	}
	for _, row := range [][2]string{
		{"name", e.Name},
		{"description", e.Description},
		{"distribution", e.Distribution + " " + e.DistributionVersion},
		{"platform", e.Platform},
		{"version", e.Version},
		{"source", e.Source},
		{"installed", installed(e)},
		{"digest", e.Digest},
		{"directory", e.InstallDir},
		{"packages", strings.Join(e.DefaultPackages, " ")},
	} {
		if row[1] != "" {
			fmt.Fprintf(a.Out, "%-13s %s\n", row[0], row[1])
		}
	}
	return nil
}

func runEnvPrune(ctx context.Context, a *app, all bool) error {
	client, err := a.client(ctx)
	if err != nil {
		return err
	}
	res, err := client.Prune(ctx, all)
	if err != nil {
		return err
	}
	return a.printPruned(res)
}

func (a *app) printPruned(res api.PruneResult) error {
	if a.json {
		if res.Removed == nil {
			res.Removed = []string{}
		}
		return a.printJSON(res)
	}
	for _, name := range res.Removed {
		fmt.Fprintf(a.Out, "removed %s\n", name)
	}
	_, err := fmt.Fprintf(a.Out, "%s freed\n", humanize.IBytes(uint64(res.FreedBytes)))
	return err
}

// completeEnvironment offers the environments' names for a first argument.
func completeEnvironment(a *app) cobra.CompletionFunc {
	return func(cmd *cobra.Command, given []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(given) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		client, err := a.client(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		envs, err := client.Environments(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		var out []cobra.Completion
		for _, e := range envs {
			out = append(out, cobra.CompletionWithDesc(e.Name, e.Description))
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}
