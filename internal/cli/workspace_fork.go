package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
)

type forkOptions struct {
	req        api.ForkRequest
	ttlSeconds float64
	idOnly     bool
}

func newForkCmd(a *app) *cobra.Command {
	o := &forkOptions{}
	var changed func(string) bool
	cmd := a.oneWorkspace(&cobra.Command{
		Use: "fork", Short: "Make workspaces that begin with another one's disk",
		Long: `Fork makes new workspaces that begin with what a workspace's disk holds, now or in
a snapshot, and starts them. They share the disk until they write. What runs in
the workspace goes on there; in the new ones it goes on with --memory or from a
snapshot with memory, and else does not run.`,
		Example: "  pyro workspace fork fix --name try --count 3\n  pyro workspace fork fix --snapshot before-upgrade",
	}, func(ctx context.Context, c *pyro.Client, ref string) error {
		if err := a.notWithJSON("id-only", o.idOnly); err != nil {
			return err
		}
		if o.req.Count < 1 {
			return api.WithHint(api.Errorf(api.ErrInvalid, "--count is %d", o.req.Count), "give it a positive number")
		}
		if changed("ttl-seconds") {
			var err error
			if o.req.TTL, err = seconds("ttl-seconds", o.ttlSeconds); err != nil {
				return err
			}
		}
		progress := a.newProgress()
		o.req.Progress = progress.show
		res, err := c.Fork(ctx, ref, o.req)
		progress.clear()
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(res)
		}
		for i := range res.Workspaces {
			ws := &res.Workspaces[i]
			if o.idOnly {
				fmt.Fprintln(a.Out, ws.WorkspaceID)
				continue
			}
			name := ""
			if ws.Name != nil {
				name = " " + *ws.Name
			}
			fmt.Fprintf(a.Out, "forked %s%s\n", ws.WorkspaceID, name)
		}
		return nil
	})
	changed = func(flag string) bool { return cmd.Flags().Changed(flag) }
	f := cmd.Flags()
	f.StringVar(&o.req.Snapshot, "snapshot", "", "begin with this snapshot (default what the disk holds now)")
	f.BoolVar(&o.req.Memory, "memory", false, "carry over what runs, too (engines qemu and gvisor)")
	f.IntVar(&o.req.Count, "count", 1, "how many to make")
	f.StringVar(&o.req.Name, "name", "", "name of the new workspace; of several, -1 and so on is added")
	f.Float64Var(&o.ttlSeconds, "ttl-seconds", 0, "time until they delete themselves; 0 for never (default the workspace's own)")
	f.BoolVar(&o.idOnly, "id-only", false, "print nothing but the ids")
	f.BoolVar(&a.quiet, "quiet", false, "no progress on stderr")
	return cmd
}

func newPauseCmd(a *app) *cobra.Command {
	var req api.PauseRequest
	cmd := a.oneWorkspace(&cobra.Command{
		Use: "pause", Short: "Take the processor away from a workspace, or its memory too",
		Long: `Pause halts everything in the workspace and keeps it in memory, until resume.

With --to-disk it is kept in a file, and the memory is free as well. The next
command that needs the guest wakes the workspace by itself: exec, file, patch,
diff, export, shell, service; and so does who connects to a published port.
Processes, shells and services then go on where they were, and connections to
the outside are broken.`,
		Example: "  pyro workspace pause fix --to-disk\n  pyro workspace exec fix -- make test    # wakes it",
	}, func(ctx context.Context, c *pyro.Client, ref string) error {
		ws, err := c.Pause(ctx, ref, req)
		if err != nil {
			return err
		}
		return a.showWorkspace(ws)
	})
	cmd.Flags().BoolVar(&req.ToDisk, "to-disk", false, "free the memory, too (engines qemu and gvisor)")
	return cmd
}

func newResumeCmd(a *app) *cobra.Command {
	cmd := a.oneWorkspace(&cobra.Command{Use: "resume", Short: "Let a paused workspace go on", Example: "  pyro workspace resume fix"},
		func(ctx context.Context, c *pyro.Client, ref string) error {
			progress := a.newProgress()
			ws, err := c.Resume(ctx, ref, progress.show)
			progress.clear()
			if err != nil {
				return err
			}
			return a.showWorkspace(ws)
		})
	cmd.Flags().BoolVar(&a.quiet, "quiet", false, "no progress on stderr")
	return cmd
}
