package gvisor

import (
	"fmt"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// A namespace is a private mount namespace with one thread of this process in
// it. What is mounted there is seen by that thread and by the processes it
// starts, and by nobody else. It ends, with every mount in it, when the thread
// and those processes have: also when this process is killed.
//
// Doing this in a thread instead of a helper process saves a process per
// machine, and makes the parent-death signal of the children reliable: it is
// tied to the thread that forked them, which here lives as long as the machine.
type namespace struct {
	calls chan func()
	stop  chan struct{} // closed by close
	ended chan struct{}
}

// newNamespace returns a namespace that begins as a copy of the caller's. It
// follows the host's later mounts and unmounts, so that it never keeps a file
// system of the host busy; nothing goes the other way.
func newNamespace() (*namespace, error) {
	n := &namespace{calls: make(chan func()), stop: make(chan struct{}), ended: make(chan struct{})}
	ready := make(chan error)
	onOwnThread(func() {
		defer close(n.ended)
		if err := enterNamespace(); err != nil {
			ready <- err
			return
		}
		ready <- nil
		for {
			select {
			case call := <-n.calls:
				call()
			case <-n.stop:
				return
			}
		}
	})
	if err := <-ready; err != nil {
		return nil, err
	}
	return n, nil
}

func enterNamespace() error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return api.Errorf(api.ErrUnsupported, "making a private mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("cutting the mount namespace off: %w", err)
	}
	return nil
}

// onOwnThread runs f on an operating system thread that nothing else uses and
// that ends with f. It is never the process's main thread: the Go runtime
// cannot end that one, and it is the thread whose mounts /proc/self shows.
func onOwnThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			f()
			return // still locked, which ends the thread
		}
		elsewhere := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(elsewhere)
			f()
		}()
		<-elsewhere // blocked here, the main thread cannot be chosen again
		runtime.UnlockOSThread()
	}()
}

// do runs f in the namespace and returns its error. Calls run one after the
// other; f must not block for long. After close the answer is ErrUnavailable.
func (n *namespace) do(f func() error) error {
	done := make(chan error, 1)
	select {
	case n.calls <- func() { done <- f() }:
		return <-done
	case <-n.ended:
		return api.Errorf(api.ErrUnavailable, "the machine is gone")
	}
}

// start starts cmd in the namespace and in the cgroups of in, which may be nil.
// The child is killed when this process ends or the namespace is closed.
func (n *namespace) start(cmd *exec.Cmd, in *limits) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &unix.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	return n.do(func() error { return in.start(cmd) })
}

// close ends the thread and kills what start has started and still runs. It
// returns when the thread has let go of the namespace. It is called once.
func (n *namespace) close() {
	close(n.stop)
	<-n.ended
}
