// Package cli is the command line: it parses, calls the SDK, and prints. What
// it needs and the SDK lacks, the SDK grows.
//
// Every command is three parts: an options struct, newXCmd, which parses and
// validates into it, and runX, which calls the client and prints. Only this
// file turns errors into exit statuses.
package cli

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
)

// Version is the version of this build, set by the linker.
var Version = "0.1.0-dev"

// The exit statuses; docs/errors.md mirrors them.
const (
	exitOK       = 0
	exitFailure  = 1
	exitUsage    = 2
	exitNotFound = 3
	// exitTimeout and exitOwn are those of timeout(1) and of container tools,
	// for commands that otherwise exit with a guest command's own status.
	exitTimeout = 124
	exitOwn     = 125
	// exitSignal is added to a signal's number, as a shell does.
	exitSignal = 128
)

// Streams are the process's own.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
}

// app is what every command gets.
type app struct {
	Streams
	json  bool // --json
	quiet bool // --quiet
	debug bool // --debug
	// passesThrough is set by commands that exit with a guest command's status.
	passesThrough bool
	status        int // exit status of a command that worked
}

// Main runs the command line and returns the exit status.
func Main(args []string, s Streams) int {
	if os.Getenv("GOGC") == "" {
		// Commands are short and their heaps small: collecting at the usual 4 MiB
		// costs more than it gives back. The supervisor sets its own.
		debug.SetGCPercent(400)
	}
	a := &app{Streams: s}
	ctx, stop := cancelOnSignal(context.Background())
	defer stop()
	root := newRoot(a)
	root.SetArgs(args)
	root.SetIn(s.In)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return a.status
	}
	var sig signalError
	if errors.As(context.Cause(ctx), &sig) && errors.Is(err, context.Canceled) {
		a.printError(api.Errorf(api.ErrCanceled, "ended by %s; everything is cleaned up", sig))
		return exitSignal + int(sig.Signal)
	}
	var usage usageError
	if errors.As(err, &usage) {
		err = api.WithHint(api.Errorf(api.ErrInvalid, "%v", usage.error), "see %s --help", cmd.CommandPath())
		a.printError(err)
		if a.passesThrough || passesThrough(cmd) {
			return exitOwn
		}
		return exitUsage
	}
	a.printError(err)
	return a.exitStatus(err)
}

// exitStatus is the only table from errors to exit statuses.
func (a *app) exitStatus(err error) int {
	if a.passesThrough {
		return exitOwn
	}
	switch {
	case errors.Is(err, api.ErrInvalid):
		return exitUsage
	case errors.Is(err, api.ErrNotFound):
		return exitNotFound
	}
	return exitFailure
}

// usageError marks an error of the command line itself.
type usageError struct{ error }

// notWithJSON refuses a flag that was given beside --json and cannot be.
func (a *app) notWithJSON(flag string, given bool) error {
	if given && a.json {
		return usageError{api.Errorf(api.ErrInvalid, "--%s and --json exclude each other", flag)}
	}
	return nil
}

// signalError is the cause of a context that a signal ended.
type signalError struct{ syscall.Signal }

func (s signalError) Error() string        { return s.String() }
func (s signalError) Is(target error) bool { return target == context.Canceled }

// cancelOnSignal ends the context on the first INT, TERM or HUP, so that the
// command can clean up, and the process on the second.
func cancelOnSignal(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(parent)
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		sig, ok := <-ch
		if !ok {
			return
		}
		cancel(signalError{sig.(syscall.Signal)})
		if sig, ok = <-ch; ok {
			// The supervisor notices that we are gone and cleans up by itself.
			os.Exit(exitSignal + int(sig.(syscall.Signal)))
		}
	}()
	return ctx, func() {
		signal.Stop(ch)
		close(ch)
		cancel(nil)
	}
}

// client opens the SDK.
func (a *app) client(ctx context.Context) (*pyro.Client, error) {
	return pyro.Open(ctx, &pyro.Options{Logger: a.logger()})
}

func (a *app) logger() *slog.Logger {
	if !a.debug {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// isTerminal reports whether w is one.
func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// passesThrough reports whether cmd exits with a guest command's status.
func passesThrough(cmd *cobra.Command) bool { return cmd.Annotations[annotationPasses] != "" }

const annotationPasses = "passes-through"
