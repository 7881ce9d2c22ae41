package process

import (
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Reaper owns wait4 in this process: it collects the status of every child,
// those it started and the orphans that the kernel hands to it. Nothing else in
// the process may start children.
type Reaper struct {
	// mu is held while a child is forked and registered, and while statuses
	// are collected. So a child that ends at once is registered when its
	// status comes, and no pid is signalled that was collected meanwhile.
	mu       sync.Mutex
	children map[int]*Child

	sigchld chan os.Signal
	done    chan struct{}
	ended   sync.WaitGroup
}

// NewReaper starts a reaper. A process other than pid 1 becomes the one that
// orphaned descendants are handed to.
func NewReaper() (*Reaper, error) {
	if os.Getpid() != 1 {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return nil, os.NewSyscallError("prctl PR_SET_CHILD_SUBREAPER", err)
		}
	}
	r := &Reaper{
		children: make(map[int]*Child),
		sigchld:  make(chan os.Signal, 1),
		done:     make(chan struct{}),
	}
	signal.Notify(r.sigchld, unix.SIGCHLD)
	r.ended.Go(r.run)
	return r, nil
}

// Close stops collecting.
func (r *Reaper) Close() {
	signal.Stop(r.sigchld)
	close(r.done)
	r.ended.Wait()
}

func (r *Reaper) run() {
	for {
		r.collect()
		select {
		case <-r.sigchld:
		case <-r.done:
			return
		}
	}
}

// collect takes the status of every child that has ended. One SIGCHLD may
// stand for many.
func (r *Reaper) collect() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if c := r.children[pid]; c != nil {
			delete(r.children, pid)
			c.status = status
			close(c.done)
		}
	}
}

// A Child is a process that the reaper started.
type Child struct {
	PID int

	reaper *Reaper
	done   chan struct{}
	status syscall.WaitStatus
}

// start forks and registers a child.
func (r *Reaper) start(path string, argv []string, attr *syscall.ProcAttr) (*Child, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return nil, err
	}
	c := &Child{PID: pid, reaper: r, done: make(chan struct{})}
	r.children[pid] = c
	return c, nil
}

// Done is closed when the child has ended and its status is known.
func (c *Child) Done() <-chan struct{} { return c.done }

// ExitCode is the child's exit code, 128 and the signal's number if a signal
// ended it. Only valid after Done.
func (c *Child) ExitCode() int {
	if c.status.Signaled() {
		return 128 + int(c.status.Signal())
	}
	return c.status.ExitStatus()
}

// signal sends sig to the child, or to its process group, unless the child has
// ended: then the number may be another's.
func (c *Child) signal(sig syscall.Signal, group bool) {
	c.reaper.mu.Lock()
	defer c.reaper.mu.Unlock()
	if c.reaper.children[c.PID] != c {
		return
	}
	pid := c.PID
	if group {
		pid = -pid
	}
	_ = syscall.Kill(pid, sig)
}

// isRegistered reports whether pid is a child that was started, not adopted.
func (r *Reaper) isRegistered(pid int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.children[pid] != nil
}
