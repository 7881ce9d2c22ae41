package api

// Isolation says what stands between a guest command and the host.
type Isolation string

// The isolation levels, strongest first.
const (
	// IsolationVMKVM is a virtual machine on hardware virtualization.
	IsolationVMKVM Isolation = "vm-kvm"
	// IsolationVMEmulated is a virtual machine on software emulation: its own
	// kernel too, but QEMU does not count the emulator as a security boundary.
	IsolationVMEmulated Isolation = "vm-emulated"
	// IsolationSandboxGVisor is gVisor's application kernel.
	IsolationSandboxGVisor Isolation = "sandbox-gvisor"
	// IsolationNone is no isolation at all: commands run on the host.
	IsolationNone Isolation = "none"
)

// Require is a floor under the isolation that automatic choice may use.
type Require string

// The floors a caller can ask for. RequireSandbox also accepts a machine.
const (
	RequireAny     Require = ""
	RequireSandbox Require = "sandbox"
	RequireVM      Require = "vm"
)

// Allows reports whether isolation i satisfies the floor. No floor admits
// IsolationNone: that takes an explicit opt-in of its own.
func (r Require) Allows(i Isolation) bool {
	vm := i == IsolationVMKVM || i == IsolationVMEmulated
	switch r {
	case RequireVM:
		return vm
	case RequireSandbox, RequireAny:
		return vm || i == IsolationSandboxGVisor
	}
	return false
}

// The values of execution_mode.
const (
	ModeGuest      = "guest"
	ModeHostCompat = "host_compat"
)

// ExecResult is what one command left behind. A command that exits non-zero is
// a result, not an error.
type ExecResult struct {
	Command       string    `json:"command"`
	Cwd           string    `json:"cwd"`
	DurationMS    int64     `json:"duration_ms"`
	Engine        string    `json:"engine"`
	Environment   string    `json:"environment,omitempty"`
	ExecutionMode string    `json:"execution_mode"`
	ExitCode      int       `json:"exit_code"`
	Isolation     Isolation `json:"isolation"`
	// OOMKilled says that the guest ran out of memory and its kernel killed
	// something of this command.
	OOMKilled bool `json:"oom_killed"`
	// Sequence is the command's number in the workspace's journal.
	Sequence        int64  `json:"sequence,omitempty"`
	Stderr          string `json:"stderr"`
	StderrTruncated bool   `json:"stderr_truncated"`
	Stdout          string `json:"stdout"`
	StdoutTruncated bool   `json:"stdout_truncated"`
	TimedOut        bool   `json:"timed_out"`
	WorkspaceID     string `json:"workspace_id,omitempty"`
}
