package process

import (
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// A tree is everything that one command started.
type tree interface {
	// prepare changes how the command is started.
	prepare(attr *syscall.ProcAttr)
	// signal sends sig to every member.
	signal(sig syscall.Signal)
	// kill ends every member, also those that appear meanwhile, and reports
	// whether none is left. It returns after killLimit at the latest.
	kill() bool
	// empty reports whether no member runs.
	empty() bool
	// oomKilled reports whether a member was killed for want of memory.
	oomKilled() bool
	// remove gives up what the tree holds. Call it last.
	remove()
}

// killLimit bounds the time that kill takes. Only a process in an
// uninterruptible sleep, or a flood of new ones, takes so long.
const killLimit = 10 * time.Second

// waitFor calls done in growing intervals until it reports true or limit is
// over. Neither /proc nor a control group of a killed command can be waited
// for in one portable call.
func waitFor(limit time.Duration, done func() bool) bool {
	pause := 500 * time.Microsecond
	for end := time.Now().Add(limit); ; {
		if done() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
		time.Sleep(pause)
		pause = min(2*pause, 20*time.Millisecond)
	}
}

// active counts the commands whose trees are found through /proc. The orphans
// of one that hid its traces can only be told from another's when it is alone.
type active struct {
	mu sync.Mutex
	n  int
	// trees are the commands' trees, for noteKilled.
	trees map[*procTree]bool
}

// noteKilled tells the tree that pid belongs to that it loses a process for
// want of memory. It takes every tree's look at /proc, while pid still runs.
func (a *active) noteKilled(pid int) {
	a.mu.Lock()
	trees := slices.Collect(maps.Keys(a.trees))
	a.mu.Unlock()
	for _, t := range trees {
		for _, e := range t.members() {
			if e.pid == pid {
				t.oom.Store(true)
			}
		}
	}
}

func (a *active) add(d int) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.n += d
	return a.n
}

// procTree finds a command's tree in /proc.
type procTree struct {
	reaper *Reaper
	active *active
	marker string // NAME=VALUE, in the command's environment
	main   int    // pid, which is the session and group too
	since  uint64 // the main process's start
	self   int
	oom    atomic.Bool
}

func (t *procTree) prepare(attr *syscall.ProcAttr) {
	attr.Env = append(attr.Env, t.marker)
}

func (t *procTree) began(main int) {
	t.main = main
	if e, ok := readEntry(main); ok {
		t.since = e.started
	}
}

// members returns the tree's processes. A process belongs to it by session, by
// the marker, or by a parent that does. An orphan that hid from all three was
// handed to this process; it is taken for ours while no other command runs.
func (t *procTree) members() []entry {
	all := listProcesses()
	alone := t.active.add(0) == 1
	in := make(map[int]bool)
	var out []entry
	add := func(e entry) {
		in[e.pid] = true
		out = append(out, e)
	}
	for _, e := range all {
		if e.dead() || e.pid == t.self || e.started < t.since {
			continue
		}
		orphan := alone && e.parent == t.self && !t.reaper.isRegistered(e.pid)
		if e.session == t.main || orphan || hasEnviron(e.pid, t.marker) {
			add(e)
		}
	}
	for grown := true; grown; {
		grown = false
		for _, e := range all {
			if !in[e.pid] && in[e.parent] && !e.dead() && e.pid != t.self {
				add(e)
				grown = true
			}
		}
	}
	return out
}

func (t *procTree) signal(sig syscall.Signal) {
	for _, e := range t.members() {
		signalEntry(e, sig)
	}
}

func (t *procTree) kill() bool {
	clean := 0
	return waitFor(killLimit, func() bool {
		members := t.members()
		// Stopped first, so that none of them forks while the others die.
		for _, e := range members {
			signalEntry(e, syscall.SIGSTOP)
		}
		for _, e := range members {
			signalEntry(e, syscall.SIGKILL)
		}
		if len(members) == 0 {
			clean++
		} else {
			clean = 0
		}
		return clean == 2 // a fork may have hidden from the first look
	})
}

func (t *procTree) empty() bool     { return len(t.members()) == 0 }
func (t *procTree) oomKilled() bool { return t.oom.Load() }

func (t *procTree) remove() {
	t.active.add(-1)
	t.active.mu.Lock()
	defer t.active.mu.Unlock()
	delete(t.active.trees, t)
}

func newProcTree(r *Reaper, a *active, id string) *procTree {
	a.add(1)
	t := &procTree{reaper: r, active: a, marker: MarkerVariable + "=" + id, self: os.Getpid()}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.trees == nil {
		a.trees = map[*procTree]bool{}
	}
	a.trees[t] = true
	return t
}

// MarkerVariable is in the environment of every command whose tree is found
// through /proc, with a value of its own.
const MarkerVariable = "PYRO_EXEC_ID"
