package pyro

import (
	"context"
	"io"

	"github.com/pyro-mcp/pyro/api"
)

// CreateWorkspace makes a workspace, seeds it with files of this host, starts
// it, and returns when it is ready for commands. On an error, and if ctx ends
// first, nothing of it is left.
func (c *Client) CreateWorkspace(ctx context.Context, req api.CreateRequest) (*api.Workspace, error) {
	return c.m.CreateWorkspace(ctx, req)
}

// In all of the following ref is a workspace's id, a unique prefix of that, or
// its name. None such is api.ErrNotFound.

// Workspaces lists workspaces, the one with the latest activity first.
func (c *Client) Workspaces(ctx context.Context, filter api.WorkspaceFilter) ([]api.Workspace, error) {
	return c.m.Workspaces(ctx, filter)
}

// Workspace returns one workspace as it is.
func (c *Client) Workspace(ctx context.Context, ref string) (*api.Workspace, error) {
	return c.m.Workspace(ctx, ref)
}

// UpdateWorkspace changes a workspace's name, labels or expiry.
func (c *Client) UpdateWorkspace(ctx context.Context, ref string, u api.WorkspaceUpdate) (*api.Workspace, error) {
	return c.m.UpdateWorkspace(ctx, ref, u)
}

// StartWorkspace boots a stopped workspace from its disk; one that runs is a
// success. progress may be nil.
func (c *Client) StartWorkspace(ctx context.Context, ref string, progress func(api.Progress)) (*api.Workspace, error) {
	return c.m.StartWorkspace(ctx, ref, progress)
}

// StopWorkspace ends a workspace's machine and keeps its disk, flushed; one
// that is stopped is a success.
func (c *Client) StopWorkspace(ctx context.Context, ref string) (*api.Workspace, error) {
	return c.m.StopWorkspace(ctx, ref)
}

// DeleteWorkspace removes a workspace with everything that is its own.
func (c *Client) DeleteWorkspace(ctx context.Context, ref string) (*api.DeleteResult, error) {
	return c.m.DeleteWorkspace(ctx, ref)
}

// PruneWorkspaces deletes the workspaces whose time is over or that never came
// to be, and removes what killed processes have left.
func (c *Client) PruneWorkspaces(ctx context.Context) (*api.PruneResult, error) {
	return c.m.PruneWorkspaces(ctx)
}

// Expire deletes the workspaces whose time is over.
func (c *Client) Expire(ctx context.Context) error { return c.m.Expire(ctx) }

// Exec runs one command in a running workspace and records it in the journal. A
// command that exits non-zero or times out is a result, not an error.
func (c *Client) Exec(ctx context.Context, ref string, req api.ExecRequest) (*api.ExecResult, error) {
	return c.m.Exec(ctx, ref, req)
}

// StartExec starts a command that goes on when this process ends, and returns
// its entry in the journal, which [Client.Logs] shows. Its streams and terminal
// must not be set.
func (c *Client) StartExec(ctx context.Context, ref string, req api.ExecRequest) (*api.CommandRecord, error) {
	return c.m.StartExec(ctx, ref, req)
}

// Logs returns a workspace's journal of commands, oldest first.
func (c *Client) Logs(ctx context.Context, ref string, q api.LogsQuery) (*api.WorkspaceLogs, error) {
	return c.m.Logs(ctx, ref, q)
}

// Summary tells what happened in a workspace since its last reset.
func (c *Client) Summary(ctx context.Context, ref string) (*api.Summary, error) {
	return c.m.Summary(ctx, ref)
}

// SyncPush copies files of this host into a running workspace, all of them or
// none.
func (c *Client) SyncPush(ctx context.Context, ref string, req api.SyncRequest) (*api.SyncResult, error) {
	return c.m.SyncPush(ctx, ref, req)
}

// ListFiles lists a directory below /workspace, one level or all of it, or one
// file.
func (c *Client) ListFiles(ctx context.Context, ref, path string, recursive bool) (*api.FileList, error) {
	return c.m.ListFiles(ctx, ref, path, recursive)
}

// ReadFile reads at most maxBytes bytes of a file below /workspace, from offset
// on.
func (c *Client) ReadFile(ctx context.Context, ref, path string, offset, maxBytes int64) (*api.FileRead, error) {
	return c.m.ReadFile(ctx, ref, path, offset, maxBytes)
}

// WriteFile writes a file below /workspace, all of it or nothing. It takes up
// to 1 MiB.
func (c *Client) WriteFile(ctx context.Context, ref, path string, content []byte) (*api.FileWrite, error) {
	return c.m.WriteFile(ctx, ref, path, content)
}

// ApplyPatch applies a unified or git-style patch to the workspace's files, all
// of it or nothing.
func (c *Client) ApplyPatch(ctx context.Context, ref string, text []byte) (*api.PatchResult, error) {
	return c.m.ApplyPatch(ctx, ref, text)
}

// Diff compares a running workspace's files with its seed or a snapshot.
func (c *Client) Diff(ctx context.Context, ref string, req api.DiffRequest) (*api.Diff, error) {
	return c.m.Diff(ctx, ref, req)
}

// Export copies a file or directory out of a running workspace, to a path at
// which nothing is yet.
func (c *Client) Export(ctx context.Context, ref string, req api.ExportRequest) (*api.ExportResult, error) {
	return c.m.Export(ctx, ref, req)
}

// CreateSnapshot saves a workspace's whole disk under a name, and what runs in
// it if the request wants that. What runs goes on.
func (c *Client) CreateSnapshot(ctx context.Context, ref string, req api.SnapshotRequest) (*api.Snapshot, error) {
	return c.m.CreateSnapshot(ctx, ref, req)
}

// Snapshots lists a workspace's snapshots, oldest first.
func (c *Client) Snapshots(ctx context.Context, ref string) ([]api.Snapshot, error) {
	return c.m.Snapshots(ctx, ref)
}

// DeleteSnapshot forgets a snapshot and gives back the room that nothing else
// needs.
func (c *Client) DeleteSnapshot(ctx context.Context, ref, name string) error {
	return c.m.DeleteSnapshot(ctx, ref, name)
}

// Reset rebuilds a workspace from a snapshot, "" for the baseline. Its identity,
// labels, snapshots and the base of its diff stay. If it fails the workspace is
// stopped, with its files as they were. progress may be nil.
func (c *Client) Reset(ctx context.Context, ref, snapshot string, progress func(api.Progress)) (*api.Workspace, error) {
	return c.m.Reset(ctx, ref, snapshot, progress)
}

// DiskList lists a path of a stopped workspace's disk without running anything.
func (c *Client) DiskList(ctx context.Context, ref, path string, recursive bool) (*api.DiskList, error) {
	return c.m.DiskList(ctx, ref, path, recursive)
}

// DiskRead reads a regular file of a stopped workspace's disk.
func (c *Client) DiskRead(ctx context.Context, ref, path string, maxBytes int64) (*api.DiskRead, error) {
	return c.m.DiskRead(ctx, ref, path, maxBytes)
}

// DiskExport writes a stopped workspace's disk as one raw ext4 image, to a path
// at which nothing is yet.
func (c *Client) DiskExport(ctx context.Context, ref, output string) (*api.DiskExport, error) {
	return c.m.DiskExport(ctx, ref, output)
}

// OpenShell starts an interactive session on a terminal in a running workspace.
// It goes on when this process ends, until it is closed, its shell exits, or the
// workspace is stopped or reset.
func (c *Client) OpenShell(ctx context.Context, ref string, req api.OpenShellRequest) (*api.Shell, error) {
	return c.m.OpenShell(ctx, ref, req)
}

// Shells lists a workspace's shells, the oldest first.
func (c *Client) Shells(ctx context.Context, ref string) ([]api.Shell, error) {
	return c.m.Shells(ctx, ref)
}

// ReadShell reads a shell's output from a cursor on. Reading consumes nothing.
func (c *Client) ReadShell(ctx context.Context, ref, id string, req api.ReadShellRequest) (*api.ShellRead, error) {
	return c.m.ReadShell(ctx, ref, id, req)
}

// WriteShell types text into a shell, with a newline behind it if newline says
// so.
func (c *Client) WriteShell(ctx context.Context, ref, id, input string, newline bool) (*api.ShellWrite, error) {
	return c.m.WriteShell(ctx, ref, id, input, newline)
}

// SignalShell sends HUP, INT ("" too), TERM or KILL to what runs in a shell's
// foreground.
func (c *Client) SignalShell(ctx context.Context, ref, id, signal string) (*api.ShellSignal, error) {
	return c.m.SignalShell(ctx, ref, id, signal)
}

// CloseShell ends a shell with everything that runs in it.
func (c *Client) CloseShell(ctx context.Context, ref, id string) (*api.ShellClose, error) {
	return c.m.CloseShell(ctx, ref, id)
}

// AttachShell connects a terminal with a shell until the shell ends, which is
// returned, or ctx does, which leaves it running.
func (c *Client) AttachShell(ctx context.Context, ref, id string, req api.AttachRequest) (*api.Shell, error) {
	return c.m.AttachShell(ctx, ref, id, req)
}

// StartService starts a named long-running command and returns when it is
// ready, or has failed, which is a result: then nothing of it runs.
func (c *Client) StartService(ctx context.Context, ref, name string, req api.StartServiceRequest) (*api.Service, error) {
	return c.m.StartService(ctx, ref, name, req)
}

// Services lists a workspace's services by name, those that have ended included.
func (c *Client) Services(ctx context.Context, ref string) ([]api.Service, error) {
	return c.m.Services(ctx, ref)
}

// Service says how one service is.
func (c *Client) Service(ctx context.Context, ref, name string) (*api.Service, error) {
	return c.m.Service(ctx, ref, name)
}

// StopService ends a service and closes its ports.
func (c *Client) StopService(ctx context.Context, ref, name string) (*api.Service, error) {
	return c.m.StopService(ctx, ref, name)
}

// ServiceLogs returns a service's output: its last tail lines, nil for all that
// is kept.
func (c *Client) ServiceLogs(ctx context.Context, ref, name string, tail *int64) (*api.ServiceLogs, error) {
	return c.m.ServiceLogs(ctx, ref, name, tail)
}

// FollowService writes a service's output as it comes, from the last tail lines
// on, until the service has ended, which is returned.
func (c *Client) FollowService(ctx context.Context, ref, name string, tail *int64, stdout, stderr io.Writer) (*api.Service, error) {
	return c.m.FollowService(ctx, ref, name, tail, stdout, stderr)
}

// Fork makes workspaces that begin with what another one's disk holds, now or in
// a snapshot, and starts them. On an error none of them is left.
func (c *Client) Fork(ctx context.Context, ref string, req api.ForkRequest) (*api.ForkResult, error) {
	return c.m.Fork(ctx, ref, req)
}

// Pause takes the processor away from a running workspace, and with ToDisk its
// memory too: then whatever needs the guest wakes it. One that is paused is a
// success.
func (c *Client) Pause(ctx context.Context, ref string, req api.PauseRequest) (*api.Workspace, error) {
	return c.m.Pause(ctx, ref, req)
}

// Resume lets a paused workspace go on. progress, which may be nil, hears what
// takes time. One that runs is a success.
func (c *Client) Resume(ctx context.Context, ref string, progress func(api.Progress)) (*api.Workspace, error) {
	return c.m.Resume(ctx, ref, progress)
}

// Prepare gets an environment and proves on a workspace that it throws away that
// workspaces work with it here. Later calls are cheap.
func (c *Client) Prepare(ctx context.Context, req api.PrepareRequest) (*api.PrepareResult, error) {
	return c.m.Prepare(ctx, req)
}
