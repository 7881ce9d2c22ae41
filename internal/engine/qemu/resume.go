package qemu

import (
	"context"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// awaitGuest returns when the guest on the channel says that it waits.
func awaitGuest(channel net.Conn) error {
	line := make([]byte, len(guestproto.WaitingLine))
	if _, err := io.ReadFull(channel, line); err != nil {
		return fmt.Errorf("waiting for the guest agent: %w", err)
	}
	if string(line) != guestproto.WaitingLine {
		return api.Errorf(api.ErrDamaged, "the guest says %q instead of that it waits", line)
	}
	return nil
}

// resumeGuest tells a guest that waits to go on, as a machine of that name, and
// returns when its root disk is mounted.
func resumeGuest(ctx context.Context, channel net.Conn, hostname string) error {
	stop := context.AfterFunc(ctx, func() { _ = channel.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	req, err := guestclient.NewResume(hostname)
	if err != nil {
		return err
	}
	req.NewIdentity = true
	line, err := guestproto.Encode(req)
	if err != nil {
		return err
	}
	if _, err := channel.Write(line); err != nil {
		return fmt.Errorf("resuming the guest: %w", orCause(ctx, err))
	}
	answer, err := guestproto.ReadResumeLine(channel, api.ErrDamaged)
	if err != nil {
		return fmt.Errorf("resuming the guest: %w", orCause(ctx, err))
	}
	var reply guestproto.ResumeReply
	if err := guestproto.DecodeReply(answer, &reply, "ok"); err != nil {
		return &blamelessError{err} // the guest's own account, of its disk most likely
	}
	return nil
}

// A blamelessError says nothing against the template of a warm start that has
// failed.
type blamelessError struct{ err error }

func (e *blamelessError) Error() string { return e.err.Error() }
func (e *blamelessError) Unwrap() error { return e.err }

// orCause is why ctx has ended, else err.
func orCause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
