package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/boundedlog"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// The bounds of the logs, both halves together.
const (
	consoleLogMax    = 1 << 20
	supervisorLogMax = 1 << 20
)

// bootTimeout is how long a guest may take from start to its agent's first
// answer on a machine at full speed. An emulated guest gets
// Capabilities.TimeScale times as much, up to bootTimeoutMax: measured 8 s
// under TCG on an idle host.
const (
	bootTimeout    = 20 * time.Second
	bootTimeoutMax = 3 * time.Minute
)

// stopGrace is how long a guest has to power off by itself at full speed.
const stopGrace = 5 * time.Second

// supervisor is the running process.
type supervisor struct {
	cfg     Config
	dir     statedir.Machine
	log     *slog.Logger
	console *boundedlog.File

	// bootLimit is bootTimeout but in tests.
	bootLimit time.Duration
	// cancel ends the machine, and this process with it, for a reason.
	cancel context.CancelCauseFunc

	snapshotMu sync.Mutex // one snapshot at a time; guards disk
	disk       string     // the layer that the machine writes to

	mu      sync.Mutex // guards the following
	machine engine.Machine
	// dropsNetwork is Capabilities.SaveDropsNetwork.
	dropsNetwork bool
	status       Status
	expired      bool
	kept         bool        // the lease has been let go
	expiry       *time.Timer // nil without a time to live
	egress       *egress     // nil without a network

	published *publishing

	// up is closed when the machine and its network are there; until then a
	// supervisor that stands by waits for a wake request.
	up      chan struct{}
	standby *standby // nil without Config.Standby
	serving sync.WaitGroup
}

// Main runs the supervisor in this process, which has been started by [Spawn].
// engines makes the engines of this host. It returns the exit status and, if
// the machine ended because its time to live was over, the state directory in
// which it is for others to draw the consequences.
func Main(engines func(noteFile string, log *slog.Logger) []engine.Engine) (status int, expiredIn string) {
	time.AfterFunc(thriftDelay, thrift)
	resultPipe := os.NewFile(fdResult, "result")
	cfg, err := readConfig()
	if err != nil {
		// On stderr too, for a person who tried the command by hand.
		fmt.Fprintf(os.Stderr, "pyro: %v\nhint: %s\n", err, api.Hint(err))
		report(resultPipe, result{Error: api.ToWire(err)})
		return 1, ""
	}
	s, err := newSupervisor(cfg)
	if err != nil {
		report(resultPipe, result{Error: api.ToWire(err)})
		return 1, ""
	}
	status = s.run(resultPipe, engines(cfg.NoteFile, s.log))
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.expired && !s.cfg.Ephemeral {
		expiredIn = s.dir.StateDir()
		// No machine is this process's any more.
		if err := statedir.WriteJSON(s.dir.RecordFile(), record{ID: s.dir.ID(), Engine: s.cfg.Engine, CreatedAt: time.Now().UTC()}); err != nil {
			s.log.Error("writing the machine's record", "error", err)
		}
		// Whoever draws them in this process must not wait for it.
		unix.Close(fdLock)
	}
	return status, expiredIn
}

// thriftDelay is how long a supervisor does not collect its garbage often: a
// start makes more than all that comes after it, and should not wait for it.
const thriftDelay = 2 * time.Second

// thrift makes this process keep little garbage and give freed memory back: many
// of them run.
func thrift() {
	debug.SetGCPercent(50)
	debug.SetMemoryLimit(48 << 20)
	debug.FreeOSMemory()
}

func readConfig() (Config, error) {
	for fd := range fdHeld {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil {
			return Config{}, api.WithHint(api.Errorf(api.ErrInvalid, "descriptor %d is not open", fd),
				"%s is started by pyro itself, with its sockets; it is no command for people", Command)
		}
	}
	// Nothing that we inherited is for the machine's processes.
	if err := unix.CloseRange(fdConfig, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return Config{}, fmt.Errorf("marking the inherited files: %w", err)
	}
	f := os.NewFile(fdConfig, "config")
	defer f.Close()
	var cfg Config
	if err := json.NewDecoder(io.LimitReader(f, 1<<20)).Decode(&cfg); err != nil {
		return Config{}, fmt.Errorf("reading the supervisor's configuration: %w", err)
	}
	if cfg.Protocol != protocol {
		return Config{}, api.WithHint(api.Errorf(api.ErrUnsupported, "this pyro speaks version %d of the supervisor protocol, its caller %d", protocol, cfg.Protocol),
			"two versions of pyro are mixed here; install one")
	}
	return cfg, nil
}

func report(pipe *os.File, r result) {
	r.Protocol, r.PID = protocol, os.Getpid()
	_ = json.NewEncoder(pipe).Encode(r) // nobody to tell if the caller is gone
	pipe.Close()
}

func newSupervisor(cfg Config) (*supervisor, error) {
	dir := statedir.Machine(cfg.Dir)
	logFile, err := boundedlog.Open(dir.SupervisorLog(), supervisorLogMax)
	if err != nil {
		return nil, err
	}
	console, err := boundedlog.Open(dir.ConsoleLog(), consoleLogMax)
	if err != nil {
		return nil, err
	}
	s := &supervisor{
		cfg: cfg, dir: dir, console: console, bootLimit: bootTimeout, disk: cfg.Spec.Disk, published: newPublishing(), up: make(chan struct{}),
		log: slog.New(slog.NewTextHandler(logFile, nil)).With("machine", dir.ID()),
	}
	if cfg.Standby != nil {
		s.standby = &standby{wakes: make(chan wake)}
	}
	return s, nil
}

// ReasonExpired is the reason in Status.Exited of a machine whose time was over.
const ReasonExpired = "its time to live is over"

// endedError is the cause of the end of a machine that ended by itself.
type endedError string

func (e endedError) Error() string { return "the machine ended: " + string(e) }

// The reasons for the end of a machine, as causes of the context.
var (
	errStopped = errors.New("stopped on request")
	errExpired = errors.New(ReasonExpired)
	errLease   = errors.New("the command that started it is gone")
	errSignal  = errors.New("the supervisor was told to end")
)

func (s *supervisor) run(resultPipe *os.File, engines []engine.Engine) int {
	ctx, cancel := context.WithCancelCause(context.Background())
	s.cancel = func(cause error) {
		s.mu.Lock()
		if s.status.Exited == "" && cause != nil {
			// Who asks why a connection broke may do so before the end.
			s.status.Exited = cause.Error()
		}
		s.mu.Unlock()
		cancel(cause)
	}
	signals := make(chan os.Signal, 1)
	// A terminal's Ctrl-C and hang-up do not reach us, we have a session of our
	// own; TERM is for people and for the host's shutdown.
	signal.Notify(signals, syscall.SIGTERM)
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE)
	go func() {
		<-signals
		s.cancel(errSignal)
	}()
	if s.cfg.Leased {
		go s.watchLease()
	}
	s.setExpiry(s.cfg.TTL)
	defer s.setExpiry(0)
	err := checkNetwork(s.cfg.Network)
	answer := func(r result) { report(resultPipe, r) }
	if err == nil && s.cfg.Standby != nil {
		answer, err = s.standBy(ctx, resultPipe)
	}
	if err == nil {
		err = s.start(ctx, engines)
	}
	if err == nil {
		err = s.startNetwork(ctx)
	}
	if err == nil {
		s.mu.Lock()
		status := s.status
		s.mu.Unlock()
		close(s.up)
		answer(result{Status: &status})
		failpoint.Hit("supervise/reported")
		s.serve(ctx)
		failpoint.Hit("supervise-end/begun")
	}
	if err != nil && s.cfg.Standby != nil {
		answer(result{Error: api.ToWire(err)}) // while there is a connection for it
	}
	s.cancel(err)
	s.serving.Wait()
	s.end(context.Cause(ctx))
	if err == nil {
		return 0
	}
	if s.cfg.Standby == nil {
		// After the end, so that the caller who reads it finds nothing left.
		answer(result{Error: api.ToWire(err)})
	}
	return 1
}

// watchLease ends the machine when the caller's end of the pipe is closed,
// which the kernel does for a caller that was killed, unless the machine has
// been told to stay.
func (s *supervisor) watchLease() {
	f := os.NewFile(fdLease, "lease")
	_, _ = io.Copy(io.Discard, f)
	if s.leased() {
		s.cancel(errLease)
	}
}

// leased says whether the machine lives only as long as its caller.
func (s *supervisor) leased() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cfg.Leased && !s.kept
}

// setExpiry lets the machine end after ttl from now; 0 means never.
func (s *supervisor) setExpiry(ttl time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.expiry != nil {
		s.expiry.Stop()
	}
	s.expiry, s.status.ExpiresAt = nil, nil
	if ttl > 0 {
		at := time.Now().Add(ttl).UTC()
		s.status.ExpiresAt = &at
		s.expiry = time.AfterFunc(ttl, s.expire)
	}
}

// start brings the machine up to its agent's first answer.
func (s *supervisor) start(ctx context.Context, engines []engine.Engine) error {
	eng := byName(engines, s.cfg.Engine)
	if eng == nil {
		return api.Errorf(api.ErrInternal, "unknown engine %q", s.cfg.Engine)
	}
	var notes []string
	for {
		err := s.boot(ctx, eng, notes)
		if err == nil {
			return nil
		}
		s.log.Error("boot", "error", err)
		watcher, ok := eng.(engine.BootWatcher)
		m := s.current()
		if !ok || m == nil || ctx.Err() != nil {
			return err
		}
		retry, note := watcher.BootFailed(m)
		caps := eng.Probe(ctx)
		if !retry || len(notes) > 2 || !s.cfg.Require.Allows(caps.Isolation) {
			return err
		}
		notes = append(notes, note)
	}
}

func (s *supervisor) boot(ctx context.Context, eng engine.Engine, notes []string) error {
	began := time.Now()
	probed := make(chan engine.Capabilities, 1)
	go func() { probed <- eng.Probe(ctx) }()
	spec := s.cfg.Spec
	spec.Console, spec.Logger = s.console, s.log
	if err := os.MkdirAll(spec.Dir, 0o700); err != nil {
		return fmt.Errorf("making the engine's directory: %w", err)
	}
	failpoint.Hit("supervise/configured")
	m, err := eng.Start(ctx, spec)
	failpoint.Hit("supervise/running")
	if err != nil {
		return causeOf(ctx, err)
	}
	s.mu.Lock()
	s.machine = m
	s.mu.Unlock()
	s.writeRecord(m)
	failpoint.Hit("supervise/recorded")
	if b, ok := m.(engine.Beginner); ok {
		if warm, note := b.Began(); note != "" || warm {
			s.log.Info("began", "warm", warm, "note", note)
			if note != "" {
				notes = append(notes, note)
			}
		}
	}
	caps := <-probed
	hello, err := s.firstAnswer(ctx, m, caps)
	failpoint.Hit("supervise/answered")
	if err != nil {
		exited := s.exitReason(m)
		if stopErr := m.Stop(context.WithoutCancel(ctx), 0); stopErr != nil {
			s.log.Error("stopping a machine that did not boot", "error", stopErr)
		}
		return causeOf(ctx, s.bootError(eng, err, exited))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropsNetwork = caps.SaveDropsNetwork
	s.status = Status{
		ExpiresAt: s.status.ExpiresAt,
		ID:        s.dir.ID(), Engine: eng.Name(), Isolation: caps.Isolation, TimeScale: max(1, caps.TimeScale),
		StartedAt: began.UTC(), BootMS: time.Since(began).Milliseconds(),
		Kernel: hello.Kernel, PIDs: m.PIDs(), Notes: notes,
	}
	return nil
}

// firstAnswer waits for the guest agent, the machine's end, or the deadline.
func (s *supervisor) firstAnswer(ctx context.Context, m engine.Machine, caps engine.Capabilities) (guestproto.Hello, error) {
	limit := min(s.bootLimit*time.Duration(max(1, caps.TimeScale)), bootTimeoutMax)
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	go func() {
		if _, err := m.Wait(ctx); err == nil {
			cancel()
		}
	}()
	client := guestclient.New(m.DialGuest, guestclient.Options{})
	for {
		hello, err := client.Hello(ctx)
		if err == nil {
			return hello, nil
		}
		if ctx.Err() != nil || !errors.Is(err, api.ErrUnavailable) {
			return guestproto.Hello{}, err
		}
		// An engine whose channel refuses until the agent is up: try again soon.
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// exitReason returns why a machine has ended, "" if it has not.
func (s *supervisor) exitReason(m engine.Machine) string {
	// A guest that just panicked closes its channel a moment before its process
	// is reaped.
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	exit, err := m.Wait(ctx)
	if err != nil {
		return ""
	}
	return exit.Reason
}

// bootError makes one error with the guest's last words.
func (s *supervisor) bootError(eng engine.Engine, err error, exited string) error {
	var text string
	switch {
	case exited != "":
		text = "the guest did not come up: " + exited
	case errors.Is(err, context.DeadlineExceeded):
		text = "the guest did not come up in time"
	default:
		text = "the guest did not come up: " + err.Error()
	}
	if tail := lastWords(s.console.Tail(50)); len(tail) > 0 {
		text += "; its console ends:\n  " + strings.Join(tail, "\n  ")
	} else {
		text += "; its console says nothing"
	}
	hint := "try again with more memory (--mem-mib), and see pyro doctor"
	return api.WithHint(api.Errorf(api.ErrUnavailable, "starting a guest on %s: %s", eng.Name(), text), "%s", hint)
}

// causeOf names the reason instead of the cancelled context it showed up as.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return api.Errorf(api.ErrCanceled, "starting the guest: %v", cause)
	}
	return err
}

// serve answers until the machine is to end or has ended.
func (s *supervisor) serve(ctx context.Context) {
	m := s.current()
	go s.watchMachine(ctx, m)
	defer s.serving.Wait()
	if s.cfg.Spec.Disk != "" && strings.HasSuffix(s.cfg.Spec.Disk, "."+string(engine.DiskExt4)) {
		go s.watchSpace(ctx)
	}
	guest, err := inherited(fdGuest)
	if err != nil {
		s.log.Error("guest socket", "error", err)
		return
	}
	s.serving.Go(func() {
		err := guestconn.ServeHybrid(ctx, guest, func(ctx context.Context, port uint32) (net.Conn, error) {
			if port != guestPort {
				return nil, api.Errorf(api.ErrUnsupported, "the guest answers on port %d only", guestPort)
			}
			return m.DialGuest(ctx)
		}, s.log)
		if err != nil {
			s.log.Error("serving the guest socket", "error", err)
		}
	})
	if s.cfg.Standby == nil {
		s.serveControl(ctx)
	}
	<-ctx.Done()
}

// serveControl answers the control API in the background until ctx ends.
func (s *supervisor) serveControl(ctx context.Context) {
	control, err := inherited(fdControl)
	if err != nil {
		s.log.Error("control socket", "error", err)
		s.cancel(err)
		return
	}
	server := &http.Server{
		Handler:           s.handler(ctx),
		ReadHeaderTimeout: 5 * time.Second,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	s.serving.Go(func() { _ = server.Serve(control) })
	s.serving.Go(func() {
		<-ctx.Done()
		// Answers under way (to the stop that ends us) get a moment to leave.
		leaving, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = server.Shutdown(leaving)
		server.Close()
	})
}

// expire ends the machine because its time is over. A caller that holds the
// lease is left the chance to ask why its command broke off.
func (s *supervisor) expire() {
	s.mu.Lock()
	m, up := s.machine, s.status.ID != ""
	s.expired = true
	s.mu.Unlock()
	if !s.leased() || !up {
		s.cancel(errExpired)
		return
	}
	if err := m.Stop(context.Background(), 0); err != nil {
		s.log.Error("stopping an expired machine", "error", err)
		s.cancel(errExpired)
	}
}

// watchMachine takes note of a machine that ends by itself. A caller that holds
// the lease will want to know why its command broke off, so the supervisor then
// stays to be asked until the lease or the time to live is over.
func (s *supervisor) watchMachine(ctx context.Context, m engine.Machine) {
	exit, err := m.Wait(ctx)
	if err != nil {
		return
	}
	s.log.Info("machine ended", "reason", exit.Reason)
	s.mu.Lock()
	s.status.Exited = exit.Reason
	if s.expired {
		s.status.Exited = errExpired.Error()
	}
	s.mu.Unlock()
	if !s.leased() {
		s.cancel(endedError(exit.Reason))
	}
}

// current is the machine, nil before there is one.
func (s *supervisor) current() engine.Machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.machine
}

// end stops the machine and clears up.
func (s *supervisor) end(cause error) {
	s.mu.Lock()
	m := s.machine
	scale := max(1, s.status.TimeScale)
	s.mu.Unlock()
	s.log.Info("ending", "cause", cause)
	s.published.end()
	if m != nil {
		grace := time.Duration(0)
		// Nothing on an ephemeral disk is worth the time a clean power-off takes,
		// and nothing that one asleep has done since.
		var asleep sleepError
		if !s.cfg.Ephemeral && !errors.As(cause, &asleep) {
			grace = stopGrace * time.Duration(scale)
			s.powerOff(m, grace)
		}
		if err := m.Stop(context.Background(), grace); err != nil {
			s.log.Error("stopping the machine", "error", err)
		}
	}
	failpoint.Hit("supervise-end/stopped")
	if !s.cfg.Ephemeral {
		s.writeEnding(cause)
	}
	s.console.Close()
	if s.cfg.Ephemeral {
		if err := os.RemoveAll(s.dir.Path()); err != nil {
			s.log.Error("removing the machine's directory", "error", err)
		}
		return
	}
	for _, sock := range []string{s.dir.ControlSocket(), s.dir.GuestSocket()} {
		_ = os.Remove(sock)
	}
}

// writeEnding leaves word of how the machine ended.
func (s *supervisor) writeEnding(cause error) {
	e := Ending{At: time.Now().UTC(), Requested: errors.Is(cause, errStopped), Expired: errors.Is(cause, errExpired)}
	var ended endedError
	var asleep sleepError
	if errors.As(cause, &asleep) {
		e.Requested, e.Frozen = true, string(asleep)
	}
	switch {
	case errors.As(cause, &ended):
		e.Reason, e.Console = string(ended), lastWords(s.console.Tail(50))
	case cause != nil:
		e.Reason = cause.Error()
	}
	// A full disk may be the very reason.
	if err := statedir.WriteReservedJSON(s.dir.EndingFile(), e); err != nil {
		s.log.Error("writing how the machine ended", "error", err)
	}
}

// powerOff asks the guest agent for a clean end.
func (s *supervisor) powerOff(m engine.Machine, limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	client := guestclient.New(m.DialGuest, guestclient.Options{})
	if err := client.Shutdown(ctx, limit/2); err != nil {
		s.log.Warn("asking the guest to power off", "error", err)
	}
}

func (s *supervisor) writeRecord(m engine.Machine) {
	rec := record{ID: s.dir.ID(), Engine: s.cfg.Engine, CreatedAt: time.Now().UTC(), Ephemeral: s.cfg.Ephemeral}
	if id, err := hostproc.Identify(os.Getpid()); err == nil {
		rec.Supervisor = &id
	}
	var pids []int
	if m != nil {
		pids = m.PIDs()
	}
	for _, pid := range pids {
		if id, err := hostproc.Identify(pid); err == nil {
			rec.Processes = append(rec.Processes, id)
		}
	}
	if err := rec.write(s.dir); err != nil {
		s.log.Error("writing the machine's record", "error", err)
	}
}

func byName(engines []engine.Engine, name string) engine.Engine {
	for _, e := range engines {
		if e.Name() == name {
			return e
		}
	}
	return nil
}
