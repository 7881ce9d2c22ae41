package boot

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// modulesOrder lists the modules in the initramfs in load order, one path per
// line.
const modulesOrder = "/modules/order"

// newRoot is where the root disk is mounted before it becomes the root.
const newRoot = "/newroot"

// deviceTimeout is how long the root disk may take to appear.
const deviceTimeout = 30 * time.Second

// IsInit reports whether this process is pid 1 of a virtual machine: it was
// started from our initramfs. Pid 1 of a sandbox finds no such file.
func IsInit() bool {
	if os.Getpid() != 1 {
		return false
	}
	_, err := os.Lstat(modulesOrder)
	return err == nil
}

// A System is what Run has found and made.
type System struct {
	// CgroupMount is where cgroup2 is mounted, "" if it is not.
	CgroupMount string
	// MemoryMax and PIDsMax are the workload's shares of the machine.
	MemoryMax, PIDsMax int64
	// Port is the channel to the host if Run has needed it, else nil. It is the
	// caller's.
	Port *os.File
}

// Run boots. Faults that leave a usable system are printed and passed over. With
// guestproto.WaitWord on the kernel's command line it waits for the host before
// it touches the root disk. rehearse is called before that: it does what this
// process will have to do once, so that no copy of it has to.
func Run(rehearse func() error) (*System, error) {
	if err := mountKernel(); err != nil {
		return nil, err
	}
	openConsole()
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, fmt.Errorf("reading the kernel's command line: %w", err)
	}
	args := parseCmdline(string(line))
	if args["pyro.root"] == "" {
		return nil, errors.New("the kernel's command line lacks pyro.root=, which names the root disk")
	}
	if err := loadModules(); err != nil {
		return nil, err
	}
	s := &System{}
	s.begin()
	if !slices.Contains(strings.Fields(string(line)), guestproto.WaitWord) {
		return s, finish(args["pyro.root"], args["pyro.hostname"])
	}
	if s.Port, err = OpenPort(); err != nil {
		return nil, err
	}
	if err := releaseDevices(); err != nil {
		return nil, err
	}
	if err := rehearse(); err != nil {
		warn(err)
	}
	r, err := awaitHost(s.Port)
	if err == nil {
		err = goOn(args["pyro.root"], r)
	}
	if err := answer(s.Port, err); err != nil {
		return nil, fmt.Errorf("answering the host: %w", err)
	}
	return s, err
}

// begin does what depends neither on the machine's disk nor on its name, so that
// it is done already where a guest goes on from its wait.
func (s *System) begin() {
	// Their memory would be lost for as long as the machine runs.
	_ = os.RemoveAll("/modules")
	_ = os.Remove("/init")
	if err := unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		warn(fmt.Errorf("mounting cgroup2: %w", err))
	} else {
		s.CgroupMount = "/sys/fs/cgroup"
	}
	s.MemoryMax, s.PIDsMax = shares(memTotal())
	for _, step := range []func() error{raiseLimits, loopbackUp} {
		if err := step(); err != nil {
			warn(err)
		}
	}
}

// goOn boots the rest after the wait.
func goOn(root string, r guestproto.Resume) error {
	if err := refresh(r); err != nil {
		return err
	}
	if err := probeDevices(); err != nil {
		return err
	}
	if err := finish(root, r.Hostname); err != nil {
		return err
	}
	return bootID()
}

// finish brings up what depends on the machine's disk and name.
func finish(root, hostname string) error {
	if err := mountRoot(root); err != nil {
		return err
	}
	if err := switchRoot(); err != nil {
		return err
	}
	for _, step := range []func() error{mountTemporary, func() error { return nameHost(hostname) }, writeFiles, func() error { return machineID(writeMachineID) }} {
		if err := step(); err != nil {
			warn(err)
		}
	}
	return nil
}

// warn prints what went wrong and does not keep the machine from serving.
func warn(err error) { fmt.Fprintf(os.Stderr, "pyro-agent: warning: %v\n", err) }

func mountKernel() error {
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		// ptmxmode for /dev/pts/ptmx; gid 5 is tty in every distribution, so
		// that programs without privilege can still own their terminals.
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,gid=5,mode=620"},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return fmt.Errorf("making %s: %w", m.target, err)
		}
		err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data)
		if err != nil && !errors.Is(err, unix.EBUSY) { // mounted by the kernel itself
			return fmt.Errorf("mounting %s on %s: %w", m.kind, m.target, err)
		}
	}
	// Programs expect these; devtmpfs has only the devices.
	for link, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("making %s: %w", link, err)
		}
	}
	return nil
}

// openConsole makes the console the standard descriptors. The kernel may have
// found none in the initramfs.
func openConsole() {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	for i := range 3 {
		_ = unix.Dup3(fd, i, 0)
	}
	if fd > 2 {
		_ = unix.Close(fd)
	}
}

// parseCmdline reads the words name=value of the kernel's command line; a word
// that comes again counts last.
func parseCmdline(line string) map[string]string {
	out := make(map[string]string)
	for _, word := range strings.Fields(line) {
		if name, value, ok := strings.Cut(word, "="); ok {
			out[name] = value
		}
	}
	return out
}

func loadModules() error {
	data, err := os.ReadFile(modulesOrder)
	if err != nil {
		return fmt.Errorf("reading the list of modules: %w", err)
	}
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		path := strings.TrimSpace(s.Text())
		if path == "" {
			continue
		}
		if err := loadModule(path); err != nil {
			return fmt.Errorf("loading the module %s: %w", filepath.Base(path), err)
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) { // built in, or listed twice
		return nil
	}
	return err
}

func mountRoot(device string) error {
	if !strings.HasPrefix(device, "/dev/") {
		return fmt.Errorf("pyro.root=%s does not name a device", device)
	}
	for end := time.Now().Add(deviceTimeout); ; {
		if _, err := os.Stat(device); err == nil {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("the root disk %s has not appeared within %s", device, deviceTimeout)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return fmt.Errorf("making %s: %w", newRoot, err)
	}
	if err := unix.Mount(device, newRoot, "ext4", unix.MS_NOATIME, "discard"); err != nil {
		return fmt.Errorf("mounting the root disk %s: %w", device, err)
	}
	if err := growRoot(device, newRoot); err != nil {
		warn(fmt.Errorf("growing the root disk: %w", err))
	}
	return nil
}

// switchRoot makes the disk the root, with the kernel's file systems in it. See
// switch_root(8).
func switchRoot() error {
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		target := newRoot + dir
		if err := plainDir(target); err != nil {
			return fmt.Errorf("making %s in the root disk: %w", dir, err)
		}
		if err := unix.Mount(dir, target, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving %s into the root disk: %w", dir, err)
		}
	}
	if err := unix.Chdir(newRoot); err != nil {
		return fmt.Errorf("entering the root disk: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the root disk to /: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("changing to the root disk: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("changing to the root disk: %w", err)
	}
	return nil
}

// plainDir makes sure that path is a directory and no link, which would lead
// back into the initramfs.
func plainDir(path string) error {
	fi, err := os.Lstat(path)
	if err == nil && fi.IsDir() {
		return nil
	}
	if err == nil {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return os.Mkdir(path, 0o755)
}

// mountTemporary puts memory on /run and /tmp. Where an image has a link there,
// what it leads to is covered instead.
func mountTemporary() error {
	var errs []error
	for _, m := range []struct{ target, data string }{
		{"/run", "mode=0755"},
		{"/tmp", "mode=1777"},
	} {
		if err := mountTmpfs(m.target, m.data); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func mountTmpfs(target, data string) error {
	if fi, err := os.Lstat(target); err == nil && fi.Mode().Type() == fs.ModeSymlink {
		if to, err := os.Readlink(target); err == nil {
			if !filepath.IsAbs(to) {
				to = filepath.Join(filepath.Dir(target), to)
			}
			_ = os.MkdirAll(to, 0o755)
		}
	} else if err := os.MkdirAll(target, 0o755); err != nil {
		return fmt.Errorf("making %s: %w", target, err)
	}
	if err := unix.Mount("tmpfs", target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, data); err != nil {
		return fmt.Errorf("mounting memory on %s: %w", target, err)
	}
	return nil
}

// raiseLimits lets commands raise their own bound on open files as far as
// distributions do, and keeps the usual soft bound.
func raiseLimits() error {
	limit := unix.Rlimit{Cur: 1024, Max: 1 << 20}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("raising the limit on open files: %w", err)
	}
	return nil
}

// shares splits a machine's memory in bytes: what the workload may use, and how
// many processes it may have. The rest is for the kernel and the agent, so that
// a workload that takes all it can get is killed and the agent is not.
func shares(total int64) (memory, pids int64) {
	const mib = 1 << 20
	if total <= 0 {
		return 0, 0
	}
	reserve := min(max(total/8, 24*mib), 64*mib)
	if reserve > total/2 {
		reserve = total / 2
	}
	return total - reserve, min(max(total/(512<<10), 256), 16384)
}

// memTotal reads MemTotal of /proc/meminfo in bytes, 0 if it cannot.
func memTotal() int64 {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) >= 2 && f[0] == "MemTotal:" {
			kib, err := strconv.ParseInt(f[1], 10, 64)
			if err == nil {
				return kib << 10
			}
		}
	}
	return 0
}
