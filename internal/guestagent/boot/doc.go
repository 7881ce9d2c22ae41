// Package boot makes a bare kernel into a system in which the guest agent can
// serve: modules, mounts, the root disk, a name, the loopback device. It is
// what the agent does as pid 1 of a virtual machine, and it undoes it at power
// off. Nothing of ours needs to be in the root disk, so any image can be one:
// what an image lacks is made, what it has is left.
//
// Linux only.
package boot
