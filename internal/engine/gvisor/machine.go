package gvisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// commandTimeout bounds every runsc command. A sandbox that has run out of host
// file descriptors, which any guest can bring about, never answers on its
// control socket again.
const commandTimeout = 10 * time.Second

// machine is one running sandbox.
type machine struct {
	runsc     runsc
	ns        *namespace
	stage     stage
	id        string
	ephemeral bool
	memMiB    int
	ids       hostIDs
	limits    *limits
	parts     parts
	logger    *slog.Logger

	run     *exec.Cmd // runsc run or restore, in the foreground
	console *console

	attached chan struct{} // closed when mux or attErr is set
	mux      *guestconn.Mux
	pipe     *guestconn.SplicedPipe // below mux
	token    string                 // what the guest agent says when it dials again
	attErr   error
	detach   context.CancelFunc // gives the waiting for the guest agent up

	ended chan struct{} // closed when runsc run has ended
	gone  chan struct{} // closed when nothing runs any more and the layer is free
	exit  engine.Exit   // valid then

	stopping     context.Context // ends when Stop is called
	markStopping context.CancelFunc
	snapshotMu   sync.Mutex

	stopOnce  sync.Once
	mu        sync.Mutex
	requested bool
	pids      []hostproc.Identity // sandbox, gofer, as far as known
	pauseMu   sync.Mutex
	paused    bool
}

var (
	_ engine.Machine = (*machine)(nil)
	_ engine.Pauser  = (*machine)(nil)

	_ engine.DiskSnapshotter = (*machine)(nil)
)

// DialGuest implements engine.Machine.
func (m *machine) DialGuest(ctx context.Context) (net.Conn, error) {
	select {
	case <-m.attached:
	case <-m.gone:
		return nil, m.goneError()
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for the guest agent: %w", ctx.Err())
	}
	if m.mux == nil {
		return nil, m.attErr
	}
	conn, err := m.mux.Open(ctx)
	if err != nil {
		if m.isGone() {
			return nil, m.goneError()
		}
	}
	return conn, err
}

func (m *machine) goneError() error {
	return api.Errorf(api.ErrUnavailable, "the machine is gone: %s", m.exit.Reason)
}

// Wait implements engine.Machine.
func (m *machine) Wait(ctx context.Context) (engine.Exit, error) {
	select {
	case <-m.gone:
		return m.exit, nil
	case <-ctx.Done():
		return engine.Exit{}, ctx.Err()
	}
}

// PIDs implements engine.Machine. The processes that runsc starts are found
// once it has reported them, shortly after Start.
func (m *machine) PIDs() []int {
	if m.isGone() {
		return nil
	}
	out := []int{m.run.Process.Pid}
	for _, id := range m.children() {
		out = append(out, id.PID)
	}
	return out
}

// children returns the live sandbox and gofer.
func (m *machine) children() []hostproc.Identity {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.pids) < 2 { // not both known yet
		if now := childrenOf(m.run.Process.Pid, m.limits.processes()); len(now) > len(m.pids) {
			m.pids = now
		}
	}
	return m.pids
}

// Stop implements engine.Machine. Politely means that the guest agent ends the
// guest's processes and flushes its files.
func (m *machine) Stop(ctx context.Context, grace time.Duration) error {
	m.mu.Lock()
	m.requested = true
	m.mu.Unlock()
	m.markStopping()
	if grace > 0 && !m.isGone() {
		m.stopOnce.Do(func() { m.shutdown(ctx, grace) })
	}
	if !m.isGone() {
		m.kill()
	}
	select {
	case <-m.gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stopping the sandbox: %w", ctx.Err())
	}
}

func (m *machine) isGone() bool {
	select {
	case <-m.gone:
		return true
	default:
		return false
	}
}

// shutdown asks the guest agent to end the guest and waits up to grace for it.
func (m *machine) shutdown(ctx context.Context, grace time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	// A paused guest hears nothing.
	if err := m.Resume(ctx); err != nil {
		m.logger.Debug("resuming the sandbox to stop it", "err", err)
	}
	// The guest's own processes get most of the time, flushing the rest.
	client := guestclient.New(m.DialGuest, guestclient.Options{Patience: grace})
	if err := client.Shutdown(ctx, grace*3/4); err != nil {
		m.logger.Info("the guest agent did not shut down", "err", err)
		return
	}
	select {
	case <-m.gone:
	case <-ctx.Done():
	}
}

// runscGrace is how long runsc run gets to reap its killed children and tidy up.
const runscGrace = 2 * time.Second

// kill ends all of the machine's processes at once. The sandbox goes first, so
// that runsc run, its parent, reaps it: a zombie that waits for the host's init
// keeps its cgroup (v1) from being removed.
func (m *machine) kill() {
	m.detach()
	children := m.children()
	for _, id := range children {
		if err := id.Kill(unix.SIGKILL); err != nil {
			m.logger.Warn("killing a process of the sandbox", "pid", id.PID, "err", err)
		}
	}
	if len(children) >= 2 {
		select {
		case <-m.ended:
			return
		case <-time.After(runscGrace):
		}
	}
	_ = m.run.Process.Kill()
}

// Pause implements engine.Pauser. Pausing a paused machine is a success.
func (m *machine) Pause(ctx context.Context) error { return m.setPaused(ctx, true) }

// Resume implements engine.Pauser. Resuming a running machine is a success.
func (m *machine) Resume(ctx context.Context) error { return m.setPaused(ctx, false) }

func (m *machine) setPaused(ctx context.Context, paused bool) error {
	m.pauseMu.Lock()
	defer m.pauseMu.Unlock()
	return m.setPausedLocked(ctx, paused)
}

func (m *machine) isPaused() bool {
	m.pauseMu.Lock()
	defer m.pauseMu.Unlock()
	return m.paused
}

func (m *machine) setPausedLocked(ctx context.Context, paused bool) error {
	if m.paused == paused {
		return nil
	}
	verb := "resume"
	if paused {
		verb = "pause"
	}
	if m.stopping.Err() == nil {
		// A runsc that is killed half-way leaves a sandbox that is the one and a
		// record that says the other, and no later command mends that.
		ctx = context.WithoutCancel(ctx)
	}
	if err := m.command(ctx, verb, m.id); err != nil {
		return err
	}
	m.paused = paused
	return nil
}

// command runs a runsc command on the sandbox.
func (m *machine) command(ctx context.Context, args ...string) error {
	return m.commandWith(ctx, commandTimeout, nil, args...)
}

// commandWith runs a runsc command that may take up to limit and has files open,
// from descriptor 3 on.
func (m *machine) commandWith(ctx context.Context, limit time.Duration, files []*os.File, args ...string) error {
	if m.isGone() {
		return m.goneError()
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := m.runsc.command(m.stage, m.parts.ownMiB, args...)
	cmd.ExtraFiles = files
	output := &cappedBuffer{max: 16 << 10}
	cmd.Stdout, cmd.Stderr = output, output
	cmd.WaitDelay = time.Second
	if err := m.ns.start(cmd, nil); err != nil {
		return fmt.Errorf("running runsc %s: %w", args[0], err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	err := cmd.Wait()
	if !stop() && err != nil {
		return api.Errorf(api.ErrDeadline, "running runsc %s: the sandbox does not answer", args[0])
	}
	if err != nil {
		return api.Errorf(api.ErrUnavailable, "running runsc %s: %w: %s", args[0], err, runscFault(output.Bytes()))
	}
	return nil
}

// watch reaps runsc run and, when it has ended for whatever reason, everything
// else of the machine. It runs in a goroutine of its own from Start on.
func (m *machine) watch() {
	err := m.run.Wait()
	close(m.ended)
	m.detach()
	m.limits.kill()
	for _, id := range m.children() {
		_ = id.Kill(unix.SIGKILL)
		ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
		if err := id.WaitGone(ctx); err != nil {
			m.logger.Error("waiting for a process of the sandbox", "pid", id.PID, "err", err)
		}
		cancel()
	}
	m.console.close()
	<-m.attached
	if m.mux != nil {
		m.mux.Close()
	}
	m.mu.Lock()
	m.exit = exitOf(err, m.requested, m.limits.outOfMemory())
	m.mu.Unlock()
	m.teardown()
	close(m.gone)
}

// teardown gives everything back that Start took from the host.
func (m *machine) teardown() {
	if !m.ephemeral && !inUserNamespace() {
		m.trim()
	}
	if err := m.ns.do(m.stage.unmountRoot); err != nil {
		m.logger.Error("taking the sandbox's mounts apart", "err", err)
	}
	m.ns.close()
	m.markStopping()
	for _, f := range m.parts.lowers {
		f.Close()
	}
	if err := m.parts.layer.release(); err != nil {
		m.logger.Error("waiting for the kernel to let go of the writable layer", "err", err)
	}
	m.limits.remove()
}

// exitOf says how the machine ended, from how runsc run did: with the guest
// agent's own exit status where that ended by itself.
func exitOf(err error, requested, outOfMemory bool) engine.Exit {
	var exit *exec.ExitError
	status := 0
	if errors.As(err, &exit) {
		status = exit.ExitCode()
	}
	switch {
	case outOfMemory && !requested:
		return engine.Exit{Reason: "the sandbox ran out of memory and was killed by the host"}
	case err == nil:
		return engine.Exit{Requested: true, Reason: "the guest shut down"}
	case requested:
		return engine.Exit{Requested: true, Reason: "the sandbox was stopped"}
	case exit == nil:
		return engine.Exit{Reason: fmt.Sprintf("waiting for the sandbox: %v", err)}
	case status < 0:
		return engine.Exit{Reason: "runsc was killed"}
	}
	return engine.Exit{Reason: fmt.Sprintf("the sandbox ended with status %d", status)}
}
