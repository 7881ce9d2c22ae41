package workspace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/supervisor"
)

// guest returns the way to the guest of a workspace that runs.
func (m *Manager) guest(ws *store.Workspace) (*supervisor.Client, *guestclient.Client) {
	s := supervisor.NewClient(m.state.Machine(ws.WorkspaceID))
	return s, guestclient.New(s.DialGuest, guestclient.Options{Patience: patience(ws.TimeScale)})
}

// inGuest runs a request on the guest of a running workspace, and explains what
// broke it.
func inGuest[T any](ctx context.Context, m *Manager, ref string, do func(ws *store.Workspace, c *guestclient.Client) (T, error)) (T, error) {
	var none T
	ws, err := m.running(ctx, ref)
	if err != nil {
		return none, err
	}
	sup, client := m.guest(ws)
	out, err := do(ws, client)
	if err != nil {
		return none, m.whyBroken(ctx, ws, sup, err)
	}
	return out, nil
}

// active records that somebody is using the workspace.
func (m *Manager) active(ctx context.Context, ws *store.Workspace) error {
	st, err := m.store(ctx)
	if err != nil {
		return err
	}
	return st.Touch(ctx, ws.WorkspaceID, time.Now().UTC())
}

// Exec runs one command in a started workspace and records it in the journal. A
// command that fails or times out is a result.
func (m *Manager) Exec(ctx context.Context, ref string, req api.ExecRequest) (*api.ExecResult, error) {
	if err := fillExec(&req); err != nil {
		return nil, err
	}
	ws, err := m.running(ctx, ref)
	if err != nil {
		return nil, err
	}
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	user, err := userOf(ws, req.User)
	if err != nil {
		return nil, err
	}
	env, set, err := m.environ(ws, req.Env, req.SecretEnv)
	if err != nil {
		return nil, err
	}
	self, err := hostproc.Identify(os.Getpid())
	if err != nil {
		return nil, err
	}
	began := time.Now().UTC()
	sequence, err := st.BeginCommand(ctx, ws.WorkspaceID, api.CommandRecord{
		Command: set.String(commandText(req.Argv)), Cwd: req.Cwd, StartedAt: began,
	}, self)
	if err != nil {
		return nil, fmt.Errorf("writing the journal: %w", err)
	}
	if req.Started != nil {
		req.Started(sequence)
	}
	failpoint.Hit("exec/recorded")
	dir := m.state.Workspace(ws.WorkspaceID)
	c := command{argv: req.Argv, env: env, redact: set, user: user, cwd: req.Cwd, timeout: max(req.Timeout, 0), stdin: req.Stdin, tty: req.TTY, resize: req.Resize,
		stdout: recorder{to: req.Stdout, file: newJournalFile(dir, sequence, streamStdout)},
		stderr: recorder{to: req.Stderr, file: newJournalFile(dir, sequence, streamStderr)}}
	sup, client := m.guest(ws)
	res, err := c.run(ctx, client)
	failpoint.Hit("exec/ran")
	if recordErr := m.record(ctx, ws.WorkspaceID, sequence, &c, res); recordErr != nil {
		m.log.Error("writing the journal", "workspace", ws.WorkspaceID, "sequence", sequence, "error", recordErr)
	}
	if err != nil {
		return nil, set.Error(m.whyBroken(ctx, ws, sup, err))
	}
	res.Command = set.String(res.Command)
	res.WorkspaceID, res.Sequence = ws.WorkspaceID, sequence
	res.Engine, res.Isolation, res.ExecutionMode = ws.Engine, ws.Isolation, ws.ExecutionMode
	return res, nil
}

func fillExec(r *api.ExecRequest) error {
	if len(r.Argv) == 0 || r.Argv[0] == "" {
		return api.WithHint(api.Errorf(api.ErrInvalid, "no command was given"), "put the command after --, as in: pyro workspace exec ID -- make test")
	}
	r.Cwd = inWorkspace(r.Cwd)
	if r.Timeout == 0 {
		r.Timeout = api.DefaultTimeout
	}
	if r.TTY != nil && (r.TTY.Cols == 0 || r.TTY.Rows == 0) {
		return api.Errorf(api.ErrInvalid, "a terminal of %d columns and %d rows", r.TTY.Cols, r.TTY.Rows)
	}
	return nil
}

// record closes a command's entry in the journal; a nil result is a command
// whose end nobody saw.
func (m *Manager) record(ctx context.Context, id string, sequence int64, c *command, res *api.ExecResult) error {
	fileErr := errors.Join(c.stdout.finish(), c.stderr.finish())
	st, err := m.store(ctx)
	if err != nil {
		return err
	}
	end := store.CommandResult{
		State: api.CommandInterrupted, EndedAt: time.Now().UTC(),
		StdoutBytes: c.stdout.n, StderrBytes: c.stderr.n,
		StdoutTruncated: c.stdout.truncated(), StderrTruncated: c.stderr.truncated(),
	}
	if res != nil {
		end.State, end.DurationMS, end.ExitCode, end.TimedOut = api.CommandExited, res.DurationMS, &res.ExitCode, res.TimedOut
		if res.TimedOut {
			end.State = api.CommandTimedOut
		}
	}
	err = st.FinishCommand(context.WithoutCancel(ctx), id, sequence, end)
	if errors.Is(err, api.ErrNotFound) {
		err = nil // deleted or reset while the command ran
	}
	return errors.Join(fileErr, err)
}

// endLimit is how long whoever's connection broke waits for the supervisor to
// write down why: until a guest that is asked to power off has done so.
const endLimit = 20 * time.Second

// whyBroken finds out why a request to the guest failed: most often the machine
// has ended, and its supervisor and its console know more than the connection.
func (m *Manager) whyBroken(ctx context.Context, ws *store.Workspace, sup *supervisor.Client, err error) error {
	if ctx.Err() != nil || !errors.Is(err, api.ErrUnavailable) {
		return err
	}
	dir := m.state.Machine(ws.WorkspaceID)
	if reason, _ := sup.Postmortem(ctx); reason == "" {
		if _, askErr := sup.Status(ctx); askErr == nil {
			return err // the machine runs; the connection broke for another reason
		}
		// Its supervisor answers nobody any more: it is ending, or gone.
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
	defer cancel()
	if goneErr := supervisor.WaitGone(end, dir); goneErr != nil && !errors.Is(goneErr, os.ErrNotExist) {
		return err
	}
	ending, readErr := supervisor.ReadEnding(dir)
	if readErr == nil && ending.Expired {
		return api.WithHint(api.Errorf(api.ErrUnavailable, "workspace %s has ended: %s", label(ws), ending.Reason), "raise --ttl-seconds, or use pyro workspace update")
	}
	st, storeErr := m.store(ctx)
	if storeErr != nil {
		return err
	}
	now, getErr := st.Get(ctx, ws.WorkspaceID)
	if errors.Is(getErr, api.ErrNotFound) || getErr == nil && now.Intent == intentDelete {
		return api.Errorf(api.ErrState, "workspace %s was deleted meanwhile", label(ws))
	}
	if ending != nil && ending.Frozen != "" {
		return api.WithHint(api.Errorf(api.ErrUnavailable, "workspace %s was paused to disk meanwhile", label(ws)), "try again: that wakes it")
	}
	text := fmt.Sprintf("workspace %s stopped meanwhile", label(ws))
	if how := howEnded(dir); how != "" {
		text += ": " + how
	}
	return api.WithHint(api.Errorf(api.ErrUnavailable, "%s", text), "pyro workspace start %s; its files are kept", refOf(ws))
}

// maxLogEntries bounds one answer of Logs.
const maxLogEntries = 1000

// Logs returns a workspace's journal, oldest first, with the outputs as far as
// they are kept.
func (m *Manager) Logs(ctx context.Context, ref string, q api.LogsQuery) (*api.WorkspaceLogs, error) {
	ws, err := m.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	if err := m.interruptCommands(ctx, ws.WorkspaceID); err != nil {
		return nil, err
	}
	query := store.CommandQuery{Sequence: q.Sequence, Limit: maxLogEntries, NewestFirst: true}
	if q.Tail > 0 {
		query.Limit = int(min(q.Tail, maxLogEntries))
	}
	records, err := st.Commands(ctx, ws.WorkspaceID, query)
	if err != nil {
		return nil, err
	}
	if q.Sequence != 0 && len(records) == 0 {
		return nil, api.Errorf(api.ErrNotFound, "workspace %s has no command %d", label(ws), q.Sequence)
	}
	logs := &api.WorkspaceLogs{WorkspaceID: ws.WorkspaceID, Entries: []api.CommandRecord{}}
	dir := m.state.Workspace(ws.WorkspaceID)
	for i := len(records) - 1; i >= 0; i-- {
		r := records[i]
		if err := readOutputs(dir, &r); err != nil {
			return nil, err
		}
		logs.Entries = append(logs.Entries, r)
	}
	logs.Count = int64(len(logs.Entries))
	return logs, nil
}

func readOutputs(dir statedir.Workspace, r *api.CommandRecord) (err error) {
	if r.Stdout, err = readJournal(dir, r.Sequence, streamStdout); err != nil {
		return err
	}
	r.Stderr, err = readJournal(dir, r.Sequence, streamStderr)
	return err
}
