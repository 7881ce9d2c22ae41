package api

import (
	"io"
	"time"
)

// WorkspaceState is what a workspace is doing.
type WorkspaceState string

// The states. Only the machine of a started or paused workspace runs; of one
// that is paused to disk nothing does.
const (
	StateStarting WorkspaceState = "starting"
	StateStarted  WorkspaceState = "started"
	StatePaused   WorkspaceState = "paused"
	StateStopped  WorkspaceState = "stopped"
	StateFailed   WorkspaceState = "failed"
)

// The network policies.
const (
	NetworkOff              = "off"
	NetworkEgress           = "egress"
	NetworkEgressPublishing = "egress+published-ports"
)

// WorkspacePath is where a workspace's files lie in its guest.
const WorkspacePath = "/workspace"

// BaselineSnapshot is the name of the snapshot that every workspace has from
// its creation on.
const BaselineSnapshot = "baseline"

// Workspace is everything about one workspace that is not its files.
type Workspace struct {
	WorkspaceID string            `json:"workspace_id"`
	Name        *string           `json:"name"`
	Labels      map[string]string `json:"labels"`
	Environment string            `json:"environment"`
	// User is who its commands run as and whose its files are, as in an image's
	// configuration; "" for the guest's root.
	User  string         `json:"user,omitempty"`
	State WorkspaceState `json:"state"`
	// PausedToDisk says of a paused workspace that its memory is on the disk.
	PausedToDisk  bool      `json:"paused_to_disk"`
	Engine        string    `json:"engine"`
	Isolation     Isolation `json:"isolation"`
	ExecutionMode string    `json:"execution_mode"`
	VCPUCount     int       `json:"vcpu_count"`
	MemMiB        int       `json:"mem_mib"`
	DiskMiB       int       `json:"disk_mib"`
	NetworkPolicy string    `json:"network_policy"`
	CreatedAt     time.Time `json:"created_at"`
	// ExpiresAt is when the workspace deletes itself; nil for never.
	ExpiresAt           *time.Time    `json:"expires_at"`
	LastActivityAt      time.Time     `json:"last_activity_at"`
	CommandCount        int64         `json:"command_count"`
	ServiceCount        int64         `json:"service_count"`
	RunningServiceCount int64         `json:"running_service_count"`
	ResetCount          int64         `json:"reset_count"`
	LastResetAt         *time.Time    `json:"last_reset_at"`
	WorkspacePath       string        `json:"workspace_path"`
	WorkspaceSeed       WorkspaceSeed `json:"workspace_seed"`
	Secrets             []SecretInfo  `json:"secrets"`
	// LastError says why the workspace failed or its machine ended by itself.
	LastError *string `json:"last_error"`
}

// SecretInfo names a secret without its value.
type SecretInfo struct {
	Name       string `json:"name"`
	SourceKind string `json:"source_kind"` // literal, file
}

// The seed modes.
const (
	SeedEmpty     = "empty"
	SeedDirectory = "directory"
	SeedArchive   = "tar_archive"
	SeedGit       = "git"
)

// WorkspaceSeed says what a workspace began with.
type WorkspaceSeed struct {
	Mode         string  `json:"mode"`
	SeedPath     *string `json:"seed_path"`
	Destination  string  `json:"destination"`
	EntryCount   int64   `json:"entry_count"`
	BytesWritten int64   `json:"bytes_written"`
	// Skipped are the first entries that were left out, and SkippedCount the
	// number of all.
	Skipped      []SkippedEntry `json:"skipped"`
	SkippedCount int64          `json:"skipped_count"`
	// OriginKind and OriginRef say where the files come from: for git the
	// commit, with "+dirty" behind it where files differ from it.
	OriginKind *string `json:"origin_kind"`
	OriginRef  *string `json:"origin_ref"`
}

// SkippedEntry is a file that was left out, and why.
type SkippedEntry struct {
	Path   string `json:"path"`
	Reason string `json:"reason"`
}

// CreateRequest asks for a new workspace. Zero fields mean the defaults.
type CreateRequest struct {
	Environment string
	// SeedPath is a directory, a Git checkout or a tar archive (plain, gzip or
	// zstd) on this host; "" for an empty workspace.
	SeedPath string
	// IncludeIgnored also takes what a Git checkout ignores.
	IncludeIgnored             bool
	Name                       string
	Labels                     map[string]string
	NetworkPolicy              string
	VCPUCount, MemMiB, DiskMiB int
	// TTL is the time until the workspace deletes itself; negative means never.
	TTL time.Duration
	// User is who its commands run as unless they say otherwise, and who its
	// files belong to: NAME-OR-NUMBER[:GROUP-OR-NUMBER]; "" for the image's own
	// user, which mostly is root.
	User string

	// Secrets are for its commands; no record, log, disk or output shows them.
	Secrets []Secret

	Engine          string
	Require         Require
	AllowHostCompat bool

	// Progress is told what happens; may be nil. It may be called from several
	// goroutines, one at a time.
	Progress func(Progress)
}

// PauseRequest asks for a workspace that stands still.
type PauseRequest struct {
	// ToDisk frees the memory, too, where the engine can.
	ToDisk bool
}

// ForkRequest asks for new workspaces that begin with another one's disk.
type ForkRequest struct {
	// Snapshot is where to begin; "" is what the workspace's disk holds now.
	Snapshot string
	// Memory carries over what runs now, too, where the engine can. A snapshot
	// with memory always does.
	Memory bool
	// Count is how many to make, 1 if zero.
	Count int
	// Name is the new workspace's; of several, "-1" and so on is added.
	Name string
	// TTL is the workspace's own if zero; negative means never.
	TTL time.Duration
	// Progress is told what happens; may be nil. It may be called from several
	// goroutines, one at a time.
	Progress func(Progress)
}

// ForkResult is what a fork made.
type ForkResult struct {
	WorkspaceID string      `json:"workspace_id"` // that was forked
	Count       int         `json:"count"`
	Workspaces  []Workspace `json:"workspaces"`
}

// WorkspaceFilter chooses workspaces.
type WorkspaceFilter struct {
	// Labels must all be there with these values.
	Labels map[string]string
}

// WorkspaceUpdate changes what may be changed; nil and empty fields change
// nothing.
type WorkspaceUpdate struct {
	Name        *string // "" clears it
	SetLabels   map[string]string
	ClearLabels []string
	// TTL, counted from now, replaces the expiry; negative means never.
	TTL *time.Duration
}

// ExecRequest asks for one command in a started workspace.
type ExecRequest struct {
	// Argv are the words of the command. A single word is run by sh -c.
	Argv []string
	Cwd  string // default /workspace
	Env  map[string]string
	// User is who the command runs as, NAME-OR-NUMBER[:GROUP-OR-NUMBER]; "" for
	// the workspace's own user.
	User string
	// SecretEnv gives secrets as environment variables: by a secret's name, the
	// variable's name.
	SecretEnv map[string]string
	// Timeout is DefaultTimeout if zero and none if negative.
	Timeout time.Duration
	// Stdin feeds the command; nil means that it reads end of file at once.
	Stdin io.Reader
	// Stdout and Stderr take the output as it comes. Where one is nil the
	// result carries it instead, up to a bound.
	Stdout, Stderr io.Writer
	// TTY runs the command on a terminal of that size, whose output is Stdout.
	TTY *TerminalSize
	// Resize passes changes of the caller's terminal on; may be nil.
	Resize <-chan TerminalSize
	// Started, which may be nil, hears the command's number in the journal
	// before it runs.
	Started func(sequence int64)
}

// TerminalSize is in characters.
type TerminalSize struct {
	Cols uint16 `json:"cols"`
	Rows uint16 `json:"rows"`
}

// The states of a command in the journal.
const (
	CommandRunning  = "running"
	CommandExited   = "exited"
	CommandTimedOut = "timed_out"
	// CommandInterrupted is a command whose end nobody saw: its pyro was
	// killed, its caller gave up, or its machine ended.
	CommandInterrupted = "interrupted"
)

// CommandRecord is one line of a workspace's journal. The output is there as
// far as it is kept.
type CommandRecord struct {
	WorkspaceID string     `json:"workspace_id"`
	Sequence    int64      `json:"sequence"`
	Command     string     `json:"command"`
	Cwd         string     `json:"cwd"`
	State       string     `json:"state"` // one of the Command constants
	StartedAt   time.Time  `json:"started_at"`
	EndedAt     *time.Time `json:"ended_at"`
	ExitCode    *int       `json:"exit_code"`
	TimedOut    bool       `json:"timed_out"`
	DurationMS  int64      `json:"duration_ms"`
	Stdout      string     `json:"stdout"`
	Stderr      string     `json:"stderr"`
	// StdoutBytes and StderrBytes are what the command wrote, also where less
	// is kept.
	StdoutBytes     int64 `json:"stdout_bytes"`
	StderrBytes     int64 `json:"stderr_bytes"`
	StdoutTruncated bool  `json:"stdout_truncated"`
	StderrTruncated bool  `json:"stderr_truncated"`
}

// Event is one line of a workspace's history.
type Event struct {
	Sequence int64          `json:"sequence"`
	At       time.Time      `json:"at"`
	Kind     string         `json:"kind"`
	Detail   map[string]any `json:"detail"`
}

// LogsQuery chooses entries of a workspace's journal.
type LogsQuery struct {
	// Sequence, if not zero, is the one entry wanted.
	Sequence int64
	// Tail, if not zero, is how many of the last entries are wanted.
	Tail int64
}

// WorkspaceLogs is a workspace's journal, oldest first.
type WorkspaceLogs struct {
	WorkspaceID string          `json:"workspace_id"`
	Count       int64           `json:"count"`
	Entries     []CommandRecord `json:"entries"`
}

// DiffRequest asks for what differs.
type DiffRequest struct {
	// From names a snapshot to compare with; "" is the seed.
	From string
	// Patch takes the patch as it is made; where it is nil the result carries
	// it, up to MaxDiffPatch bytes.
	Patch io.Writer
	// NoPatch leaves the patch out altogether.
	NoPatch bool
	// Stat, which may be nil, takes a table of the changed lines of each file,
	// for people, as wide as StatWidth columns (80 if zero).
	Stat      io.Writer
	StatWidth int
}

// MaxDiffPatch bounds the bytes of the patch that a Diff carries itself.
const MaxDiffPatch = 32 << 20

// The statuses of a changed path.
const (
	ChangeAdded       = "added"
	ChangeModified    = "modified"
	ChangeDeleted     = "deleted"
	ChangeTypeChanged = "type_changed"
)

// DiffEntry is one path that differs from the base.
type DiffEntry struct {
	Path         string `json:"path"`
	Status       string `json:"status"`
	ArtifactType string `json:"artifact_type"` // of what is there now; for a deleted path of what was
	SizeBytes    int64  `json:"size_bytes"`
	// TextPatch is the entry's own part of the patch, nil where that is not
	// text or is too long to repeat.
	TextPatch *string `json:"text_patch"`
}

// DiffSummary counts the entries of a diff.
type DiffSummary struct {
	Total       int64 `json:"total"`
	Added       int64 `json:"added"`
	Modified    int64 `json:"modified"`
	Deleted     int64 `json:"deleted"`
	TypeChanged int64 `json:"type_changed"`
	TextPatched int64 `json:"text_patched"`
	NonText     int64 `json:"non_text"`
}

// Diff is what differs between a base and the workspace's files now.
type Diff struct {
	WorkspaceID string      `json:"workspace_id"`
	Base        string      `json:"base"` // seed, or the name of a snapshot
	Changed     bool        `json:"changed"`
	Summary     DiffSummary `json:"summary"`
	Entries     []DiffEntry `json:"entries"`
	// Patch is for git apply: applied to the base it gives the workspace. It is
	// empty where the request took it. It is always UTF-8: text in other
	// encodings is in it as binary.
	Patch string `json:"patch"`
	// Unpatched are changes that no patch can carry, such as an empty
	// directory.
	Unpatched []SkippedEntry `json:"unpatched"`
}

// SyncRequest asks to copy files of this host into a workspace.
type SyncRequest struct {
	SourcePath     string // a directory or a tar archive
	IncludeIgnored bool
	Destination    string // default /workspace
	Progress       func(Progress)
}

// SyncResult is what a sync push did.
type SyncResult struct {
	WorkspaceID  string         `json:"workspace_id"`
	SourcePath   string         `json:"source_path"`
	Destination  string         `json:"destination"`
	EntryCount   int64          `json:"entry_count"`
	BytesWritten int64          `json:"bytes_written"`
	Skipped      []SkippedEntry `json:"skipped"`
	SkippedCount int64          `json:"skipped_count"`
}

// FileList is what lies at a path of a workspace.
type FileList struct {
	WorkspaceID string      `json:"workspace_id"`
	Path        string      `json:"path"`
	Entries     []DiskEntry `json:"entries"`
	// Truncated says that there are more entries than a listing may hold.
	Truncated bool `json:"truncated"`
}

// FileRead is a part of a file's content.
type FileRead struct {
	WorkspaceID string `json:"workspace_id"`
	Path        string `json:"path"`
	SizeBytes   int64  `json:"size_bytes"`
	Offset      int64  `json:"offset"`
	MaxBytes    int64  `json:"max_bytes"`
	// Content is the text; for bytes that are not UTF-8 it is empty and
	// ContentBase64 is set.
	Content       string `json:"content"`
	ContentBase64 string `json:"content_base64,omitempty"`
	Truncated     bool   `json:"truncated"`
}

// FileWrite is what a file write did.
type FileWrite struct {
	WorkspaceID  string `json:"workspace_id"`
	Path         string `json:"path"`
	BytesWritten int64  `json:"bytes_written"`
	Created      bool   `json:"created"`
}

// PatchResult is what a patch changed.
type PatchResult struct {
	WorkspaceID string        `json:"workspace_id"`
	Changed     bool          `json:"changed"`
	Summary     PatchSummary  `json:"summary"`
	Entries     []PatchedFile `json:"entries"`
}

// PatchSummary counts the files of a patch.
type PatchSummary struct {
	Total    int64 `json:"total"`
	Added    int64 `json:"added"`
	Modified int64 `json:"modified"`
	Deleted  int64 `json:"deleted"`
	Renamed  int64 `json:"renamed"`
}

// PatchedFile is one file that a patch changed.
type PatchedFile struct {
	Path   string  `json:"path"`
	From   *string `json:"from,omitempty"` // of a rename or copy
	Status string  `json:"status"`         // added, modified, deleted, renamed
}

// ExportRequest asks to copy a file or directory out of a workspace.
type ExportRequest struct {
	Path       string // default /workspace
	OutputPath string // on this host; nothing may be there
}

// ExportResult is what an export wrote.
type ExportResult struct {
	WorkspaceID   string         `json:"workspace_id"`
	WorkspacePath string         `json:"workspace_path"`
	OutputPath    string         `json:"output_path"`
	ArtifactType  string         `json:"artifact_type"`
	EntryCount    int64          `json:"entry_count"`
	BytesWritten  int64          `json:"bytes_written"`
	Skipped       []SkippedEntry `json:"skipped"`
	SkippedCount  int64          `json:"skipped_count"`
	// Active are exported files that tools on this host run or obey by
	// themselves, such as Git hooks.
	Active []string `json:"active"`
}

// SnapshotRequest asks for a snapshot.
type SnapshotRequest struct {
	Name string
	// Memory also saves what runs, where the engine can: a reset or fork then
	// goes on with it.
	Memory bool
}

// The kinds of snapshots.
const (
	SnapshotBaseline = "baseline"
	SnapshotDisk     = "disk"
	SnapshotFull     = "full"
)

// Snapshot is a saved state of a workspace.
type Snapshot struct {
	WorkspaceID  string `json:"workspace_id"`
	SnapshotName string `json:"snapshot_name"`
	Kind         string `json:"kind"`
	// SizeBytes is the room on the host's disk that is this snapshot's own.
	SizeBytes int64     `json:"size_bytes"`
	CreatedAt time.Time `json:"created_at"`
	Deletable bool      `json:"deletable"`
}

// Summary tells what happened in a workspace since its last reset.
type Summary struct {
	WorkspaceID string          `json:"workspace_id"`
	Name        *string         `json:"name"`
	State       WorkspaceState  `json:"state"`
	Since       time.Time       `json:"since"`
	Commands    SummaryCommands `json:"commands"`
	Edits       SummaryEdits    `json:"edits"`
	Changes     *SummaryChanges `json:"changes"` // nil if the machine does not run
	Services    SummaryServices `json:"services"`
	Exports     []Event         `json:"exports"`
	Snapshots   []Snapshot      `json:"snapshots"`
	// Outcome is one sentence.
	Outcome string `json:"outcome"`
}

// SummaryCommands counts commands.
type SummaryCommands struct {
	Total  int64           `json:"total"`
	Failed int64           `json:"failed"`
	Recent []CommandRecord `json:"recent"` // the last ones, without output
}

// SummaryEdits counts what came in from the host.
type SummaryEdits struct {
	Syncs   int64   `json:"syncs"`
	Patches int64   `json:"patches"`
	Writes  int64   `json:"writes"`
	Recent  []Event `json:"recent"`
}

// SummaryChanges is the diff against the seed, counted.
type SummaryChanges struct {
	DiffSummary
	Paths []string `json:"paths"` // the first of them
}

// SummaryServices counts services.
type SummaryServices struct {
	Total   int64 `json:"total"`
	Running int64 `json:"running"`
	Failed  int64 `json:"failed"`
}

// DeleteResult says that a workspace is gone.
type DeleteResult struct {
	WorkspaceID string `json:"workspace_id"`
	Deleted     bool   `json:"deleted"`
}
