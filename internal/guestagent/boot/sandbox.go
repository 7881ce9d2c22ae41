package boot

import (
	"os"
)

// PrepareSandbox gives a sandbox the files that Run gives a virtual machine. Its
// first process finds the kernel's file systems mounted, the loopback running
// and the host name set; what it cannot make is printed and passed over.
func PrepareSandbox() {
	name, err := os.Hostname()
	if err != nil {
		warn(err)
	}
	for _, step := range []func() error{func() error { return nameHost(name) }, writeFiles, machineID} {
		if err := step(); err != nil {
			warn(err)
		}
	}
}
