package process

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// entry is one process as /proc shows it, proc(5).
type entry struct {
	pid, parent    int
	group, session int
	started        uint64 // clock ticks since boot
	state          byte
}

// readEntry reads /proc/PID/stat.
func readEntry(pid int) (entry, bool) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return entry{}, false
	}
	return parseStat(pid, string(data))
}

// parseStat reads the fields after the command's name, which is in parentheses
// and may itself hold parentheses, blanks and newlines.
func parseStat(pid int, stat string) (entry, bool) {
	i := strings.LastIndexByte(stat, ')')
	if i < 0 {
		return entry{}, false
	}
	// Fields 3 (state), 4 (ppid), 5 (pgrp), 6 (session), 22 (starttime) of
	// proc(5).
	f := strings.Fields(stat[i+1:])
	if len(f) < 20 || len(f[0]) != 1 {
		return entry{}, false
	}
	e := entry{pid: pid, state: f[0][0]}
	var errs [4]error
	e.parent, errs[0] = strconv.Atoi(f[1])
	e.group, errs[1] = strconv.Atoi(f[2])
	e.session, errs[2] = strconv.Atoi(f[3])
	e.started, errs[3] = strconv.ParseUint(f[19], 10, 64)
	return e, errors.Join(errs[:]...) == nil
}

// dead reports whether the process has ended and only waits to be collected.
func (e entry) dead() bool { return e.state == 'Z' || e.state == 'X' }

// listProcesses reads all of /proc.
func listProcesses() []entry {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	out := make([]entry, 0, len(names))
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if e, ok := readEntry(pid); ok {
			out = append(out, e)
		}
	}
	return out
}

// hasEnviron reports whether pid was started with this variable.
func hasEnviron(pid int, variable string) bool {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return false
	}
	want := []byte(variable + "\x00")
	return bytes.HasPrefix(data, want) || bytes.Contains(data, append([]byte{0}, want...))
}

// signalEntry sends sig to the very process that e was read from: the number
// may have gone to another process since.
func signalEntry(e entry, sig syscall.Signal) {
	fd, err := unix.PidfdOpen(e.pid, 0)
	if err != nil {
		if err == unix.ENOSYS { // gVisor of 2026-05 has no pidfd
			if now, ok := readEntry(e.pid); ok && now.started == e.started {
				_ = syscall.Kill(e.pid, sig)
			}
		}
		return
	}
	defer unix.Close(fd)
	if now, ok := readEntry(e.pid); ok && now.started == e.started {
		_ = unix.PidfdSendSignal(fd, sig, nil, 0)
	}
}
