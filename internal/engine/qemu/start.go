package qemu

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/initramfs"
)

// MinMemMiB is the least memory with which Debian's cloud kernel and the agent
// come up and leave a workload something to use.
const MinMemMiB = 128

// qmpTimeout bounds how long QEMU takes from exec to its first answer. Measured
// 50 ms; the rest is for a host under load.
const qmpTimeout = 30 * time.Second

// Start implements [engine.Engine].
func (e *Engine) Start(ctx context.Context, spec engine.MachineSpec) (engine.Machine, error) {
	if err := check(spec); err != nil {
		return nil, err
	}
	accel, _, err := e.accelerator()
	if err != nil {
		return nil, err
	}
	if spec.Memory != "" {
		return started(e.startSaved(ctx, spec, accel))
	}
	if spec.Templates != "" {
		return e.startTemplated(ctx, spec, accel)
	}
	return started(e.boot(ctx, spec, accel, nil, ""))
}

// boot starts a machine from its kernel. With a template it leaves one there.
// note is what it has to tell the user.
func (e *Engine) boot(ctx context.Context, spec engine.MachineSpec, accel string, t *template, note string) (*machine, error) {
	var begin func(context.Context, net.Conn) error
	var m *machine
	memory, err := newMemory("pyro-"+spec.ID, int64(spec.MemMiB)<<20)
	if err != nil {
		return nil, fmt.Errorf("starting qemu: %w", err)
	}
	how := start{memory: memory, waits: t != nil}
	if t != nil {
		begin = func(ctx context.Context, channel net.Conn) error {
			return m.beginWaiting(ctx, channel, t, spec, memory)
		}
	}
	m, channel, err := e.launch(ctx, spec, accel, how)
	if err != nil {
		memory.Close()
		return nil, err
	}
	m.note = note
	go m.connect(channel, begin)
	return m, nil
}

// start is how a machine comes up.
type start struct {
	// memory is its memory, which is the machine's to close once it was
	// launched; nil for memory of QEMU's own.
	memory *os.File
	// waits says that the guest waits for its host before it mounts its disk,
	// and incoming that the machine does not boot but gets a state.
	waits, incoming      bool
	private, devicesOnly bool // see inputs
}

// launch starts QEMU and gets its attention. The machine's channel is not read
// or written yet. On an error nothing is left running.
func (e *Engine) launch(ctx context.Context, spec engine.MachineSpec, accel string, how start) (_ *machine, channel net.Conn, err error) {
	files := &opener{}
	defer files.closeAll() // QEMU has its own descriptors by then

	in := inputs{memory: how.memory, private: how.private, waits: how.waits || how.incoming, incoming: how.incoming, devicesOnly: how.devicesOnly}
	if spec.RootImage != "" {
		if in.disk, err = e.openDisk(ctx, files, spec); err != nil {
			return nil, nil, fmt.Errorf("starting qemu: %w", err)
		}
	}
	if how.incoming && isELF(spec.Kernel.Image) {
		in.kernel = files.create(filepath.Join(spec.Dir, "kernel"), writeStubKernel)
	} else {
		in.kernel = files.readable(spec.Kernel.Image, filepath.Join(spec.Dir, "kernel"))
	}
	if !how.incoming {
		in.initramfs = files.initramfs(spec, filepath.Join(spec.Dir, "initramfs.cpio"))
	}
	var console, control net.Conn
	console, in.console = files.pair("console")
	control, in.qmp = files.pair("qmp")
	channel, in.channel = files.pair("channel")
	if in.vhostVsock, err = openVhostVsock(); err == nil {
		files.opened = append(files.opened, in.vhostVsock)
		in.cid = pickCID()
	}
	if files.err != nil {
		files.closeConns()
		return nil, nil, fmt.Errorf("starting qemu: %w", files.err)
	}

	c := build(spec, accel, in)
	var stderr tailBuffer
	cmd, err := e.run(c, spec.ID, accel, io.MultiWriter(spec.Console, &stderr))
	if err != nil {
		files.closeConns()
		return nil, nil, fmt.Errorf("starting qemu: %w", err)
	}
	files.closeAll()

	m := &machine{log: spec.Logger, cmd: cmd, accel: accel, cid: in.cid, memory: how.memory,
		disk:     liveDisk{engine: e, path: diskPath(spec), node: "disk", fdset: c.diskSet, size: in.disk.size, ephemeral: spec.Ephemeral},
		migrated: make(chan string, 64), muxed: make(chan struct{}), done: make(chan struct{})}
	m.drained = drain(console, spec.Console)
	m.qmp = newQMP(control, m.event)
	go m.wait()
	limit(cmd.Process.Pid, spec.MemMiB, len(spec.Layers), in.disk.size)

	qmpCtx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	if err := m.qmp.negotiate(qmpCtx); err != nil {
		_ = m.Stop(context.WithoutCancel(ctx), 0)
		channel.Close()
		if said := stderr.String(); said != "" {
			return nil, nil, fmt.Errorf("starting qemu: %w", refusedStart(said))
		}
		return nil, nil, fmt.Errorf("starting qemu: %w", err)
	}
	return m, channel, nil
}

func check(spec engine.MachineSpec) error {
	if spec.VCPUCount < 1 || spec.VCPUCount > api.MaxVCPUCount {
		return api.WithHint(api.Errorf(api.ErrInvalid, "%d virtual processors asked for, and a machine has 1 to %d", spec.VCPUCount, api.MaxVCPUCount),
			"change --vcpu-count")
	}
	if spec.MemMiB < MinMemMiB {
		return api.WithHint(api.Errorf(api.ErrInvalid, "%d MiB of memory asked for, and a virtual machine needs at least %d", spec.MemMiB, MinMemMiB),
			"raise --mem-mib")
	}
	if spec.Kernel.Image == "" {
		return api.Errorf(api.ErrInternal, "starting qemu: no kernel given")
	}
	return nil
}

// run starts QEMU with c. What it says goes to stderr.
func (e *Engine) run(c *command, id, accel string, stderr io.Writer) (*exec.Cmd, error) {
	cmd := exec.Command(e.binary, c.args...)
	cmd.ExtraFiles = c.files
	cmd.Dir = "/"
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.SysProcAttr = confine(id, accel)
	cmd.Stderr = stderr
	if err := hostproc.StartTied(cmd); err != nil {
		return nil, err
	}
	return cmd, nil
}

// refusedStart makes an error of QEMU's last words. It knows the way out of the
// commonest refusals.
func refusedStart(said string) error {
	hint := "run pyro doctor; the message above is QEMU's own"
	switch {
	case strings.Contains(said, `"write" lock`): // one is not to be had, or somebody else's is in the way
		return api.WithHint(api.Errorf(api.ErrBusy, "a machine or a disk tool has the disk open"), "stop the workspaces and programs that use it first")
	case strings.Contains(said, "cannot set up guest memory"), strings.Contains(said, "Cannot allocate memory"):
		hint = "the host has not that much memory free: lower --mem-mib"
	case strings.Contains(said, "Permission denied"):
		hint = "see what pyro doctor says about qemu"
	}
	return api.WithHint(api.Errorf(api.ErrUnavailable, "%s", said), "%s", hint)
}

// confine returns how QEMU is started: in its own session, so that a terminal's
// Ctrl-C does not reach it, dying with us, and, where we are root, as a user
// that owns nothing, in network and IPC namespaces with nothing in them.
func confine(id, accel string) *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		return attr
	}
	attr.Cloneflags = unix.CLONE_NEWNET | unix.CLONE_NEWIPC
	uid := uid(id)
	cred := &syscall.Credential{Uid: uid, Gid: uid}
	if accel == accelKVM {
		// KVM's device is opened by QEMU itself: through its group where that
		// may, and where only root may, QEMU has to stay root.
		var st unix.Stat_t
		if err := unix.Stat(kvmDevice, &st); err != nil || st.Mode&0o066 == 0 {
			return attr
		}
		cred.Groups = []uint32{st.Gid}
	}
	attr.Credential = cred
	return attr
}

// uid picks a user for one machine out of the range that systemd sets aside for
// users which exist only while a service runs (systemd.io/UIDS-GIDS), so that
// machines cannot signal or trace one another.
func uid(id string) uint32 {
	const first, last = 61184, 65519
	h := fnv.New32a()
	h.Write([]byte(id))
	return first + h.Sum32()%(last-first+1)
}

// maxFiles is how many open files QEMU may have: two for each layer of a disk,
// also of those that snapshots will add, and some fifty of its own.
const maxFiles = 1024

// limit bounds what a QEMU taken over by its guest could use up. Failing to is
// not worth failing the start.
func limit(pid, memMiB, layers int, diskSize int64) {
	// Guest memory, up to 1 GiB of translated code, and QEMU itself; and for each
	// layer, also the next hundred, the cache of the disk's tables. QEMU makes
	// that an 8192nd of the disk's size, up to 32 MiB (docs/qcow2-cache.txt).
	perLayer := 1 + min(32, int(diskSize>>20/8192))
	as := uint64(memMiB+3<<10+perLayer*(layers+100)) << 20
	for resource, max := range map[int]uint64{
		unix.RLIMIT_AS:     as,
		unix.RLIMIT_CORE:   0,
		unix.RLIMIT_NOFILE: maxFiles,
	} {
		_ = unix.Prlimit(pid, resource, &unix.Rlimit{Cur: max, Max: max}, nil)
	}
}

// opener opens files and remembers the first failure.
type opener struct {
	opened []*os.File
	conns  []net.Conn
	err    error
}

func (o *opener) open(path string, flags int) *os.File {
	if o.err != nil {
		return nil
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		o.err = err
		return nil
	}
	o.opened = append(o.opened, f)
	return f
}

// readable opens path for a QEMU that runs as another user and reopens it by
// descriptor, which the file's own mode must allow. Where it does not, a copy
// with a wider mode is made: its directory stays closed to everybody else.
func (o *opener) readable(path, copyPath string) *os.File {
	f := o.open(path, os.O_RDONLY)
	if f == nil || os.Geteuid() != 0 {
		return f
	}
	st, err := f.Stat()
	if err == nil && st.Mode().Perm()&0o004 != 0 {
		return f
	}
	return o.create(copyPath, func(w io.Writer) error {
		_, err := io.Copy(w, f)
		return err
	})
}

func (o *opener) initramfs(spec engine.MachineSpec, path string) *os.File {
	return o.create(path, func(w io.Writer) error {
		return initramfs.Write(w, initramfs.Spec{Init: spec.AgentPath, Modules: spec.Kernel.Modules})
	})
}

// create writes a file anew and returns it opened for reading.
func (o *opener) create(path string, fill func(io.Writer) error) *os.File {
	if o.err != nil {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		o.err = err
		return nil
	}
	if o.err = cmp.Or(fill(f), f.Close()); o.err != nil {
		return nil
	}
	return o.open(path, os.O_RDONLY)
}

// pair makes a connection and the file that is its other end.
func (o *opener) pair(name string) (net.Conn, *os.File) {
	if o.err != nil {
		return nil, nil
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		o.err = fmt.Errorf("making a socket pair: %w", err)
		return nil, nil
	}
	theirs := os.NewFile(uintptr(fds[1]), name)
	o.opened = append(o.opened, theirs)
	ours := os.NewFile(uintptr(fds[0]), name)
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		o.err = fmt.Errorf("making a socket pair: %w", err)
		return nil, nil
	}
	o.conns = append(o.conns, conn)
	return conn, theirs
}

func (o *opener) closeAll() {
	for _, f := range o.opened {
		f.Close()
	}
	o.opened = nil
}

func (o *opener) closeConns() {
	for _, c := range o.conns {
		c.Close()
	}
}

// tailBuffer keeps the last kilobyte of what QEMU prints.
type tailBuffer struct{ b []byte }

func (t *tailBuffer) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if over := len(t.b) - 1024; over > 0 {
		t.b = t.b[over:]
	}
	return len(p), nil
}

func (t *tailBuffer) String() string { return strings.TrimSpace(string(t.b)) }
