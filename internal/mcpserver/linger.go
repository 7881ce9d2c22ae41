package mcpserver

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// lingerTime is how long calls under way may take to be answered when the input
// ends: enough for a script that pipes its requests in, and little enough that
// nothing outlives a client that is gone.
const lingerTime = time.Second

// A lingering transport tells of the end of its input when every call has been
// answered, or when lingerTime is over.
type lingering struct{ mcp.Transport }

func (t lingering) Connect(ctx context.Context) (mcp.Connection, error) {
	c, err := t.Transport.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return &lingeringConn{Connection: c, answered: make(chan struct{}, 1)}, nil
}

type lingeringConn struct {
	mcp.Connection

	mu       sync.Mutex
	pending  int
	answered chan struct{} // is sent to when pending may have become 0
}

func (c *lingeringConn) Read(ctx context.Context) (jsonrpc.Message, error) {
	m, err := c.Connection.Read(ctx)
	if r, ok := m.(*jsonrpc.Request); ok && r.IsCall() {
		c.mu.Lock()
		c.pending++
		c.mu.Unlock()
	}
	if errors.Is(err, io.EOF) {
		over := time.NewTimer(lingerTime)
		defer over.Stop()
		for c.isPending() {
			select {
			case <-c.answered:
				continue
			case <-ctx.Done():
			case <-over.C:
			}
			break
		}
	}
	return m, err
}

func (c *lingeringConn) isPending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pending > 0
}

func (c *lingeringConn) Write(ctx context.Context, m jsonrpc.Message) error {
	err := c.Connection.Write(ctx, m)
	if _, ok := m.(*jsonrpc.Response); ok {
		c.mu.Lock()
		c.pending--
		c.mu.Unlock()
		select {
		case c.answered <- struct{}{}:
		default:
		}
	}
	return err
}
