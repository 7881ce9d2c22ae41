package gvisor

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// askShutdown asks the guest agent for a clean end and returns when it has
// agreed to it.
func askShutdown(ctx context.Context, dial func(context.Context) (net.Conn, error), grace time.Duration) error {
	conn, err := dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	line, err := json.Marshal(guestproto.Shutdown{
		Envelope: guestproto.Envelope{Action: guestproto.ActionShutdown},
		GraceMS:  grace.Milliseconds(),
	})
	if err != nil {
		return err
	}
	if _, err := conn.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("asking the guest agent to shut down: %w", err)
	}
	var reply struct {
		guestproto.ShutdownReply
		guestproto.ErrorReply
	}
	if err := json.NewDecoder(io.LimitReader(conn, guestproto.MaxHeaderLine)).Decode(&reply); err != nil {
		return fmt.Errorf("asking the guest agent to shut down: %w", err)
	}
	if !reply.OK {
		return fmt.Errorf("asking the guest agent to shut down: %w", reply.Err())
	}
	return nil
}
