package guestagent

import (
	"crypto/rand"
	"encoding/hex"

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
		return api.Errorf(api.ErrUnsupported, "this guest agent is no virtual machine's and leaves its system's clock alone")
	}
	if err := s.Resume(req); err != nil {
		return api.Errorf(api.ErrUnavailable, "resuming: %w", err)
	}
	if req.NewIdentity {
		if err := s.newBootID(); err != nil {
			return err
		}
	}
	return q.reply(guestproto.ResumeReply{OK: true})
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
