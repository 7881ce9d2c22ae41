// Package jbd2 replays the journal of an ext3 or ext4 filesystem in memory: it
// returns the device as it will read after recovery and writes nothing. What
// it accepts and where it ends the log follows the kernel's and e2fsck's
// recovery.c (three passes: scan, revoke, replay), and e2fsck -E journal_only
// is its judge in the tests.
//
// The guest that wrote the journal is hostile: each pass reads every block of
// the log at most once, and what is kept in memory is bounded by maxBlocks.
//
// The format is that of the kernel's documentation, "Journal (jbd2)"
// (Documentation/filesystems/ext4/journal.rst). All its numbers are big
// endian.
package jbd2
