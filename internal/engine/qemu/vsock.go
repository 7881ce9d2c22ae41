package qemu

import (
	"math/rand/v2"
	"os"
)

const vhostVsockDevice = "/dev/vhost-vsock"

// openVhostVsock opens the host's vsock device, which QEMU takes by descriptor.
func openVhostVsock() (*os.File, error) {
	return os.OpenFile(vhostVsockDevice, os.O_RDWR, 0)
}

// pickCID returns a random context id for a new guest. 0 to 2 are reserved
// (vsock(7)) and small ones are what people pick by hand; among the rest a
// collision is improbable, and QEMU refuses a taken one with a clear message.
func pickCID() uint32 { return 1<<16 + rand.Uint32N(1<<30) }
