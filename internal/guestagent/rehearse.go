package guestagent

import (
	"fmt"
	"runtime/debug"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// rehearse encodes and decodes what every guest is sent first. The codec of a
// type is made when the type is first used, which under emulation takes longer
// than mounting the disk.
func rehearse() error {
	for _, v := range []any{
		&guestproto.Resume{Envelope: guestproto.Envelope{Action: guestproto.ActionResume}, TimeNS: 1, Entropy: make([]byte, guestproto.MinEntropy), Hostname: "pyro", NewIdentity: true},
		&guestproto.ResumeReply{OK: true},
		&guestproto.Envelope{Action: guestproto.ActionHello},
		&guestproto.Hello{Capabilities: []string{guestproto.CapTTY}},
		&guestproto.ExecRequest{Argv: []string{"true"}, Env: map[string]string{"A": "b"}, TTY: &guestproto.Resize{}},
		&guestproto.ExecReply{TimedOut: true},
		&guestproto.Started{},
	} {
		line, err := guestproto.Encode(v)
		if err == nil {
			err = guestproto.Decode(line[:len(line)-1], v)
		}
		if err != nil {
			return fmt.Errorf("rehearsing a %T: %w", v, err)
		}
	}
	// What is garbage by now needs no place in the saved memory.
	debug.FreeOSMemory()
	return nil
}
