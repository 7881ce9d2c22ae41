package process

import (
	"context"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A sandbox has no control group that would hold its workload below the memory
// that it has in all (gVisor's count memory and enforce nothing), and the host
// ends the whole sandbox that goes over it. So the largest process is killed
// while there is still some room.
const (
	// roomShare is the part of the memory, one in so many, that stays free.
	roomShare = 10
	// worthKilling is the part of the memory, one in so many, that a process
	// must have to be killed.
	worthKilling = 32
	// fillRate is how fast a guest may fill memory, in bytes per second. Reading
	// /dev/zero in one call of 900 MiB takes gVisor 0.2 s.
	fillRate = 8 << 30
	// The bounds of the pause between two looks at the memory. A look takes
	// some 50 us.
	lookMin = 5 * time.Millisecond
	lookMax = 500 * time.Millisecond
)

// GuardMemory kills the largest process whenever less than a tenth of the
// memory is free, until ctx ends. A command that lost a process so reports it
// as the kernel's own doing, [Command.OOMKilled].
func (r *Runner) GuardMemory(ctx context.Context) {
	look := time.NewTimer(0)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
		total, free, ok := memory()
		pause := lookMin
		switch {
		case !ok:
			pause = lookMax
		case free < total/roomShare:
			r.killLargest(total)
		default:
			// As long as the fastest guest needs for half of what is free.
			pause = min(max(time.Duration(free/2)*time.Second/fillRate, lookMin), lookMax)
		}
		look.Reset(pause)
	}
}

// killLargest kills the process with the most memory of its own, apart from
// this one, and notes it with the command that it belongs to. Where the largest
// is small the memory is not in processes (in files of a tmpfs, say), and
// killing one would not help.
func (r *Runner) killLargest(total int64) {
	var largest entry
	var most int64
	for _, e := range listProcesses() {
		if e.pid == os.Getpid() || e.dead() {
			continue
		}
		if n := resident(e.pid); n > most {
			largest, most = e, n
		}
	}
	if most < total/worthKilling {
		return
	}
	r.active.noteKilled(largest.pid)
	if r.Workload != nil {
		r.Workload.noteKilled(largest.pid)
	}
	signalEntry(largest, syscall.SIGKILL)
	// Its memory comes back some time after it is gone, gVisor gives it back in
	// the background: until then the next largest is not to blame.
	waitFor(time.Second, func() bool {
		_, free, ok := memory()
		return ok && free >= total/roomShare
	})
}

// memory returns MemTotal and MemAvailable in bytes, proc_meminfo(5).
func memory() (total, free int64, ok bool) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0, false
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			continue
		}
		switch f[0] {
		case "MemTotal:":
			total = kib << 10
		case "MemAvailable:":
			free, ok = kib<<10, true
		}
	}
	return total, free, ok && total > 0
}

// resident returns a process's resident memory in bytes, 0 if it is gone:
// field 2 of /proc/PID/statm, proc_pid_statm(5).
func resident(pid int) int64 {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, err := strconv.ParseInt(f[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}
