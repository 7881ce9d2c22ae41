// Command pyro gives coding agents disposable isolated Linux workspaces.
package main

import (
	"os"

	"github.com/pyro-mcp/pyro/internal/cli"
)

func main() {
	os.Exit(cli.Main(os.Args[1:], cli.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
}
