package gvisor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// cgroupMount is where every distribution mounts the cgroup file systems.
const cgroupMount = "/sys/fs/cgroup"

// cgroupPrefix begins the name of every cgroup of ours. What follows is
// "ID.PID.STARTTIME" with the supervisor's pid and start time: whoever finds
// the group can tell whether its owner still lives.
const cgroupPrefix = "pyro-"

// Memory and tasks that the sandbox itself may use beyond what the guest was
// given. An idle sentry and gofer take 60 MiB, after much file work 110 MiB, and
// what a guest takes before the guest agent, which watches its memory, has
// killed the process that took it comes on top. Each guest process costs 0.3 MiB
// that the guest does not see, and the guest agent allows more of them to larger
// guests. Tasks are the host's, several for each guest thread; a guest that runs
// into that limit loses its whole sandbox, so it is only there to save the host.
const maxHostTasks = 16384

func sandboxOverheadMiB(memMiB int) int { return 256 + memMiB/2 }

// cpuPeriod is the kernel's default period of processor quotas, in microseconds.
const cpuPeriod = 100_000

// limits is the set of cgroups around one machine. A nil limits does nothing.
type limits struct {
	name  string
	vcpus int
	// dirs are the group's directories by controller: three in cgroup v1, one
	// under the key "" in cgroup v2.
	dirs  map[string]string
	doors []door // until start has been called
}

// Which cgroups this host has.
type cgroupKind int

const (
	cgroupNone cgroupKind = iota
	cgroupV1
	cgroupV2
)

// cgroups says what can be limited here, and why not where it cannot.
func cgroups() (cgroupKind, string) {
	if os.Geteuid() != 0 || inUserNamespace() {
		return cgroupNone, "needs root"
	}
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupMount, &st); err != nil {
		return cgroupNone, "no cgroup file system is mounted"
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		have, err := os.ReadFile(filepath.Join(cgroupMount, "cgroup.controllers"))
		if err != nil || !containsAll(strings.Fields(string(have)), v2Controllers) {
			return cgroupNone, "the memory, pids and cpu controllers are not all there"
		}
		if unix.Access(cgroupMount, unix.W_OK) != nil {
			return cgroupNone, cgroupMount + " is not writable"
		}
		return cgroupV2, ""
	}
	for _, c := range v1Controllers {
		if err := unix.Access(filepath.Join(cgroupMount, c), unix.W_OK); err != nil {
			return cgroupNone, fmt.Sprintf("cgroup controller %s: %v", c, err)
		}
	}
	return cgroupV1, ""
}

var (
	v1Controllers = []string{"memory", "pids", "cpu"}
	v2Controllers = []string{"memory", "pids", "cpu"}
)

func containsAll(have, want []string) bool {
	set := map[string]bool{}
	for _, h := range have {
		set[h] = true
	}
	for _, w := range want {
		if !set[w] {
			return false
		}
	}
	return true
}

// newLimits makes the machine's cgroups with their limits set, or returns nil
// where this host has none.
func newLimits(id string, memMiB, vcpus int) (*limits, error) {
	kind, _ := cgroups()
	if kind == cgroupNone {
		return nil, nil
	}
	self, err := hostproc.Identify(os.Getpid())
	if err != nil {
		return nil, fmt.Errorf("making the machine's cgroup: %w", err)
	}
	l := &limits{
		name: fmt.Sprintf("%s%s.%d.%d", cgroupPrefix, id, self.PID, self.StartTime),
		dirs: map[string]string{},
	}
	l.vcpus = vcpus
	memory := strconv.FormatInt(int64(memMiB+sandboxOverheadMiB(memMiB))<<20, 10)
	// A start makes use of a second processor; settle takes it away again.
	quota := max(vcpus, minGuestCPUs) * cpuPeriod
	type setting struct{ controller, file, value string }
	var settings []setting
	if kind == cgroupV1 {
		settings = []setting{
			{"memory", "memory.limit_in_bytes", memory},
			{"pids", "pids.max", strconv.Itoa(maxHostTasks)},
			{"cpu", "cpu.cfs_period_us", strconv.Itoa(cpuPeriod)},
			{"cpu", "cpu.cfs_quota_us", strconv.Itoa(quota)},
		}
	} else {
		control := filepath.Join(cgroupMount, "cgroup.subtree_control")
		if err := os.WriteFile(control, []byte("+"+strings.Join(v2Controllers, " +")), 0); err != nil {
			return nil, fmt.Errorf("enabling cgroup controllers: %w", err)
		}
		settings = []setting{
			{"", "memory.max", memory},
			{"", "memory.oom.group", "1"}, // half a sandbox is of no use
			{"", "pids.max", strconv.Itoa(maxHostTasks)},
			{"", "cpu.max", fmt.Sprintf("%d %d", quota, cpuPeriod)},
		}
	}
	for _, s := range settings {
		dir, ok := l.dirs[s.controller]
		if !ok {
			dir = filepath.Join(cgroupMount, s.controller, l.name)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
				l.remove()
				return nil, fmt.Errorf("making the machine's cgroup: %w", err)
			}
			l.dirs[s.controller] = dir
		}
		if err := os.WriteFile(filepath.Join(dir, s.file), []byte(s.value), 0); err != nil {
			l.remove()
			return nil, fmt.Errorf("limiting the machine: %w", err)
		}
	}
	if err := l.openDoors(); err != nil {
		l.remove()
		return nil, fmt.Errorf("making the machine's cgroup: %w", err)
	}
	return l, nil
}

// settle sets the limit that holds from the guest's first answer on: the
// processors are as many as the machine was given.
func (l *limits) settle() error {
	if l == nil || l.vcpus >= minGuestCPUs {
		return nil
	}
	quota := strconv.Itoa(l.vcpus * cpuPeriod)
	file := filepath.Join(l.dirs["cpu"], "cpu.cfs_quota_us")
	if dir, ok := l.dirs[""]; ok {
		file, quota = filepath.Join(dir, "cpu.max"), quota+" "+strconv.Itoa(cpuPeriod)
	}
	if err := os.WriteFile(file, []byte(quota), 0); err != nil {
		return fmt.Errorf("limiting the machine: %w", err)
	}
	return nil
}

// start starts cmd as a member of the group, in which everything that it starts
// stays. It is called once, on a thread that no other code runs on meanwhile, and
// which need not see the host's cgroups.
//
// runsc would join by itself, but with cgroup v1 as a whole process, for which
// the kernel waits for a grace period of RCU on the way in and one on the way out:
// 20 to 40 ms. A new process is made in the groups of the thread that makes it,
// and a single thread moves itself at once. With cgroup v2 a process is made
// where it belongs, clone(2).
func (l *limits) start(cmd *exec.Cmd) (err error) {
	if l == nil {
		return cmd.Start()
	}
	defer l.closeDoors()
	for _, d := range l.doors {
		if d.out == nil {
			cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(d.in.Fd())
			continue
		}
		if _, err := d.in.WriteString("0"); err != nil {
			return fmt.Errorf("entering the machine's cgroup: %w", err)
		}
		defer func() {
			if _, outErr := d.out.WriteString("0"); outErr != nil {
				err = errors.Join(err, fmt.Errorf("leaving the machine's cgroup: %w", outErr))
			}
		}()
	}
	return cmd.Start()
}

// A door leads a thread into a group of cgroup v1 and back to where this process
// is, by the files "tasks" of both. With cgroup v2 in is the group's directory.
type door struct{ in, out *os.File }

// openDoors opens what start needs.
func (l *limits) openDoors() error {
	home, err := ownCgroups()
	if err != nil {
		return err
	}
	for controller, dir := range l.dirs {
		var d door
		if controller == "" {
			if d.in, err = os.Open(dir); err != nil {
				return err
			}
		} else {
			if d.in, err = os.OpenFile(filepath.Join(dir, "tasks"), os.O_WRONLY, 0); err != nil {
				return err
			}
			if d.out, err = os.OpenFile(filepath.Join(home[controller], "tasks"), os.O_WRONLY, 0); err != nil {
				d.in.Close()
				return err
			}
		}
		l.doors = append(l.doors, d)
	}
	return nil
}

func (l *limits) closeDoors() {
	for _, d := range l.doors {
		d.in.Close()
		if d.out != nil {
			d.out.Close()
		}
	}
	l.doors = nil
}

// ownCgroups returns the directories of this process's groups of cgroup v1, by
// controller. In a container whose own group is not to be seen it is the root of
// what is.
func ownCgroups() (map[string]string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, c := range v1Controllers {
		out[c] = filepath.Join(cgroupMount, c)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3) // id:controllers:path, cgroups(7)
		if len(f) < 3 {
			continue
		}
		for _, c := range strings.Split(f[1], ",") {
			dir := filepath.Join(cgroupMount, c, f[2])
			if _, err := os.Lstat(filepath.Join(dir, "tasks")); err == nil {
				out[c] = dir
			}
		}
	}
	return out, nil
}

// outOfMemory reports whether the kernel has killed something in the group.
func (l *limits) outOfMemory() bool {
	if l == nil {
		return false
	}
	file := filepath.Join(l.dirs["memory"], "memory.oom_control")
	if dir, ok := l.dirs[""]; ok {
		file = filepath.Join(dir, "memory.events")
	}
	b, _ := os.ReadFile(file)
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) == 2 && f[0] == "oom_kill" {
			return f[1] != "0"
		}
	}
	return false
}

// processes returns the pids of the processes in the group; of all processes
// where there is no group.
func (l *limits) processes() []string {
	if l == nil {
		return allProcesses()
	}
	for _, dir := range l.dirs {
		return groupProcesses(dir) // they all hold the same
	}
	return nil
}

func groupProcesses(dir string) []string {
	b, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	return strings.Fields(string(b))
}

// kill kills every process in the group.
func (l *limits) kill() {
	if l != nil {
		killCgroup(l.name)
	}
}

// cgroupParents are the directories that a machine's groups are made in.
var cgroupParents = func() []string {
	out := []string{cgroupMount} // cgroup v2
	for _, c := range v1Controllers {
		out = append(out, filepath.Join(cgroupMount, c))
	}
	return out
}()

// cgroupDirs returns those of the group's directories that there are.
func cgroupDirs(name string) []string {
	var out []string
	for _, parent := range cgroupParents {
		dir := filepath.Join(parent, name)
		if _, err := os.Lstat(dir); err == nil {
			out = append(out, dir)
		}
	}
	return out
}

// killCgroup kills what runs in the group until nothing does. The sandbox ends
// with its parent by a signal that it asks for a moment after its start; killed
// before that moment, the parent leaves it, and only the group tells whose it is.
func killCgroup(name string) {
	for range 100 {
		found := false
		for _, dir := range cgroupDirs(name) {
			for _, p := range groupProcesses(dir) {
				pid, err := strconv.Atoi(p)
				if err != nil || pid <= 1 || pid == os.Getpid() {
					continue
				}
				if id, err := hostproc.Identify(pid); err == nil && id.Alive() {
					found = true
					_ = id.Kill(unix.SIGKILL)
				}
			}
		}
		if !found {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// reapWait is how long remove waits for the host's init to reap what was killed
// after its parent. Most do at once.
const reapWait = 5 * time.Second

// remove removes the group. The kernel refuses as long as a process is in it,
// with cgroup v1 also a zombie. What stays after reapWait is for [Engine.Reap].
func (l *limits) remove() {
	if l == nil {
		return
	}
	l.closeDoors()
	for deadline := time.Now().Add(reapWait); ; time.Sleep(time.Millisecond) {
		removeCgroup(l.name)
		if len(cgroupDirs(l.name)) == 0 || time.Now().After(deadline) {
			return
		}
	}
}

func removeCgroup(name string) {
	for _, dir := range cgroupDirs(name) {
		_ = unix.Rmdir(dir)
	}
}

// sweepCgroups removes the cgroups of machines whose supervisor is gone. A
// supervisor that was killed takes its processes with it, and leaves only them.
func sweepCgroups() {
	seen := map[string]bool{}
	for _, parent := range cgroupParents {
		entries, _ := os.ReadDir(parent)
		for _, e := range entries {
			name := e.Name()
			if owner, ok := cgroupOwner(name); ok && !seen[name] && !owner.Alive() {
				seen[name] = true
				killCgroup(name)
				removeCgroup(name)
			}
		}
	}
}

// cgroupOwner returns whose cgroup it is, by its name.
func cgroupOwner(name string) (hostproc.Identity, bool) {
	f := strings.Split(strings.TrimPrefix(name, cgroupPrefix), ".")
	if len(f) < 3 || !strings.HasPrefix(name, cgroupPrefix) {
		return hostproc.Identity{}, false
	}
	pid, err1 := strconv.Atoi(f[len(f)-2])
	start, err2 := strconv.ParseUint(f[len(f)-1], 10, 64)
	if err1 != nil || err2 != nil || pid <= 1 {
		return hostproc.Identity{}, false
	}
	return hostproc.Identity{PID: pid, StartTime: start, BootID: hostproc.BootID()}, true
}

// inUserNamespace reports whether root here is not root of the host: the
// initial namespace maps every id onto itself, user_namespaces(7).
func inUserNamespace() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false
	}
	f := strings.Fields(string(b))
	return len(f) != 3 || f[0] != "0" || f[1] != "0" || f[2] != "4294967295"
}
