// Package host is the engine without isolation: the guest agent runs as a plain
// child process and so do its commands. It exists for --allow-host-compat,
// where a person decides that no isolation is better than no pyro, and as the
// fast engine of the test suite, because everything above it is the real thing.
package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestagent"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// Engine implements [engine.Engine].
type Engine struct{}

var (
	_ engine.Engine      = Engine{}
	_ engine.LayerMerger = Engine{}
)

// New returns the engine.
func New() Engine { return Engine{} }

// Name implements [engine.Engine].
func (Engine) Name() string { return engine.HostName }

// Probe implements [engine.Engine].
func (Engine) Probe(context.Context) engine.Capabilities {
	if runtime.GOOS != "linux" {
		return engine.Capabilities{Isolation: api.IsolationNone, Detail: "the guest agent runs on Linux only"}
	}
	return engine.Capabilities{
		Available: true, Isolation: api.IsolationNone, FullSpeed: true, TimeScale: 1,
		Disk:   engine.DiskDirectory,
		Detail: "no isolation: commands run on this host, only with --allow-host-compat",
	}
}

// Start implements [engine.Engine]. Guest paths such as /workspace lie below
// the disk, a directory, by default Dir/root. It stands on nothing: each layer
// is a complete copy, and a new disk one of the highest.
func (Engine) Start(ctx context.Context, spec engine.MachineSpec) (engine.Machine, error) {
	log := cmp.Or(spec.Logger, slog.New(slog.DiscardHandler))
	root := cmp.Or(spec.Disk, filepath.Join(spec.Dir, "root"))
	switch st, err := os.Stat(root); {
	case errors.Is(err, os.ErrNotExist) && len(spec.Layers) > 0:
		layer := spec.Layers[len(spec.Layers)-1]
		if st, err := os.Stat(layer); errors.Is(err, os.ErrNotExist) || err == nil && !st.IsDir() {
			return nil, api.Errorf(api.ErrDamaged, "layer %s of the machine's disk is missing or not a directory", layer)
		}
		skipped, err := copyTree(ctx, layer, root)
		if err != nil {
			return nil, fmt.Errorf("creating the machine's disk: %w", err)
		}
		logSkipped(log, skipped)
	case err == nil && !st.IsDir():
		return nil, api.Errorf(api.ErrDamaged, "the machine's disk %s is not a directory", root)
	}
	if err := os.MkdirAll(filepath.Join(root, "workspace"), 0o755); err != nil {
		return nil, fmt.Errorf("starting on the host: %w", err)
	}
	socket := filepath.Join(spec.Dir, "agent.sock")
	listener, err := guestconn.ListenFile(socket)
	if err != nil {
		return nil, fmt.Errorf("starting on the host: %w", err)
	}
	defer listener.Close()
	cmd := exec.Command(spec.AgentPath, "--listen", "fd:3", "--root", root)
	cmd.ExtraFiles = []*os.File{listener}
	cmd.Dir = root
	cmd.Env = append(os.Environ(), Marker(spec.ID))
	cmd.Stdout, cmd.Stderr = spec.Console, spec.Console
	// A command that escapes its session holds our pipe open; do not wait for
	// it once the agent is gone.
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL}
	if err := hostproc.StartTied(cmd); err != nil {
		return nil, api.WithHint(fmt.Errorf("starting the guest agent: %w", err), "reinstall pyro, or name the agent with PYRO_AGENT")
	}
	m := &machine{id: spec.ID, cmd: cmd, socket: socket, disk: root, log: log, done: make(chan struct{})}
	go m.wait()
	return m, nil
}

// MergeLayer implements [engine.LayerMerger]. There is nothing to move: the layer
// above is a complete copy already.
func (Engine) MergeLayer(_ context.Context, chain []string, i int, _, _ string) (merged string, err error) {
	if i < 0 || i+1 >= len(chain) {
		return "", api.Errorf(api.ErrInvalid, "layer %d of %d has no layer above it to be merged with", i, len(chain))
	}
	return chain[i+1], nil
}

// machine implements [engine.Machine].
type machine struct {
	id     string
	cmd    *exec.Cmd
	socket string
	disk   string
	log    *slog.Logger

	mu    sync.Mutex // guards asked
	asked bool

	done chan struct{} // closed when the agent has been reaped; then exit is set
	exit engine.Exit
}

var (
	_ engine.Machine         = (*machine)(nil)
	_ engine.DiskSnapshotter = (*machine)(nil)
)

func (m *machine) wait() {
	err := m.cmd.Wait()
	m.mu.Lock()
	asked := m.asked
	m.mu.Unlock()
	switch {
	case asked, err == nil:
		m.exit = engine.Exit{Requested: true, Reason: "stopped"}
	default:
		m.exit = engine.Exit{Reason: "the guest agent ended: " + err.Error()}
	}
	close(m.done)
}

// DialGuest implements [engine.Machine].
func (m *machine) DialGuest(ctx context.Context) (net.Conn, error) {
	select {
	case <-m.done:
		return nil, api.Errorf(api.ErrUnavailable, "the machine is gone: %s", m.exit.Reason)
	default:
		return guestconn.DialHybrid(ctx, m.socket, guestproto.Port)
	}
}

// SnapshotDisk implements [engine.DiskSnapshotter]: the layer is a copy, made
// while commands go on. What they write meanwhile may be in it or not, each file
// for itself; nothing here could hold them still.
func (m *machine) SnapshotDisk(ctx context.Context, spare string) (string, error) {
	select {
	case <-m.done:
		return "", api.Errorf(api.ErrUnavailable, "the machine is gone: %s", m.exit.Reason)
	default:
	}
	skipped, err := copyTree(ctx, m.disk, spare)
	if err != nil {
		return "", fmt.Errorf("copying the machine's disk: %w", err)
	}
	logSkipped(m.log, skipped)
	return spare, nil
}

func logSkipped(log *slog.Logger, skipped int) {
	if skipped > 0 {
		log.Warn("files that cannot be read were left out of a disk's copy", "count", skipped)
	}
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

// Stop implements [engine.Machine]. The agent ends its commands when it is told
// to end; one that has to be killed leaves them to the sweep that follows.
func (m *machine) Stop(ctx context.Context, grace time.Duration) error {
	m.mu.Lock()
	m.asked = true
	m.mu.Unlock()
	id, err := hostproc.Identify(m.cmd.Process.Pid)
	if err == nil {
		// The agent has nothing to lose by TERM first, and takes its commands
		// with it in milliseconds.
		if err := id.KillLadder(ctx, max(grace, time.Second)); err != nil {
			return err
		}
	}
	<-m.done
	return hostproc.KillMarked(context.WithoutCancel(ctx), Marker(m.id))
}

// Marker is the environment variable that every process of a machine inherits.
func Marker(id string) string { return guestagent.MachineVariable + "=" + id }

// PIDs implements [engine.Machine].
func (m *machine) PIDs() []int { return []int{m.cmd.Process.Pid} }
