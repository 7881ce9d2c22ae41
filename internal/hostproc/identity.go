package hostproc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// Identity names one process for good: its pid together with its start time
// (clock ticks since boot, field 22 of /proc/PID/stat) and the boot's id.
type Identity struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"`
	BootID    string `json:"boot_id"`
}

// BootID returns the id of the running boot.
var BootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
})

// Identify returns the identity of a live process. A process that does not
// exist is api.ErrNotFound.
func Identify(pid int) (Identity, error) {
	if pid <= 1 {
		return Identity{}, api.Errorf(api.ErrInvalid, "pid %d is never one of ours", pid)
	}
	start, _, err := readStat(pid)
	if err != nil {
		return Identity{}, err
	}
	return Identity{PID: pid, StartTime: start, BootID: BootID()}, nil
}

// Alive reports whether exactly this process still runs. A zombie does not.
func (id Identity) Alive() bool {
	if id.PID <= 1 || id.BootID != BootID() {
		return false
	}
	start, state, err := readStat(id.PID)
	return err == nil && start == id.StartTime && state != 'Z' && state != 'X'
}

// Kill sends sig to exactly this process. A process that has ended already, or
// whose pid now belongs to somebody else, is a success without any signal.
func (id Identity) Kill(sig unix.Signal) error {
	if id.PID <= 1 {
		return api.Errorf(api.ErrInvalid, "refusing to signal pid %d", id.PID)
	}
	fd, err := unix.PidfdOpen(id.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening a pidfd of process %d: %w", id.PID, err)
	}
	defer unix.Close(fd)
	// Compared after the pidfd is open: from here on the pid cannot change
	// hands behind our back.
	if !id.Alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signalling process %d: %w", id.PID, err)
	}
	return nil
}

// WaitGone returns when the process has ended, or with ctx's error. It needs no
// parenthood.
func (id Identity) WaitGone(ctx context.Context) error {
	if id.PID <= 1 {
		return nil
	}
	fd, err := unix.PidfdOpen(id.PID, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	for id.Alive() {
		if ctx.Err() != nil {
			return fmt.Errorf("waiting for process %d to end: %w", id.PID, ctx.Err())
		}
		// A pidfd turns readable when the process ends. The short limit only
		// bounds how late a cancelled ctx is noticed.
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("waiting for process %d to end: %w", id.PID, err)
		}
	}
	return nil
}

// KillLadder ends the process: TERM, up to grace for it to go, KILL, and a
// further five seconds for the kernel to take it away. A grace of 0 starts
// with KILL.
func (id Identity) KillLadder(ctx context.Context, grace time.Duration) error {
	if grace > 0 {
		if err := id.Kill(unix.SIGTERM); err != nil {
			return err
		}
		waitCtx, cancel := context.WithTimeout(ctx, grace)
		err := id.WaitGone(waitCtx)
		cancel()
		if err == nil {
			return nil
		}
	}
	if err := id.Kill(unix.SIGKILL); err != nil {
		return err
	}
	waitCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return id.WaitGone(waitCtx)
}

// readStat returns start time and state of a process, by proc_pid_stat(5).
func readStat(pid int) (start uint64, state byte, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, 0, fmt.Errorf("process %d: %w", pid, api.ErrNotFound)
	}
	if err != nil {
		return 0, 0, err
	}
	// The second field is the command in parentheses and may hold anything,
	// parentheses included: count from the last one.
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, 0, api.Errorf(api.ErrDamaged, "reading the state of process %d: no command field", pid)
	}
	f := strings.Fields(string(b[i+1:]))
	// f[0] is field 3 (state), f[19] field 22 (start time).
	if len(f) < 20 {
		return 0, 0, api.Errorf(api.ErrDamaged, "reading the state of process %d: %d fields", pid, len(f))
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return 0, 0, fmt.Errorf("reading the start time of process %d: %w", pid, err)
	}
	return start, f[0][0], nil
}
