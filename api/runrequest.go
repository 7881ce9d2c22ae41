package api

import (
	"io"
	"time"
)

// The defaults of a run.
const (
	DefaultVCPUCount = 1
	DefaultMemMiB    = 1024
	DefaultTimeout   = 30 * time.Second
	DefaultTTL       = 600 * time.Second
)

// The most that a guest may be asked to have.
const (
	// MaxVCPUCount is what QEMU's q35 takes without further devices.
	MaxVCPUCount = 64
	// MaxMemMiB and MaxDiskMiB are 8 TiB: half of the largest file that ext4, below
	// most state directories, can hold.
	MaxMemMiB  = 8 << 20
	MaxDiskMiB = 8 << 20
)

// A RunRequest asks for one command in a fresh guest.
type RunRequest struct {
	Environment string
	// Argv are the words of the command. A single word is run by sh -c.
	Argv []string
	// Zero means the default for all of the following.
	VCPUCount, MemMiB, DiskMiB int
	// Timeout is for the command, TTL for the machine; negative means none.
	Timeout, TTL time.Duration
	Env          map[string]string
	// User is who the command runs as, NAME-OR-NUMBER[:GROUP-OR-NUMBER]; "" for
	// the image's own user, which mostly is root.
	User string
	// NetworkPolicy is NetworkOff if empty, or NetworkEgress.
	NetworkPolicy string

	Engine          string
	Require         Require
	AllowHostCompat bool

	// Stdin feeds the command; nil means that it reads end of file at once.
	Stdin io.Reader
	// Stdout and Stderr take the command's output as it comes. Where one is
	// nil the result carries it instead, up to a bound.
	Stdout, Stderr io.Writer
	// Progress is told what happens before the command runs; may be nil. It
	// may be called from several goroutines, one at a time.
	Progress func(Progress)
}
