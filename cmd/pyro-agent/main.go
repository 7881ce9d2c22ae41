// Command pyro-agent is pyro's guest agent: it runs inside a guest and does
// there what the host asks. See package guestagent.
package main

import (
	"os"

	"github.com/pyro-mcp/pyro/internal/guestagent"
)

// version is set by the linker.
var version = "dev"

func main() {
	os.Exit(guestagent.Main(version, os.Args[1:], os.Stdout, os.Stderr))
}
