package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// machine implements [engine.Machine].
type machine struct {
	log     *slog.Logger
	cmd     *exec.Cmd
	accel   string
	qmp     *qmp
	cid     uint32 // 0 without vsock
	drained <-chan struct{}
	memory  *os.File // nil or closed when the machine ends
	warm    bool
	note    string

	diskMu sync.Mutex // held during a snapshot; guards disk
	disk   liveDisk

	// migrated receives the status of a migration whenever it changes.
	migrated chan string

	stopOnce sync.Once

	// muxed is closed when the guest agent and this side have agreed on a
	// session over the serial channel, or cannot any more; then mux or muxErr
	// is set.
	muxed  chan struct{}
	mux    *guestconn.Mux
	muxErr error

	mu     sync.Mutex // guards the following
	asked  bool       // Stop was called
	reason string     // why QEMU says it ends, "" until it does
	// installed is closed when the template that the machine leaves is in
	// place; nil if it leaves none.
	installed <-chan struct{}

	done chan struct{} // closed when QEMU has been reaped; then exit is set
	exit engine.Exit
}

var (
	_ engine.Machine = (*machine)(nil)
	_ engine.Pauser  = (*machine)(nil)
)

// wait reaps QEMU and works out why it ended.
func (m *machine) wait() {
	err := m.cmd.Wait()
	// What QEMU and the guest said last may still be on its way to us. Both
	// readers end by themselves now that the other side is gone; the limit is
	// for a descriptor that leaked somewhere.
	settled := time.NewTimer(time.Second)
	defer settled.Stop()
	for _, reader := range []<-chan struct{}{m.qmp.done, m.drained} {
		select {
		case <-reader:
		case <-settled.C:
		}
	}
	m.qmp.close()
	if m.memory != nil {
		m.memory.Close()
	}

	m.mu.Lock()
	m.exit = engine.Exit{Requested: m.asked || m.reason == poweredOff, Reason: m.reason}
	switch {
	case m.reason != "":
	case m.asked:
		m.exit.Reason = "stopped"
	case err == nil:
		m.exit.Reason = "qemu ended by itself"
	default:
		m.exit.Reason = "qemu " + describeExit(err)
	}
	m.mu.Unlock()
	close(m.done)
}

// poweredOff is the reason of a machine whose guest ended it in good order.
const poweredOff = "guest powered off"

// connect agrees with the guest agent on a session over the serial channel,
// which takes as long as the guest takes to boot. begin, which may be nil, has
// the channel before.
func (m *machine) connect(channel net.Conn, begin func(context.Context, net.Conn) error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-m.done:
			cancel()
		case <-m.muxed:
		}
	}()
	if begin != nil {
		m.muxErr = begin(ctx, channel)
	}
	if m.muxErr == nil {
		m.mux, m.muxErr = guestconn.NewMux(ctx, channel, guestconn.Host)
	} else {
		channel.Close()
	}
	close(m.muxed)
	if m.muxErr == nil {
		<-m.done
		m.mux.Close()
	}
}

func describeExit(err error) string {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return "failed: " + err.Error()
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		if ws.Signal() == syscall.SIGSYS {
			return "was killed by its own seccomp sandbox"
		}
		return "was killed by signal " + ws.Signal().String()
	}
	return fmt.Sprintf("ended with status %d", exit.ExitCode())
}

// event is called by the QMP reader.
func (m *machine) event(name string, data json.RawMessage) {
	var reason string
	switch name {
	case "MIGRATION":
		var d struct {
			Status string `json:"status"`
		}
		_ = json.Unmarshal(data, &d)
		select {
		case m.migrated <- d.Status:
		default: // nobody waits: a migration has far fewer states than fit
		}
	case "SHUTDOWN":
		// qapi/run-state.json, ShutdownCause.
		var d struct {
			Reason string `json:"reason"`
		}
		_ = json.Unmarshal(data, &d)
		switch d.Reason {
		case "guest-shutdown":
			reason = poweredOff
		case "guest-reset":
			// The kernel resets on panic; nothing else in our guests does
			// unless the workload asks for it.
			reason = "guest kernel panicked or rebooted"
		case "guest-panic":
			reason = "guest kernel panicked"
		}
	case "BLOCK_IO_ERROR":
		var d struct {
			NoSpace bool `json:"nospace"`
		}
		_ = json.Unmarshal(data, &d)
		if d.NoSpace {
			reason = engine.ReasonHostDiskFull
			// QEMU has paused the guest (werror=enospc). Nothing here can free
			// space, and a paused guest would only look hung.
			_ = m.cmd.Process.Kill()
		}
	}
	if reason == "" {
		return
	}
	m.mu.Lock()
	if m.reason == "" {
		m.reason = reason
	}
	m.mu.Unlock()
}

// DialGuest implements [engine.Machine].
func (m *machine) DialGuest(ctx context.Context) (net.Conn, error) {
	select {
	case <-m.done:
		return nil, api.Errorf(api.ErrUnavailable, "the machine is gone: %s", m.exit.Reason)
	default:
	}
	if m.cid != 0 {
		if conn, err := guestconn.DialVsock(ctx, m.cid, guestproto.Port); err == nil {
			return conn, nil
		}
		// The guest may have no vsock driver, or not be up yet. The serial
		// channel is always there.
	}
	select {
	case <-m.muxed:
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for the guest agent: %w", ctx.Err())
	}
	conn, err := net.Conn(nil), m.muxErr
	if err == nil {
		conn, err = m.mux.Open(ctx)
	}
	if err != nil {
		select {
		case <-m.done:
			return nil, api.Errorf(api.ErrUnavailable, "the machine is gone: %s", m.exit.Reason)
		default:
			return nil, fmt.Errorf("opening a stream to the guest: %w", err)
		}
	}
	return conn, nil
}

// Wait implements [engine.Machine].
func (m *machine) Wait(ctx context.Context) (engine.Exit, error) {
	select {
	case <-m.done:
		return m.exit, nil
	case <-ctx.Done():
		return engine.Exit{}, fmt.Errorf("waiting for the machine to end: %w", ctx.Err())
	}
}

// installPatience is how long the end of a machine that leaves a template waits
// for it to be on the disk. Measured 0.3 s from the moment it was taken.
const installPatience = 3 * time.Second

// Stop implements [engine.Machine]. The polite part is the caller's: it asks
// the guest agent to power off; grace is how long that may still take.
func (m *machine) Stop(ctx context.Context, grace time.Duration) error {
	m.mu.Lock()
	m.asked = true
	installed := m.installed
	m.mu.Unlock()
	if installed != nil {
		// The end of this process may follow that of its machine.
		select {
		case <-installed:
		case <-time.After(installPatience):
		case <-ctx.Done():
		}
	}
	if grace > 0 {
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-m.done:
			return nil
		case <-t.C:
		case <-ctx.Done():
		}
	}
	m.stopOnce.Do(func() {
		// An unreaped child: its pid is ours, so this cannot hit a stranger.
		if err := m.cmd.Process.Kill(); err != nil {
			m.log.Debug("killing qemu", "error", err)
		}
	})
	select {
	case <-m.done:
		return nil
	case <-time.After(10 * time.Second):
		return api.Errorf(api.ErrInternal, "process %d of the machine does not end after SIGKILL", m.cmd.Process.Pid)
	}
}

// Pause implements [engine.Pauser].
func (m *machine) Pause(ctx context.Context) error { return m.qmp.execute(ctx, "stop", nil, nil) }

// Resume implements [engine.Pauser]. The guest's clock stood still as well and is
// set, if its agent can be told within clockTimeout: one that is too busy to
// listen is no reason to keep the machine.
func (m *machine) Resume(ctx context.Context) error {
	if err := m.qmp.execute(ctx, "cont", nil, nil); err != nil {
		return err
	}
	select {
	case <-m.muxed:
	default:
		return nil // still booting, from a clock of the host's
	}
	ctx, cancel := context.WithTimeout(ctx, clockTimeout)
	defer cancel()
	if err := m.goOn(ctx, false, ""); err != nil {
		m.log.Warn("the guest's clock is behind", "error", err)
	}
	return nil
}

// clockTimeout bounds how long a guest may take to set its clock. Measured 10 ms
// under TCG on an idle host.
const clockTimeout = 5 * time.Second

// PIDs implements [engine.Machine].
func (m *machine) PIDs() []int { return []int{m.cmd.Process.Pid} }

// drain copies what the guest prints until QEMU closes its end. It has no other
// duty, so a flood of output costs the guest time and nobody else anything.
func drain(conn io.ReadCloser, to io.Writer) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer conn.Close()
		_, _ = io.Copy(to, conn)
	}()
	return done
}
