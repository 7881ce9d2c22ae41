package cli

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
	"github.com/pyro-mcp/pyro/internal/hosthelper"
)

func newHostCmd(a *app) *cobra.Command {
	cmd := group("host", "Put pyro into chat hosts and keep it right",
		newHostConnectCmd(a), newHostConfigCmd(a), newHostDoctorCmd(a), newHostRepairCmd(a))
	cmd.Long = `A chat host is a program whose model uses pyro's tools: Claude Code, Codex,
OpenCode, Claude Desktop, Cursor, VS Code, Zed. Its configuration has an entry
that starts pyro mcp serve; these commands write it, look at it and mend it. They
take the options of mcp serve, which the entry then carries.`
	cmd.Example = `  pyro host connect claude-code
  pyro host connect codex --mode repro-fix --dry-run
  pyro host print-config cursor --merge
  pyro host doctor`
	return cmd
}

type hostOptions struct {
	*mcpSelectors
	host   string   // the first of hosts
	hosts  []string // that were named
	scope  string
	output string
	merge  bool
	dryRun bool
}

// newHostCommand returns a command with the selectors of mcp serve.
func newHostCommand(o *hostOptions, cmd *cobra.Command, run func(ctx context.Context, h *hosthelper.Helper, want hosthelper.Want) error) *cobra.Command {
	o.mcpSelectors = newMCPSelectors()
	cmd.RunE = func(cmd *cobra.Command, given []string) error {
		if o.hosts = given; len(given) > 0 {
			o.host = given[0]
		}
		if err := o.complete(); err != nil {
			return err
		}
		h, err := hosthelper.New(checkMCPArguments)
		if err != nil {
			return err
		}
		want, err := o.want()
		if err != nil {
			return err
		}
		return run(cmd.Context(), h, want)
	}
	cmd.ValidArgsFunction = cobra.FixedCompletions(hosthelper.Hosts(), cobra.ShellCompDirectiveNoFileComp)
	cmd.Flags().AddFlagSet(o.flags)
	return cmd
}

// want is the entry that the selectors ask for.
func (o *hostOptions) want() (hosthelper.Want, error) {
	var w hosthelper.Want
	var err error
	if w.Command, err = ownPath(); err != nil {
		return w, err
	}
	if w.Args, err = o.arguments(); err != nil {
		return w, err
	}
	w.AnyArgs = len(w.Args) == len([]string{"mcp", "serve"})
	// A host starts the server with few of this shell's variables.
	w.Env = map[string]string{}
	for _, name := range []string{"PYRO_STATE_DIR", "PYRO_CACHE_DIR"} {
		if v := os.Getenv(name); v != "" {
			w.Env[name] = v
		}
	}
	return w, nil
}

// ownPath is how this program is called: by its name on PATH if that is this
// program, which survives an upgrade, else by its file.
func ownPath() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("finding this program: %w", err)
	}
	found, err := exec.LookPath("pyro")
	if err != nil {
		return self, nil
	}
	st, err := os.Stat(found)
	own, ownErr := os.Stat(self)
	if err == nil && ownErr == nil && os.SameFile(st, own) && strings.HasPrefix(found, "/") {
		return found, nil
	}
	return self, nil
}

func newHostConnectCmd(a *app) *cobra.Command {
	o := &hostOptions{}
	cmd := newHostCommand(o, &cobra.Command{
		Use: "connect claude-code|codex", Short: "Add pyro to a chat host with the host's own command",
		Long: `Connect runs the chat host's own mcp add. An entry that is right already stays,
another one of the name pyro is replaced. --dry-run shows the commands and runs
nothing.`,
		Example: "  pyro host connect claude-code\n  pyro host connect codex --project-path . --dry-run",
		Args:    args(named),
	}, func(ctx context.Context, h *hosthelper.Helper, want hosthelper.Want) error {
		c, err := h.Connect(ctx, o.host, o.scope, want.Entry, o.dryRun)
		return a.printChange(c, err)
	})
	cmd.Flags().StringVar(&o.scope, "scope", "user", "Claude Code's scope: user, local or project")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "show the exact change and make none")
	return cmd
}

func newHostConfigCmd(a *app) *cobra.Command {
	o := &hostOptions{}
	cmd := newHostCommand(o, &cobra.Command{
		Use: "print-config HOST", Short: "Print a chat host's entry for pyro, or write it",
		Long: `Print-config prints what starts pyro in the form of the host's configuration:
opencode, claude-desktop, cursor, vscode or zed; for claude-code and codex too,
whose configuration connect changes.

--output writes it to a new file. --merge puts it into the host's own file, of
which all else stays byte for byte, after a copy to FILE` + hosthelper.BackupSuffix + `. A file that
is not plain JSON is left alone.`,
		Example: "  pyro host print-config opencode\n  pyro host print-config cursor --merge --dry-run",
		Args:    args(named),
	}, func(_ context.Context, h *hosthelper.Helper, want hosthelper.Want) error {
		if o.merge && o.output != "" {
			return usageError{api.Errorf(api.ErrInvalid, "--merge and --output exclude each other")}
		}
		switch {
		case o.merge:
			c, err := h.Merge(o.host, "", want.Entry, o.dryRun)
			return a.printChange(c, err)
		case o.output != "":
			c, err := h.WriteConfig(o.host, o.output, want.Entry, o.dryRun)
			return a.printChange(c, err)
		}
		config, err := h.Config(o.host, want.Entry)
		if err != nil {
			return err
		}
		_, err = fmt.Fprint(a.Out, config)
		return err
	})
	cmd.Flags().StringVar(&o.output, "output", "", "write to a new `FILE`")
	cmd.Flags().BoolVar(&o.merge, "merge", false, "put it into the host's own configuration file")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "with --merge or --output: show the exact change and make none")
	return cmd
}

func newHostDoctorCmd(a *app) *cobra.Command {
	o := &hostOptions{}
	return newHostCommand(o, &cobra.Command{
		Use: "doctor [HOST]...", Short: "Tell which chat hosts have pyro, and whether it is right",
		Long: `Doctor looks at the entry for pyro of each chat host, or of those named. It has
drifted if it starts another program than this pyro or one that is not there, or
with arguments that pyro does not understand; if options of mcp serve are given,
it must carry exactly these. Exit status 1 if one has drifted.`,
		Example: "  pyro host doctor\n  pyro host doctor codex --mode repro-fix",
		Args:    cobra.ArbitraryArgs,
	}, func(ctx context.Context, h *hosthelper.Helper, want hosthelper.Want) error {
		hosts := o.hosts
		if len(hosts) == 0 {
			hosts = hosthelper.Hosts()
		}
		return a.hostDoctor(ctx, h, hosts, want)
	})
}

func (a *app) hostDoctor(ctx context.Context, h *hosthelper.Helper, hosts []string, want hosthelper.Want) error {
	all := make([]*hosthelper.Status, 0, len(hosts))
	for _, host := range hosts {
		s, err := h.Status(ctx, host, want)
		if err != nil {
			return err
		}
		if s.State == hosthelper.StateDrifted || s.State == hosthelper.StateUnknown {
			a.status = exitFailure
		}
		all = append(all, s)
	}
	if a.json {
		return a.printJSON(map[string]any{"hosts": all})
	}
	rows := make([][]string, len(all))
	for i, s := range all {
		installed := "not found"
		if s.Installed {
			installed = "installed"
		}
		detail := s.Detail
		switch {
		case s.State == hosthelper.StateConfigured:
			detail = hosthelper.Quote(append([]string{s.Command}, s.Args...))
		case detail == "" && s.Repair != "":
			detail = "run: " + s.Repair
		case s.Repair != "":
			detail += "; run: " + s.Repair
		}
		rows[i] = []string{s.Host, installed, s.State, boundedlog.Printable(detail)}
	}
	return a.table([]string{"HOST", "PROGRAM", "PYRO", "DETAIL"}, rows)
}

func newHostRepairCmd(a *app) *cobra.Command {
	o := &hostOptions{}
	cmd := newHostCommand(o, &cobra.Command{
		Use: "repair HOST", Short: "Make a chat host's entry for pyro right again",
		Long: `Repair makes the entry start this pyro, with the options of mcp serve that are
given or, if none are, those it has, as far as pyro understands them. A host
without an entry gets one.`,
		Example: "  pyro host repair claude-code\n  pyro host repair cursor --dry-run",
		Args:    args(named),
	}, func(ctx context.Context, h *hosthelper.Helper, want hosthelper.Want) error {
		c, err := h.Repair(ctx, o.host, want, o.dryRun)
		return a.printChange(c, err)
	})
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "show the exact change and make none")
	return cmd
}

// printChange prints what was done, or would be.
func (a *app) printChange(c *hosthelper.Change, err error) error {
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(c)
	}
	if c.Action == hosthelper.ActionNone {
		fmt.Fprintf(a.Out, "%s has pyro already; nothing to do\n", c.Host)
		return nil
	}
	if c.DryRun {
		for _, argv := range c.Commands {
			fmt.Fprintf(a.Out, "would run: %s\n", hosthelper.Quote(argv))
		}
		if c.File != "" {
			fmt.Fprintf(a.Out, "would change: %s\n%s%s", c.File, prefixed("-", c.Before), prefixed("+", c.After))
		}
		return nil
	}
	done := "added pyro to"
	if c.Action == hosthelper.ActionReplace {
		done = "replaced pyro's entry in"
	}
	fmt.Fprintf(a.Out, "%s %s\n", done, c.Host)
	if c.File != "" {
		fmt.Fprintf(a.Out, "changed %s\n", c.File)
	}
	if c.Backup != "" {
		fmt.Fprintf(a.Out, "what was there is in %s\n", c.Backup)
	}
	return nil
}

// prefixed puts prefix before every line.
func prefixed(prefix, text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		fmt.Fprintf(&b, "%s %s\n", prefix, strings.TrimRight(line, "\n"))
	}
	return b.String()
}
