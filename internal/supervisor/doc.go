// Package supervisor is the host process that owns one machine, and the client
// that talks to it.
//
// A command starts it with [Spawn]: `pyro supervise`, hidden, in a session of
// its own, with its sockets, its lock and a pipe inherited. It starts the
// machine, waits until the guest agent has answered, says so in one line of
// JSON on the pipe, and from then on answers on two sockets in the machine's
// directory: control.sock (HTTP and JSON, see [Client]) and guest.sock (the
// hybrid vsock handshake, then the guest protocol). Whoever finds the machine's
// lock free knows that the supervisor is gone and cleans up with [Reap]; no pid
// needs to be believed for that.
//
// It owns the machine, the guest channel, expiry and the logs, and nothing
// else, and may be killed at any instant: the machine dies with it.
package supervisor
