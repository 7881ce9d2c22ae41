package guestclient

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// AttachShell connects streams with a shell in the guest until the shell ends,
// and returns how. attached, where not nil, is called once when it is connected.
// When ctx ends the caller is detached: the shell goes on, and the error is
// ctx's. What the caller has missed of the output because it was slow is told,
// as text, on Stderr. The end of Stdin detaches nobody. Started is not called.
//
// It always sets req.Action and Stream.
func (c *Client) AttachShell(ctx context.Context, req guestproto.AttachShell, streams ExecIO, attached func(guestproto.ShellAttached)) (guestproto.Shell, error) {
	const doing = "attaching to a shell in the guest"
	req.Action, req.Stream = guestproto.ActionAttachShell, true
	l, err := c.open(ctx, req)
	if err != nil {
		return guestproto.Shell{}, fmt.Errorf("%s: %w", doing, err)
	}
	defer l.close()
	s := &execSession{link: l, frames: newFrames(l), streams: streams, credit: newCredit()}
	senders, stopSenders := context.WithCancel(ctx)
	shell, err := s.receiveShell(req.ShellID, func(a guestproto.ShellAttached) {
		if attached != nil {
			attached(a)
		}
		s.startSenders(senders)
	})
	stopSenders()
	s.credit.close()
	if err != nil {
		if werr := s.sendError(); werr != nil && ctx.Err() == nil {
			err = werr
		}
		return guestproto.Shell{}, fmt.Errorf("%s: %w", doing, l.cause(ctx, err))
	}
	return shell, nil
}

// receiveShell reads frames up to the result.
func (s *execSession) receiveShell(id string, attached func(guestproto.ShellAttached)) (guestproto.Shell, error) {
	var none guestproto.Shell
	typ, p, err := s.frames.next(s.link.patience)
	if err != nil {
		return none, err
	}
	switch typ {
	case guestproto.FrameHeader:
		var a guestproto.ShellAttached
		if err := guestproto.Decode(p, &a, "shell_id", "state", "cursor"); err != nil {
			return none, err
		}
		if err := checkShell(&a.Shell, id); err != nil {
			return none, err
		}
		attached(a)
	case guestproto.FrameError:
		return none, remoteError(p)
	default:
		return none, unexpectedFrame(typ)
	}
	if p, err = s.pass(); err != nil {
		return none, err
	}
	var shell guestproto.Shell
	if err := guestproto.Decode(p, &shell, "shell_id", "state"); err != nil {
		return none, err
	}
	return shell, checkShell(&shell, id)
}

// StreamLogs writes a service's output, from its last tail lines on (nil for all
// that is kept), and returns the service. With follow it goes on until the
// service is over or ctx ends. Either writer may be nil; an error of theirs ends
// it.
func (c *Client) StreamLogs(ctx context.Context, name string, tail *int64, follow bool, stdout, stderr io.Writer) (guestproto.Service, error) {
	const doing = "reading a service's log in the guest"
	var none guestproto.Service
	req := guestproto.LogsService{
		Envelope:    guestproto.Envelope{Action: guestproto.ActionLogsService, Stream: true},
		ServiceName: name, TailLines: tail, Follow: follow,
	}
	l, err := c.open(ctx, req)
	if err != nil {
		return none, fmt.Errorf("%s: %w", doing, err)
	}
	defer l.close()
	service, err := receiveLogs(newFrames(l), name, follow, stdout, stderr)
	if err != nil {
		return none, fmt.Errorf("%s: %w", doing, l.cause(ctx, err))
	}
	return service, nil
}

func receiveLogs(f *frames, name string, follow bool, stdout, stderr io.Writer) (guestproto.Service, error) {
	var none guestproto.Service
	var quiet time.Duration // a service may be silent for ever
	if !follow {
		quiet = f.patience
	}
	for {
		typ, p, err := f.next(quiet)
		if err != nil {
			return none, err
		}
		switch typ {
		case guestproto.FrameStdout:
			err = deliver(stdout, p, "stdout")
		case guestproto.FrameStderr:
			err = deliver(stderr, p, "stderr")
		case guestproto.FrameResult:
			var service guestproto.Service
			if err := guestproto.Decode(p, &service, "service_name", "state"); err != nil {
				return none, err
			}
			return service, checkService(&service, name)
		case guestproto.FrameError:
			err = remoteError(p)
		default:
			err = unexpectedFrame(typ)
		}
		if err != nil {
			return none, err
		}
	}
}
