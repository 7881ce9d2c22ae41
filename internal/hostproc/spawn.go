package hostproc

import (
	"os/exec"
	"runtime"
)

// StartTied starts cmd, whose SysProcAttr has Pdeathsig set, so that the child
// dies with this process and not earlier: the kernel ties the signal to the
// thread that forked, and Go may end a thread whenever it likes, so the fork
// happens on a thread that lives as long as the process.
func StartTied(cmd *exec.Cmd) error {
	done := make(chan error)
	tiedStarts <- func() { done <- cmd.Start() }
	return <-done
}

var tiedStarts = func() chan<- func() {
	ch := make(chan func())
	go func() {
		runtime.LockOSThread()
		for start := range ch {
			start()
		}
	}()
	return ch
}()
