package workspace

import (
	"context"
	"fmt"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
	"github.com/pyro-mcp/pyro/internal/store"
)

// How much of each kind a summary shows.
const (
	summaryCommands = 20
	summaryEvents   = 50
	summaryPaths    = 100
)

// Summary tells what happened in a workspace since its last reset. It does not
// count as activity.
func (m *Manager) Summary(ctx context.Context, ref string) (*api.Summary, error) {
	ws, err := m.find(ctx, ref)
	if err != nil {
		return nil, err
	}
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	s := &api.Summary{
		WorkspaceID: ws.WorkspaceID, Name: ws.Name, State: ws.State, Since: ws.CreatedAt,
		Exports: []api.Event{}, Snapshots: []api.Snapshot{},
		Commands: api.SummaryCommands{Recent: []api.CommandRecord{}}, Edits: api.SummaryEdits{Recent: []api.Event{}},
	}
	if ws.LastResetAt != nil {
		s.Since = *ws.LastResetAt
	}
	commands, err := st.Commands(ctx, ws.WorkspaceID, store.CommandQuery{})
	if err != nil {
		return nil, err
	}
	for _, c := range commands {
		s.Commands.Total++
		if c.State != api.CommandRunning && (c.ExitCode == nil || *c.ExitCode != 0) {
			s.Commands.Failed++
		}
	}
	s.Commands.Recent = append(s.Commands.Recent, commands[max(0, len(commands)-summaryCommands):]...)
	events, err := st.Events(ctx, ws.WorkspaceID, ws.HistoryStart)
	if err != nil {
		return nil, err
	}
	for _, e := range events {
		switch e.Kind {
		case eventSync:
			s.Edits.Syncs++
		case eventPatch:
			s.Edits.Patches++
		case eventWrite:
			s.Edits.Writes++
		case eventExport:
			s.Exports = append(s.Exports, e)
			continue
		default:
			continue
		}
		s.Edits.Recent = append(s.Edits.Recent, e)
	}
	s.Edits.Recent = s.Edits.Recent[max(0, len(s.Edits.Recent)-summaryEvents):]
	if s.Snapshots, err = m.Snapshots(ctx, ws.WorkspaceID); err != nil {
		return nil, err
	}
	if ws.State == api.StateStarted {
		if s.Changes, err = m.changes(ctx, ws); err != nil {
			return nil, err
		}
	}
	s.Outcome = outcome(s)
	return s, nil
}

// changes counts what differs from the seed, without reading any of it.
func (m *Manager) changes(ctx context.Context, ws *store.Workspace) (*api.SummaryChanges, error) {
	base, err := m.diffBase(ctx, ws, "")
	if err != nil {
		return nil, err
	}
	defer base.close()
	sup, client := m.guest(ws)
	var unread []api.SkippedEntry
	changes, err := manifest.Compare(base.manifest(ctx), guestManifest(ctx, client, &unread))
	if err != nil {
		return nil, m.whyBroken(ctx, ws, sup, err)
	}
	c := &api.SummaryChanges{Paths: []string{}}
	for _, change := range changes {
		c.Total++
		switch change.Status {
		case api.ChangeAdded:
			c.Added++
		case api.ChangeModified:
			c.Modified++
		case api.ChangeDeleted:
			c.Deleted++
		case api.ChangeTypeChanged:
			c.TypeChanged++
		}
		if len(c.Paths) < summaryPaths {
			c.Paths = append(c.Paths, validText(change.Path))
		}
	}
	return c, nil
}

// outcome says it in one sentence.
func outcome(s *api.Summary) string {
	var parts []string
	add := func(n int64, one, many string) {
		switch {
		case n == 1:
			parts = append(parts, "1 "+one)
		case n > 1:
			parts = append(parts, fmt.Sprintf("%d %s", n, many))
		}
	}
	add(s.Commands.Total, "command", "commands")
	if s.Commands.Failed > 0 {
		parts[len(parts)-1] += fmt.Sprintf(" (%d failed)", s.Commands.Failed)
	}
	add(s.Edits.Syncs+s.Edits.Patches+s.Edits.Writes, "edit from outside", "edits from outside")
	if s.Changes != nil {
		add(s.Changes.Total, "path differs from the seed", "paths differ from the seed")
	}
	add(int64(len(s.Exports)), "export", "exports")
	if len(parts) == 0 {
		return "nothing happened yet"
	}
	if n := len(s.Commands.Recent); n > 0 {
		last := s.Commands.Recent[n-1]
		switch {
		case last.State == api.CommandRunning:
			parts = append(parts, "the last command is running")
		case last.ExitCode != nil && *last.ExitCode == 0:
			parts = append(parts, "the last command succeeded")
		default:
			parts = append(parts, "the last command failed")
		}
	}
	return strings.Join(parts, ", ")
}
