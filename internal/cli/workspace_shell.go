package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
)

func newShellCmd(a *app) *cobra.Command {
	cmd := group("shell", "Use interactive shells in a workspace",
		newShellOpenCmd(a), newShellListCmd(a), newShellReadCmd(a), newShellWriteCmd(a), newShellSignalCmd(a), newShellCloseCmd(a), newShellAttachCmd(a))
	cmd.Long = `A shell is a terminal in the workspace that goes on between commands: open one,
write to it, read what it shows, or attach this terminal to it. It ends when it is
closed or its workspace is stopped or reset.`
	return cmd
}

type shellOptions struct {
	size          api.TerminalSize
	cwd           string
	user          string
	secretEnv     []string
	idOnly        bool
	read          api.ReadShellRequest
	waitForIdleMS int64
	input         string
	noNewline     bool
	signal        string
}

func newShellOpenCmd(a *app) *cobra.Command {
	o := &shellOptions{}
	cmd := a.oneWorkspace(&cobra.Command{
		Use: "open", Short: "Start a shell",
		Example: "  shell=$(pyro workspace shell open fix --id-only)\n  pyro workspace shell write fix $shell --input 'make test'\n  pyro workspace shell read fix $shell --plain --wait-for-idle-ms 500",
	}, func(ctx context.Context, c *pyro.Client, ref string) error {
		if err := a.notWithJSON("id-only", o.idOnly); err != nil {
			return err
		}
		env, err := parseSecretEnv(o.secretEnv)
		if err != nil {
			return err
		}
		s, err := c.OpenShell(ctx, ref, api.OpenShellRequest{Cwd: o.cwd, User: o.user, Size: o.size, SecretEnv: env})
		if err != nil {
			return err
		}
		switch {
		case a.json:
			return a.printJSON(s)
		case o.idOnly:
			_, err := fmt.Fprintln(a.Out, s.ShellID)
			return err
		}
		_, err = fmt.Fprintf(a.Out, "opened shell %s\n", s.ShellID)
		return err
	})
	f := cmd.Flags()
	f.StringVar(&o.cwd, "cwd", api.WorkspacePath, "directory to start in")
	addUser(cmd, &o.user, "the workspace's own")
	f.Uint16Var(&o.size.Cols, "cols", 120, "columns of its terminal")
	f.Uint16Var(&o.size.Rows, "rows", 30, "rows of its terminal")
	f.BoolVar(&o.idOnly, "id-only", false, "print nothing but the id")
	addSecretEnv(cmd, &o.secretEnv)
	return cmd
}

func newShellListCmd(a *app) *cobra.Command {
	return a.oneWorkspace(&cobra.Command{Use: "list", Short: "List a workspace's shells, oldest first", Example: "  pyro workspace shell list fix"},
		func(ctx context.Context, c *pyro.Client, ref string) error {
			all, err := c.Shells(ctx, ref)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]any{"count": len(all), "shells": all})
			}
			rows := make([][]string, len(all))
			for i, s := range all {
				rows[i] = []string{s.ShellID, s.State, fmt.Sprintf("%dx%d", s.Cols, s.Rows), s.Cwd, when(s.StartedAt)}
			}
			return a.table([]string{"SHELL", "STATE", "SIZE", "CWD", "STARTED"}, rows)
		})
}

// oneShell is a command with a workspace and a shell as its arguments.
func (a *app) oneShell(cmd *cobra.Command, run func(ctx context.Context, c *pyro.Client, ref, id string) error) *cobra.Command {
	cmd.Use += " WORKSPACE SHELL"
	cmd.Args = args(named)
	cmd.ValidArgsFunction = a.completeWorkspace
	cmd.RunE = a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
		return run(ctx, c, given[0], given[1])
	})
	return cmd
}

func newShellReadCmd(a *app) *cobra.Command {
	o := &shellOptions{}
	cmd := a.oneShell(&cobra.Command{
		Use: "read", Short: "Print a shell's output from a cursor on",
		Long: `Read prints what a shell has shown, from a cursor on. Reading consumes nothing:
the same cursor gives the same output. The next cursor is on stderr.`,
		Example: "  pyro workspace shell read fix $shell --plain --wait-for-idle-ms 500\n  pyro workspace shell read fix $shell --cursor 169",
	}, func(ctx context.Context, c *pyro.Client, ref, id string) error {
		o.read.WaitForIdle = time.Duration(o.waitForIdleMS) * time.Millisecond
		r, err := c.ReadShell(ctx, ref, id, o.read)
		if err != nil {
			return err
		}
		if a.json {
			return a.printJSON(r)
		}
		record := fmt.Sprintf("[shell-read] shell_id=%s state=%s cursor=%d next_cursor=%d truncated=%t", r.ShellID, r.State, r.Cursor, r.NextCursor, r.Truncated)
		return a.printContent(r.Output, "", false, record)
	})
	f := cmd.Flags()
	f.Int64Var(&o.read.Cursor, "cursor", 0, "where to begin")
	f.Int64Var(&o.read.MaxChars, "max-chars", api.DefaultShellChars, "read at most this many characters")
	f.BoolVar(&o.read.Plain, "plain", false, "what a person would read on the terminal, in place of the bytes that draw it")
	f.Int64Var(&o.waitForIdleMS, "wait-for-idle-ms", 0, "first wait until no output has come for so long")
	return cmd
}

func newShellWriteCmd(a *app) *cobra.Command {
	o := &shellOptions{}
	cmd := a.oneShell(&cobra.Command{Use: "write", Short: "Type into a shell", Example: "  pyro workspace shell write fix $shell --input 'make test'\n  pyro workspace shell write fix $shell --input q --no-newline"},
		func(ctx context.Context, c *pyro.Client, ref, id string) error {
			r, err := c.WriteShell(ctx, ref, id, o.input, !o.noNewline)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(r)
			}
			_, err = fmt.Fprintf(a.Out, "wrote %d bytes\n", r.InputLength)
			return err
		})
	cmd.Flags().StringVar(&o.input, "input", "", "what to type")
	cmd.Flags().BoolVar(&o.noNewline, "no-newline", false, "do not type a newline behind it")
	return cmd
}

func newShellSignalCmd(a *app) *cobra.Command {
	o := &shellOptions{}
	cmd := a.oneShell(&cobra.Command{Use: "signal", Short: "Send a signal to what runs in a shell's foreground", Example: "  pyro workspace shell signal fix $shell\n  pyro workspace shell signal fix $shell --signal TERM"},
		func(ctx context.Context, c *pyro.Client, ref, id string) error {
			r, err := c.SignalShell(ctx, ref, id, o.signal)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(r)
			}
			_, err = fmt.Fprintf(a.Out, "sent %s\n", r.Signal)
			return err
		})
	cmd.Flags().StringVar(&o.signal, "signal", "INT", "HUP, INT, TERM or KILL")
	return cmd
}

func newShellCloseCmd(a *app) *cobra.Command {
	return a.oneShell(&cobra.Command{Use: "close", Short: "End a shell with everything that runs in it", Example: "  pyro workspace shell close fix $shell"},
		func(ctx context.Context, c *pyro.Client, ref, id string) error {
			r, err := c.CloseShell(ctx, ref, id)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(r)
			}
			_, err = fmt.Fprintf(a.Out, "closed shell %s\n", r.ShellID)
			return err
		})
}

func newShellAttachCmd(a *app) *cobra.Command {
	return &cobra.Command{
		Use: "attach WORKSPACE [SHELL]", Short: "Connect this terminal with a shell, a new one if none is named",
		Long: `Attach connects this terminal with a shell until that ends. Ctrl-] detaches: the
shell goes on, and attach or read finds it again.`,
		Example:           "  pyro workspace shell attach fix",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(named),
		RunE: a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
			id := ""
			if len(given) > 1 {
				id = given[1]
			}
			return runAttach(ctx, a, c, given[0], id)
		}),
	}
}

// detachKey is Ctrl-], as in telnet(1).
const detachKey = 0x1d

// errDetached says that the person has pressed it.
var errDetached = errors.New("detached")

func runAttach(ctx context.Context, a *app, c *pyro.Client, ref, id string) error {
	in := a.stdinFile()
	if in == nil || !term.IsTerminal(int(in.Fd())) || !isTerminal(a.Out) {
		return api.WithHint(api.Errorf(api.ErrInvalid, "attach needs a terminal on stdin and stdout"), "use shell write and shell read in a script")
	}
	size, resize, restore, err := rawTerminal(ctx, in)
	if err != nil {
		return err
	}
	defer restore()
	opened := id == ""
	if opened {
		s, err := c.OpenShell(ctx, ref, api.OpenShellRequest{Size: size})
		if err != nil {
			return err
		}
		id = s.ShellID
	}
	attached, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	keys := &keyReader{r: in, detach: func() { cancel(errDetached) }}
	shell, err := c.AttachShell(attached, ref, id, api.AttachRequest{Stdin: keys, Stdout: a.Out, Size: size, Resize: resize})
	// What the guest has switched on is switched off again: the alternate
	// screen (by 1047, since 1049 would move the cursor of a terminal that is not
	// in it), mouse reports, bracketed paste, a hidden cursor, colours.
	fmt.Fprint(a.Out, "\x1b[?1047l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?25h\x1b[0m\x1b>\x1b[?1l\r\n\x1b[J")
	restore()
	if errors.Is(context.Cause(attached), errDetached) {
		fmt.Fprintf(a.Err, "pyro: detached; pyro workspace shell attach %s %s comes back\n", boundedlog.Printable(ref), id)
		return nil
	}
	if err != nil {
		return err
	}
	if shell.ExitCode != nil {
		fmt.Fprintf(a.Err, "pyro: the shell has ended with status %d\n", *shell.ExitCode)
	}
	return nil
}

// keyReader passes keys on up to the detach key.
type keyReader struct {
	r      io.Reader
	detach func()
}

func (k *keyReader) Read(p []byte) (int, error) {
	n, err := k.r.Read(p)
	if i := bytes.IndexByte(p[:n], detachKey); i >= 0 {
		k.detach()
		return i, io.EOF
	}
	return n, err
}

func newServiceCmd(a *app) *cobra.Command {
	cmd := group("service", "Run long-running commands in a workspace",
		newServiceStartCmd(a), newServiceListCmd(a), newServiceStatusCmd(a), newServiceStopCmd(a), newServiceLogsCmd(a))
	cmd.Long = `A service is a long-running command with a name: it is started and checked for
readiness, its output is kept, its ports can be published on this host while it
lives. It ends when it is stopped or its workspace is stopped or reset.`
	return cmd
}

type serviceOptions struct {
	req             api.StartServiceRequest
	env             []string
	secretEnv       []string
	readyFile       string
	readyTCP        string
	readyHTTP       string
	readyCommand    string
	readyTimeout    float64
	readyIntervalMS int64
	publish         []string
	tail            int64
	all             bool
	follow          bool
}

func newServiceStartCmd(a *app) *cobra.Command {
	o := &serviceOptions{}
	cmd := &cobra.Command{
		Use: "start WORKSPACE NAME [flags] -- COMMAND [ARGUMENT]...", Short: "Start a service and wait until it is ready",
		Long: `Start runs a command in the background and returns when it is ready by the check
that one of the --ready flags gives, or at once without one. A service that is not
ready in time has failed: its log is kept and nothing of it runs. Exit status 1.`,
		Example:           "  pyro workspace service start fix web --ready-http http://127.0.0.1:8000/ --publish 8000 -- python3 -m http.server 8000",
		ValidArgsFunction: a.completeWorkspace,
		Args:              args(serviceArgs),
		RunE: func(cmd *cobra.Command, given []string) error {
			o.req.Argv = given[2:]
			if err := o.complete(cmd); err != nil {
				return err
			}
			return a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
				s, err := c.StartService(ctx, given[0], given[1], o.req)
				if err != nil {
					return err
				}
				if s.State == api.ServiceFailed {
					a.status = exitFailure
				}
				return a.showService(s)
			})(cmd, given)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.req.Cwd, "cwd", api.WorkspacePath, "directory to run it in")
	addUser(cmd, &o.req.User, "the workspace's own")
	f.StringArrayVar(&o.env, "env", nil, "environment variable `NAME=VALUE`, or NAME to take this process's; repeatable")
	f.StringVar(&o.readyFile, "ready-file", "", "ready when this file is there")
	f.StringVar(&o.readyTCP, "ready-tcp", "", "ready when something answers at `HOST:PORT` in the guest")
	f.StringVar(&o.readyHTTP, "ready-http", "", "ready when this `URL` answers with success in the guest")
	f.StringVar(&o.readyCommand, "ready-command", "", "ready when this command succeeds")
	f.Float64Var(&o.readyTimeout, "ready-timeout-seconds", 30, "how long it may take to be ready")
	f.Int64Var(&o.readyIntervalMS, "ready-interval-ms", 500, "how often to check")
	f.StringArrayVar(&o.publish, "publish", nil, "publish `[[HOST:]HOST_PORT:]GUEST_PORT` on this host, 127.0.0.1 and a free port if not given; repeatable")
	f.StringVar(&o.req.Restart, "restart", "", "on-failure: start it again when it fails after it was ready")
	addSecretEnv(cmd, &o.secretEnv)
	return cmd
}

func serviceArgs(cmd *cobra.Command, given []string) error {
	if err := swallowed(cmd); err != nil {
		return err
	}
	if dash := cmd.ArgsLenAtDash(); dash != 2 {
		return fmt.Errorf("name a workspace and the service, and put the command after --, as in: pyro workspace service start fix web -- ./serve")
	}
	if len(given) < 3 {
		return fmt.Errorf("no command was given after --")
	}
	return nil
}

func (o *serviceOptions) complete(cmd *cobra.Command) error {
	var checks []api.Readiness
	for _, c := range []struct {
		flag      string
		readiness api.Readiness
	}{
		{"ready-file", api.Readiness{Type: "file", Path: o.readyFile}},
		{"ready-tcp", api.Readiness{Type: "tcp", Address: o.readyTCP}},
		{"ready-http", api.Readiness{Type: "http", URL: o.readyHTTP}},
		{"ready-command", api.Readiness{Type: "command", Command: o.readyCommand}},
	} {
		if cmd.Flags().Changed(c.flag) {
			checks = append(checks, c.readiness)
		}
	}
	if len(checks) > 1 {
		return usageError{api.Errorf(api.ErrInvalid, "give at most one of --ready-file, --ready-tcp, --ready-http and --ready-command")}
	}
	if len(checks) == 1 {
		o.req.Readiness = &checks[0]
	}
	timeout, err := seconds("ready-timeout-seconds", o.readyTimeout)
	if err != nil {
		return err
	}
	o.req.ReadyTimeout, o.req.ReadyInterval = max(timeout, 0), time.Duration(o.readyIntervalMS)*time.Millisecond
	if o.req.Env, err = parseEnv(o.env, os.LookupEnv); err != nil {
		return err
	}
	if o.req.SecretEnv, err = parseSecretEnv(o.secretEnv); err != nil {
		return err
	}
	for _, p := range o.publish {
		port, err := parsePublish(p)
		if err != nil {
			return err
		}
		o.req.Publish = append(o.req.Publish, port)
	}
	return nil
}

// parsePublish reads [[HOST:]HOST_PORT:]GUEST_PORT. A host that is an IPv6
// address stands in brackets.
func parsePublish(text string) (api.PublishedPort, error) {
	bad := api.WithHint(api.Errorf(api.ErrInvalid, "--publish %q is no port", text), "write --publish 8000, --publish 18000:8000 or --publish 127.0.0.1:18000:8000")
	number := func(s string, least int) (int, bool) {
		n := 0
		if _, err := fmt.Sscanf(s, "%d", &n); err != nil || fmt.Sprint(n) != s || n < least || n > 65535 {
			return 0, false
		}
		return n, true
	}
	var p api.PublishedPort
	rest, guest := "", text
	if i := strings.LastIndexByte(text, ':'); i >= 0 {
		rest, guest = text[:i], text[i+1:]
	}
	var ok bool
	if p.GuestPort, ok = number(guest, 1); !ok {
		return p, bad
	}
	if rest == "" {
		if strings.Contains(text, ":") {
			return p, bad
		}
		return p, nil
	}
	host := rest
	if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		p.Host, host = strings.Trim(rest[:i], "[]"), rest[i+1:]
	}
	if p.HostPort, ok = number(host, 0); !ok {
		return p, bad
	}
	return p, nil
}

// showService prints a service.
func (a *app) showService(s *api.Service) error {
	if a.json {
		return a.printJSON(s)
	}
	rows := [][2]string{{"service", s.ServiceName}, {"state", s.State}, {"command", s.Command}, {"started", when(s.StartedAt)}}
	if s.StopReason != nil {
		rows = append(rows, [2]string{"reason", *s.StopReason})
	}
	if s.ExitCode != nil {
		rows = append(rows, [2]string{"exit code", fmt.Sprint(*s.ExitCode)})
	}
	for _, p := range s.PublishedPorts {
		rows = append(rows, [2]string{"published", portText(p)})
	}
	return a.printPairs(rows)
}

func portText(p api.PublishedPort) string {
	return fmt.Sprintf("%s:%d -> %d", p.Host, p.HostPort, p.GuestPort)
}

func newServiceListCmd(a *app) *cobra.Command {
	return a.oneWorkspace(&cobra.Command{Use: "list", Short: "List a workspace's services", Example: "  pyro workspace service list fix"},
		func(ctx context.Context, c *pyro.Client, ref string) error {
			all, err := c.Services(ctx, ref)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]any{"count": len(all), "services": all})
			}
			rows := make([][]string, len(all))
			for i, s := range all {
				var ports []string
				for _, p := range s.PublishedPorts {
					ports = append(ports, portText(p))
				}
				rows[i] = []string{s.ServiceName, s.State, when(s.StartedAt), strings.Join(ports, ", "), s.Command}
			}
			return a.table([]string{"SERVICE", "STATE", "STARTED", "PORTS", "COMMAND"}, rows)
		})
}

// oneService is a command with a workspace and a service as its arguments.
func (a *app) oneService(cmd *cobra.Command, run func(ctx context.Context, c *pyro.Client, ref, name string) error) *cobra.Command {
	cmd.Use += " WORKSPACE SERVICE"
	cmd.Args = args(named)
	cmd.ValidArgsFunction = a.completeWorkspace
	cmd.RunE = a.withClient(func(ctx context.Context, c *pyro.Client, given []string) error {
		return run(ctx, c, given[0], given[1])
	})
	return cmd
}

func newServiceStatusCmd(a *app) *cobra.Command {
	return a.oneService(&cobra.Command{Use: "status", Short: "Show one service", Example: "  pyro workspace service status fix web"},
		func(ctx context.Context, c *pyro.Client, ref, name string) error {
			s, err := c.Service(ctx, ref, name)
			if err != nil {
				return err
			}
			return a.showService(s)
		})
}

func newServiceStopCmd(a *app) *cobra.Command {
	return a.oneService(&cobra.Command{Use: "stop", Short: "End a service and close its ports", Example: "  pyro workspace service stop fix web"},
		func(ctx context.Context, c *pyro.Client, ref, name string) error {
			s, err := c.StopService(ctx, ref, name)
			if err != nil {
				return err
			}
			return a.showService(s)
		})
}

func newServiceLogsCmd(a *app) *cobra.Command {
	o := &serviceOptions{}
	var cmd *cobra.Command
	cmd = a.oneService(&cobra.Command{Use: "logs", Short: "Show a service's output", Example: "  pyro workspace service logs fix web --tail-lines 50\n  pyro workspace service logs fix web --follow"},
		func(ctx context.Context, c *pyro.Client, ref, name string) error {
			tail := &o.tail
			if o.all && cmd.Flags().Changed("tail-lines") {
				return usageError{api.Errorf(api.ErrInvalid, "--all and --tail-lines exclude each other")}
			}
			if o.all {
				tail = nil
			}
			if o.follow {
				if err := a.notWithJSON("follow", true); err != nil {
					return err
				}
				_, err := c.FollowService(ctx, ref, name, tail, a.filtered(a.Out, false), a.filtered(a.Err, false))
				return err
			}
			l, err := c.ServiceLogs(ctx, ref, name, tail)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(l)
			}
			if _, err := io.WriteString(a.filtered(a.Out, false), l.Stdout); err != nil {
				return err
			}
			_, err = io.WriteString(a.filtered(a.Err, false), l.Stderr)
			return err
		})
	cmd.Flags().Int64Var(&o.tail, "tail-lines", api.DefaultLogTail, "show this many of the last lines")
	cmd.Flags().BoolVar(&o.all, "all", false, "show all that is kept")
	cmd.Flags().BoolVar(&o.follow, "follow", false, "go on until the service ends")
	return cmd
}
