package cli

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pyro-mcp/pyro/api"
)

type runOptions struct {
	req            api.RunRequest
	require        string
	timeoutSeconds float64
	ttlSeconds     float64
	env            []string
	raw            bool
}

func newRunCmd(a *app) *cobra.Command {
	o := &runOptions{}
	cmd := &cobra.Command{
		Use:   "run ENVIRONMENT -- COMMAND [ARGUMENT]...",
		Short: "Run one command in a fresh guest and remove the guest again",
		Long: `Run starts a fresh isolated guest, runs one command in it with its input and
output passed through live, and removes the guest again, whatever happens.

The words after -- keep their boundaries; a single word is run by sh -c. The
exit status is the command's own; 124 if it ran out of time, 125 if pyro itself
failed. Without an engine that isolates, run refuses: only --allow-host-compat
lets a command run on this host, and the answer says so.`,
		Example: `  pyro run debian:12 -- git --version
  pyro run debian:12 -- 'uname -r; nproc'
  tar c . | pyro run debian:12 -- sh -c 'tar x && ls -la'
  pyro run debian:12 --json --timeout-seconds 5 -- python3 -c 'print(6*7)'`,
		Annotations: map[string]string{annotationPasses: "yes"},

		ValidArgsFunction: completeEnvironment(a),
		Args:              args(runArgs),
		RunE: func(cmd *cobra.Command, given []string) error {
			a.passesThrough = true
			o.req.Environment, o.req.Argv = given[0], given[1:]
			if err := o.complete(cmd); err != nil {
				return err
			}
			return runRun(cmd.Context(), a, o)
		},
	}
	f := cmd.Flags()
	addSizeFlags(cmd, &o.req.VCPUCount, &o.req.MemMiB, &o.req.DiskMiB)
	f.Float64Var(&o.timeoutSeconds, "timeout-seconds", api.DefaultTimeout.Seconds(), "time limit for the command; 0 for none")
	f.Float64Var(&o.ttlSeconds, "ttl-seconds", api.DefaultTTL.Seconds(), "time limit for the guest; 0 for none")
	f.StringVar(&o.req.NetworkPolicy, "network", api.NetworkOff, "network policy: off or egress")
	f.StringArrayVar(&o.env, "env", nil, "environment variable `NAME=VALUE` for the command, or NAME to take this process's; repeatable")
	addUser(cmd, &o.req.User, "the image's own")
	f.BoolVar(&o.raw, "raw", false, "do not filter control sequences on a terminal")
	f.BoolVar(&a.quiet, "quiet", false, "no progress and no closing line on stderr")
	addEngineFlags(cmd, &o.req.Engine, &o.require, &o.req.AllowHostCompat)
	return cmd
}

// addSizeFlags adds the flags that say how large a new machine is.
func addSizeFlags(cmd *cobra.Command, vcpuCount, memMiB, diskMiB *int) {
	f := cmd.Flags()
	f.IntVar(vcpuCount, "vcpu-count", api.DefaultVCPUCount, "virtual processors")
	f.IntVar(memMiB, "mem-mib", api.DefaultMemMiB, "memory in MiB")
	f.IntVar(diskMiB, "disk-mib", 0, "disk in MiB (default the environment's own)")
}

// checkSizeFlags refuses sizes that were given and are not positive.
func checkSizeFlags(cmd *cobra.Command) error {
	for _, flag := range []string{"vcpu-count", "mem-mib", "disk-mib"} {
		n, err := cmd.Flags().GetInt(flag)
		if err != nil {
			return err
		}
		if err := positive(cmd, flag, n); err != nil {
			return err
		}
	}
	return nil
}

// addUser adds the flag that says who runs something in the guest.
func addUser(cmd *cobra.Command, to *string, otherwise string) {
	cmd.Flags().StringVar(to, "user", "", "run as this `USER[:GROUP]` of the guest, names or numbers (default "+otherwise+")")
}

// addEngineFlags adds the flags by which a new machine's engine is chosen.
func addEngineFlags(cmd *cobra.Command, engine, require *string, hostCompat *bool) {
	f := cmd.Flags()
	f.StringVar(engine, "engine", "", "engine: auto, qemu, gvisor, host (default auto, or PYRO_ENGINE)")
	f.StringVar(require, "require", "", "isolation to insist on: vm or sandbox")
	f.BoolVar(hostCompat, "allow-host-compat", false, "run on this host, without any isolation, if nothing else works")
}

func runArgs(cmd *cobra.Command, given []string) error {
	if err := swallowed(cmd); err != nil {
		return err
	}
	dash := cmd.ArgsLenAtDash()
	switch {
	case len(given) == 0 || dash == 0:
		return fmt.Errorf("no environment was given, as in: pyro run debian:12 -- git --version")
	case dash > 1 || (dash < 0 && len(given) > 1):
		return fmt.Errorf("put the command after --, as in: pyro run %s -- %s", given[0], strings.Join(given[1:], " "))
	}
	return nil
}

// complete checks the flags and turns them into the request.
func (o *runOptions) complete(cmd *cobra.Command) error {
	err := checkSizeFlags(cmd)
	if err != nil {
		return err
	}
	if o.req.Timeout, err = seconds("timeout-seconds", o.timeoutSeconds); err != nil {
		return err
	}
	if o.req.TTL, err = seconds("ttl-seconds", o.ttlSeconds); err != nil {
		return err
	}
	o.req.Require = api.Require(o.require)
	o.req.Env, err = parseEnv(o.env, os.LookupEnv)
	return err
}

// seconds converts a flag in seconds; 0 means no limit, which is -1 in requests.
func seconds(flag string, s float64) (time.Duration, error) {
	const year = 365 * 24 * 3600
	if math.IsNaN(s) || s < 0 || s > year {
		return 0, api.WithHint(api.Errorf(api.ErrInvalid, "--%s is %v", flag, s), "give a number of seconds between 0 (no limit) and %d", year)
	}
	if s == 0 {
		return -1, nil
	}
	return max(time.Duration(s*float64(time.Second)), time.Millisecond), nil
}

func parseEnv(given []string, lookup func(string) (string, bool)) (map[string]string, error) {
	env := map[string]string{}
	for _, e := range given {
		name, value, ok := strings.Cut(e, "=")
		if !ok {
			if value, ok = lookup(name); !ok {
				return nil, api.WithHint(api.Errorf(api.ErrInvalid, "--env %s: this process has no such variable", name), "write --env %s=VALUE", name)
			}
		}
		if name == "" {
			return nil, api.WithHint(api.Errorf(api.ErrInvalid, "--env %q has no name", e), "write --env NAME=VALUE")
		}
		env[name] = value
	}
	return env, nil
}

func runRun(ctx context.Context, a *app, o *runOptions) error {
	client, err := a.client(ctx)
	if err != nil {
		return err
	}
	progress := a.newProgress()
	o.req.Progress = progress.show
	o.req.Stdin = a.In
	if !a.json {
		o.req.Stdout = a.guestOutput(a.Out, o.raw, progress)
		o.req.Stderr = a.guestOutput(a.Err, o.raw, progress)
	}
	res, err := client.Run(ctx, o.req)
	progress.clear()
	if err != nil {
		return err
	}
	a.exitAs(res)
	if a.json {
		return a.printJSON(res)
	}
	a.afterCommand(res, o.req.Timeout)
	return nil
}

// exitAs makes pyro's exit status that of a command in the guest.
func (a *app) exitAs(res *api.ExecResult) {
	a.status = res.ExitCode
	if res.TimedOut {
		a.status = exitTimeout
	}
}

// tellTrouble says on stderr what the exit status alone does not.
func (a *app) tellTrouble(res *api.ExecResult, limit time.Duration) {
	if res.TimedOut {
		fmt.Fprintf(a.Err, "pyro: the command ran longer than %s and was ended\nhint: raise --timeout-seconds\n", limit)
	}
	if res.OOMKilled {
		fmt.Fprintf(a.Err, "pyro: the guest ran out of memory and the command was killed\nhint: raise --mem-mib\n")
	}
}

// afterCommand says on stderr how a command of run went.
func (a *app) afterCommand(res *api.ExecResult, limit time.Duration) {
	a.tellTrouble(res, limit)
	if a.quiet {
		return
	}
	fmt.Fprintf(a.Err, "[run] environment=%s engine=%s isolation=%s exit_code=%d duration_ms=%d\n",
		res.Environment, res.Engine, res.Isolation, res.ExitCode, res.DurationMS)
}

// guestOutput returns where a guest's output goes while progress is shown.
func (a *app) guestOutput(to io.Writer, raw bool, progress *progress) io.Writer {
	return progress.before(a.filtered(to, raw))
}
