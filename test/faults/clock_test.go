package faults_test

import (
	"context"
	"time"

	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/store"
)

// changeRecord changes a workspace's record behind pyro's back.
func (l *lab) changeRecord(name string, change func(*store.Workspace)) {
	l.Helper()
	d, err := statedir.Open(l.state)
	if err != nil {
		l.Fatal(err)
	}
	ctx := context.Background()
	st, err := store.Open(ctx, d.Database(), store.Options{WorkspacesDir: d.WorkspacesDir()})
	if err != nil {
		l.Fatal(err)
	}
	defer st.Close()
	ws, err := st.Find(ctx, name)
	if err != nil {
		l.Fatal(err)
	}
	if _, err := st.Update(ctx, ws.WorkspaceID, func(ws *store.Workspace) error { change(ws); return nil }); err != nil {
		l.Fatal(err)
	}
}

// shiftExpiry moves a workspace's end by both clocks.
func shiftExpiry(l *lab, name string, seconds int) {
	l.Helper()
	by := time.Duration(seconds) * time.Second
	l.changeRecord(name, func(ws *store.Workspace) {
		at := ws.ExpiresAt.Add(by)
		ws.ExpiresAt = &at
		ws.ExpiresBoot += int64(by)
	})
}
