package guestagent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// resume tells a guest that has run already that time has passed without it.
func (q *request) resume(line []byte) error {
	var req guestproto.Resume
	if err := decodeRequest(line, &req, "time_ns", "entropy"); err != nil {
		return err
	}
	if err := req.Check(); err != nil {
		return err
	}
	s := q.server
	if s.Resume == nil {
		return api.Errorf(api.ErrUnsupported, "this guest agent is an ordinary process and leaves its system alone")
	}
	if err := s.Resume(req); err != nil {
		return api.Errorf(api.ErrUnavailable, "resuming: %w", err)
	}
	if req.NewIdentity {
		if err := s.newBootID(); err != nil {
			return err
		}
	}
	if w := s.Runner.Workload; w != nil && w.CanFreeze() {
		if err := w.Thaw(); err != nil {
			return api.Errorf(api.ErrUnavailable, "resuming: %w", err)
		}
	}
	return q.reply(guestproto.ResumeReply{OK: true})
}

// suspendTimeout bounds how long commands may take to stand still.
const suspendTimeout = 10 * time.Second

// suspend stops every command until resume.
func (q *request) suspend(ctx context.Context) error {
	s := q.server
	if s.Resume == nil || s.Runner.Workload == nil || !s.Runner.Workload.CanFreeze() {
		return api.Errorf(api.ErrUnsupported, "this guest agent cannot stop its commands")
	}
	ctx, cancel := context.WithTimeout(ctx, suspendTimeout)
	defer cancel()
	if err := s.Runner.Workload.Freeze(ctx); err != nil {
		return api.Errorf(api.ErrUnavailable, "suspending: %w", err)
	}
	return q.reply(guestproto.SuspendReply{OK: true})
}

// newBootID draws the id that hello answers with.
func (s *Server) newBootID() error {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return api.Errorf(api.ErrInternal, "drawing a boot id: %w", err)
	}
	id := hex.EncodeToString(b[:])
	s.bootID.Store(&id)
	return nil
}
