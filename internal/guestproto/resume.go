package guestproto

import (
	"bytes"
	"io"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// ActionResume tells a guest that time has passed without it, and that it may
// not be the only one with this memory. It is the one request that an agent also
// takes before its root disk is mounted, see [WaitingLine].
const ActionResume = "resume"

// ActionSuspend asks a virtual machine's agent to stop every command where it
// stands, so that none runs between a copy's begin and its Resume; a sandbox has
// what it needs to be another from its host. It takes no
// parameters; SuspendReply comes when all stand still. Only ActionResume lets
// them go on.
const ActionSuspend = "suspend"

// SuspendReply answers ActionSuspend.
type SuspendReply struct {
	OK bool `json:"ok"`
}

// WaitingLine is what the guest agent writes to the virtio port, newline
// included, when it was started with WaitWord on the kernel's command line: the
// kernel is up, the root disk has not been touched, and nothing goes on until
// the host has written one line with a Resume. The agent answers it with one
// line, ResumeReply or ErrorReply, when it has done as told and mounted the root
// disk; after that line the port carries multiplexed sessions.
const WaitingLine = "pyro-agent waits for its host\n"

// WaitWord is the word of the kernel's command line that makes the agent wait.
const WaitWord = "pyro.wait=host"

const (
	// MaxResumeLine bounds the line of a Resume and its answer.
	MaxResumeLine = 8 << 10
	// MinEntropy and MaxEntropy bound the randomness in a Resume, in bytes. The
	// kernel's generator has a state of 32 (drivers/char/random.c).
	MinEntropy = 32
	MaxEntropy = 512
	// maxHostname is the longest name that the kernel takes less one,
	// __NEW_UTS_LEN.
	maxHostname = 63
)

// ReadResumeLine reads the one line of a Resume, or that of its answer, without
// its end. Neither side says more before the other has spoken: what follows the
// line, or a line longer than MaxResumeLine, is an error of class.
func ReadResumeLine(r io.Reader, class error) ([]byte, error) {
	buf := make([]byte, 0, MaxResumeLine)
	for {
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if i := bytes.IndexByte(buf, '\n'); i >= 0 {
			if i != len(buf)-1 {
				return nil, api.Errorf(class, "%d bytes follow the line", len(buf)-1-i)
			}
			return buf[:i], nil
		}
		if err != nil {
			return nil, err
		}
		if len(buf) == cap(buf) {
			return nil, api.Errorf(class, "the line is longer than %d bytes", MaxResumeLine)
		}
	}
}

// Resume is what a guest has to be told after its memory has been copied or has
// stood still. Before anything else runs, the agent sets the clock, mixes the
// entropy into the kernel's generator and makes that draw a new key. Commands
// that ActionSuspend has stopped go on at the end.
type Resume struct {
	Envelope
	// TimeNS is the host's clock, in nanoseconds since 1970.
	TimeNS int64 `json:"time_ns"`
	// Entropy is random and was sent to no other guest.
	Entropy []byte `json:"entropy"`
	// Hostname is the machine's name; "" leaves the one it has.
	Hostname string `json:"hostname,omitzero"`
	// NewIdentity says that this memory was copied: the agent makes a new boot
	// id, a new machine id where that lives in memory, and answers hello with a
	// new boot_id.
	NewIdentity bool `json:"new_identity,omitzero"`
}

// Check refuses what no host has reason to send.
func (r *Resume) Check() error {
	if r.TimeNS <= 0 {
		return api.Errorf(api.ErrInvalid, "%d ns since 1970 is no time", r.TimeNS)
	}
	if n := len(r.Entropy); n < MinEntropy || n > MaxEntropy {
		return api.Errorf(api.ErrInvalid, "%d bytes of entropy are not between %d and %d", n, MinEntropy, MaxEntropy)
	}
	if len(r.Hostname) > maxHostname || strings.ContainsAny(r.Hostname, "/ \t\r\n\x00") {
		return api.Errorf(api.ErrInvalid, "%q is no host name", r.Hostname)
	}
	return nil
}

// ResumeReply answers Resume.
type ResumeReply struct {
	OK bool `json:"ok"`
}
