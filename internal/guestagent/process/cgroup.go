package process

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Workload is the control group that every command's group lies in. Its
// limits keep commands from starving the guest agent.
type Workload struct {
	dir     string
	pidsMax int64 // for one command; 0 means none

	mu sync.Mutex
	// killed names the groups that lost a process to GuardMemory: gVisor
	// counts no memory.events.
	killed map[string]bool
}

// noteKilled tells the group that pid is in that it loses a process for want of
// memory. It must be called while pid still runs.
func (w *Workload) noteKilled(pid int) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return
	}
	// "0::/workload/exec-ID", cgroups(7); the command may have made groups below.
	for element := range strings.SplitSeq(strings.TrimSpace(string(b)), "/") {
		if strings.HasPrefix(element, execPrefix) {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.killed == nil {
				w.killed = map[string]bool{}
			}
			w.killed[element] = true
			return
		}
	}
}

func (w *Workload) lost(group string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.killed[group]
}

func (w *Workload) forget(group string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.killed, group)
}

// execPrefix begins the name of each command's group.
const execPrefix = "exec-"

// NewWorkload makes the workload's group below the cgroup2 file system at
// mount. memoryMax in bytes and pidsMax bound all commands together; 0 means no
// bound. One command alone gets three quarters of the pids, and as much of the
// processors as any other command that wants them, so that a fork bomb leaves room
// and time for the command that looks into it.
//
// A controller that the kernel lacks is not an error; its bound is then absent
// and named in missing.
func NewWorkload(mount string, memoryMax, pidsMax int64) (w *Workload, missing []string, err error) {
	dir := filepath.Join(mount, "workload")
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, nil, fmt.Errorf("making the workload's control group: %w", err)
	}
	enable := func(controller string) bool {
		for _, d := range []string{mount, dir} {
			if err := os.WriteFile(filepath.Join(d, "cgroup.subtree_control"), []byte("+"+controller), 0); err != nil {
				missing = append(missing, controller)
				return false
			}
		}
		return true
	}
	limit := func(file string, n int64) error {
		if n <= 0 {
			return nil
		}
		return os.WriteFile(filepath.Join(dir, file), []byte(strconv.FormatInt(n, 10)), 0)
	}
	if enable("memory") {
		if err := limit("memory.max", memoryMax); err != nil {
			return nil, nil, fmt.Errorf("limiting the workload's memory: %w", err)
		}
	}
	enable("cpu") // the kernel shares it out among groups by itself
	w = &Workload{dir: dir}
	if enable("pids") {
		if err := limit("pids.max", pidsMax); err != nil {
			return nil, nil, fmt.Errorf("limiting the workload's processes: %w", err)
		}
		w.pidsMax = pidsMax * 3 / 4
	}
	return w, missing, nil
}

// cgroupTree is a command's tree as a control group, cgroup-v2.rst.
type cgroupTree struct {
	workload *Workload
	dir      string
	fd       int
}

func newCgroupTree(w *Workload, id string) (*cgroupTree, error) {
	dir := filepath.Join(w.dir, execPrefix+id)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the command's control group: %w", err)
	}
	t := &cgroupTree{workload: w, dir: dir, fd: -1}
	if w.pidsMax > 0 {
		// Absent where the controller is; the workload's bound still holds.
		_ = os.WriteFile(filepath.Join(dir, "pids.max"), []byte(strconv.FormatInt(w.pidsMax, 10)), 0)
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		_ = os.Remove(dir)
		return nil, fmt.Errorf("opening the command's control group: %w", err)
	}
	t.fd = fd
	return t, nil
}

func (t *cgroupTree) prepare(attr *syscall.ProcAttr) {
	// The child is born in the group (clone3 with CLONE_INTO_CGROUP, Linux
	// 5.7), so nothing it starts can be outside.
	attr.Sys.UseCgroupFD = true
	attr.Sys.CgroupFD = t.fd
}

func (t *cgroupTree) signal(sig syscall.Signal) {
	for _, pid := range t.pids() {
		_ = syscall.Kill(pid, sig)
	}
}

// pids lists the members, those of groups that the command made below its own
// too.
func (t *cgroupTree) pids() []int {
	var out []int
	_ = filepath.WalkDir(t.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		for _, word := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(word); err == nil && pid > 1 {
				out = append(out, pid)
			}
		}
		return nil
	})
	return out
}

func (t *cgroupTree) kill() bool {
	return waitFor(killLimit, func() bool {
		// One write kills all members at once, forks included (Linux 5.14).
		if err := os.WriteFile(filepath.Join(t.dir, "cgroup.kill"), []byte("1"), 0); err != nil {
			t.signal(syscall.SIGKILL)
		}
		return t.empty()
	})
}

func (t *cgroupTree) empty() bool {
	n, ok := readCounter(filepath.Join(t.dir, "cgroup.events"), "populated")
	return ok && n == 0
}

func (t *cgroupTree) oomKilled() bool {
	n, ok := readCounter(filepath.Join(t.dir, "memory.events"), "oom_kill")
	return ok && n > 0 || t.workload.lost(filepath.Base(t.dir))
}

func (t *cgroupTree) remove() {
	t.workload.forget(filepath.Base(t.dir))
	_ = unix.Close(t.fd)
	// Deepest first: a group with groups in it cannot be removed.
	var dirs []string
	_ = filepath.WalkDir(t.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		_ = os.Remove(dirs[i])
	}
}

// readCounter finds one "name number" line in a control file.
func readCounter(file, name string) (int64, bool) {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, false
	}
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		if word, number, ok := strings.Cut(s.Text(), " "); ok && word == name {
			n, err := strconv.ParseInt(number, 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
