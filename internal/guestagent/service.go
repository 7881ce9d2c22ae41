package guestagent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/pyro-mcp/pyro/internal/guestagent/process"
	"github.com/pyro-mcp/pyro/internal/guestagent/ring"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

const (
	// settleTime is how long a service without a readiness check is watched
	// before its start counts as a success: a command that does not exist, or
	// refuses its arguments, has ended by then.
	settleTime = 200 * time.Millisecond
	// backoffMin and backoffMax bound the pause before a service is started
	// again. It doubles each time, and begins anew after stableTime.
	backoffMin = time.Second
	backoffMax = time.Minute
	stableTime = time.Minute
	// lookMin and lookMax bound the pause between two looks at the processes
	// of a service whose first process has ended: nobody tells their end.
	lookMin = 10 * time.Millisecond
	lookMax = 500 * time.Millisecond
)

// The states of a service.
const (
	serviceStarting = "starting"
	serviceRunning  = "running"
	serviceExited   = "exited"
	serviceStopped  = "stopped"
	serviceFailed   = "failed"
)

// A service is a command that runs in the background under a name, with all
// that it starts.
type service struct {
	name, command, cwd string
	runner             *process.Runner
	spec               process.Spec
	probe              *probe // nil if it is ready when it runs
	restart            bool
	out                [2]*ring.Ring // stdout, stderr

	settled chan struct{} // closed when its start has succeeded or not
	settle  func()
	stopped chan struct{} // closed when it is to end
	done    chan struct{} // closed when it has ended for good

	mu         sync.Mutex
	state      string
	started    time.Time
	ready      *time.Time
	ended      *time.Time
	exitCode   *int
	pid        *int
	stopReason string
	stopGrace  time.Duration
	restarts   int64
}

// outcome is how one run of a service has ended.
type outcome struct {
	begun  bool // its command was started
	code   int
	failed error // it did not become ready, or could not be started
	oom    bool
	ran    time.Duration
}

// run runs the service until it is over.
func (sv *service) run() {
	defer close(sv.done)
	defer sv.settle()
	defer sv.out[0].End()
	defer sv.out[1].End()
	pause := backoffMin
	for {
		o := sv.once()
		if o.ran >= stableTime {
			pause = backoffMin
		}
		first := sv.neverReady()
		switch {
		case sv.isStopped():
			sv.over(serviceStopped, o, sv.reason())
			return
		case first && o.failed != nil:
			sv.over(serviceFailed, o, o.failed.Error())
			return
		case first, !sv.restart, o.failed == nil && o.code == 0 && !o.oom:
			sv.over(serviceExited, o, o.text())
			return
		}
		sv.wait(pause)
		if sv.isStopped() {
			sv.over(serviceStopped, o, sv.reason())
			return
		}
		pause = min(2*pause, backoffMax)
	}
}

func (o outcome) text() string {
	switch {
	case o.oom:
		return "killed for want of memory"
	case o.failed != nil:
		return o.failed.Error()
	}
	return fmt.Sprintf("ended with status %d", o.code)
}

// wait pauses before the service is started again.
func (sv *service) wait(pause time.Duration) {
	sv.mu.Lock()
	sv.state, sv.pid = serviceStarting, nil
	sv.restarts++
	sv.mu.Unlock()
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-t.C:
	case <-sv.stopped:
	}
}

// once starts the command, waits for its end, and leaves nothing of it running.
func (sv *service) once() (o outcome) {
	began := time.Now()
	cmd, outputs, err := sv.start()
	if err != nil {
		return outcome{failed: fmt.Errorf("it could not be started: %w", err)}
	}
	recorded := make(chan struct{})
	go func() {
		defer close(recorded)
		_ = pumpAll(outputs[:], func(stream int, p []byte) error {
			_, err := sv.out[stream].Write(p)
			return err
		})
	}()
	sv.mu.Lock()
	sv.pid, sv.state = &cmd.PID, serviceStarting
	sv.mu.Unlock()

	o.begun = true
	o.failed = sv.watch(cmd)
	cmd.Kill()
	for _, out := range outputs {
		out.flush()
	}
	<-recorded
	t := time.NewTimer(reapLimit)
	defer t.Stop()
	select {
	case <-cmd.Done():
		o.code = cmd.ExitCode()
	case <-t.C:
		o.failed = errors.New("it cannot be killed: it hangs in the guest's kernel")
	}
	o.oom, o.ran = cmd.OOMKilled(), time.Since(began)
	cmd.Release()
	return o
}

// watch returns when the run is over: all of it has ended by itself, it did not
// become ready, or it was stopped.
func (sv *service) watch(cmd *process.Command) (failed error) {
	ctx, cancel := context.WithCancel(context.Background())
	gone := make(chan struct{})
	var watchers sync.WaitGroup
	defer watchers.Wait()
	defer cancel()
	watchers.Go(func() {
		if sv.untilGone(ctx, cmd) {
			close(gone)
		}
	})
	probed := make(chan error, 1)
	watchers.Go(func() { probed <- sv.probeOnce(ctx) })
	ready := sv.probe == nil
	for {
		select {
		case <-gone:
			if !ready {
				return fmt.Errorf("it ended with status %d before it was ready", cmd.ExitCode())
			}
			return nil
		case <-sv.stopped:
			sv.mu.Lock()
			grace := sv.stopGrace
			sv.mu.Unlock()
			cmd.Terminate(grace)
			return nil
		case err := <-probed:
			if err != nil {
				cmd.Terminate(killGrace)
				return err
			}
			ready, probed = true, nil
			sv.becameReady()
		}
	}
}

// probeOnce waits until the service is ready.
func (sv *service) probeOnce(ctx context.Context) error {
	if sv.probe != nil {
		return sv.probe.wait(ctx)
	}
	t := time.NewTimer(settleTime)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (sv *service) becameReady() {
	now := time.Now()
	sv.mu.Lock()
	sv.state = serviceRunning
	sv.ready = &now
	sv.mu.Unlock()
	sv.settle()
}

// untilGone returns true when the command has ended, and where it has ended with
// status 0 also what it left running: a daemon that went to the background.
func (sv *service) untilGone(ctx context.Context, cmd *process.Command) bool {
	select {
	case <-cmd.Done():
	case <-ctx.Done():
		return false
	}
	if cmd.ExitCode() != 0 {
		return true
	}
	sv.mu.Lock()
	sv.pid = nil
	sv.mu.Unlock()
	for pause := lookMin; !cmd.Quiet(); pause = min(2*pause, lookMax) {
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return false
		}
	}
	return true
}

// start starts the command with its outputs in pipes.
func (sv *service) start() (*process.Command, [2]*output, error) {
	var outputs [2]*output
	spec := sv.spec
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, outputs, err
	}
	defer null.Close()
	spec.Files[0] = null
	undo := func() {
		for _, o := range outputs {
			if o != nil {
				o.close()
			}
		}
	}
	for i := range outputs {
		parent, child, err := newPipe(false)
		if err != nil {
			undo()
			return nil, outputs, err
		}
		defer child.Close()
		outputs[i] = &output{f: parent}
		spec.Files[i+1] = child
	}
	cmd, err := sv.runner.Start(spec)
	if err != nil {
		undo()
		return nil, outputs, err
	}
	return cmd, outputs, nil
}

// stop asks the service to end. The first reason counts.
func (sv *service) stop(reason string, grace time.Duration) {
	sv.mu.Lock()
	defer sv.mu.Unlock()
	select {
	case <-sv.stopped:
	default:
		sv.stopReason, sv.stopGrace = reason, grace
		close(sv.stopped)
	}
}

func (sv *service) isStopped() bool {
	select {
	case <-sv.stopped:
		return true
	default:
		return false
	}
}

func (sv *service) neverReady() bool {
	sv.mu.Lock()
	defer sv.mu.Unlock()
	return sv.ready == nil
}

func (sv *service) reason() string {
	sv.mu.Lock()
	defer sv.mu.Unlock()
	return sv.stopReason
}

func (sv *service) over(state string, o outcome, reason string) {
	now := time.Now()
	sv.mu.Lock()
	defer sv.mu.Unlock()
	sv.state, sv.ended, sv.pid, sv.stopReason = state, &now, nil, reason
	if o.begun {
		sv.exitCode = &o.code
	}
}

// isOver reports whether the service is over for good.
func (sv *service) isOver() bool {
	select {
	case <-sv.done:
		return true
	default:
		return false
	}
}

func (sv *service) message() guestproto.Service {
	sv.mu.Lock()
	defer sv.mu.Unlock()
	at := func(t *time.Time) *float64 {
		if t == nil {
			return nil
		}
		e := epoch(*t)
		return &e
	}
	m := guestproto.Service{
		ServiceName: sv.name, Command: sv.command, Cwd: sv.cwd, State: sv.state,
		StartedAt: epoch(sv.started), ReadyAt: at(sv.ready), EndedAt: at(sv.ended),
		ExitCode: sv.exitCode, PID: sv.pid, Restarts: sv.restarts,
	}
	if sv.probe != nil {
		check := sv.probe.check
		m.Readiness = &check
	}
	if sv.ended != nil {
		reason := sv.stopReason
		m.StopReason = &reason
	}
	return m
}
