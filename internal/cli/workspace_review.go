package cli

import (
	"context"
	"fmt"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

type diffOptions struct {
	req      api.DiffRequest
	stat     bool
	nameOnly bool
}

func newDiffCmd(a *app) *cobra.Command {
	o := &diffOptions{}
	cmd := a.oneWorkspace(&cobra.Command{
		Use: "diff", Short: "Show what differs from the seed or a snapshot, as a patch",
		Long: `Diff compares the files of a running workspace with its seed, also after a reset
to a later snapshot, or with the snapshot that --from names. The patch on stdout
is for git apply: applied to a copy of the base it gives the workspace, binary
files included. What no patch can carry (empty directories, Git's own files) is
named on stderr; where a file has taken the place of empty directories, remove
those before git apply.`,
		Example: "  pyro workspace diff fix | git apply\n  pyro workspace diff fix --stat\n  pyro workspace diff fix --from before-upgrade --json",
	}, func(ctx context.Context, c *pyro.Client, ref string) error { return runDiff(ctx, a, c, o, ref) })
	f := cmd.Flags()
	f.StringVar(&o.req.From, "from", "", "compare with this snapshot (default the seed)")
	f.BoolVar(&o.stat, "stat", false, "count the changed lines of each file instead")
	f.BoolVar(&o.nameOnly, "name-only", false, "print the changed paths only")
	return cmd
}

func runDiff(ctx context.Context, a *app, c *pyro.Client, o *diffOptions, ref string) error {
	switch {
	case o.stat && o.nameOnly:
		return usageError{api.Errorf(api.ErrInvalid, "--stat and --name-only exclude each other")}
	case a.json && o.nameOnly:
		o.req.NoPatch = true
	case a.json:
	case o.nameOnly:
		o.req.NoPatch = true
	case o.stat:
		o.req.NoPatch, o.req.Stat, o.req.StatWidth = true, a.Out, terminalWidth(a.Out)
	default:
		o.req.Patch = a.filtered(a.Out, false)
	}
	d, err := c.Diff(ctx, ref, o.req)
	if err != nil {
		return err
	}
	switch {
	case a.json:
		return a.printJSON(d)
	case o.nameOnly:
		for _, e := range d.Entries {
			fmt.Fprintln(a.Out, nameText(e.Path))
		}
	}
	for _, u := range d.Unpatched {
		fmt.Fprintf(a.Err, "pyro: not in the patch: %s: %s\n", nameText(u.Path), boundedlog.Printable(u.Reason))
	}
	if !d.Changed {
		fmt.Fprintf(a.Err, "pyro: nothing differs from %s\n", d.Base)
	}
	return nil
}

type exportOptions struct{ req api.ExportRequest }

func newExportCmd(a *app) *cobra.Command {
	o := &exportOptions{}
	cmd := &cobra.Command{
		Use: "export WORKSPACE PATH --output HOST_PATH", Short: "Copy a file or directory out of a workspace",
		Long: `Export copies a file or directory from below /workspace to a new path of this
host. It appears there when it is complete, or not at all. Owners and set-id bits
are dropped, and links that lead out of what is exported are left out. Files that
tools run or obey by themselves, such as Git hooks and editor tasks, are named.`,
		Example:           "  pyro workspace export fix dist --output ./dist\n  pyro workspace export fix . --output ./result",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			o.req.Path = given[1]
			if o.req.OutputPath == "" {
				return usageError{api.Errorf(api.ErrInvalid, "--output is required")}
			}
			res, err := c.Export(ctx, given[0], o.req)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(res)
			}
			fmt.Fprintf(a.Out, "wrote %s (%s, %s)\n", res.OutputPath, entriesText(res.EntryCount), humanize.IBytes(uint64(res.BytesWritten)))
			a.noteSkipped(res.Skipped, res.SkippedCount)
			for _, p := range res.Active {
				fmt.Fprintf(a.Err, "pyro: look at it before you work there, tools obey it by themselves: %s\n", nameText(p))
			}
			return nil
		}),
	}
	cmd.Flags().StringVarP(&o.req.OutputPath, "output", "o", "", "where to put it; nothing may be there")
	return cmd
}

func newSnapshotCmd(a *app) *cobra.Command {
	return group("snapshot", "Save a workspace's disk, to go back to it", newSnapshotCreateCmd(a), newSnapshotListCmd(a), newSnapshotDeleteCmd(a))
}

func newSnapshotCreateCmd(a *app) *cobra.Command {
	var req api.SnapshotRequest
	cmd := &cobra.Command{
		Use: "create WORKSPACE NAME", Short: "Save the whole disk under a name",
		Long: `Create saves the workspace's whole disk, packages and /tmp on it included. What
runs goes on. Reset goes back to it; diff --from compares with it. With --memory it
saves what runs, too, where the engine can: a reset or a fork then goes on with it.`,
		Example:           "  pyro workspace snapshot create fix before-upgrade",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			req.Name = given[1]
			s, err := c.CreateSnapshot(ctx, given[0], req)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(s)
			}
			_, err = fmt.Fprintf(a.Out, "saved %s\n", s.SnapshotName)
			return err
		}),
	}
	cmd.Flags().BoolVar(&req.Memory, "memory", false, "save what runs, too (engines qemu and gvisor)")
	return cmd
}

func newSnapshotListCmd(a *app) *cobra.Command {
	return a.oneWorkspace(&cobra.Command{Use: "list", Short: "List a workspace's snapshots, oldest first", Example: "  pyro workspace snapshot list fix"},
		func(ctx context.Context, c *pyro.Client, ref string) error {
			all, err := c.Snapshots(ctx, ref)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]any{"count": len(all), "snapshots": all})
			}
			rows := make([][]string, len(all))
			for i, s := range all {
				rows[i] = []string{s.SnapshotName, s.Kind, humanize.IBytes(uint64(s.SizeBytes)), when(s.CreatedAt)}
			}
			return a.table([]string{"NAME", "KIND", "SIZE", "CREATED"}, rows)
		})
}

func newSnapshotDeleteCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "delete WORKSPACE NAME", Short: "Forget a snapshot",
		Long:              "Delete forgets a snapshot and gives back the room that nothing else needs.",
		Example:           "  pyro workspace snapshot delete fix before-upgrade",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			if err := c.DeleteSnapshot(ctx, given[0], given[1]); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]any{"snapshot_name": given[1], "deleted": true})
			}
			_, err := fmt.Fprintf(a.Out, "deleted %s\n", given[1])
			return err
		}),
	}
}

type resetOptions struct{ snapshot string }

func newResetCmd(a *app) *cobra.Command {
	o := &resetOptions{}
	cmd := a.oneWorkspace(&cobra.Command{
		Use: "reset", Short: "Rebuild a workspace from a snapshot",
		Long: `Reset rebuilds the workspace from its baseline or from the snapshot that
--snapshot names: files, packages and processes of later are gone, and so is the
journal. Its id, name, labels, snapshots and the base of its diff stay. If it
fails the workspace is stopped, with its files as they were.`,
		Example: "  pyro workspace reset fix\n  pyro workspace reset fix --snapshot before-upgrade",
	}, func(ctx context.Context, c *pyro.Client, ref string) error {
		progress := a.newProgress()
		ws, err := c.Reset(ctx, ref, o.snapshot, progress.show)
		progress.clear()
		if err != nil {
			return err
		}
		return a.showWorkspace(ws)
	})
	cmd.Flags().StringVar(&o.snapshot, "snapshot", api.BaselineSnapshot, "the snapshot to go back to")
	cmd.Flags().BoolVar(&a.quiet, "quiet", false, "no progress on stderr")
	return cmd
}

func newWorkspaceDiskCmd(a *app) *cobra.Command {
	cmd := group("disk", "Look into a stopped workspace's disk without starting it",
		newWorkspaceDiskListCmd(a), newWorkspaceDiskReadCmd(a), newWorkspaceDiskExportCmd(a))
	cmd.Long = `These commands read the disk of a stopped workspace. Nothing in it runs, nothing
is mounted, and what the guest kept for one boot only is left out.`
	return cmd
}

func newWorkspaceDiskListCmd(a *app) *cobra.Command {
	o := &diskOptions{}
	cmd := &cobra.Command{
		Use: "list WORKSPACE [PATH]", Short: "List a directory of the disk (default " + defaultDiskPath + ")",
		Example:           "  pyro workspace disk list fix\n  pyro workspace disk list fix /etc --recursive",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			path := defaultDiskPath
			if len(given) > 1 {
				path = given[1]
			}
			list, err := c.DiskList(ctx, given[0], path, o.recursive)
			if err != nil {
				return err
			}
			if a.json {
				return a.printList(list)
			}
			return a.printEntries(list.Entries)
		}),
	}
	cmd.Flags().BoolVarP(&o.recursive, "recursive", "r", false, "list all levels")
	return cmd
}

func newWorkspaceDiskReadCmd(a *app) *cobra.Command {
	o := &diskOptions{}
	cmd := &cobra.Command{
		Use: "read WORKSPACE PATH", Short: "Print the beginning of a regular file of the disk",
		Example:           "  pyro workspace disk read fix /var/log/dpkg.log",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			if err := a.notWithJSON("content-only", o.contentOnly); err != nil {
				return err
			}
			r, err := c.DiskRead(ctx, given[0], given[1], o.maxBytes)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(r)
			}
			return a.printContent(r.Content, r.ContentBase64, o.contentOnly, diskReadRecord(r))
		}),
	}
	cmd.Flags().Int64Var(&o.maxBytes, "max-bytes", 65536, "read at most this many bytes")
	cmd.Flags().BoolVar(&o.contentOnly, "content-only", false, "print the file's bytes as they are and nothing else")
	return cmd
}

func newWorkspaceDiskExportCmd(a *app) *cobra.Command {
	o := &diskOptions{}
	cmd := &cobra.Command{
		Use: "export WORKSPACE --output FILE", Short: "Write the disk as one raw ext4 image",
		Example:           "  pyro workspace disk export fix --output fix.ext4",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			if o.output == "" {
				return usageError{api.Errorf(api.ErrInvalid, "--output is required")}
			}
			res, err := c.DiskExport(ctx, given[0], o.output)
			if err != nil {
				return err
			}
			return a.printDiskExport(res)
		}),
	}
	cmd.Flags().StringVarP(&o.output, "output", "o", "", "the file to write; it must not exist")
	return cmd
}
