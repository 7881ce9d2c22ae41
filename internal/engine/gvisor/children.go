package gvisor

import (
	"bytes"
	"os"
	"strconv"
	"strings"

	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// childrenOf returns those of the processes that are live children of the first:
// for runsc run the sandbox and its file server. The processes that make up the
// guest are the sandbox's own children and end with it.
func childrenOf(pid int, processes []string) []hostproc.Identity {
	var out []hostproc.Identity
	for _, p := range processes {
		child, err := strconv.Atoi(p)
		if err != nil || parentOf(child) != pid {
			continue
		}
		if id, err := hostproc.Identify(child); err == nil {
			out = append(out, id)
		}
	}
	return out
}

// allProcesses are the names in /proc, among them the pid of every process.
func allProcesses() []string {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	return names
}

// parentOf returns a process's parent by proc_pid_stat(5), 0 if it is gone.
func parentOf(pid int) int {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0
	}
	// The command in parentheses may hold anything; field 4 is the second
	// after the last of them.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 2 {
		return 0
	}
	parent, _ := strconv.Atoi(f[1])
	return parent
}
