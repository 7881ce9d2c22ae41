package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/mcpserver"
)

func newMCPCmd(a *app) *cobra.Command {
	cmd := group("mcp", "Offer workspaces to models over the Model Context Protocol", newMCPServeCmd(a))
	cmd.Long = `The MCP server gives a chat host's model tools to create and use workspaces. Chat
hosts start it themselves: pyro host connect claude-code writes the entry.`
	return cmd
}

// mcpSelectors are the options that a chat host's entry carries, as well as the
// command line of mcp serve.
type mcpSelectors struct {
	server        mcpserver.Options
	require       string
	maxTTLSeconds float64
	flags         *pflag.FlagSet
}

// pathFlags take paths of this host. They are made absolute in an entry, which
// is used from elsewhere.
var pathFlags = []string{"project-path", "allow-path", "allow-export"}

func newMCPSelectors() *mcpSelectors {
	s := &mcpSelectors{flags: pflag.NewFlagSet("selectors", pflag.ContinueOnError)}
	s.flags.SortFlags = false
	f, o := s.flags, &s.server
	f.StringVar(&o.Profile, "profile", "", "tools to offer: "+strings.Join(mcpserver.Profiles(), ", ")+" (default "+mcpserver.ProfileCore+")")
	f.StringVar(&o.Mode, "mode", "", "tools and descriptions for one job: "+strings.Join(mcpserver.Modes(), ", "))
	f.StringVar(&o.Project.Path, "project-path", "", "directory or archive that workspaces begin with (default the Git checkout of the working directory)")
	f.StringVar(&o.Project.RepoURL, "repo-url", "", "repository that workspaces begin with, as a clean clone")
	f.StringVar(&o.Project.RepoRef, "repo-ref", "", "branch, tag or commit of --repo-url")
	f.BoolVar(&o.Project.None, "no-project-source", false, "let workspaces begin empty")
	f.BoolVar(&o.Project.IncludeIgnored, "include-ignored", false, "also take what the project's Git ignores")
	f.StringVar(&o.Environment, "environment", mcpserver.DefaultEnvironment, "environment where a call names none")
	f.StringVar(&o.Limits.Engine, "engine", "", "engine for everything: auto, qemu, gvisor, host (default auto, or PYRO_ENGINE)")
	f.StringVar(&s.require, "require", "", "isolation to insist on: vm or sandbox")
	f.BoolVar(&o.Limits.AllowHostCompat, "allow-host-compat", false, "let commands run on this host, without any isolation, if nothing else works")
	f.StringVar(&o.Limits.Network, "network-policy", api.NetworkOff, "widest network policy that a call may ask for: off, egress, egress+published-ports")
	f.IntVar(&o.Limits.MaxWorkspaces, "max-workspaces", 0, "most workspaces on this host, whoever made them; 0 for no limit")
	f.IntVar(&o.Limits.MaxVCPUs, "max-vcpus", 0, "most virtual processors of one guest; 0 for no limit")
	f.IntVar(&o.Limits.MaxMemMiB, "max-mem-mib", 0, "most memory of one guest in MiB; 0 for no limit")
	f.IntVar(&o.Limits.MaxDiskMiB, "max-disk-mib", 0, "largest disk of one guest in MiB; 0 for no limit")
	f.Float64Var(&s.maxTTLSeconds, "max-ttl-seconds", 0, "longest life of one guest; 0 for no limit")
	f.StringArrayVar(&o.Limits.AllowPaths, "allow-path", nil, "`DIRECTORY` of this host, next to the project, whose files calls may copy in; repeatable")
	f.StringArrayVar(&o.Limits.AllowExports, "allow-export", nil, "`DIRECTORY` of this host into which calls may copy files out; repeatable")
	return s
}

// complete checks the selectors and converts what is no plain value.
func (s *mcpSelectors) complete() error {
	if err := mcpserver.Check(s.server.Profile, s.server.Mode); err != nil {
		return err
	}
	if err := s.server.Project.Check(); err != nil {
		return err
	}
	s.server.Limits.Require = api.Require(s.require)
	if s.maxTTLSeconds < 0 {
		return usageError{api.Errorf(api.ErrInvalid, "--max-ttl-seconds must not be negative")}
	}
	s.server.Limits.MaxTTL = time.Duration(s.maxTTLSeconds * float64(time.Second))
	return s.server.Limits.Check()
}

type mcpServeOptions struct {
	*mcpSelectors
	http      mcpserver.HTTPOptions
	tokenFile string
}

func newMCPServeCmd(a *app) *cobra.Command {
	o := &mcpServeOptions{mcpSelectors: newMCPSelectors()}
	cmd := &cobra.Command{
		Use: "serve", Short: "Run the MCP server on stdin and stdout, or over HTTP",
		Long: `Serve speaks MCP on stdin and stdout until stdin ends, or over HTTP until it is
stopped. Workspaces outlive it: they go when their time is over.

Workspaces begin with a copy of the Git checkout that the server is started in;
--project-path, --repo-url and --no-project-source change that. A model reads
files of this host only below the project and --allow-path, writes only below
--allow-export, and cannot ask for more than the limits given here.

With --http every request needs the token as Authorization: Bearer TOKEN. It is
taken from PYRO_MCP_TOKEN or --token-file, or made and kept in the state
directory; the path is printed on stderr.`,
		Example: `  pyro mcp serve
  pyro mcp serve --mode repro-fix --project-path ~/src/app
  pyro mcp serve --repo-url https://example.org/app.git --repo-ref v2 --max-workspaces 4
  pyro mcp serve --http 127.0.0.1:8731 --token-file ~/.config/pyro-token`,
		Args: args(named),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.complete(); err != nil {
				return err
			}
			if o.http.Addr == "" {
				for _, only := range []string{"token-file", "allow-remote", "allowed-host"} {
					if cmd.Flags().Changed(only) {
						return usageError{api.Errorf(api.ErrInvalid, "--%s goes with --http only", only)}
					}
				}
			}
			return runMCPServe(cmd.Context(), a, o)
		},
	}
	f := cmd.Flags()
	f.AddFlagSet(o.flags)
	f.StringVar(&o.http.Addr, "http", "", "serve streamable HTTP on `HOST:PORT` in place of stdio; port 0 for any")
	f.StringVar(&o.tokenFile, "token-file", "", "file with the token of --http")
	f.BoolVar(&o.http.AllowRemote, "allow-remote", false, "let --http listen on other than loopback addresses, without TLS")
	f.StringArrayVar(&o.http.Hosts, "allowed-host", nil, "further `HOST` or HOST:PORT that callers of --http may use; repeatable")
	return cmd
}

func runMCPServe(ctx context.Context, a *app, o *mcpServeOptions) error {
	out, err := a.protocolOut(o.http.Addr == "")
	if err != nil {
		return fmt.Errorf("setting stdout aside for the protocol: %w", err)
	}
	level := slog.LevelInfo
	if a.debug {
		level = slog.LevelDebug
	}
	logger := slog.New(slog.NewTextHandler(a.Err, &slog.HandlerOptions{Level: level}))
	client, err := pyro.Open(ctx, &pyro.Options{Logger: a.logger()})
	if err != nil {
		return err
	}
	defer client.Close()
	o.server.Version, o.server.Logger = Version, logger
	server, err := mcpserver.New(client, o.server)
	if err != nil {
		return err
	}
	defer server.Close()
	if o.http.Addr == "" {
		err = server.ServeStdio(ctx, readCloser(a.In), out)
	} else {
		err = serveHTTP(ctx, client, server, o, logger)
	}
	if errors.Is(err, context.Canceled) {
		return nil // being stopped is how a server ends
	}
	return err
}

func serveHTTP(ctx context.Context, client *pyro.Client, server *mcpserver.Server, o *mcpServeOptions, log *slog.Logger) (err error) {
	from := "PYRO_MCP_TOKEN"
	switch o.http.Token = os.Getenv("PYRO_MCP_TOKEN"); {
	case o.tokenFile != "":
		from = o.tokenFile
		o.http.Token, err = mcpserver.ReadToken(o.tokenFile)
	case o.http.Token == "":
		from = client.MCPTokenFile()
		o.http.Token, err = mcpserver.MakeToken(from)
	}
	if err != nil {
		return err
	}
	o.http.Ready = func(url string) { log.Info("serving MCP", "url", url, "token", from) }
	return server.ServeHTTP(ctx, o.http)
}

// protocolOut returns what the protocol is written to. Where that is this
// process's stdout, nothing else can write to it from then on.
func (a *app) protocolOut(stdio bool) (io.WriteCloser, error) {
	if f, ok := a.Out.(*os.File); stdio && ok && f == os.Stdout {
		return mcpserver.TakeStdout()
	}
	return writeCloser{a.Out}, nil
}

type writeCloser struct{ io.Writer }

func (writeCloser) Close() error { return nil }

func readCloser(r io.Reader) io.ReadCloser {
	if rc, ok := r.(io.ReadCloser); ok {
		return rc
	}
	return io.NopCloser(r)
}

// arguments are the selectors that were given, as the command line of an entry
// in a chat host's configuration.
func (s *mcpSelectors) arguments() ([]string, error) {
	out := []string{"mcp", "serve"}
	var failed error
	s.flags.VisitAll(func(f *pflag.Flag) {
		if !f.Changed {
			return
		}
		values := []string{f.Value.String()}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			values = list.GetSlice()
		}
		for _, v := range values {
			if f.Value.Type() == "bool" {
				if v == "true" {
					out = append(out, "--"+f.Name)
				}
				continue
			}
			if isPathFlag(f.Name) || (f.Name == "repo-url" && isLocalPath(v)) {
				abs, err := filepath.Abs(v)
				if err != nil {
					failed = fmt.Errorf("looking at --%s: %w", f.Name, err)
				}
				v = abs
			}
			out = append(out, "--"+f.Name, v)
		}
	})
	return out, failed
}

func isPathFlag(name string) bool {
	for _, p := range pathFlags {
		if p == name {
			return true
		}
	}
	return false
}

// isLocalPath reports whether a repository is named by an existing path.
func isLocalPath(v string) bool {
	_, err := os.Stat(v)
	return err == nil
}

// checkMCPArguments reports whether the arguments of an entry are ones that pyro
// understands.
func checkMCPArguments(given []string) error {
	if len(given) < 2 || given[0] != "mcp" || given[1] != "serve" {
		return api.Errorf(api.ErrInvalid, "it does not run mcp serve")
	}
	s := newMCPSelectors()
	if err := s.flags.Parse(given[2:]); err != nil {
		return api.Errorf(api.ErrInvalid, "%v", err)
	}
	if s.flags.NArg() > 0 {
		return api.Errorf(api.ErrInvalid, "mcp serve takes no argument %q", s.flags.Arg(0))
	}
	return s.complete()
}
