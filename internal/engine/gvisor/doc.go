// Package gvisor runs guests in gVisor's sandbox: an application kernel in user
// space (runsc, platform systrap) that needs no hardware virtualization and
// starts in a fifth of a second.
//
// A machine is one `runsc run` in the foreground, a child of this process. Its
// sandbox and its file server die with it, and it dies with us: whoever kills
// any of them, at any moment, ends all of them. Everything it needs from the
// host is made inside a mount namespace of its own ([namespace]), so that the
// mounts, the loop devices below them and the sockets end with the last of
// these processes, and there is nothing to clean up after a crash but an empty
// cgroup.
//
// The root file system is the environment's image, mounted read-only, under an
// overlay whose writable layer is an ext4 image of the machine's own: as
// private and as bounded as a virtual disk. Frozen layers of the same kind may
// lie between the two, read-only and shared by several machines. The host mounts
// these images, which only this host's kernel and package ext4image have ever
// written.
//
// The guest agent is the first process. It dials a socket that we listen on;
// the way round is forced, because a socket that the guest binds in a shared
// directory makes later checkpoints of the sandbox fail.
package gvisor
