package gvisor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
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
	name   string
	memMiB int
	vcpus  int
	// dirs are the group's directories by controller: three in cgroup v1, one
	// under the key "" in cgroup v2.
	dirs map[string]string
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
	l.memMiB, l.vcpus = memMiB, vcpus
	// What the guest sees as its memory is the limit that runsc finds at the
	// start; settle raises it once runsc has looked.
	memory := strconv.FormatInt(int64(memMiB)<<20, 10)
	// Two processors are the fewest that runsc shows a guest. They are also what
	// a start makes use of; settle takes the second away again.
	quota := max(vcpus, 2) * cpuPeriod
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
	return l, nil
}

// path is the group's name for the OCI configuration, "" for none.
func (l *limits) path() string {
	if l == nil {
		return ""
	}
	return "/" + l.name
}

// settle sets the limits that hold from the guest's first answer on: the memory
// that the sandbox itself needs comes on top, and the processors are as many as
// the machine was given.
func (l *limits) settle() error {
	if l == nil {
		return nil
	}
	memory := strconv.FormatInt(int64(l.memMiB+sandboxOverheadMiB(l.memMiB))<<20, 10)
	quota := strconv.Itoa(l.vcpus * cpuPeriod)
	files := map[string]string{
		filepath.Join(l.dirs["memory"], "memory.limit_in_bytes"): memory,
		filepath.Join(l.dirs["cpu"], "cpu.cfs_quota_us"):         quota,
	}
	if dir, ok := l.dirs[""]; ok {
		files = map[string]string{
			filepath.Join(dir, "memory.max"): memory,
			filepath.Join(dir, "cpu.max"):    quota + " " + strconv.Itoa(cpuPeriod),
		}
	}
	for file, value := range files {
		if err := os.WriteFile(file, []byte(value), 0); err != nil {
			return fmt.Errorf("limiting the machine: %w", err)
		}
	}
	return nil
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

// kill kills every process in the group.
func (l *limits) kill() {
	if l != nil {
		killCgroup(l.name)
	}
}

// cgroupDirs returns the group's directories in all controllers.
func cgroupDirs(name string) []string {
	var out []string
	for _, pattern := range []string{filepath.Join(cgroupMount, name), filepath.Join(cgroupMount, "*", name)} {
		dirs, _ := filepath.Glob(pattern)
		out = append(out, dirs...)
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
			b, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			for _, line := range strings.Fields(string(b)) {
				pid, err := strconv.Atoi(line)
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

// remove removes the group, also from controllers that runsc added by itself.
// The kernel refuses as long as a process is in it, with cgroup v1 also a
// zombie. What stays after reapWait is for [Engine.Reap].
func (l *limits) remove() {
	if l == nil {
		return
	}
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
	for _, pattern := range []string{filepath.Join(cgroupMount, cgroupPrefix+"*"), filepath.Join(cgroupMount, "*", cgroupPrefix+"*")} {
		dirs, _ := filepath.Glob(pattern)
		for _, dir := range dirs {
			name := filepath.Base(dir)
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
