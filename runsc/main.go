// Command pyro-runsc is gVisor's runsc, built from the version that go.mod pins.
//
// It is a module of its own so that gVisor's dependencies, among them an older
// copy of its own network stack's interfaces, do not bind the rest of pyro. It
// adds nothing to runsc but an answer to --version: a plain build of the module
// would say VERSION_MISSING, and the engine wants to know what it runs.
package main

import (
	"fmt"
	"os"
	"runtime/debug"

	"gvisor.dev/gvisor/runsc/cli/maincli"
)

const gvisorModule = "gvisor.dev/gvisor"

func main() {
	// Only as the sole argument: the sandbox and its gofer are this same
	// binary, started by runsc itself with arguments of its own.
	if len(os.Args) == 2 && (os.Args[1] == "--version" || os.Args[1] == "-version") {
		fmt.Printf("pyro-runsc gvisor %s\n", gvisorVersion())
		return
	}
	maincli.Main()
}

// gvisorVersion returns the pinned module's version as the build recorded it.
func gvisorVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, dep := range info.Deps {
		if dep.Path == gvisorModule {
			if dep.Replace != nil {
				return dep.Replace.Version
			}
			return dep.Version
		}
	}
	return "unknown"
}
