// Package store keeps what pyro knows about its workspaces: their records,
// snapshots, journal of commands and history, in one SQLite database in the
// state directory.
//
// Any number of processes use the database at once. Readers never wait for
// writers; a writer waits up to five seconds for another one. What a method has
// acknowledged survives the death of every process, and, but for the journal
// and times of activity, the loss of power.
//
// Beside the database every workspace's record is repeated in a file of its
// own, from which [Repair] makes a lost or damaged database again: the disks of
// workspaces are worth far more than the list of them, and no fault of the list
// may ever read as "there are no workspaces".
package store
