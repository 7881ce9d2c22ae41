// Package guestagent is the program that runs inside a guest and does there
// what the host asks: run commands, move files, shut down. The same code is
// pid 1 of a virtual machine, first process of a gVisor sandbox, and a plain
// child process for engine host.
//
// A [Server] serves connections, whatever they come from; package boot turns a
// bare kernel into a system in which it can; package process runs commands.
// Everything in a guest may be hostile to everything else in it, so a caller
// can rely on the agent only as far as the guest is intact; the agent's own
// duty is to survive its workload and to leave nothing of a command behind.
//
// Linux only.
package guestagent
