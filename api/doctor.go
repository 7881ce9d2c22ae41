package api

// Fact is one finding of doctor.
type Fact struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Remedy string `json:"remedy,omitempty"`
	Value  string `json:"value"`
}

// EngineReport is what doctor says of one engine.
type EngineReport struct {
	Available bool      `json:"available"`
	Detail    string    `json:"detail"`
	Engine    string    `json:"engine"`
	Facts     []Fact    `json:"facts"`
	Isolation Isolation `json:"isolation"`
	Remedy    string    `json:"remedy,omitempty"`
	Selected  bool      `json:"selected"` // what --engine auto takes
}

// The states of an environment that doctor knows.
const (
	// EnvironmentCold means that the first use has to build it.
	EnvironmentCold = "cold"
	// EnvironmentWarm means that it is installed and passes its checks.
	EnvironmentWarm = "warm"
	// EnvironmentStale means that what is installed is damaged; the next pull
	// replaces it.
	EnvironmentStale = "stale"
)

// EnvironmentReport is what doctor says of one environment.
type EnvironmentReport struct {
	Detail string `json:"detail"`
	Name   string `json:"name"`
	State  string `json:"state"`
}

// RepairResult says what doctor --repair did to the records of workspaces.
type RepairResult struct {
	Repaired bool   `json:"repaired"` // false if there was nothing to do
	Damage   string `json:"damage"`   // what was wrong
	// MovedTo is where the damaged database lies now, "" if there was none.
	MovedTo    string         `json:"moved_to"`
	Workspaces int            `json:"workspaces"`
	Skipped    []SkippedEntry `json:"skipped"` // what could not be taken in
}

// DoctorReport is everything doctor found.
type DoctorReport struct {
	CacheDir        string             `json:"cache_dir"`
	CacheFreeBytes  int64              `json:"cache_free_bytes"`
	Engines         []EngineReport     `json:"engines"`
	Environment     *EnvironmentReport `json:"environment,omitempty"`
	Facts           []Fact             `json:"facts"`
	KernelInstalled bool               `json:"kernel_installed"`
	// OK is true if at least one isolating engine works.
	OK             bool   `json:"ok"`
	Selected       string `json:"selected"` // engine that auto takes, "" if none
	StateDir       string `json:"state_dir"`
	StateFreeBytes int64  `json:"state_free_bytes"`
}
