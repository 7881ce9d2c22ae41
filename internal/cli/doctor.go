package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

func newDoctorCmd(a *app) *cobra.Command {
	var environment string
	var repair bool
	cmd := &cobra.Command{
		Use: "doctor", Short: "Say what works on this host and what would mend the rest",
		Long: `Doctor looks at every engine and says whether it works here and, if not, why and
what mends it; it changes nothing. Its exit status is 0 only if at least one
engine that isolates works.

With --repair it makes lost or damaged records of workspaces again, from copies
that lie with the workspaces. Nothing that is whole is touched.`,
		Example: "  pyro doctor\n  pyro doctor --environment debian:12 --json",
		Args:    args(named),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if repair {
				return runRepair(cmd.Context(), a)
			}
			return runDoctor(cmd.Context(), a, environment)
		},
	}
	cmd.Flags().StringVar(&environment, "environment", "", "look at this environment too: cold, warm or stale")
	cmd.Flags().BoolVar(&repair, "repair", false, "make lost or damaged records of workspaces again")
	return cmd
}

func runRepair(ctx context.Context, a *app) error {
	client, err := a.client(ctx)
	if err != nil {
		return err
	}
	r, err := client.RepairState(ctx)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(r)
	}
	if !r.Repaired {
		_, err := fmt.Fprintf(a.Out, "nothing to repair: the records of %d workspaces are whole\n", r.Workspaces)
		return err
	}
	fmt.Fprintf(a.Out, "repaired: %s\nthe records of %d workspaces are back\n", boundedlog.Printable(r.Damage), r.Workspaces)
	if r.MovedTo != "" {
		fmt.Fprintf(a.Out, "the damaged file is at %s\n", r.MovedTo)
	}
	for _, s := range r.Skipped {
		fmt.Fprintf(a.Err, "pyro: left out %s: %s\n", boundedlog.Printable(s.Path), boundedlog.Printable(s.Reason))
	}
	return nil
}

func runDoctor(ctx context.Context, a *app, environment string) error {
	client, err := a.client(ctx)
	if err != nil {
		return err
	}
	r, err := client.Doctor(ctx, environment)
	if err != nil {
		return err
	}
	if !r.OK {
		a.status = exitFailure
	}
	if a.json {
		return a.printJSON(r)
	}
	fmt.Fprintln(a.Out, "Engines")
	for _, e := range r.Engines {
		a.finding(2, e.Engine, e.Detail, e.Remedy, e.Available)
		for _, f := range e.Facts {
			a.finding(4, f.Name, f.Value, f.Remedy, f.OK)
		}
	}
	fmt.Fprintln(a.Out, "Installation")
	for _, f := range r.Facts {
		a.finding(2, f.Name, f.Value, f.Remedy, f.OK)
	}
	kernel := "installed"
	if !r.KernelInstalled {
		kernel = "not built yet; the first virtual machine builds it"
	}
	a.finding(2, "guest kernel", kernel, "", true)
	if e := r.Environment; e != nil {
		a.finding(2, e.Name, e.State+": "+e.Detail, "", e.State != api.EnvironmentStale)
	}
	if r.OK {
		fmt.Fprintf(a.Out, "Guests will run on %s.\n", r.Selected)
	} else {
		fmt.Fprintln(a.Out, "No engine that isolates works here.")
	}
	return nil
}

func (a *app) finding(indent int, name, value, remedy string, ok bool) {
	mark := "ok"
	if !ok {
		mark = "--"
	}
	fmt.Fprintf(a.Out, "%*s%s %s: %s\n", indent, "", mark, name, value)
	if remedy != "" && !ok {
		fmt.Fprintf(a.Out, "%*s   to mend: %s\n", indent, "", remedy)
	}
}
