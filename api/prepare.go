package api

// PrepareRequest asks to make the first use of an environment quick.
type PrepareRequest struct {
	Environment string // default debian:12
	// Force does all of it again, also what is known to work.
	Force bool
	// NetworkPolicy is that of the workspace that proves it; default off.
	NetworkPolicy string

	Engine          string
	Require         Require
	AllowHostCompat bool
	// Progress is told what happens; may be nil. It may be called from several
	// goroutines, one at a time.
	Progress func(Progress)
}

// PrepareStep is one thing that prepare has done.
type PrepareStep struct {
	Name       string `json:"name"` // pull, create, exec, reset, delete
	DurationMS int64  `json:"duration_ms"`
}

// PrepareResult says what was prepared.
type PrepareResult struct {
	Environment string    `json:"environment"`
	Digest      string    `json:"digest"`
	Engine      string    `json:"engine"`
	Isolation   Isolation `json:"isolation"`
	// Proven is false where an earlier prepare had proven the same already.
	Proven bool          `json:"proven"`
	Steps  []PrepareStep `json:"steps"`
}
