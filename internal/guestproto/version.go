package guestproto

// Version is the protocol version that this build speaks. It grows by one with
// every change a peer can notice; a peer that needs more than it gets refuses
// with ErrUnsupported and names both numbers.
//
//	1  2026-11-22  plain form, streaming exec and archives, hello, shutdown
//	2  2026-11-22  flush, manifest, list_files, read_file, write_file, sync, export_files
//	3  2026-11-22  shells and services
//	4  2026-11-22  attach_network, dial_tcp, set_secrets
//	5  2026-11-22  user of exec, open_shell and start_service, own_workspace
const Version = 5

// Port is the port on which the guest agent answers.
const Port = 5005

// The limits of the protocol. A side that meets more than these ends the
// connection with an error.
const (
	// MaxLine bounds a request line and a reply header line, newline included.
	MaxLine = 1 << 20
	// MaxHeaderLine bounds the header line in front of raw archive bytes.
	MaxHeaderLine = 64 << 10
	// MaxReply bounds one plain reply. It holds two outputs of MaxPlainOutput
	// in the worst JSON escaping of six bytes for one.
	MaxReply = 16 << 20
	// MaxPlainOutput bounds stdout and stderr each in a plain exec reply; what
	// is beyond it is cut and reported by the *_truncated fields.
	MaxPlainOutput = 1 << 20
	// MaxFrame bounds the payload of one frame.
	MaxFrame = 64 << 10
	// StdinWindow is how many bytes of stdin a host may send before the guest
	// has granted more with FrameStdinWindow. It exists so that a command that
	// never reads its stdin cannot keep the agent from reading signals.
	StdinWindow = 256 << 10
)

// Capabilities that hello may list.
const (
	CapExecStream    = "exec-stream"
	CapArchiveStream = "archive-stream"
	CapShutdown      = "shutdown"
	CapTTY           = "tty"
	CapShells        = "shells"
	CapServices      = "services"
	CapFiles         = "files"
	CapSync          = "sync"
)
