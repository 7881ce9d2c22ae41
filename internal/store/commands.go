package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// commandRunning is the state of a command that nobody has seen end.
const commandRunning = "running"

// CommandResult is how a command ended.
type CommandResult struct {
	State                            string // not running
	EndedAt                          time.Time
	ExitCode                         *int
	TimedOut                         bool
	DurationMS                       int64
	StdoutBytes, StderrBytes         int64
	StdoutTruncated, StderrTruncated bool
}

// RunningCommand is a command that nobody has seen end, and the process that
// should see it.
type RunningCommand struct {
	api.CommandRecord
	Owner hostproc.Identity
}

// CommandQuery chooses commands of a workspace's journal. The zero value means
// all, oldest first.
type CommandQuery struct {
	After       int64 // only those with a higher sequence number
	Sequence    int64 // only this one, unless 0
	Limit       int   // at most that many, unless 0
	NewestFirst bool
}

// BeginCommand adds a running command to the journal of the workspace with that
// id, counts it, and notes the activity at its StartedAt. It returns the
// command's sequence number: from 1 on, and never used twice in one workspace,
// also not after ClearCommands. The record's own number and output are ignored.
//
// A loss of the host's power may take the last commands out of the journal; a
// file that is named by a sequence number may therefore exist already.
func (s *Store) BeginCommand(ctx context.Context, id string, c api.CommandRecord, owner hostproc.Identity) (int64, error) {
	ownerJSON, err := json.Marshal(owner)
	if err != nil {
		return 0, err
	}
	c.WorkspaceID, c.State, c.Stdout, c.Stderr = id, commandRunning, "", ""
	err = s.write(ctx, quick, func(tx *sql.Tx) error {
		err := tx.QueryRowContext(ctx, `UPDATE workspaces SET last_command = last_command + 1, command_count = command_count + 1,
			last_activity_at = max(last_activity_at, ?) WHERE id = ? RETURNING last_command`, nanos(c.StartedAt), id).Scan(&c.Sequence)
		if errors.Is(err, sql.ErrNoRows) {
			return notFound(id)
		}
		if err != nil {
			return err
		}
		record, err := json.Marshal(c)
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, "INSERT INTO commands (workspace, sequence, state, owner, record) VALUES (?, ?, ?, ?, ?)",
			id, c.Sequence, c.State, string(ownerJSON), string(record))
		return err
	})
	if err != nil {
		return 0, err
	}
	return c.Sequence, nil
}

// FinishCommand says how a running command ended, and notes the activity. A
// command that has ended already keeps its first result and is api.ErrState;
// one that was cleared is api.ErrNotFound.
func (s *Store) FinishCommand(ctx context.Context, id string, sequence int64, r CommandResult) error {
	if r.State == "" || r.State == commandRunning {
		return api.Errorf(api.ErrInternal, "a command cannot end in state %q", r.State)
	}
	return s.write(ctx, quick, func(tx *sql.Tx) error {
		missing := fmt.Errorf("command %d of workspace %s: %w", sequence, id, api.ErrNotFound)
		var record string
		err := tx.QueryRowContext(ctx, "SELECT record FROM commands WHERE workspace = ? AND sequence = ?", id, sequence).Scan(&record)
		if errors.Is(err, sql.ErrNoRows) {
			return missing
		}
		if err != nil {
			return err
		}
		c, err := decodeCommand(record)
		if err != nil {
			return err
		}
		if c.State != commandRunning {
			return api.Errorf(api.ErrState, "command %d of workspace %s has ended already (%s)", sequence, id, c.State)
		}
		c.State, c.ExitCode, c.TimedOut, c.DurationMS = r.State, r.ExitCode, r.TimedOut, r.DurationMS
		c.StdoutBytes, c.StderrBytes = r.StdoutBytes, r.StderrBytes
		c.StdoutTruncated, c.StderrTruncated = r.StdoutTruncated, r.StderrTruncated
		c.EndedAt = &r.EndedAt
		b, err := json.Marshal(c)
		if err != nil {
			return err
		}
		if err := exec1(ctx, tx, missing, "UPDATE commands SET state = ?, record = ? WHERE workspace = ? AND sequence = ?",
			c.State, string(b), id, sequence); err != nil {
			return err
		}
		return touch(ctx, tx, id, r.EndedAt)
	})
}

func decodeCommand(record string) (api.CommandRecord, error) {
	var c api.CommandRecord
	if err := json.Unmarshal([]byte(record), &c); err != nil {
		return c, api.WithHint(api.Errorf(api.ErrDamaged, "reading the record of a command: %v", err), repairHint)
	}
	return c, nil
}

// Commands returns what q chooses of a workspace's journal, without output. A
// workspace that does not exist has none.
func (s *Store) Commands(ctx context.Context, id string, q CommandQuery) ([]api.CommandRecord, error) {
	order, limit := "ASC", q.Limit
	if q.NewestFirst {
		order = "DESC"
	}
	if limit <= 0 {
		limit = -1
	}
	var out []api.CommandRecord
	err := s.read(ctx, func(tx *sql.Tx) error {
		return collect(ctx, tx, func(rows *sql.Rows) error {
			var record string
			if err := rows.Scan(&record); err != nil {
				return err
			}
			c, err := decodeCommand(record)
			out = append(out, c)
			return err
		}, `SELECT record FROM commands WHERE workspace = ?1 AND sequence > ?2 AND (?3 = 0 OR sequence = ?3)
			ORDER BY sequence `+order+` LIMIT ?4`, id, q.After, q.Sequence, limit)
	})
	return out, err
}

// RunningCommands returns the commands of a workspace, or of all for id "", that
// nobody has seen end.
func (s *Store) RunningCommands(ctx context.Context, id string) ([]RunningCommand, error) {
	var out []RunningCommand
	err := s.read(ctx, func(tx *sql.Tx) error {
		return collect(ctx, tx, func(rows *sql.Rows) error {
			var record, owner string
			if err := rows.Scan(&record, &owner); err != nil {
				return err
			}
			c, err := decodeCommand(record)
			if err != nil {
				return err
			}
			r := RunningCommand{CommandRecord: c}
			if err := json.Unmarshal([]byte(owner), &r.Owner); err != nil {
				return api.WithHint(api.Errorf(api.ErrDamaged, "reading the owner of a command: %v", err), repairHint)
			}
			out = append(out, r)
			return nil
		}, "SELECT record, owner FROM commands WHERE state = 'running' AND (?1 = '' OR workspace = ?1) ORDER BY workspace, sequence", id)
	})
	return out, err
}

// ClearCommands empties a workspace's journal. Sequence numbers go on, and the
// count of commands is the caller's to change.
func (s *Store) ClearCommands(ctx context.Context, id string) error {
	return s.write(ctx, durable, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM commands WHERE workspace = ?", id)
		return err
	})
}
