package guestclient

import (
	"net"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// frames reads the guest's frames. Before a frame's first byte it waits without
// limit (a command may be silent); from then on the frame must be complete
// within patience.
type frames struct {
	conn     net.Conn
	src      *link
	patience time.Duration
	fr       *guestproto.FrameReader
	any      bool // something was read before
	inFrame  bool
	limit    time.Duration // for the first byte; 0 means none
}

func newFrames(l *link) *frames {
	f := &frames{conn: l.conn, src: l, patience: l.patience}
	f.fr = guestproto.NewFrameReader(f)
	return f
}

// next returns the next frame, whose payload is valid until the next call.
// first limits the wait for its first byte; 0 means no limit.
func (f *frames) next(first time.Duration) (guestproto.FrameType, []byte, error) {
	f.inFrame, f.limit = false, first
	if !f.any {
		// Read as a frame, plain JSON would announce an absurd length.
		f.any = true
		if b, err := f.peek(); err == nil && b == '{' {
			if err := f.src.earlyError(); err != nil {
				return 0, nil, err
			}
			return 0, nil, plainPeer()
		}
	}
	return f.fr.Next()
}

// peek waits for the first byte and leaves it there.
func (f *frames) peek() (byte, error) {
	if f.limit > 0 {
		_ = f.conn.SetReadDeadline(time.Now().Add(f.limit))
	}
	b, err := f.src.r.Peek(1)
	if err != nil {
		return 0, err
	}
	f.inFrame = true
	_ = f.conn.SetReadDeadline(time.Now().Add(f.patience))
	return b[0], nil
}

// Read feeds the frame reader.
func (f *frames) Read(b []byte) (int, error) {
	if f.src.r.Buffered() == 0 {
		switch {
		case f.inFrame:
			// The deadline set when the frame began holds.
		case f.limit > 0:
			_ = f.conn.SetReadDeadline(time.Now().Add(f.limit))
		default:
			_ = f.conn.SetReadDeadline(time.Time{})
		}
	}
	n, err := f.src.r.Read(b)
	if n > 0 && !f.inFrame {
		f.inFrame = true
		_ = f.conn.SetReadDeadline(time.Now().Add(f.patience))
	}
	return n, err
}

// remoteError decodes the payload of FrameError.
func remoteError(payload []byte) error {
	var w api.WireError
	if err := guestproto.Decode(payload, &w, "code", "message"); err != nil {
		return err
	}
	return guestproto.ErrorReply{Error: w.Message, Code: w.Code, Hint: w.Hint}.Err()
}

// plainPeer is the error for a peer that answers a streaming request with plain
// JSON, whose first byte is no frame type.
func plainPeer() error {
	return api.WithHint(api.Errorf(api.ErrUnsupported, "the guest agent answers in the plain form: it does not speak the streaming form"),
		"use a pyro-agent of the same release as pyro")
}

func unexpectedFrame(t guestproto.FrameType) error {
	return api.Errorf(api.ErrDamaged, "the guest sent a frame of type %d where none belongs", t)
}
