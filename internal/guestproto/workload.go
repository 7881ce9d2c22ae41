package guestproto

import (
	"math"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// Messages of shells and services. Times are seconds since 1970.

// The limits of shells and services.
const (
	// MaxShells and MaxServices bound how many a guest keeps, those that have
	// ended included; the oldest of these make room for new ones.
	MaxShells   = 32
	MaxServices = 32
	// MaxWorkloadName bounds the name of a shell or service in bytes.
	MaxWorkloadName = 64
	// DefaultShellCols and DefaultShellRows are a terminal's size.
	DefaultShellCols = 120
	DefaultShellRows = 30
	// DefaultShellChars is what a read returns at most, unless it says
	// otherwise; MaxShellChars is what it may ask for.
	DefaultShellChars = 64 << 10
	MaxShellChars     = 1 << 20
	// MaxShellWait bounds how long a read of a shell waits in all.
	MaxShellWait = time.Minute
	// DefaultReadyTimeout and DefaultReadyInterval are a readiness check's.
	DefaultReadyTimeout  = 30 * time.Second
	DefaultReadyInterval = 500 * time.Millisecond
	// MaxReadyTimeout bounds what a start may wait.
	MaxReadyTimeout = time.Hour
	// DefaultStopGrace is how long a service has between TERM and KILL, and
	// MaxStopGrace what may be asked for.
	DefaultStopGrace = 5 * time.Second
	MaxStopGrace     = 10 * time.Minute
)

// CheckWorkloadName refuses what cannot name a shell or service: a name is 1 to
// MaxWorkloadName letters, digits, ".", "_" and "-", and begins with a letter or
// digit.
func CheckWorkloadName(name string) error {
	if name == "" || len(name) > MaxWorkloadName {
		return api.Errorf(api.ErrInvalid, "a name of %d bytes is not between 1 and %d", len(name), MaxWorkloadName)
	}
	for i, c := range []byte(name) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && (i == 0 || c != '.' && c != '_' && c != '-') {
			return api.WithHint(api.Errorf(api.ErrInvalid, "the name %q has a character at %d that none may have", name, i),
				"use letters, digits, '.', '_' and '-', a letter or digit first")
		}
	}
	return nil
}

// ListShells answers list_shells, the oldest first.
type ListShells struct {
	Shells []Shell `json:"shells"`
}

// ResizeShell changes a shell's terminal; the reply is a Shell.
type ResizeShell struct {
	Envelope
	ShellID string `json:"shell_id"`
	Cols    uint16 `json:"cols"`
	Rows    uint16 `json:"rows"`
}

// AttachShell connects the caller to a shell until it ends or the caller hangs
// up, which leaves the shell running. Streaming form only: FrameHeader with
// ShellAttached, then output as FrameStdout, what was missed of it as text in
// FrameStderr, and at the shell's end FrameResult with a Shell. The caller sends
// stdin, resizes and signals as for exec.
type AttachShell struct {
	Envelope
	ShellID string `json:"shell_id"`
	// Cursor is where the output begins; nil means with what comes next.
	Cursor *int64 `json:"cursor,omitzero"`
	// Cols and Rows, unless zero, are the new size of the terminal.
	Cols uint16 `json:"cols,omitzero"`
	Rows uint16 `json:"rows,omitzero"`
}

// ShellAttached says where an attached shell's output begins.
type ShellAttached struct {
	Shell
	Cursor int64 `json:"cursor"`
}

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
	User    string            `json:"user,omitzero"` // as in ExecRequest
}

// ReadShell reads a shell's output from Cursor on, at most MaxChars characters
// (DefaultShellChars if 0). Cursors count bytes; reading consumes nothing.
type ReadShell struct {
	Envelope
	ShellID  string `json:"shell_id"`
	Cursor   int64  `json:"cursor"`
	MaxChars int64  `json:"max_chars,omitzero"`
	// WaitMS waits that long at most for output behind Cursor. WaitForIdleMS
	// then waits until none has come for that long. Both end with the shell,
	// with MaxChars of output, and together after MaxShellWait.
	WaitMS        int64 `json:"wait_ms,omitzero"`
	WaitForIdleMS int64 `json:"wait_for_idle_ms,omitzero"`
}

// ReadShellReply answers ReadShell. Bytes that are no UTF-8 are U+FFFD; a
// character of several bytes is never split between two reads.
type ReadShellReply struct {
	Shell
	// Cursor is where Output begins: behind the one asked for if that is no
	// longer kept, by MissedBytes. NextCursor is where to read on.
	Cursor      int64  `json:"cursor"`
	NextCursor  int64  `json:"next_cursor"`
	Output      string `json:"output"`
	MissedBytes int64  `json:"missed_bytes,omitzero"`
	// Truncated says that Output is not all: something was missed, or there is
	// more at NextCursor.
	Truncated bool `json:"truncated"`
}

// WriteShell types Input into a shell. The reply comes when it was accepted,
// which is before a busy shell has read it.
type WriteShell struct {
	Envelope
	ShellID       string `json:"shell_id"`
	Input         string `json:"input"`
	AppendNewline bool   `json:"append_newline"`
}

// WriteShellReply answers WriteShell; InputLength is in bytes.
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

// Check refuses a readiness that no service could meet.
func (r *Readiness) Check() error {
	bad := func(format string, args ...any) error {
		return api.Errorf(api.ErrInvalid, "the readiness check "+format, args...)
	}
	fields := map[string]string{"file": r.Path, "tcp": r.Address, "http": r.URL, "command": r.Command}
	value, ok := fields[r.Type]
	if !ok {
		return bad("has the type %q, which is none of file, tcp, http, command", r.Type)
	}
	for typ, v := range fields {
		if typ != r.Type && v != "" {
			return bad("of type %s also says what only one of type %s would", r.Type, typ)
		}
	}
	if value == "" || strings.ContainsRune(value, 0) {
		return bad("of type %s says nothing to check", r.Type)
	}
	switch r.Type {
	case "tcp":
		if _, port, err := net.SplitHostPort(value); err != nil || !isPort(port) {
			return bad("of type tcp has the address %q, which is not HOST:PORT", value)
		}
	case "http":
		u, err := url.Parse(value)
		if err == nil && u.Scheme == "https" {
			return api.WithHint(bad("of type http has an https URL, whose certificate cannot be judged in the guest"),
				"check with a command, such as curl -k, or with type tcp")
		}
		if err != nil || u.Scheme != "http" || u.Hostname() == "" || u.Port() != "" && !isPort(u.Port()) {
			return bad("of type http has %q, which is not http://HOST[:PORT][/PATH]", value)
		}
	}
	return nil
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
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
	// Restarts counts how often it was started again by its policy.
	Restarts int64 `json:"restarts,omitzero"`
}

// RestartOnFailure starts a service again that was ready and has ended with
// another status than 0.
const RestartOnFailure = "on-failure"

// StartService starts a named command in the background and waits until it is
// ready, or for a moment where it has no readiness check; the reply is a
// Service, also for one that has failed.
type StartService struct {
	Envelope
	ServiceName string `json:"service_name"`
	// Command is run by sh -c, unless Argv is given: then that is run as it
	// stands, and Command is how it is shown.
	Command             string            `json:"command"`
	Argv                []string          `json:"argv,omitzero"`
	Cwd                 string            `json:"cwd,omitzero"`
	Readiness           *Readiness        `json:"readiness,omitzero"`
	ReadyTimeoutSeconds float64           `json:"ready_timeout_seconds,omitzero"`
	ReadyIntervalMS     int64             `json:"ready_interval_ms,omitzero"`
	Env                 map[string]string `json:"env,omitzero"`
	// Restart is "" for never, or RestartOnFailure.
	Restart string `json:"restart,omitzero"`
	User    string `json:"user,omitzero"` // as in ExecRequest
}

// ReadyTimeout returns how long the start may wait for readiness, ErrInvalid if
// that is out of bounds.
func (r *StartService) ReadyTimeout() (time.Duration, error) {
	s := r.ReadyTimeoutSeconds
	switch {
	case math.IsNaN(s) || s < 0 || s > MaxReadyTimeout.Seconds():
		return 0, api.Errorf(api.ErrInvalid, "ready_timeout_seconds is %v, not between 0 and %v", s, MaxReadyTimeout.Seconds())
	case r.Readiness == nil:
		return 0, nil
	case s == 0:
		return DefaultReadyTimeout, nil
	}
	return time.Duration(s * float64(time.Second)), nil
}

// StopService ends a service: TERM to all of it, and KILL after the grace.
type StopService struct {
	Envelope
	ServiceName string `json:"service_name"`
	GraceMS     *int64 `json:"grace_ms,omitzero"` // default DefaultStopGrace
}

// Grace returns the request's grace, ErrInvalid if it is out of bounds.
func (r *StopService) Grace() (time.Duration, error) {
	if r.GraceMS == nil {
		return DefaultStopGrace, nil
	}
	if *r.GraceMS < 0 || *r.GraceMS > MaxStopGrace.Milliseconds() {
		return 0, api.Errorf(api.ErrInvalid, "a grace of %d ms is not between 0 and %d", *r.GraceMS, MaxStopGrace.Milliseconds())
	}
	return time.Duration(*r.GraceMS) * time.Millisecond, nil
}

// ListServices answers list_services, by name.
type ListServices struct {
	Services []Service `json:"services"`
}

// NamedService is the request of status_service.
type NamedService struct {
	Envelope
	ServiceName string `json:"service_name"`
}

// LogsService asks for the last TailLines lines of a service's stdout and of its
// stderr; nil for all that is kept. In the streaming form they come as
// FrameStdout and FrameStderr, without a bound, and FrameResult with a Service
// ends them: at once, or with Follow when the service has ended.
type LogsService struct {
	Envelope
	ServiceName string `json:"service_name"`
	TailLines   *int64 `json:"tail_lines"`
	Follow      bool   `json:"follow,omitzero"`
}

// ServiceLogs answers LogsService.
type ServiceLogs struct {
	Service
	Stdout    string `json:"stdout"`
	Stderr    string `json:"stderr"`
	TailLines *int64 `json:"tail_lines"`
	// Truncated says that older output was asked for than is kept, or than
	// fits into a reply of MaxPlainOutput each.
	Truncated bool `json:"truncated"`
}
