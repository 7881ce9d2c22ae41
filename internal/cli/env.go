package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

func newEnvCmd(a *app) *cobra.Command {
	cmd := group("env", "Environments: the images that guests start from",
		&cobra.Command{
			Use: "list", Short: "List the environments that can be used",
			Example: "  pyro env list\n  pyro env list --json",
			Args:    args(named),
			RunE:    func(cmd *cobra.Command, _ []string) error { return runEnvList(cmd.Context(), a) },
		},
		&cobra.Command{
			Use: "inspect ENVIRONMENT", Short: "Show one environment in full",
			Example: "  pyro env inspect debian:12",
			Args:    args(named),
			RunE:    func(cmd *cobra.Command, given []string) error { return runEnvInspect(cmd.Context(), a, given[0]) },

			ValidArgsFunction: completeEnvironment(a),
		},
		newEnvPullCmd(a),
		newEnvRemoveCmd(a),
		newEnvPruneCmd(a),
	)
	cmd.Aliases = []string{"environment"}
	return cmd
}

func newEnvPullCmd(a *app) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use: "pull ENVIRONMENT", Short: "Build an environment, or check and repair an installed one",
		Long: `Pull builds an environment in the cache: a curated one from Debian's signed
packages, or one from an OCI image:

  docker://[HOST[:PORT]/]NAME[:TAG][@DIGEST]   of a registry, with the
                                               credentials of docker login
  oci-layout:DIRECTORY[@NAME]                  of an OCI image layout
  docker-archive:FILE[@NAME:TAG]               of a file of docker save

An image is then used by its short name, such as python:3.13-slim, or by the one
given with --name. Pulling it again looks whether its reference means another
image by now. Layers that were fetched are not fetched again.

An installed environment is checked byte for byte and built anew if it is
damaged. An interrupted pull leaves nothing half done; the next one goes on with
what was already fetched. If another pull of the same environment is under way
this one waits for it and uses the result.`,
		Example: "  pyro env pull debian:12-build\n  pyro env pull docker://python:3.13-slim\n  pyro env pull --name tools docker-archive:tools.tar",
		Args:    args(named),
		RunE:    func(cmd *cobra.Command, given []string) error { return runEnvPull(cmd.Context(), a, given[0], name) },

		ValidArgsFunction: completeEnvironment(a),
	}
	cmd.Flags().StringVar(&name, "name", "", "what to call the environment of an image")
	cmd.Flags().BoolVar(&a.quiet, "quiet", false, "no progress on stderr")
	return cmd
}

func newEnvRemoveCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "remove ENVIRONMENT", Short: "Remove an installed environment",
		Long: `Remove takes an environment out of the cache. A workspace that was made from it
goes on: its files stay until it is deleted and pyro env prune is run.`,
		Example: "  pyro env remove python:3.13-slim",
		Args:    args(named),
		RunE:    func(cmd *cobra.Command, given []string) error { return runEnvRemove(cmd.Context(), a, given[0]) },

		ValidArgsFunction: completeEnvironment(a),
	}
}

func newEnvPruneCmd(a *app) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "prune", Short: "Remove from the cache what nothing can use any more",
		Long: `Prune removes damaged and outdated images, what interrupted builds left behind,
and machines whose pyro was killed. With --all it removes every image that no
guest uses at the moment; the next use builds it again.`,
		Example: "  pyro env prune\n  pyro env prune --all",
		Args:    args(named),
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

func runEnvPull(ctx context.Context, a *app, what, name string) error {
	client, err := a.client(ctx)
	if err != nil {
		return err
	}
	progress := a.newProgress()
	e, err := client.PullEnvironmentAs(ctx, what, name, progress.show)
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
	rows := [][2]string{
		{"name", e.Name},
		{"description", e.Description},
		{"distribution", strings.TrimSpace(e.Distribution + " " + e.DistributionVersion)},
		{"platform", e.Platform},
		{"version", e.Version},
		{"source", e.Source},
		{"installed", installed(e)},
		{"digest", e.Digest},
		{"directory", e.InstallDir},
		{"packages", strings.Join(e.DefaultPackages, " ")},
		{"image", e.ImageReference},
		{"image digest", e.ImageDigest},
	}
	if c := e.Config; c != nil {
		rows = append(rows, [][2]string{
			{"env", quoted(c.Env)},
			{"working dir", c.WorkingDir},
			{"user", c.User},
			{"entry point", quoted(c.Entrypoint)},
			{"command", quoted(c.Cmd)},
		}...)
	}
	for _, row := range rows {
		if row[1] != "" {
			// An image's settings are anybody's text.
			fmt.Fprintf(a.Out, "%-13s %s\n", row[0], boundedlog.Printable(row[1]))
		}
	}
	return nil
}

// quoted shows a list so that it can be told where a word ends.
func quoted(words []string) string {
	var out []string
	for _, w := range words {
		out = append(out, strconv.Quote(w))
	}
	return strings.Join(out, " ")
}

func runEnvRemove(ctx context.Context, a *app, name string) error {
	client, err := a.client(ctx)
	if err != nil {
		return err
	}
	res, err := client.RemoveEnvironment(ctx, name)
	if err != nil {
		return err
	}
	return a.printPruned(res)
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
