package guestconn

import (
	"encoding/binary"
	"io"

	"github.com/pyro-mcp/pyro/api"
)

// A frameGuard ends a session whose incoming bytes cannot be its own. The
// library would take a header's length at its word and wait for gigabytes; so a
// receiver that is out of step, because a new host speaks in the middle of what
// an older one left, would never notice. Header layout: yamux spec.md, "Framing".
type frameGuard struct {
	r      io.Reader
	header [headerLen]byte
	n      int    // bytes of header seen
	body   uint32 // bytes of the frame's data still to come
}

const (
	headerLen    = 12
	typeData     = 0
	typeLargest  = 3
	yamuxVersion = 0
)

func (g *frameGuard) Read(b []byte) (int, error) {
	n, err := g.r.Read(b)
	if bad := g.check(b[:n]); bad != nil {
		return 0, bad
	}
	return n, err
}

func (g *frameGuard) check(b []byte) error {
	for len(b) > 0 {
		if g.body > 0 {
			k := min(uint32(len(b)), g.body)
			g.body -= k
			b = b[k:]
			continue
		}
		k := copy(g.header[g.n:], b)
		g.n += k
		b = b[k:]
		if g.n < headerLen {
			return nil
		}
		g.n = 0
		if g.header[0] != yamuxVersion || g.header[1] > typeLargest {
			return api.Errorf(api.ErrDamaged, "the session's bytes are out of step")
		}
		if g.header[1] == typeData {
			g.body = binary.BigEndian.Uint32(g.header[8:])
			if g.body > muxFrame {
				return api.Errorf(api.ErrDamaged, "a frame of the session announces %d bytes, the limit is %d", g.body, muxFrame)
			}
		}
	}
	return nil
}
