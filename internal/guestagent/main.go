package guestagent

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/guestagent/boot"
	"github.com/pyro-mcp/pyro/internal/guestagent/process"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// memoryTarget is what the agent's own heap should stay below; the runtime
// collects harder near it. Buffers are bounded, so this is no promise it needs
// to break.
const memoryTarget = 40 << 20

// Main is the whole program. It returns the exit status: 0 after a shutdown, 2
// for wrong usage, 1 for anything else.
func Main(version string, args []string, stdout, stderr io.Writer) int {
	debug.SetMemoryLimit(memoryTarget)
	if boot.IsInit() {
		// Never returns: pid 1 must not end.
		runInit(version)
	}
	o, err := parseArgs(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "pyro-agent: %v\n", err)
		return 2
	case o.version:
		fmt.Fprintf(stdout, "pyro-agent %s\n", version)
		return 0
	}
	if err := runProcess(version, o, stderr); err != nil {
		fmt.Fprintf(stderr, "pyro-agent: %v\n", err)
		return 1
	}
	return 0
}

type options struct {
	listen, dial, root string
	version            bool
}

const usage = `pyro-agent serves pyro's guest protocol. As /init of a virtual machine it takes
no options. Otherwise it runs commands on this system, with no isolation of its
own:

  pyro-agent --listen unix:PATH [--root DIR]   serve a Unix socket
  pyro-agent --listen fd:N      [--root DIR]   serve an inherited listening one
  pyro-agent --dial unix:PATH                  connect to a host that listens;
                                               needs PYRO_AGENT_TOKEN
  pyro-agent --version

`

func parseArgs(args []string, stderr io.Writer) (options, error) {
	var o options
	fs := flag.NewFlagSet("pyro-agent", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, usage)
		fs.PrintDefaults()
	}
	fs.StringVar(&o.listen, "listen", "", "serve on `unix:PATH` or fd:N")
	fs.StringVar(&o.dial, "dial", "", "connect to `unix:PATH` and serve there")
	fs.StringVar(&o.root, "root", "/", "resolve guest paths below `DIR`")
	fs.BoolVar(&o.version, "version", false, "print the version")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	switch {
	case o.version:
		return o, nil
	case fs.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	case (o.listen == "") == (o.dial == ""):
		return o, errors.New("give either --listen or --dial; see --help")
	}
	if o.dial != "" && !strings.HasPrefix(o.dial, "unix:") {
		return o, fmt.Errorf("--dial %s: want unix:PATH", o.dial)
	}
	abs, err := filepath.Abs(o.root)
	if err != nil {
		return o, fmt.Errorf("--root %s: %w", o.root, err)
	}
	o.root = abs
	return o, nil
}

// runProcess is the agent as an ordinary process.
func runProcess(version string, o options, stderr io.Writer) error {
	logger := slog.New(slog.NewTextHandler(stderr, nil))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if fi, err := os.Stat(o.root); err != nil || !fi.IsDir() {
		return fmt.Errorf("--root %s is not a directory", o.root)
	}
	if o.root != "/" {
		if err := os.MkdirAll(filepath.Join(o.root, defaultCwd), 0o755); err != nil {
			return fmt.Errorf("making the workspace: %w", err)
		}
	}
	source, err := openSource(o)
	if err != nil {
		return err
	}
	reaper, err := process.NewReaper()
	if err != nil {
		return fmt.Errorf("starting to collect processes: %w", err)
	}
	runner := &process.Runner{Reaper: reaper}
	var resume func(guestproto.Resume) error
	// The first process of a sandbox: a guest of its own, whose system lacks
	// what a virtual machine gets at its boot.
	sandbox := o.dial != "" && os.Getpid() == 1
	if sandbox {
		runner.Workload = workload(boot.PrepareSandbox(filepath.Dir(strings.TrimPrefix(o.dial, "unix:"))), logger)
		resume = boot.ResumeSandbox
		if err := os.MkdirAll(defaultCwd, 0o755); err != nil {
			logger.Warn("making the workspace", "err", err)
		}
		go runner.GuardMemory(ctx)
		defer unix.Sync()
	}
	var once sync.Once
	ended := make(chan time.Duration, 1)
	end := func(grace time.Duration) { once.Do(func() { ended <- grace }) }
	s, err := NewServer(Config{
		Version:    version,
		Root:       o.root,
		Runner:     runner,
		Logger:     logger,
		InheritEnv: !sandbox,
		OwnNetwork: sandbox,
		Resume:     resume,
		PowerOff:   end,
	})
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	go func() {
		<-stop
		end(killGrace)
	}()
	failed := make(chan error, 1)
	go func() { failed <- source(ctx, s, logger) }()
	grace := killGrace
	select {
	case err := <-failed:
		if err != nil {
			return err
		}
	case grace = <-ended:
	}
	// Every command ends with its request's context; what does not end within
	// its TERM and KILL cannot be waited for.
	cancel()
	quiet := make(chan struct{})
	go func() {
		s.EndWorkload(grace)
		s.Wait()
		close(quiet)
	}()
	select {
	case <-quiet:
	case <-time.After(max(grace, killGrace) + 15*time.Second):
	}
	if source, ok := strings.CutPrefix(o.listen, "unix:"); ok {
		_ = os.Remove(source)
	}
	return nil
}

// runInit is the agent as pid 1 of a virtual machine.
func runInit(version string) {
	system, err := boot.Run(rehearse)
	if err != nil {
		boot.Die(err)
	}
	if err := serveMachine(version, system); err != nil {
		boot.Die(err)
	}
	boot.Die(errors.New("the guest agent has no way left to reach its host"))
}

func serveMachine(version string, system *boot.System) error {
	logger := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	reaper, err := process.NewReaper()
	if err != nil {
		return fmt.Errorf("starting to collect processes: %w", err)
	}
	runner := &process.Runner{Reaper: reaper, Workload: workload(system, logger)}
	if err := os.MkdirAll(defaultCwd, 0o755); err != nil {
		logger.Warn("making the workspace", "err", err)
	}
	s, err := NewServer(Config{
		Version:  version,
		Root:     "/",
		Runner:   runner,
		Logger:   logger,
		PowerOff: boot.PowerOff,
		Resume:   boot.Resume,

		OwnNetwork: true,
	})
	if err != nil {
		return err
	}
	return serveChannels(context.Background(), system.Port, s, logger)
}

// workload makes the control group for the commands, nil where there is none.
func workload(system *boot.System, logger *slog.Logger) *process.Workload {
	if system.CgroupMount == "" {
		return nil
	}
	w, missing, err := process.NewWorkload(system.CgroupMount, system.MemoryMax, system.PIDsMax)
	if err != nil {
		logger.Warn("commands run without a control group", "err", err)
		return nil
	}
	if len(missing) > 0 {
		logger.Warn("the kernel lacks limits", "controllers", missing)
	}
	return w
}
