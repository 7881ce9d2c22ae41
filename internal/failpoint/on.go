//go:build failpoints

package failpoint

import (
	"os"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// halted says that the failpoint has halted this process.
var halted atomic.Bool

// Hit is where the failpoint of that name is.
func Hit(name string) {
	armed, action, _ := strings.Cut(os.Getenv(Variable), "=")
	if armed != name {
		return
	}
	sig := unix.SIGKILL
	if action == "stop" {
		if halted.Swap(true) {
			return
		}
		sig = unix.SIGSTOP
	}
	// The signal reaches this process before the call returns.
	if err := unix.Kill(os.Getpid(), sig); err != nil {
		panic(err)
	}
}
