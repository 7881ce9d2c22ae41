package guestproto

import "github.com/pyro-mcp/pyro/api"

// The actions. A request without one means ActionExec.
const (
	ActionHello          = "hello"
	ActionExec           = "exec"
	ActionExtractArchive = "extract_archive"
	ActionExportArchive  = "export_archive"
	ActionShutdown       = "shutdown"
	ActionOpenShell      = "open_shell"
	ActionReadShell      = "read_shell"
	ActionWriteShell     = "write_shell"
	ActionSignalShell    = "signal_shell"
	ActionCloseShell     = "close_shell"
	ActionResizeShell    = "resize_shell"
	ActionListShells     = "list_shells"
	ActionAttachShell    = "attach_shell"
	ActionStartService   = "start_service"
	ActionStatusService  = "status_service"
	ActionLogsService    = "logs_service"
	ActionStopService    = "stop_service"
	ActionListServices   = "list_services"
	ActionFlush          = "flush"
	ActionManifest       = "manifest"
	ActionListFiles      = "list_files"
	ActionReadFile       = "read_file"
	ActionWriteFile      = "write_file"
	ActionSync           = "sync"
	ActionExportFiles    = "export_files"
)

// Envelope is what every request line has in common.
type Envelope struct {
	Action string `json:"action,omitzero"`
	// Stream asks for the streaming form.
	Stream bool `json:"stream,omitzero"`
	// Version is the lowest protocol version that the caller needs; 0 for any.
	Version int `json:"version,omitzero"`
}

// Hello is the reply to ActionHello, which takes no parameters.
type Hello struct {
	Protocol     int      `json:"protocol"`
	AgentVersion string   `json:"agent_version"`
	BootID       string   `json:"boot_id"` // new with every start of the agent
	Capabilities []string `json:"capabilities"`
	Kernel       string   `json:"kernel"` // uname -r, for people
}

// ExecRequest asks for one command. Exactly one of Command and Argv is set.
type ExecRequest struct {
	Envelope
	// Command is run by sh -c. Argv is run as it stands, Argv[0] by PATH.
	Command string   `json:"command,omitzero"`
	Argv    []string `json:"argv,omitzero"`
	// TimeoutSeconds ends the command's whole process tree; 0 means none.
	TimeoutSeconds float64           `json:"timeout_seconds,omitzero"`
	Env            map[string]string `json:"env,omitzero"`
	// Cwd defaults to /workspace where that exists, else /.
	Cwd string `json:"cwd,omitzero"`
	// Stdin says that FrameStdin frames will follow (streaming form only);
	// without it the command reads end of file at once.
	Stdin bool `json:"stdin,omitzero"`
	// TTY runs the command on a terminal of this size (streaming form only).
	TTY *Resize `json:"tty,omitzero"`
	// User is who the command runs as, since protocol version 5:
	// NAME-OR-NUMBER[:GROUP-OR-NUMBER], names as the guest's files have them; ""
	// is the guest's root.
	User string `json:"user,omitzero"`
}

// ActionOwnWorkspace gives the workspace to a user, since protocol version 5.
const ActionOwnWorkspace = "own_workspace"

// OwnWorkspace makes the directory /workspace, not what is in it, the user's.
// What the guest agent makes in the workspace belongs to whom the workspace
// belongs to.
type OwnWorkspace struct {
	Envelope
	User string `json:"user"` // as in ExecRequest
}

// OwnWorkspaceReply answers OwnWorkspace with the user's ids.
type OwnWorkspaceReply struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
}

// ExecReply is the plain reply, and without the outputs the FrameResult.
type ExecReply struct {
	Stdout          string `json:"stdout"`
	Stderr          string `json:"stderr"`
	ExitCode        int    `json:"exit_code"`
	DurationMS      int64  `json:"duration_ms"`
	TimedOut        bool   `json:"timed_out,omitzero"`
	OOMKilled       bool   `json:"oom_killed,omitzero"`
	StdoutTruncated bool   `json:"stdout_truncated,omitzero"`
	StderrTruncated bool   `json:"stderr_truncated,omitzero"`
}

// Started is the payload of FrameStarted.
type Started struct {
	PID int `json:"pid"`
}

// Resize is the payload of FrameResize.
type Resize struct {
	Cols uint16 `json:"cols"`
	Rows uint16 `json:"rows"`
}

// Signal is the payload of FrameSignal: HUP, INT, TERM or KILL.
type Signal struct {
	Name string `json:"signal"`
}

// ExtractArchive asks the guest to unpack a tar or tar.gz below Destination. In
// the plain form ArchiveSize raw bytes follow the line; in the streaming form
// FrameData until FrameDataEnd.
type ExtractArchive struct {
	Envelope
	Destination string `json:"destination"`
	ArchiveSize int64  `json:"archive_size,omitzero"`
}

// ExtractReply answers ExtractArchive.
type ExtractReply struct {
	Destination  string `json:"destination"`
	EntryCount   int64  `json:"entry_count"`
	BytesWritten int64  `json:"bytes_written"`
}

// ExportArchive asks for Path as a tar.
type ExportArchive struct {
	Envelope
	Path string `json:"path"`
}

// ExportHeader is the line in front of the raw tar in the plain form. In the
// streaming form FrameHeader carries it with zero counts and FrameResult, after
// the data, with true ones.
type ExportHeader struct {
	WorkspacePath string `json:"workspace_path"`
	ArtifactType  string `json:"artifact_type"` // file, directory, symlink
	ArchiveSize   int64  `json:"archive_size"`
	EntryCount    int64  `json:"entry_count"`
	BytesWritten  int64  `json:"bytes_written"`
}

// Shutdown asks for a clean end: workload stopped, disks flushed, power off.
// The agent replies with ShutdownReply before it starts.
type Shutdown struct {
	Envelope
	// GraceMS is how long the workload has between TERM and KILL.
	GraceMS int64 `json:"grace_ms,omitzero"`
}

// ShutdownReply acknowledges Shutdown.
type ShutdownReply struct {
	OK bool `json:"ok"`
}

// ErrorReply is the plain form's failure. Code and Hint are ours; a peer of
// another make sends Error alone.
type ErrorReply struct {
	Error string `json:"error"`
	Code  string `json:"code,omitzero"`
	Hint  string `json:"hint,omitzero"`
}

// Err returns the reply as an error of its class. A reply without a code is
// ErrUnavailable: the guest says no, and only its text tells why. Texts are cut
// at MaxErrorText.
func (e ErrorReply) Err() error {
	code := e.Code
	if code == "" {
		code = api.Code(api.ErrUnavailable)
	}
	text := cut(e.Error, MaxErrorText)
	if text == "" {
		text = "the guest reports an error without a text"
	}
	return (&api.WireError{Code: code, Message: text, Hint: cut(e.Hint, MaxErrorText)}).Err()
}
