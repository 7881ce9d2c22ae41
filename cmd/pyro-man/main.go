// Command pyro-man writes pyro's manual pages into a directory, for make man. It
// is a program of its own because what makes them costs whoever has it in it half
// a millisecond at every start.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra/doc"

	"github.com/pyro-mcp/pyro/internal/cli"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: pyro-man DIRECTORY")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintf(os.Stderr, "pyro-man: %v\n", err)
		os.Exit(1)
	}
}

func write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	tree := cli.Tree()
	tree.InitDefaultCompletionCmd() // which is otherwise made when a command runs
	return doc.GenManTree(tree, &doc.GenManHeader{Section: "1", Source: "pyro " + cli.Version}, dir)
}
