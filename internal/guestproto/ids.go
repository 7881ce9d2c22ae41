package guestproto

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// The files that a sandbox's host may put beside the socket that the guest agent
// dials, each with one line: the machine's ids, which the agent mounts over
// /etc/machine-id, where the image has none, and over the kernel's boot_id.
const (
	MachineIDFile = "machine-id"
	BootIDFile    = "boot-id"
)

// NewMachineID draws an id as in machine-id(5), a line.
func NewMachineID() string {
	return hex.EncodeToString(randomID()) + "\n"
}

// NewBootID draws an id as in /proc/sys/kernel/random/boot_id, a line.
func NewBootID() string {
	b := randomID()
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80 // version 4, RFC 9562 section 5.4
	return fmt.Sprintf("%x-%x-%x-%x-%x\n", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func randomID() []byte {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails, crypto/rand
	return b
}
