// Package hostproc holds what pyro needs to know about processes on the host:
// who a pid really is, how to end it, and the file locks that say whether the
// owner of a directory still lives.
//
// A pid alone is never trusted: the kernel reuses it. An [Identity] carries the
// process's start time and the boot it belongs to as well, and is only ever
// signalled through a pidfd opened before both were compared.
package hostproc
