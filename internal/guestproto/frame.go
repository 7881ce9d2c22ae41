package guestproto

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/pyro-mcp/pyro/api"
)

// A FrameType says what a frame's payload is.
type FrameType uint8

// Frames from host to guest.
const (
	FrameStdin      FrameType = 1 // raw bytes, never more than the granted window
	FrameStdinClose FrameType = 2 // empty: end of stdin
	FrameResize     FrameType = 3 // Resize as JSON
	FrameSignal     FrameType = 4 // Signal as JSON
)

// Frames from guest to host.
const (
	FrameStarted     FrameType = 16 // Started as JSON, once, first
	FrameStdout      FrameType = 17 // raw bytes
	FrameStderr      FrameType = 18 // raw bytes
	FrameStdinWindow FrameType = 19 // uint32 big endian: that many more bytes
	FrameResult      FrameType = 20 // the action's reply as JSON, once, last
	FrameError       FrameType = 21 // api.WireError as JSON, once, last
	FrameHeader      FrameType = 22 // the action's header as JSON, before data
)

// Frames in either direction.
const (
	FrameData    FrameType = 32 // raw bytes of an archive
	FrameDataEnd FrameType = 33 // empty: all data was sent
)

// frameHeaderLen is one type byte and a big-endian uint32 payload length.
const frameHeaderLen = 5

// WriteFrame writes one frame in a single Write call. It fails with ErrInvalid
// on a payload above MaxFrame. It does not serialise callers.
func WriteFrame(w io.Writer, t FrameType, payload []byte) error {
	if len(payload) > MaxFrame {
		return api.Errorf(api.ErrInvalid, "frame payload of %d bytes is above the limit of %d", len(payload), MaxFrame)
	}
	buf := make([]byte, frameHeaderLen+len(payload))
	buf[0] = byte(t)
	binary.BigEndian.PutUint32(buf[1:], uint32(len(payload)))
	copy(buf[frameHeaderLen:], payload)
	_, err := w.Write(buf)
	return err
}

// A FrameReader reads frames from one connection. It allocates one buffer of
// MaxFrame bytes and reuses it.
type FrameReader struct {
	r   io.Reader
	hdr [frameHeaderLen]byte
	buf []byte
}

// NewFrameReader returns a reader of r. Give it a buffered r if reads are dear.
func NewFrameReader(r io.Reader) *FrameReader {
	return &FrameReader{r: r}
}

// Next returns the next frame; the payload is valid until the following call.
// It returns io.EOF only between frames and io.ErrUnexpectedEOF inside one. A
// length above MaxFrame is ErrDamaged and nothing of it is read.
func (f *FrameReader) Next() (FrameType, []byte, error) {
	if _, err := io.ReadFull(f.r, f.hdr[:1]); err != nil {
		return 0, nil, err
	}
	if _, err := io.ReadFull(f.r, f.hdr[1:]); err != nil {
		return 0, nil, unexpected(err)
	}
	n := binary.BigEndian.Uint32(f.hdr[1:])
	if n > MaxFrame {
		return 0, nil, fmt.Errorf("frame announces %d bytes, limit %d: %w", n, MaxFrame, api.ErrDamaged)
	}
	if f.buf == nil {
		f.buf = make([]byte, MaxFrame)
	}
	if _, err := io.ReadFull(f.r, f.buf[:n]); err != nil {
		return 0, nil, unexpected(err)
	}
	return FrameType(f.hdr[0]), f.buf[:n], nil
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
