package guestproto

// Messages of shells and services. Times are seconds since 1970.

// Shell is what every shell action answers with, alone or with more.
type Shell struct {
	ShellID   string   `json:"shell_id"`
	Cwd       string   `json:"cwd"`
	Cols      uint16   `json:"cols"`
	Rows      uint16   `json:"rows"`
	State     string   `json:"state"` // running, stopped
	StartedAt float64  `json:"started_at"`
	EndedAt   *float64 `json:"ended_at"`
	ExitCode  *int     `json:"exit_code"`
}

// OpenShell starts a shell on a terminal; the reply is a Shell.
type OpenShell struct {
	Envelope
	ShellID string            `json:"shell_id"`
	Cwd     string            `json:"cwd,omitzero"`
	Cols    uint16            `json:"cols,omitzero"`
	Rows    uint16            `json:"rows,omitzero"`
	Env     map[string]string `json:"env,omitzero"`
}

// ReadShell reads a shell's output from Cursor on, at most MaxChars characters.
type ReadShell struct {
	Envelope
	ShellID  string `json:"shell_id"`
	Cursor   int64  `json:"cursor"`
	MaxChars int64  `json:"max_chars,omitzero"`
}

// ReadShellReply answers ReadShell.
type ReadShellReply struct {
	Shell
	Cursor     int64  `json:"cursor"`
	NextCursor int64  `json:"next_cursor"`
	Output     string `json:"output"`
	Truncated  bool   `json:"truncated"`
}

// WriteShell types Input into a shell.
type WriteShell struct {
	Envelope
	ShellID       string `json:"shell_id"`
	Input         string `json:"input"`
	AppendNewline bool   `json:"append_newline"`
}

// WriteShellReply answers WriteShell.
type WriteShellReply struct {
	Shell
	InputLength   int64 `json:"input_length"`
	AppendNewline bool  `json:"append_newline"`
}

// SignalShell sends HUP, INT, TERM or KILL to a shell's foreground.
type SignalShell struct {
	Envelope
	ShellID string `json:"shell_id"`
	Signal  string `json:"signal"`
}

// SignalShellReply answers SignalShell.
type SignalShellReply struct {
	Shell
	Signal string `json:"signal"`
}

// CloseShell ends a shell.
type CloseShell struct {
	Envelope
	ShellID string `json:"shell_id"`
}

// CloseShellReply answers CloseShell.
type CloseShellReply struct {
	Shell
	Closed bool `json:"closed"`
}

// Readiness says when a service counts as ready. Type names the one other
// field that is set.
type Readiness struct {
	Type    string `json:"type"` // file, tcp, http, command
	Path    string `json:"path,omitzero"`
	Address string `json:"address,omitzero"` // HOST:PORT
	URL     string `json:"url,omitzero"`
	Command string `json:"command,omitzero"`
}

// Service is what every service action answers with, alone or with more.
type Service struct {
	ServiceName string     `json:"service_name"`
	Command     string     `json:"command"`
	Cwd         string     `json:"cwd"`
	State       string     `json:"state"` // starting, running, exited, stopped, failed
	StartedAt   float64    `json:"started_at"`
	ReadyAt     *float64   `json:"ready_at"`
	EndedAt     *float64   `json:"ended_at"`
	ExitCode    *int       `json:"exit_code"`
	PID         *int       `json:"pid"`
	Readiness   *Readiness `json:"readiness"`
	StopReason  *string    `json:"stop_reason"`
}

// StartService starts a named command in the background and waits until it is
// ready; the reply is a Service.
type StartService struct {
	Envelope
	ServiceName         string            `json:"service_name"`
	Command             string            `json:"command"`
	Cwd                 string            `json:"cwd,omitzero"`
	Readiness           *Readiness        `json:"readiness,omitzero"`
	ReadyTimeoutSeconds float64           `json:"ready_timeout_seconds,omitzero"`
	ReadyIntervalMS     int64             `json:"ready_interval_ms,omitzero"`
	Env                 map[string]string `json:"env,omitzero"`
}

// NamedService is the request of status_service and stop_service.
type NamedService struct {
	Envelope
	ServiceName string `json:"service_name"`
}

// LogsService asks for the last TailLines lines of a service's output; nil for
// all of it.
type LogsService struct {
	Envelope
	ServiceName string `json:"service_name"`
	TailLines   *int64 `json:"tail_lines"`
}

// ServiceLogs answers LogsService.
type ServiceLogs struct {
	Service
	Stdout    string `json:"stdout"`
	Stderr    string `json:"stderr"`
	TailLines *int64 `json:"tail_lines"`
	Truncated bool   `json:"truncated"`
}
