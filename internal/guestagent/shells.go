package guestagent

import (
	"context"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestagent/ring"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// shells are the agent's shells by their ids.
type shells struct {
	budget *ring.Budget

	mu     sync.Mutex
	all    map[string]*shell
	closed bool
}

// open starts a shell and adds it. It makes room by forgetting the shell that
// ended first.
func (ss *shells) open(s *Server, req *guestproto.OpenShell) (*shell, error) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	switch {
	case ss.closed:
		return nil, api.Errorf(api.ErrState, "the guest is shutting down")
	case ss.all[req.ShellID] != nil:
		return nil, api.Errorf(api.ErrExists, "there is a shell %q already", req.ShellID)
	}
	if len(ss.all) >= guestproto.MaxShells {
		var oldest *shell
		for _, sh := range ss.all {
			if sh.running() != nil && (oldest == nil || sh.ended.Before(*oldest.ended)) {
				oldest = sh
			}
		}
		if oldest == nil {
			return nil, api.WithHint(api.Errorf(api.ErrExhausted, "%d shells are open, and there may be no more", len(ss.all)), "close one")
		}
		delete(ss.all, oldest.id)
		_ = oldest.out.Close()
	}
	sh, err := s.startShell(req, ss.budget)
	if err != nil {
		return nil, err
	}
	if ss.all == nil {
		ss.all = map[string]*shell{}
	}
	ss.all[sh.id] = sh
	return sh, nil
}

func (ss *shells) find(id string) (*shell, error) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if sh := ss.all[id]; sh != nil {
		return sh, nil
	}
	return nil, api.Errorf(api.ErrNotFound, "no shell %q is open", id)
}

func (ss *shells) list() []*shell {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	var out []*shell
	for _, sh := range ss.all {
		out = append(out, sh)
	}
	slices.SortFunc(out, func(a, b *shell) int { return a.started.Compare(b.started) })
	return out
}

// forget drops a shell that has ended.
func (ss *shells) forget(sh *shell) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.all[sh.id] == sh {
		delete(ss.all, sh.id)
	}
	_ = sh.out.Close()
}

// end ends all shells and lets none begin. It returns when they have ended.
func (ss *shells) end() {
	ss.mu.Lock()
	ss.closed = true
	ss.mu.Unlock()
	all := ss.list()
	for _, sh := range all {
		sh.close()
	}
	for _, sh := range all {
		<-sh.done
	}
}

func (q *request) openShell(line []byte) error {
	var req guestproto.OpenShell
	if err := decodeRequest(line, &req, "shell_id"); err != nil {
		return err
	}
	if err := guestproto.CheckWorkloadName(req.ShellID); err != nil {
		return err
	}
	sh, err := q.server.shells.open(q.server, &req)
	if err != nil {
		return err
	}
	return q.reply(sh.message())
}

// namedShell decodes a request and finds its shell.
func (q *request) namedShell(line []byte, req any, id *string, required ...string) (*shell, error) {
	if err := decodeRequest(line, req, append(required, "shell_id")...); err != nil {
		return nil, err
	}
	return q.server.shells.find(*id)
}

func (q *request) readShell(ctx context.Context, line []byte) error {
	var req guestproto.ReadShell
	sh, err := q.namedShell(line, &req, &req.ShellID)
	if err != nil {
		return err
	}
	_, end, _ := sh.out.Bounds()
	if req.MaxChars == 0 {
		req.MaxChars = guestproto.DefaultShellChars
	}
	longest := guestproto.MaxShellWait.Milliseconds()
	switch {
	case req.Cursor < 0 || req.Cursor > end:
		return api.Errorf(api.ErrInvalid, "the cursor %d is not between 0 and %d, which is all that shell %q has written", req.Cursor, end, sh.id)
	case req.MaxChars < 0 || req.MaxChars > guestproto.MaxShellChars:
		return api.Errorf(api.ErrInvalid, "max_chars is %d, not between 1 and %d", req.MaxChars, guestproto.MaxShellChars)
	case req.WaitMS < 0 || req.WaitMS > longest:
		return api.Errorf(api.ErrInvalid, "wait_ms is %d, not between 0 and %d", req.WaitMS, longest)
	case req.WaitForIdleMS < 0 || req.WaitForIdleMS > longest:
		return api.Errorf(api.ErrInvalid, "wait_for_idle_ms is %d, not between 0 and %d", req.WaitForIdleMS, longest)
	}
	ctx, unheed := q.heed(ctx)
	p := sh.read(ctx, &req)
	hungUp := ctx.Err() != nil
	unheed()
	if hungUp {
		return q.sent(errGone)
	}
	_, end, _ = sh.out.Bounds()
	return q.reply(guestproto.ReadShellReply{
		Shell: sh.message(), Cursor: p.at, NextCursor: p.next, Output: p.text,
		MissedBytes: p.missed, Truncated: p.missed > 0 || p.chars >= req.MaxChars && p.next < end,
	})
}

// heed returns a context that ends when the caller hangs up, and what ends its
// watch before the answer.
func (q *request) heed(ctx context.Context) (context.Context, func()) {
	if q.stream {
		return q.heedHangUp(ctx)
	}
	ctx, cancel := context.WithCancel(ctx)
	watch := q.watchCaller(ctx, cancel)
	return ctx, func() {
		cancel()
		_ = q.conn.SetReadDeadline(time.Unix(1, 0))
		<-watch
	}
}

func (q *request) writeShell(line []byte) error {
	var req guestproto.WriteShell
	sh, err := q.namedShell(line, &req, &req.ShellID, "input")
	if err != nil {
		return err
	}
	text := req.Input
	if req.AppendNewline {
		text += "\n"
	}
	if err := sh.write([]byte(text), nil); err != nil {
		return err
	}
	return q.reply(guestproto.WriteShellReply{Shell: sh.message(), InputLength: int64(len(req.Input)), AppendNewline: req.AppendNewline})
}

func (q *request) signalShell(line []byte) error {
	var req guestproto.SignalShell
	sh, err := q.namedShell(line, &req, &req.ShellID, "signal")
	if err != nil {
		return err
	}
	sig, ok := signals[req.Signal]
	if !ok {
		return api.Errorf(api.ErrInvalid, "the signal %q is none of HUP, INT, TERM, KILL", req.Signal)
	}
	if err := sh.running(); err != nil {
		return err
	}
	sh.signal(sig)
	return q.reply(guestproto.SignalShellReply{Shell: sh.message(), Signal: req.Signal})
}

func (q *request) resizeShell(line []byte) error {
	var req guestproto.ResizeShell
	sh, err := q.namedShell(line, &req, &req.ShellID, "cols", "rows")
	if err != nil {
		return err
	}
	if req.Cols == 0 || req.Rows == 0 {
		return api.Errorf(api.ErrInvalid, "a terminal of %d columns and %d rows has no room", req.Cols, req.Rows)
	}
	if err := sh.running(); err != nil {
		return err
	}
	sh.resize(guestproto.Resize{Cols: req.Cols, Rows: req.Rows})
	return q.reply(sh.message())
}

func (q *request) listShells() error {
	reply := guestproto.ListShells{Shells: []guestproto.Shell{}}
	for _, sh := range q.server.shells.list() {
		reply.Shells = append(reply.Shells, sh.message())
	}
	return q.reply(reply)
}

// closeShell ends a shell and forgets it. A caller that hangs up does not keep
// it open.
func (q *request) closeShell(line []byte) error {
	var req guestproto.CloseShell
	sh, err := q.namedShell(line, &req, &req.ShellID)
	if err != nil {
		return err
	}
	sh.close()
	<-sh.done // its own limits bound this
	q.server.shells.forget(sh)
	return q.reply(guestproto.CloseShellReply{Shell: sh.message(), Closed: true})
}

// guestPath is a path on this system's disk as the guest protocol names it.
func (s *Server) guestPath(path string) string {
	rel, err := filepath.Rel(s.Root, path)
	if err != nil {
		return path
	}
	return filepath.Join("/", rel)
}
