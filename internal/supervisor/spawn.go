package supervisor

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// Command is the hidden subcommand that runs a supervisor.
const Command = "supervise"

// SpawnOptions say how to start a supervisor.
type SpawnOptions struct {
	// Binary is the pyro program; a program that embeds the SDK is not one.
	Binary string
	// Launcher is a command line that becomes the program given after it, for
	// an engine whose supervisor needs other surroundings; usually empty.
	Launcher []string
	Config   Config
	// Hold are files that the supervisor keeps open as long as it lives.
	Hold []*os.File
}

// A Process is a supervisor that this process has started.
type Process struct {
	// Client talks to it.
	*Client
	// Status is what it said when its guest was ready.
	Status Status

	ephemeral bool

	cmd    *exec.Cmd
	lease  *os.File
	exited chan struct{}
	once   sync.Once
}

// Spawn makes the machine's directory, starts a supervisor for it and returns
// when the guest answers. On an error nothing is left running, and of an
// ephemeral machine no directory either. If ctx ends first the machine is ended
// too.
//
// A machine that is not ephemeral may have run before: its directory is taken
// over, unless its supervisor still lives, which is api.ErrBusy.
func Spawn(ctx context.Context, o SpawnOptions) (_ *Process, err error) {
	dir := statedir.Machine(o.Config.Dir)
	lock, err := makeDirectory(ctx, dir, o.Config.Ephemeral)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	defer func() {
		if err == nil {
			return
		}
		clear := clearMachine
		if o.Config.Ephemeral {
			clear = removeMachine
		}
		err = errors.Join(err, clear(context.WithoutCancel(ctx), dir))
	}()
	if !o.Config.Ephemeral {
		if err := clearMachine(ctx, dir); err != nil {
			return nil, fmt.Errorf("clearing up after the machine's last run: %w", err)
		}
		// How that one ended says nothing about how this one will.
		if err := os.Remove(dir.EndingFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		if err := statedir.Reserve(dir.EndingFile(), endingRoom); err != nil {
			return nil, fmt.Errorf("making room for word of the machine's end: %w", err)
		}
	}
	failpoint.Hit("spawn/locked")
	rec := record{ID: dir.ID(), Engine: o.Config.Engine, CreatedAt: time.Now().UTC(), Ephemeral: o.Config.Ephemeral}
	if err := rec.write(dir); err != nil {
		return nil, err
	}
	failpoint.Hit("spawn/recorded")
	p, pipe, err := start(dir, o, lock)
	failpoint.Hit("spawn/process")
	if err != nil {
		return nil, fmt.Errorf("starting the supervisor: %w", err)
	}
	defer pipe.Close()
	// A supervisor that hears that its caller is gone stops what it is doing
	// and ends, which closes the pipe.
	stop := context.AfterFunc(ctx, p.release)
	line, readErr := bufio.NewReader(io.LimitReader(pipe, 1<<20)).ReadBytes('\n')
	if !stop() {
		p.waitOrKill(10 * time.Second)
		return nil, ctx.Err()
	}
	var res result
	if readErr != nil || json.Unmarshal(line, &res) != nil || res.Protocol != protocol {
		p.waitOrKill(0)
		return nil, died(dir, res.Protocol, bytes.TrimSpace(line))
	}
	if res.Error != nil {
		p.waitOrKill(10 * time.Second)
		return nil, res.Error.Err()
	}
	p.Status = *res.Status
	return p, nil
}

// endingRoom is how much room an [Ending] has on a full disk, in bytes: all that a
// console remembers, with every byte escaped.
const endingRoom = 64 << 10

// makeDirectory makes the machine's directory, or takes over that of one that is
// not ephemeral, and locks it.
func makeDirectory(ctx context.Context, dir statedir.Machine, ephemeral bool) (lock *hostproc.Lock, err error) {
	// Whoever clears up after killed commands may take a directory that is not
	// locked yet for an abandoned one, and remove it.
	for range 10 {
		if err := os.Mkdir(dir.Path(), 0o700); err != nil && (ephemeral || !errors.Is(err, os.ErrExist)) {
			return nil, fmt.Errorf("creating the machine's directory: %w", err)
		}
		failpoint.Hit("spawn/directory")
		// And tries every lock for a moment.
		lock, err = hostproc.LockWithin(ctx, dir.LockFile(), time.Second)
		if !errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	return lock, err
}

func died(dir statedir.Machine, version int, line []byte) error {
	if version != 0 && version != protocol {
		return api.WithHint(api.Errorf(api.ErrUnsupported, "the supervisor speaks version %d of its protocol, and this pyro %d", version, protocol),
			"two versions of pyro are mixed here; install one")
	}
	text := "the supervisor died before its guest was ready"
	if len(line) > 0 {
		text += ", saying " + string(line[:min(len(line), 200)])
	}
	if b, err := os.ReadFile(dir.SupervisorLog()); err == nil && len(b) > 0 {
		text += "; its log ends: " + string(bytes.TrimSpace(b[max(0, len(b)-500):]))
	}
	return api.Errorf(api.ErrUnavailable, "%s", text)
}

// start runs the process and hands over its configuration.
func start(dir statedir.Machine, o SpawnOptions, lock *hostproc.Lock) (_ *Process, resultPipe *os.File, err error) {
	var files closers
	defer files.closeAll()
	configR, configW, err := files.pipe()
	if err != nil {
		return nil, nil, err
	}
	resultR, resultW, err := files.pipe()
	if err != nil {
		return nil, nil, err
	}
	leaseR, leaseW, err := files.pipe()
	if err != nil {
		return nil, nil, err
	}
	control, err := files.listen(dir.ControlSocket())
	if err != nil {
		return nil, nil, err
	}
	guest, err := files.listen(dir.GuestSocket())
	if err != nil {
		return nil, nil, err
	}
	log, err := os.OpenFile(dir.SupervisorLog(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, nil, err
	}
	files = append(files, log)

	argv := append(slices.Clone(o.Launcher), o.Binary, Command)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.ExtraFiles = append([]*os.File{configR, resultW, control, guest, lock.File(), leaseR}, o.Hold...)
	// What the runtime prints when it panics; the supervisor's own log goes to
	// the same file, bounded.
	cmd.Stderr = log
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, nil, api.WithHint(err, "pyro was looked for at %s: reinstall it, or name it with PYRO_BINARY", o.Binary)
	}
	p := &Process{Client: NewClient(dir), ephemeral: o.Config.Ephemeral, cmd: cmd, exited: make(chan struct{})}
	go func() {
		_ = cmd.Wait() // how it ended is in the result and the log
		close(p.exited)
	}()
	o.Config.Protocol = protocol
	if err := json.NewEncoder(configW).Encode(o.Config); err != nil {
		leaseW.Close()
		p.waitOrKill(0)
		return nil, nil, err
	}
	p.lease = leaseW
	files.keep(leaseW)
	files.keep(resultR)
	return p, resultR, nil
}

// Release lets go of a machine that was told to [Client.Keep]: it outlives this
// process.
func (p *Process) Release() { p.release() }

func (p *Process) release() {
	p.once.Do(func() { p.lease.Close() })
}

// Shutdown ends a leased machine and makes sure of it: a supervisor that has
// not ended by the time ctx does is killed, which takes its machine along. What
// is left in the directory of an ephemeral machine is removed.
func (p *Process) Shutdown(ctx context.Context) error {
	p.release()
	select {
	case <-p.exited:
	case <-ctx.Done():
		p.waitOrKill(0)
	}
	if !p.ephemeral {
		return clearMachine(context.WithoutCancel(ctx), p.dir)
	}
	return removeMachine(context.WithoutCancel(ctx), p.dir)
}

// waitOrKill waits up to grace for the supervisor to end by itself.
func (p *Process) waitOrKill(grace time.Duration) {
	p.release()
	select {
	case <-p.exited:
		return
	case <-time.After(grace):
	}
	_ = p.cmd.Process.Kill() // a child that is not reaped yet: the pid is ours
	<-p.exited
}

// closers are files to close on every way out but for those taken out again.
type closers []*os.File

func (c *closers) pipe() (r, w *os.File, err error) {
	r, w, err = os.Pipe()
	if err == nil {
		*c = append(*c, r, w)
	}
	return r, w, err
}

// listen makes a listening Unix socket to inherit.
func (c *closers) listen(path string) (*os.File, error) {
	f, err := guestconn.ListenFile(path)
	if err == nil {
		*c = append(*c, f)
	}
	return f, err
}

func (c *closers) keep(f *os.File) {
	for i, g := range *c {
		if g == f {
			*c = append((*c)[:i], (*c)[i+1:]...)
			return
		}
	}
}

// closeAll has a pointer so that one who defers it means those to come, too.
func (c *closers) closeAll() {
	for _, f := range *c {
		f.Close()
	}
}
