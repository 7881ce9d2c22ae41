package gvisor

import (
	"bytes"
	"os"
	"strconv"
	"strings"

	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// childrenOf returns the live children of a process: for runsc run the sandbox
// and its file server. The processes that make up the guest are the sandbox's
// own children and end with it.
func childrenOf(pid int) []hostproc.Identity {
	var out []hostproc.Identity
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		child, err := strconv.Atoi(e.Name())
		if err != nil || parentOf(child) != pid {
			continue
		}
		if id, err := hostproc.Identify(child); err == nil {
			out = append(out, id)
		}
	}
	return out
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
