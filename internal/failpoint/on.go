//go:build failpoints

package failpoint

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Hit is where the failpoint of that name is.
func Hit(name string) {
	armed, action, _ := strings.Cut(os.Getenv(Variable), "=")
	if armed != name {
		return
	}
	sig := unix.SIGKILL
	if action == "stop" {
		sig = unix.SIGSTOP
	}
	// The signal reaches this process before the call returns.
	if err := unix.Kill(os.Getpid(), sig); err != nil {
		panic(err)
	}
}
