package api

import (
	"io"
	"time"
)

// A Secret is a value that a workspace's commands may use and that nothing else
// shows.
type Secret struct {
	// Name is how commands ask for it and the name of its file below
	// /run/pyro-secrets: letters, digits and underscores.
	Name string
	// Value must be long enough that replacing it wherever it is shown does no
	// harm.
	Value string
	// FromFile says that the value came from a file.
	FromFile bool
}

// String keeps the value out of logs and messages.
func (s Secret) String() string { return s.Name + "=" + Redacted }

// GoString does too.
func (s Secret) GoString() string { return "api.Secret{" + s.String() + "}" }

// Redacted stands where the value of a secret was.
const Redacted = "[REDACTED]"

// The states of a shell.
const (
	ShellRunning = "running"
	ShellStopped = "stopped"
)

// Shell is an interactive session on a terminal in a workspace.
type Shell struct {
	WorkspaceID string     `json:"workspace_id"`
	ShellID     string     `json:"shell_id"`
	Cwd         string     `json:"cwd"`
	Cols        uint16     `json:"cols"`
	Rows        uint16     `json:"rows"`
	State       string     `json:"state"`
	StartedAt   time.Time  `json:"started_at"`
	EndedAt     *time.Time `json:"ended_at"`
	ExitCode    *int       `json:"exit_code"`
}

// OpenShellRequest asks for a shell. Zero fields mean the defaults.
type OpenShellRequest struct {
	Cwd  string // default /workspace
	Size TerminalSize
	Env  map[string]string
	User string // as in ExecRequest
	// SecretEnv gives secrets as environment variables: by a secret's name, the
	// variable's name.
	SecretEnv map[string]string
}

// The bounds of one shell read.
const (
	DefaultShellChars = 64 << 10
	MaxShellChars     = 1 << 20
)

// ReadShellRequest asks for a shell's output.
type ReadShellRequest struct {
	// Cursor is where to begin: 0, or the NextCursor of an earlier read.
	Cursor int64
	// MaxChars is DefaultShellChars if zero, at most MaxShellChars.
	MaxChars int64
	// Plain asks for what a person would read on the terminal in place of the
	// bytes that draw it.
	Plain bool
	// WaitForIdle waits until no output has come for so long, a minute at most.
	WaitForIdle time.Duration
}

// ShellRead is a part of a shell's output. Reading consumes nothing.
type ShellRead struct {
	Shell
	Cursor     int64  `json:"cursor"`
	NextCursor int64  `json:"next_cursor"`
	Output     string `json:"output"`
	// Truncated says that Output is not all: there is more at NextCursor, or
	// output before Cursor is no longer kept.
	Truncated bool `json:"truncated"`
	Plain     bool `json:"plain"`
}

// ShellWrite is what was typed into a shell.
type ShellWrite struct {
	Shell
	InputLength   int64 `json:"input_length"` // bytes
	AppendNewline bool  `json:"append_newline"`
}

// ShellSignal is a signal that was sent.
type ShellSignal struct {
	Shell
	Signal string `json:"signal"`
}

// ShellClose says that a shell is gone.
type ShellClose struct {
	Shell
	Closed bool `json:"closed"`
}

// AttachRequest connects a caller's terminal with a shell.
type AttachRequest struct {
	Stdin  io.Reader
	Stdout io.Writer
	// Size is the terminal's, Resize passes its changes on; may be nil.
	Size   TerminalSize
	Resize <-chan TerminalSize
}

// The states of a service.
const (
	ServiceStarting = "starting"
	ServiceRunning  = "running"
	ServiceExited   = "exited"
	ServiceStopped  = "stopped"
	ServiceFailed   = "failed"
)

// Readiness says when a service counts as ready: Type names the one other field
// that is set.
type Readiness struct {
	Type    string `json:"type"` // file, tcp, http, command
	Path    string `json:"path,omitempty"`
	Address string `json:"address,omitempty"` // HOST:PORT
	URL     string `json:"url,omitempty"`
	Command string `json:"command,omitempty"`
}

// PublishedPort is a port of this host that leads to a service.
type PublishedPort struct {
	Host      string `json:"host"`
	HostPort  int    `json:"host_port"`
	GuestPort int    `json:"guest_port"`
	Protocol  string `json:"protocol"`
}

// Service is a long-running command with a name.
type Service struct {
	WorkspaceID    string          `json:"workspace_id"`
	ServiceName    string          `json:"service_name"`
	Command        string          `json:"command"`
	Cwd            string          `json:"cwd"`
	State          string          `json:"state"`
	StartedAt      time.Time       `json:"started_at"`
	ReadyAt        *time.Time      `json:"ready_at"`
	EndedAt        *time.Time      `json:"ended_at"`
	ExitCode       *int            `json:"exit_code"`
	PID            *int            `json:"pid"`
	Readiness      *Readiness      `json:"readiness"`
	StopReason     *string         `json:"stop_reason"`
	Restarts       int64           `json:"restarts"`
	PublishedPorts []PublishedPort `json:"published_ports"`
}

// The restart policies.
const (
	RestartNever     = ""
	RestartOnFailure = "on-failure"
)

// StartServiceRequest asks for a service. Zero fields mean the defaults.
type StartServiceRequest struct {
	// Argv are the words of the command. A single word is run by sh -c.
	Argv      []string
	Cwd       string
	Env       map[string]string
	User      string // as in ExecRequest
	SecretEnv map[string]string
	// Readiness is nil for a service that is ready when it runs.
	Readiness     *Readiness
	ReadyTimeout  time.Duration // default 30 s
	ReadyInterval time.Duration // default 500 ms
	Restart       string
	// Publish are the ports to publish while the service lives. A HostPort of 0
	// picks a free one, a Host of "" is 127.0.0.1.
	Publish []PublishedPort
}

// DefaultLogTail is how many lines a look into a service's log shows.
const DefaultLogTail = 200

// ServiceLogs is a service with its output.
type ServiceLogs struct {
	Service
	Stdout    string `json:"stdout"`
	Stderr    string `json:"stderr"`
	TailLines *int64 `json:"tail_lines"` // nil for all that is kept
	Truncated bool   `json:"truncated"`
}
