package guestconn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// maxHandshake bounds one line of the hybrid handshake, newline included. The
// longest honest one is "CONNECT 4294967295\n".
const maxHandshake = 64

// handshakeTimeout is how long a client of ours may take for its CONNECT line.
const handshakeTimeout = 10 * time.Second

// DialHybrid connects to the Unix socket at path and asks for the guest's port
// with the hybrid vsock handshake that Firecracker and Cloud Hypervisor speak
// (Firecracker, docs/vsock.md, "Host-initiated connections"). It returns once
// the other side has said OK, with not a byte read past that line.
//
// Nobody listening on path is [ErrNobody]; a side that hangs up or answers
// anything but OK is [ErrRefused].
func DialHybrid(ctx context.Context, path string, port uint32) (net.Conn, error) {
	c, err := DialUnix(ctx, path)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	err = handshake(c, port)
	if !stop() && err == nil {
		// The deadline is or will be in the past: the connection is spoilt.
		err = ctx.Err()
	}
	if err != nil {
		_ = c.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("connecting to guest port %d through %s: %w", port, path, err)
	}
	return c, nil
}

func handshake(c net.Conn, port uint32) error {
	if _, err := fmt.Fprintf(c, "CONNECT %d\n", port); err != nil {
		return fmt.Errorf("%w (%w)", ErrRefused, rootCause(err))
	}
	line, err := readLine(c, maxHandshake)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w (hung up without an answer)", ErrRefused)
	}
	if err != nil {
		return fmt.Errorf("%w (%w)", ErrRefused, rootCause(err))
	}
	number, ok := strings.CutPrefix(line, "OK ")
	if !ok {
		return fmt.Errorf("%w (answered %q)", ErrRefused, line)
	}
	if _, err := strconv.ParseUint(strings.TrimSpace(number), 10, 32); err != nil {
		return fmt.Errorf("%w (answered %q)", ErrRefused, line)
	}
	return nil
}

// readLine reads up to and including a newline one byte at a time, so that
// what follows stays in r. It returns the line without the newline.
func readLine(r io.Reader, limit int) (string, error) {
	line := make([]byte, 0, limit)
	var b [1]byte
	for len(line) < limit {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
	return "", api.Errorf(api.ErrDamaged, "a line of the handshake is longer than %d bytes", limit)
}

// A HybridRequest is one connection on which a client asked for a port. Its
// handler calls Accept once or closes Conn.
type HybridRequest struct {
	Conn net.Conn
	Port uint32

	number uint32
}

// Accept says OK to the client. After it, Conn carries the guest's bytes.
func (r *HybridRequest) Accept() error {
	_, err := fmt.Fprintf(r.Conn, "OK %d\n", r.number)
	return err
}

// HandleHybrid accepts connections on l, reads each one's CONNECT line and
// gives it to handle in a goroutine of its own; handle owns the connection. It
// returns when ctx ends or l fails, after it has closed l and all handlers have
// returned; the ctx of the handlers ends with it.
func HandleHybrid(ctx context.Context, l net.Listener, handle func(context.Context, *HybridRequest), logger *slog.Logger) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var count atomic.Uint32
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if temporary(err) {
				logger.Warn("accepting a connection to the guest", "err", err)
				select {
				case <-time.After(50 * time.Millisecond):
					continue
				case <-ctx.Done():
					return nil
				}
			}
			_ = l.Close()
			return fmt.Errorf("accepting connections to the guest: %w", err)
		}
		wg.Go(func() {
			port, err := readConnect(ctx, c)
			if err != nil {
				logger.Debug("handshake for the guest", "err", err)
				_ = c.Close()
				return
			}
			handle(ctx, &HybridRequest{Conn: c, Port: port, number: 1<<30 + count.Add(1)})
		})
	}
}

func readConnect(ctx context.Context, c net.Conn) (uint32, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = c.SetReadDeadline(time.Now().Add(handshakeTimeout))
	line, err := readLine(c, maxHandshake)
	if err != nil {
		return 0, err
	}
	number, ok := strings.CutPrefix(line, "CONNECT ")
	if !ok {
		return 0, api.Errorf(api.ErrInvalid, "client said %q instead of CONNECT", line)
	}
	port, err := strconv.ParseUint(strings.TrimSpace(number), 10, 32)
	if err != nil {
		return 0, api.Errorf(api.ErrInvalid, "client asked for port %q", number)
	}
	_ = c.SetReadDeadline(time.Time{})
	return uint32(port), ctx.Err()
}

// ServeHybrid is the host's side of the handshake in front of a guest: it
// accepts clients on l, dials the port each asks for, and joins the two streams
// until both have ended. A half-close on one side becomes one on the other, an
// abort an abort. A client that gives up while dial is still waiting for the
// guest ends that dial's context. A dial that fails hangs up on the client,
// which reads that as a refusal. It returns when ctx ends or l fails, when all
// connections are closed.
func ServeHybrid(ctx context.Context, l net.Listener, dial func(ctx context.Context, port uint32) (net.Conn, error), logger *slog.Logger) error {
	return HandleHybrid(ctx, l, func(ctx context.Context, r *HybridRequest) {
		join(ctx, r, dial, logger)
	}, logger)
}

// firstChunk is the size of the first read of a client's bytes, which starts
// before the guest is reached.
const firstChunk = 4 << 10

func join(ctx context.Context, r *HybridRequest, dial func(context.Context, uint32) (net.Conn, error), logger *slog.Logger) {
	client := r.Conn
	defer client.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = client.Close() })
	defer stop()

	// A client may not send before the OK, so a read that returns now is the
	// client's end; afterwards the same read is the start of its bytes.
	type chunk struct {
		data []byte
		err  error
	}
	first := make(chan chunk, 1)
	dialCtx, dialDone := context.WithCancel(ctx)
	defer dialDone()
	go func() {
		buf := make([]byte, firstChunk)
		n, err := client.Read(buf)
		if n == 0 && err != nil {
			dialDone()
		}
		first <- chunk{buf[:n], err}
	}()
	guest, err := dial(dialCtx, r.Port)
	if err != nil {
		logger.Debug("dialling the guest for a client", "port", r.Port, "err", err)
		_ = client.Close()
		<-first
		return
	}
	defer guest.Close()
	if err := r.Accept(); err != nil {
		_ = client.Close()
		<-first
		return
	}

	stopGuest := context.AfterFunc(ctx, func() { _ = guest.Close() })
	defer stopGuest()
	watchCtx, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	var wg sync.WaitGroup
	wg.Go(func() { // client to guest
		c := <-first
		_, err := guest.Write(c.data)
		if err == nil && c.err == nil {
			_, err = io.Copy(guest, client)
		}
		if c.err != nil && !errors.Is(c.err, io.EOF) {
			err = c.err
		}
		if err != nil || PeerGone(client) {
			cancel()
			return
		}
		closeWrite(guest)
		if WaitPeerGone(watchCtx, client) {
			cancel()
		}
	})
	wg.Go(func() { // guest to client
		defer stopWatching()
		if _, err := io.Copy(client, guest); err != nil {
			cancel()
			return
		}
		closeWrite(client)
		// The guest has said everything. A client that keeps its own side
		// open is given until it closes, or until ctx ends.
	})
	wg.Wait()
}

// closeWrite ends c's sending direction, or all of c where it cannot.
func closeWrite(c net.Conn) {
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		_ = w.CloseWrite()
		return
	}
	_ = c.Close()
}

func temporary(err error) bool {
	var ne interface{ Temporary() bool }
	return errors.As(err, &ne) && ne.Temporary() && !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded)
}
