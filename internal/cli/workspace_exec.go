package cli

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

type execOptions struct {
	workspace      string
	req            api.ExecRequest
	timeoutSeconds float64
	env            []string
	secretEnv      []string
	stdin          bool
	tty            bool
	detach         bool
	raw            bool
}

func newExecCmd(a *app) *cobra.Command {
	o := &execOptions{}
	cmd := &cobra.Command{
		Use: "exec WORKSPACE [flags] -- COMMAND [ARGUMENT]...", Short: "Run one command in a workspace",
		Long: `Exec runs one command in a running workspace, with its output passed through
live, and exits with its status; 124 if it ran out of time, 125 if pyro itself
failed. The words after -- keep their boundaries; a single word is run by sh -c.

Every command gets a number and an entry in the workspace's journal, which
pyro workspace logs shows with its output.`,
		Example: `  pyro workspace exec fix -- make test
  pyro workspace exec fix --timeout-seconds 600 -- 'apt-get install -y ./dist/*.deb && foo --version'
  tar c . | pyro workspace exec fix --stdin -- tar x
  pyro workspace exec fix --tty -- python3
  pyro workspace exec fix --detach --timeout-seconds 0 -- ./long-benchmark.sh`,
		Annotations:       map[string]string{annotationPasses: "yes"},
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(execArgs),
		RunE: func(cmd *cobra.Command, given []string) error {
			a.passesThrough = true
			o.workspace, o.req.Argv = given[0], given[1:]
			if err := o.complete(a); err != nil {
				return err
			}
			return a.withClient(func(ctx context.Context, c *pyro.Client, _ []string) error {
				if o.detach {
					return runDetach(ctx, a, c, o)
				}
				return runExec(ctx, a, c, o)
			})(cmd, given)
		},
	}
	f := cmd.Flags()
	f.Float64Var(&o.timeoutSeconds, "timeout-seconds", api.DefaultTimeout.Seconds(), "time limit for the command; 0 for none")
	f.StringVar(&o.req.Cwd, "cwd", api.WorkspacePath, "directory to run it in")
	f.StringArrayVar(&o.env, "env", nil, "environment variable `NAME=VALUE` for the command, or NAME to take this process's; repeatable")
	addSecretEnv(cmd, &o.secretEnv)
	addUser(cmd, &o.req.User, "the workspace's own")
	f.BoolVar(&o.stdin, "stdin", false, "pass this process's stdin to the command")
	f.BoolVarP(&o.tty, "tty", "t", false, "run it on a terminal, connected to this one")
	f.BoolVar(&o.detach, "detach", false, "return at once; the command goes on, and logs shows it")
	f.BoolVar(&o.raw, "raw", false, "do not filter control sequences on a terminal")
	f.BoolVar(&a.quiet, "quiet", false, "no closing line on stderr")
	return cmd
}

func execArgs(cmd *cobra.Command, given []string) error {
	if err := swallowed(cmd); err != nil {
		return err
	}
	dash := cmd.ArgsLenAtDash()
	switch {
	case len(given) == 0 || dash == 0:
		return fmt.Errorf("no workspace was named, as in: pyro workspace exec WORKSPACE -- make test")
	case dash > 1 || (dash < 0 && len(given) > 1):
		return fmt.Errorf("put the command after --, as in: pyro workspace exec %s -- %s", given[0], strings.Join(given[1:], " "))
	}
	return nil
}

func (o *execOptions) complete(a *app) error {
	var err error
	if o.req.Timeout, err = seconds("timeout-seconds", o.timeoutSeconds); err != nil {
		return err
	}
	if o.req.Env, err = parseEnv(o.env, os.LookupEnv); err != nil {
		return err
	}
	if o.req.SecretEnv, err = parseSecretEnv(o.secretEnv); err != nil {
		return err
	}
	if o.detach && (o.tty || o.stdin) {
		return usageError{api.Errorf(api.ErrInvalid, "--detach goes with neither --tty nor --stdin")}
	}
	if err := a.notWithJSON("tty", o.tty); err != nil {
		return err
	}
	if o.stdin {
		o.req.Stdin = a.In
	}
	return nil
}

func runExec(ctx context.Context, a *app, c *pyro.Client, o *execOptions) error {
	if !a.json {
		o.req.Stdout = a.filtered(a.Out, o.raw || o.tty)
		o.req.Stderr = a.filtered(a.Err, o.raw)
	}
	if o.tty {
		restore, err := a.connectTerminal(ctx, &o.req)
		if err != nil {
			return err
		}
		defer restore()
	}
	res, err := c.Exec(ctx, o.workspace, o.req)
	if err != nil {
		return err
	}
	a.exitAs(res)
	if a.json {
		return a.printJSON(res)
	}
	a.tellTrouble(res, o.req.Timeout)
	if !a.quiet {
		fmt.Fprintf(a.Err, "[workspace-exec] workspace_id=%s sequence=%d cwd=%s exit_code=%d duration_ms=%d\n",
			res.WorkspaceID, res.Sequence, boundedlog.Printable(res.Cwd), res.ExitCode, res.DurationMS)
	}
	return nil
}

// connectTerminal gives the command this process's terminal, raw, until
// restore. Where stdin is none the command gets one of the usual size and reads
// end of file.
func (a *app) connectTerminal(ctx context.Context, req *api.ExecRequest) (restore func(), err error) {
	req.TTY = &api.TerminalSize{Cols: 80, Rows: 24}
	in := a.stdinFile()
	if in == nil || !term.IsTerminal(int(in.Fd())) {
		return func() {}, nil
	}
	req.Stdin = in
	size, resize, restore, err := rawTerminal(ctx, in)
	if err == nil {
		req.TTY, req.Resize = &size, resize
	}
	return restore, err
}

// rawTerminal makes a terminal raw until restore, and tells its size and the
// changes of that.
func rawTerminal(ctx context.Context, in *os.File) (size api.TerminalSize, resize <-chan api.TerminalSize, restore func(), err error) {
	fd := int(in.Fd())
	size = api.TerminalSize{Cols: 80, Rows: 24}
	if cols, rows, err := term.GetSize(fd); err == nil && cols > 0 && rows > 0 {
		size = api.TerminalSize{Cols: uint16(cols), Rows: uint16(rows)}
	}
	was, err := term.MakeRaw(fd)
	if err != nil {
		return size, nil, nil, fmt.Errorf("making the terminal raw: %w", err)
	}
	sizes := make(chan api.TerminalSize, 1)
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		for {
			select {
			case <-changed:
				if cols, rows, err := term.GetSize(fd); err == nil && cols > 0 && rows > 0 {
					select {
					case sizes <- api.TerminalSize{Cols: uint16(cols), Rows: uint16(rows)}:
					case <-ctx.Done():
					}
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return size, sizes, func() {
		signal.Stop(changed)
		cancel()
		_ = term.Restore(fd, was)
	}, nil
}

func runDetach(ctx context.Context, a *app, c *pyro.Client, o *execOptions) error {
	rec, err := c.StartExec(ctx, o.workspace, o.req)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(rec)
	}
	fmt.Fprintf(a.Out, "%d\n", rec.Sequence)
	if !a.quiet {
		fmt.Fprintf(a.Err, "[workspace-exec] workspace_id=%s sequence=%d cwd=%s state=%s; see pyro workspace logs %s --sequence %d\n",
			rec.WorkspaceID, rec.Sequence, boundedlog.Printable(rec.Cwd), rec.State, o.workspace, rec.Sequence)
	}
	return nil
}

type logsOptions struct{ query api.LogsQuery }

func newLogsCmd(a *app) *cobra.Command {
	o := &logsOptions{}
	cmd := a.oneWorkspace(&cobra.Command{
		Use: "logs", Short: "Show the journal of a workspace's commands",
		Example: "  pyro workspace logs fix\n  pyro workspace logs fix --sequence 3",
	}, func(ctx context.Context, c *pyro.Client, ref string) error {
		if o.query.Sequence < 0 || o.query.Tail < 0 {
			return usageError{api.Errorf(api.ErrInvalid, "--sequence and --tail take numbers above 0")}
		}
		logs, err := c.Logs(ctx, ref, o.query)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(logs)
		}
		return a.printLogs(logs)
	})
	cmd.Flags().Int64Var(&o.query.Sequence, "sequence", 0, "only the command with this number")
	cmd.Flags().Int64Var(&o.query.Tail, "tail", 0, "only this many of the last commands")
	return cmd
}

func (a *app) printLogs(logs *api.WorkspaceLogs) error {
	out := a.filtered(a.Out, false)
	for _, e := range logs.Entries {
		how := e.State
		if e.ExitCode != nil {
			how = fmt.Sprintf("exit %d", *e.ExitCode)
		}
		if e.TimedOut {
			how = "timed out"
		}
		fmt.Fprintf(a.Out, "# %d  %s  (%s, %d ms, %s, in %s)\n", e.Sequence, boundedlog.Printable(e.Command), how, e.DurationMS,
			when(e.StartedAt), boundedlog.Printable(e.Cwd))
		for _, stream := range []string{e.Stdout, e.Stderr} {
			if _, err := out.Write([]byte(stream)); err != nil {
				return err
			}
			if stream != "" && !strings.HasSuffix(stream, "\n") {
				fmt.Fprintln(a.Out)
			}
		}
	}
	return nil
}

func newSummaryCmd(a *app) *cobra.Command {
	return a.oneWorkspace(&cobra.Command{Use: "summary", Short: "Tell what happened in a workspace since its last reset", Example: "  pyro workspace summary fix"},
		func(ctx context.Context, c *pyro.Client, ref string) error {
			s, err := c.Summary(ctx, ref)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(s)
			}
			return a.printSummary(s)
		})
}

func (a *app) printSummary(s *api.Summary) error {
	rows := [][2]string{{"workspace", s.WorkspaceID}, {"state", string(s.State)}, {"since", when(s.Since)}, {"outcome", s.Outcome}}
	var lines []string
	for _, c := range s.Commands.Recent {
		how := c.State
		if c.ExitCode != nil {
			how = fmt.Sprintf("exit %d", *c.ExitCode)
		}
		lines = append(lines, fmt.Sprintf("%d  %s  (%s)", c.Sequence, c.Command, how))
	}
	if len(lines) > 0 {
		rows = append(rows, [2]string{"commands", strings.Join(lines, "\n")})
	}
	if c := s.Changes; c != nil && c.Total > 0 {
		text := fmt.Sprintf("%d added, %d modified, %d deleted, %d of another type", c.Added, c.Modified, c.Deleted, c.TypeChanged)
		rows = append(rows, [2]string{"changes", text + "\n" + strings.Join(c.Paths, "\n")})
	}
	for _, e := range s.Exports {
		rows = append(rows, [2]string{"export", fmt.Sprintf("%v to %v", e.Detail["path"], e.Detail["output"])})
	}
	for _, snap := range s.Snapshots {
		rows = append(rows, [2]string{"snapshot", fmt.Sprintf("%s (%s)", snap.SnapshotName, when(snap.CreatedAt))})
	}
	return a.printPairs(rows)
}
