package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

func newWorkspaceCmd(a *app) *cobra.Command {
	cmd := group("workspace", "Create, use, rewind and review isolated workspaces",
		newCreateCmd(a), newListCmd(a), newStatusCmd(a), newUpdateCmd(a), newLogsCmd(a), newSummaryCmd(a),
		newStartCmd(a), newStopCmd(a), newPauseCmd(a), newResumeCmd(a), newForkCmd(a), newDeleteCmd(a), newPruneCmd(a),
		newExecCmd(a), newSyncCmd(a), newFileCmd(a), newPatchCmd(a), newDiffCmd(a), newExportCmd(a),
		newSnapshotCmd(a), newResetCmd(a), newShellCmd(a), newServiceCmd(a), newWorkspaceDiskCmd(a))
	cmd.Aliases = []string{"ws"}
	cmd.Long = `A workspace is a guest with files that last: created from a copy of a project,
used by any number of commands, rewound to a snapshot, looked at, and thrown away.

A workspace is named by its id, a unique beginning of the id, or its name.`
	cmd.Example = `  pyro workspace create debian:12 --seed-path . --name fix
  pyro workspace exec fix -- make test
  pyro workspace diff fix > fix.patch
  pyro workspace reset fix
  pyro workspace delete fix`
	return cmd
}

// workspaceRun wraps what a command does with an opened client.
func (a *app) withClient(run func(ctx context.Context, c *pyro.Client, given []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, given []string) error {
		c, err := a.client(cmd.Context())
		if err != nil {
			return err
		}
		defer c.Close()
		return run(cmd.Context(), c, given)
	}
}

// completeWorkspace completes the names and ids of workspaces.
func (a *app) completeWorkspace(cmd *cobra.Command, given []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(given) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	c, err := a.client(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.Close()
	all, err := c.Workspaces(cmd.Context(), api.WorkspaceFilter{})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, ws := range all {
		what := fmt.Sprintf("\t%s, %s", ws.Environment, ws.State)
		if ws.Name != nil {
			out = append(out, *ws.Name+what)
		} else {
			out = append(out, ws.WorkspaceID+what)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

type createOptions struct {
	req        api.CreateRequest
	ttlSeconds float64
	labels     []string
	secrets    []string
	files      []string
	require    string
	idOnly     bool
}

func newCreateCmd(a *app) *cobra.Command {
	o := &createOptions{}
	cmd := &cobra.Command{
		Use: "create ENVIRONMENT", Short: "Make a workspace, seed it and start it",
		Long: `Create makes a workspace from an environment, puts a copy of --seed-path into its
/workspace, starts it and returns. A Git checkout is seeded with what Git tracks
plus what it does not ignore. Files that cannot be read, devices and sockets are
left out and reported; links stay links. Nothing in the workspace can change the
original.

The workspace deletes itself when --ttl-seconds are over; update changes that.`,
		Example: `  pyro workspace create debian:12 --seed-path .
  pyro workspace create debian:12-build --seed-path project.tar.gz --name review --label issue=42
  id=$(pyro workspace create debian:12 --id-only --ttl-seconds 0)`,
		ValidArgsFunction: completeEnvironment(a),
		Args:              args(named),
		RunE: func(cmd *cobra.Command, given []string) error {
			o.req.Environment = given[0]
			if err := o.complete(a, cmd); err != nil {
				return err
			}
			return a.withClient(func(ctx context.Context, c *pyro.Client, _ []string) error {
				return runCreate(ctx, a, c, o)
			})(cmd, given)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.req.SeedPath, "seed-path", "", "directory or tar archive (.tar, .tar.gz, .tgz, .tar.zst) to begin with")
	f.BoolVar(&o.req.IncludeIgnored, "include-ignored", false, "also take what a Git checkout ignores")
	f.StringVar(&o.req.Name, "name", "", "name to call it by")
	f.StringArrayVar(&o.labels, "label", nil, "label `KEY=VALUE`; repeatable")
	f.StringVar(&o.req.NetworkPolicy, "network-policy", api.NetworkOff, "network policy: off, egress or egress+published-ports")
	f.StringArrayVar(&o.secrets, "secret", nil, "secret `NAME` whose value is this process's variable of that name, or NAME=VALUE, which other users may see in the process list; repeatable")
	f.StringArrayVar(&o.files, "secret-file", nil, "secret `NAME=PATH` whose value is in a file of this host; repeatable")
	addSizeFlags(cmd, &o.req.VCPUCount, &o.req.MemMiB, &o.req.DiskMiB)
	f.Float64Var(&o.ttlSeconds, "ttl-seconds", api.DefaultTTL.Seconds(), "time until it deletes itself; 0 for never")
	addUser(cmd, &o.req.User, "the image's own")
	f.BoolVar(&o.idOnly, "id-only", false, "print nothing but the id")
	f.BoolVar(&a.quiet, "quiet", false, "no progress and no report of what was left out on stderr")
	addEngineFlags(cmd, &o.req.Engine, &o.require, &o.req.AllowHostCompat)
	return cmd
}

func (o *createOptions) complete(a *app, cmd *cobra.Command) error {
	if err := a.notWithJSON("id-only", o.idOnly); err != nil {
		return err
	}
	// An empty value is mostly a variable that was not set.
	if o.req.SeedPath == "" && cmd.Flags().Changed("seed-path") {
		return api.WithHint(api.Errorf(api.ErrInvalid, "--seed-path is empty"), "name a directory or an archive, or leave --seed-path out for a workspace without files")
	}
	if o.req.Name == "" && cmd.Flags().Changed("name") {
		return api.WithHint(api.Errorf(api.ErrInvalid, "--name is empty"), "leave --name out for a workspace without a name")
	}
	err := checkSizeFlags(cmd)
	if err != nil {
		return err
	}
	if o.req.TTL, err = seconds("ttl-seconds", o.ttlSeconds); err != nil {
		return err
	}
	o.req.Require = api.Require(o.require)
	if o.req.Labels, err = parseLabels(o.labels); err != nil {
		return err
	}
	o.req.Secrets, err = parseSecrets(o.secrets, o.files, os.LookupEnv)
	return err
}

func parseLabels(given []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, l := range given {
		k, v, ok := strings.Cut(l, "=")
		if !ok || k == "" {
			return nil, api.WithHint(api.Errorf(api.ErrInvalid, "--label %q has no key or no value", l), "write --label KEY=VALUE")
		}
		labels[k] = v
	}
	return labels, nil
}

func runCreate(ctx context.Context, a *app, c *pyro.Client, o *createOptions) error {
	progress := a.newProgress()
	o.req.Progress = progress.show
	ws, err := c.CreateWorkspace(ctx, o.req)
	progress.clear()
	if err != nil {
		return err
	}
	switch {
	case a.json:
		return a.printJSON(ws)
	case o.idOnly:
		_, err := fmt.Fprintln(a.Out, ws.WorkspaceID)
		return err
	}
	if err := a.printWorkspace(ws); err != nil {
		return err
	}
	a.noteSkipped(ws.WorkspaceSeed.Skipped, ws.WorkspaceSeed.SkippedCount)
	return nil
}

// noteSkipped says on stderr what was left out.
func (a *app) noteSkipped(skipped []api.SkippedEntry, count int64) {
	if a.quiet || count == 0 {
		return
	}
	const shown = 10
	for _, s := range skipped[:min(shown, len(skipped))] {
		fmt.Fprintf(a.Err, "pyro: left out %s: %s\n", nameText(s.Path), boundedlog.Printable(s.Reason))
	}
	if rest := count - int64(min(shown, len(skipped))); rest > 0 {
		fmt.Fprintf(a.Err, "pyro: and left out %d more; --json lists them\n", rest)
	}
}

// stateText is a workspace's state for people.
func stateText(ws *api.Workspace) string {
	if ws.PausedToDisk {
		return "paused to disk"
	}
	return string(ws.State)
}

// printWorkspace prints one workspace for people.
func (a *app) printWorkspace(ws *api.Workspace) error {
	rows := [][2]string{{"workspace", ws.WorkspaceID}}
	if ws.Name != nil {
		rows = append(rows, [2]string{"name", *ws.Name})
	}
	rows = append(rows, [2]string{"state", stateText(ws)})
	if ws.LastError != nil {
		rows = append(rows, [2]string{"last error", *ws.LastError})
	}
	rows = append(rows,
		[2]string{"environment", ws.Environment},
	)
	if ws.User != "" {
		rows = append(rows, [2]string{"user", ws.User})
	}
	rows = append(rows,
		[2]string{"engine", fmt.Sprintf("%s (%s)", ws.Engine, ws.Isolation)},
		[2]string{"size", fmt.Sprintf("%d vCPU, %d MiB memory, %d MiB disk", ws.VCPUCount, ws.MemMiB, ws.DiskMiB)},
		[2]string{"network", ws.NetworkPolicy},
		[2]string{"seed", seedText(ws.WorkspaceSeed)},
		[2]string{"created", when(ws.CreatedAt)},
		[2]string{"activity", when(ws.LastActivityAt)},
		[2]string{"expires", expiryText(ws.ExpiresAt)},
		[2]string{"commands", fmt.Sprint(ws.CommandCount)},
	)
	if len(ws.Secrets) > 0 {
		var names []string
		for _, s := range ws.Secrets {
			names = append(names, s.Name)
		}
		rows = append(rows, [2]string{"secrets", strings.Join(names, " ")})
	}
	if ws.ResetCount > 0 && ws.LastResetAt != nil {
		rows = append(rows, [2]string{"resets", fmt.Sprintf("%d, the last %s", ws.ResetCount, when(*ws.LastResetAt))})
	}
	if len(ws.Labels) > 0 {
		rows = append(rows, [2]string{"labels", labelsText(ws.Labels)})
	}
	return a.printPairs(rows)
}

// printPairs prints names and values aligned; lines after a value's first are
// indented.
func (a *app) printPairs(rows [][2]string) error {
	width := 0
	for _, r := range rows {
		width = max(width, len(r[0]))
	}
	for _, r := range rows {
		for i, line := range strings.Split(r[1], "\n") {
			name := r[0]
			if i > 0 {
				name = ""
			}
			if _, err := fmt.Fprintf(a.Out, "%-*s  %s\n", width, name, boundedlog.Printable(line)); err != nil {
				return err
			}
		}
	}
	return nil
}

func seedText(s api.WorkspaceSeed) string {
	if s.Mode == api.SeedEmpty {
		return "empty"
	}
	text := fmt.Sprintf("%s, %s", entriesText(s.EntryCount), humanize.IBytes(uint64(s.BytesWritten)))
	if s.SeedPath != nil {
		text = *s.SeedPath + ": " + text
	}
	if s.OriginRef != nil {
		ref := *s.OriginRef
		if commit, rest, _ := strings.Cut(ref, "+"); len(commit) > 12 {
			ref = commit[:12]
			if rest != "" {
				ref += "+" + rest
			}
		}
		text += " (" + ref + ")"
	}
	return text
}

// entriesText counts files, directories and links.
func entriesText(n int64) string {
	if n == 1 {
		return "1 entry"
	}
	return humanize.Comma(n) + " entries"
}

func labelsText(labels map[string]string) string {
	var out []string
	for k, v := range labels {
		out = append(out, k+"="+v)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func when(t time.Time) string { return humanize.Time(t) }

func expiryText(t *time.Time) string {
	if t == nil {
		return "never"
	}
	if time.Until(*t) > 2*time.Minute {
		// What was given ten minutes a moment ago has ten minutes.
		return humanize.Time(t.Add(30 * time.Second))
	}
	return humanize.Time(*t)
}

type listOptions struct{ labels []string }

func newListCmd(a *app) *cobra.Command {
	o := &listOptions{}
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List workspaces, the latest activity first",
		Example: "  pyro workspace list\n  pyro workspace list --label issue=42 --json",
		Args:    args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, _ []string) error {
			labels, err := parseLabels(o.labels)
			if err != nil {
				return err
			}
			return runList(ctx, a, c, labels)
		}),
	}
	cmd.Flags().StringArrayVar(&o.labels, "label", nil, "only those with the label `KEY=VALUE`; repeatable")
	return cmd
}

func runList(ctx context.Context, a *app, c *pyro.Client, labels map[string]string) error {
	all, err := c.Workspaces(ctx, api.WorkspaceFilter{Labels: labels})
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(map[string]any{"count": len(all), "workspaces": all})
	}
	switch {
	case len(all) == 0 && len(labels) > 0:
		fmt.Fprintf(a.Err, "no workspace has the labels %s\n", boundedlog.Printable(labelsText(labels)))
		return nil
	case len(all) == 0:
		fmt.Fprintln(a.Err, "no workspaces; make one: pyro workspace create debian:12 --seed-path .")
		return nil
	}
	rows := make([][]string, len(all))
	for i, ws := range all {
		name := "-"
		if ws.Name != nil {
			name = *ws.Name
		}
		rows[i] = []string{ws.WorkspaceID, name, stateText(&ws), ws.Environment, ws.Engine, fmt.Sprint(ws.CommandCount), when(ws.LastActivityAt), expiryText(ws.ExpiresAt)}
	}
	return a.table([]string{"ID", "NAME", "STATE", "ENVIRONMENT", "ENGINE", "COMMANDS", "ACTIVITY", "EXPIRES"}, rows)
}

// showWorkspace prints what a command made of a workspace.
func (a *app) showWorkspace(ws *api.Workspace) error {
	if a.json {
		return a.printJSON(ws)
	}
	return a.printWorkspace(ws)
}

// oneWorkspace is a command with a workspace as its only argument.
func (a *app) oneWorkspace(cmd *cobra.Command, run func(ctx context.Context, c *pyro.Client, ref string) error) *cobra.Command {
	cmd.Use += " WORKSPACE"
	cmd.Args = args(named)
	cmd.ValidArgsFunction = a.completeWorkspace
	cmd.RunE = a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error { return run(ctx, c, given[0]) })
	return cmd
}

func newStatusCmd(a *app) *cobra.Command {
	return a.oneWorkspace(&cobra.Command{Use: "status", Short: "Show one workspace", Example: "  pyro workspace status fix"},
		func(ctx context.Context, c *pyro.Client, ref string) error {
			ws, err := c.Workspace(ctx, ref)
			if err != nil {
				return err
			}
			return a.showWorkspace(ws)
		})
}

func newStartCmd(a *app) *cobra.Command {
	cmd := a.oneWorkspace(&cobra.Command{
		Use: "start", Short: "Boot a stopped workspace from its disk",
		Long:    "Start boots a stopped workspace from its disk. One that runs is left as it is.",
		Example: "  pyro workspace start fix",
	}, func(ctx context.Context, c *pyro.Client, ref string) error {
		progress := a.newProgress()
		ws, err := c.StartWorkspace(ctx, ref, progress.show)
		progress.clear()
		if err != nil {
			return err
		}
		return a.showWorkspace(ws)
	})
	cmd.Flags().BoolVar(&a.quiet, "quiet", false, "no progress on stderr")
	return cmd
}

func newStopCmd(a *app) *cobra.Command {
	return a.oneWorkspace(&cobra.Command{
		Use: "stop", Short: "End a workspace's machine and keep its disk",
		Long: `Stop ends everything that runs in the workspace, flushes its disk, and keeps it:
start boots the same disk, and disk list, read and export look into it meanwhile.`,
		Example: "  pyro workspace stop fix\n  pyro workspace disk read fix /var/log/dpkg.log",
	}, func(ctx context.Context, c *pyro.Client, ref string) error {
		ws, err := c.StopWorkspace(ctx, ref)
		if err != nil {
			return err
		}
		return a.showWorkspace(ws)
	})
}

type updateOptions struct {
	name        string
	clearName   bool
	labels      []string
	clearLabels []string
	ttlSeconds  float64
}

func newUpdateCmd(a *app) *cobra.Command {
	o := &updateOptions{}
	var changed func(flag string) bool
	cmd := a.oneWorkspace(&cobra.Command{
		Use: "update", Short: "Change a workspace's name, labels or time to live",
		Example: "  pyro workspace update 3f2a --name fix --label issue=42\n  pyro workspace update fix --ttl-seconds 3600",
	}, func(ctx context.Context, c *pyro.Client, ref string) error {
		u := api.WorkspaceUpdate{ClearLabels: o.clearLabels}
		var err error
		if u.SetLabels, err = parseLabels(o.labels); err != nil {
			return err
		}
		none := ""
		switch {
		case o.clearName && changed("name"):
			return usageError{api.Errorf(api.ErrInvalid, "--name and --clear-name exclude each other")}
		case o.clearName:
			u.Name = &none
		case changed("name"):
			if o.name == "" {
				return api.WithHint(api.Errorf(api.ErrInvalid, "--name is empty"), "use --clear-name to take the name away")
			}
			u.Name = &o.name
		}
		if changed("ttl-seconds") {
			ttl, err := seconds("ttl-seconds", o.ttlSeconds)
			if err != nil {
				return err
			}
			u.TTL = &ttl
		}
		if u.Name == nil && u.TTL == nil && len(u.SetLabels)+len(u.ClearLabels) == 0 {
			return usageError{api.Errorf(api.ErrInvalid, "nothing to change was given")}
		}
		ws, err := c.UpdateWorkspace(ctx, ref, u)
		if err != nil {
			return err
		}
		return a.showWorkspace(ws)
	})
	changed = func(flag string) bool { return cmd.Flags().Changed(flag) }
	f := cmd.Flags()
	f.StringVar(&o.name, "name", "", "new name")
	f.BoolVar(&o.clearName, "clear-name", false, "take the name away")
	f.StringArrayVar(&o.labels, "label", nil, "set the label `KEY=VALUE`; repeatable")
	f.StringArrayVar(&o.clearLabels, "clear-label", nil, "take the label `KEY` away; repeatable")
	f.Float64Var(&o.ttlSeconds, "ttl-seconds", 0, "time from now until it deletes itself; 0 for never")
	return cmd
}

type deleteOptions struct{ all bool }

func newDeleteCmd(a *app) *cobra.Command {
	o := &deleteOptions{}
	cmd := &cobra.Command{
		Use: "delete WORKSPACE... | --all", Aliases: []string{"rm"}, Short: "Remove workspaces with their disks and snapshots",
		Example:           "  pyro workspace delete fix\n  pyro workspace delete --all",
		ValidArgsFunction: a.completeWorkspace,
		Args: args(func(_ *cobra.Command, given []string) error {
			switch {
			case o.all && len(given) > 0:
				return api.Errorf(api.ErrInvalid, "--all and the name of a workspace exclude each other")
			case !o.all && len(given) == 0:
				return api.Errorf(api.ErrInvalid, "no workspace was named, and --all was not given")
			}
			return nil
		}),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			return runDelete(ctx, a, c, o, given)
		}),
	}
	cmd.Flags().BoolVar(&o.all, "all", false, "remove every workspace")
	return cmd
}

func runDelete(ctx context.Context, a *app, c *pyro.Client, o *deleteOptions, refs []string) error {
	if o.all {
		all, err := c.Workspaces(ctx, api.WorkspaceFilter{})
		if err != nil {
			return err
		}
		for _, ws := range all {
			refs = append(refs, ws.WorkspaceID)
		}
	}
	// One that cannot be deleted is no reason to keep the others.
	var errs []error
	results := []*api.DeleteResult{}
	for _, ref := range refs {
		res, err := c.DeleteWorkspace(ctx, ref)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		results = append(results, res)
		if !a.json {
			fmt.Fprintf(a.Out, "deleted %s\n", res.WorkspaceID)
		}
	}
	switch {
	case len(errs) > 0:
		return errors.Join(errs...)
	case !a.json:
		return nil
	case len(results) == 1 && !o.all:
		return a.printJSON(results[0])
	}
	return a.printJSON(map[string]any{"count": len(results), "deleted": results})
}

func newPruneCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "prune", Short: "Remove expired and failed workspaces and what killed processes left",
		Example: "  pyro workspace prune",
		Args:    args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, _ []string) error {
			res, err := c.PruneWorkspaces(ctx)
			if err != nil {
				return err
			}
			return a.printPruned(*res)
		}),
	}
}

// positive refuses a flag that was given and is not.
func positive(cmd *cobra.Command, flag string, n int) error {
	if n < 1 && cmd.Flags().Changed(flag) {
		return api.WithHint(api.Errorf(api.ErrInvalid, "--%s is %d", flag, n), "give it a positive number")
	}
	return nil
}

// stdinOf returns the process's own stdin only where it is wanted.
func (a *app) stdinFile() *os.File {
	f, _ := a.In.(*os.File)
	return f
}
