package guestagent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestagent/process"
	"github.com/pyro-mcp/pyro/internal/guestagent/ring"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

const (
	// maxConnections is how many requests are served at once; more are told
	// that the agent is busy.
	maxConnections = 1024
	// requestTimeout is how long a request line may take. It is generous
	// because an emulated guest may be very busy.
	requestTimeout = 60 * time.Second
	// lingerTimeout is how long a caller may take to read an answer and hang
	// up once the agent has nothing more to do.
	lingerTimeout = 60 * time.Second
	// maxLinger bounds what is read, and thrown away, of a caller that goes on
	// sending after the answer.
	maxLinger = 1 << 30
)

// Config says how a Server works.
type Config struct {
	Version string
	// Root is the directory that guest paths are resolved below; "/" in a
	// guest.
	Root   string
	Runner *process.Runner
	Logger *slog.Logger
	// InheritEnv gives commands the agent's own PATH, HOME and USER instead of
	// a guest's usual ones.
	InheritEnv bool
	// OwnNetwork says that the guest's network devices are its own and may be
	// changed; a plain process has its host's.
	OwnNetwork bool
	// Resume does what a Resume asks for, as far as it is not the server's own;
	// nil where the guest cannot be copied or stood still.
	Resume func(guestproto.Resume) error
	// PowerOff ends the guest, or this process. It is called once, after the
	// reply to a shutdown, with the grace that the workload is to have.
	PowerOff func(grace time.Duration)
}

// A Server answers requests.
type Server struct {
	Config
	bootID   atomic.Pointer[string]
	active   atomic.Int64
	wg       sync.WaitGroup
	shutdown sync.Once
	// switching is held, by a value in it, while a sync changes the workspace.
	switching chan struct{}
	// attached is held, by a value in it, while the guest has a network.
	attached chan struct{}

	shells   shells
	services services
}

// NewServer returns a server with a boot id of its own. First it rolls back a
// sync that an earlier agent below the same root did not complete; no other may
// be serving there.
func NewServer(c Config) (*Server, error) {
	budget := ring.NewBudget()
	s := &Server{
		Config: c, switching: make(chan struct{}, 1), attached: make(chan struct{}, 1),
		shells: shells{budget: budget}, services: services{budget: budget},
	}
	if err := s.newBootID(); err != nil {
		return nil, err
	}
	recoverStages(c.Root, c.Logger)
	return s, nil
}

// EndWorkload ends all shells and services, the services with that much time
// between TERM and KILL, and lets none begin. It returns when they are gone.
func (s *Server) EndWorkload(grace time.Duration) {
	var wg sync.WaitGroup
	wg.Go(s.shells.end)
	wg.Go(func() { s.services.end(grace) })
	wg.Wait()
}

// An Acceptor is where connections come from: a net.Listener or a multiplexed
// session.
type Acceptor interface {
	Accept() (net.Conn, error)
}

// Serve answers every connection of a in a goroutine of its own until Accept
// fails, and returns why; the connections go on. Their requests end with ctx.
func (s *Server) Serve(ctx context.Context, a Acceptor) error {
	for {
		c, err := a.Accept()
		if err != nil {
			var temporary interface{ Temporary() bool }
			if errors.As(err, &temporary) && temporary.Temporary() && ctx.Err() == nil {
				select {
				case <-time.After(20 * time.Millisecond): // out of descriptors
					continue
				case <-ctx.Done():
				}
			}
			return err
		}
		s.wg.Go(func() { s.Handle(ctx, c) })
	}
}

// Wait returns when no request is being served any more.
func (s *Server) Wait() { s.wg.Wait() }

// Handle serves one connection to its end and closes it. A panic in it ends
// the connection, not the agent.
func (s *Server) Handle(ctx context.Context, c net.Conn) {
	s.wg.Add(1)
	defer s.wg.Done()
	defer c.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A caller that must be hung up on is, also while a Read or Write waits.
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	q := &request{server: s, conn: c, done: make(chan struct{})}
	defer close(q.done)
	q.r = bufio.NewReaderSize(c, 16<<10)
	defer func() {
		if v := recover(); v != nil {
			s.Logger.Error("a request made the guest agent panic", "panic", v, "stack", string(debug.Stack()))
			q.fail(api.Errorf(api.ErrInternal, "the guest agent met a fault of its own: %v", v))
		}
		q.linger()
	}()
	if s.active.Add(1) > maxConnections {
		s.active.Add(-1)
		q.fail(api.Errorf(api.ErrBusy, "the guest agent serves %d requests already", maxConnections))
		return
	}
	defer s.active.Add(-1)
	if err := q.serve(ctx); err != nil {
		q.fail(err)
	}
}

// A request is one connection's request and the means to answer it.
type request struct {
	server *Server
	conn   net.Conn
	r      *bufio.Reader
	done   chan struct{} // closed when the connection is over

	stream   bool // answer in frames
	writeMu  sync.Mutex
	answered bool // the last answer was sent
	gone     bool // the caller has hung up: nothing more to say
}

func (q *request) serve(ctx context.Context) error {
	_ = q.conn.SetReadDeadline(time.Now().Add(requestTimeout))
	line, err := guestproto.ReadLine(q.r, guestproto.MaxLine)
	if err != nil {
		if !errors.Is(err, api.ErrDamaged) {
			q.gone = true // hung up, or never said anything
			return nil
		}
		return api.Errorf(api.ErrInvalid, "reading the request: %w", err)
	}
	_ = q.conn.SetReadDeadline(time.Time{})
	var env guestproto.Envelope
	if err := decodeRequest(line, &env); err != nil {
		return err
	}
	if env.Version > guestproto.Version {
		return api.WithHint(api.Errorf(api.ErrUnsupported,
			"the request needs protocol version %d, the guest agent speaks %d", env.Version, guestproto.Version),
			"install pyro and pyro-agent of the same release, then start the workspace anew")
	}
	q.stream = env.Stream
	switch env.Action {
	case guestproto.ActionHello:
		return q.reply(q.server.hello())
	case guestproto.ActionExec, "":
		return q.exec(ctx, line)
	case guestproto.ActionExtractArchive:
		return q.extract(ctx, line)
	case guestproto.ActionExportArchive:
		return q.export(ctx, line)
	case guestproto.ActionSuspend:
		return q.suspend(ctx)
	case guestproto.ActionResume:
		return q.resume(line)
	case guestproto.ActionSetSecrets:
		return q.setSecrets(line)
	case guestproto.ActionOwnWorkspace:
		return q.ownWorkspace(line)
	case guestproto.ActionShutdown:
		return q.shutdown(line)
	case guestproto.ActionFlush:
		return q.flush()
	case guestproto.ActionManifest:
		return q.manifest(ctx, line)
	case guestproto.ActionListFiles:
		return q.listFiles(ctx, line)
	case guestproto.ActionReadFile:
		return q.readFile(ctx, line)
	case guestproto.ActionWriteFile:
		return q.writeFile(ctx, line)
	case guestproto.ActionAttachNetwork:
		return q.attachNetwork(ctx, line)
	case guestproto.ActionDialTCP:
		return q.dialTCP(ctx, line)
	case guestproto.ActionSync:
		return q.sync(ctx, line)
	case guestproto.ActionExportFiles:
		return q.exportFiles(ctx, line)
	case guestproto.ActionOpenShell:
		return q.openShell(line)
	case guestproto.ActionReadShell:
		return q.readShell(ctx, line)
	case guestproto.ActionWriteShell:
		return q.writeShell(line)
	case guestproto.ActionSignalShell:
		return q.signalShell(line)
	case guestproto.ActionResizeShell:
		return q.resizeShell(line)
	case guestproto.ActionCloseShell:
		return q.closeShell(line)
	case guestproto.ActionListShells:
		return q.listShells()
	case guestproto.ActionAttachShell:
		return q.attachShell(ctx, line)
	case guestproto.ActionStartService:
		return q.startService(ctx, line)
	case guestproto.ActionStatusService:
		return q.statusService(line)
	case guestproto.ActionLogsService:
		return q.logsService(ctx, line)
	case guestproto.ActionStopService:
		return q.stopService(line)
	case guestproto.ActionListServices:
		return q.listServices()
	}
	return api.Errorf(api.ErrUnsupported, "the guest agent does not know the action %q", env.Action)
}

// decodeRequest decodes strictly; every fault is the caller's.
func decodeRequest(line []byte, v any, required ...string) error {
	if err := guestproto.Decode(line, v, required...); err != nil {
		return api.Errorf(api.ErrInvalid, "reading the request: %w", err)
	}
	return nil
}

func (s *Server) hello() guestproto.Hello {
	h := guestproto.Hello{
		Protocol:     guestproto.Version,
		AgentVersion: s.Version,
		BootID:       *s.bootID.Load(),
		Capabilities: []string{
			guestproto.CapExecStream, guestproto.CapArchiveStream, guestproto.CapShutdown, guestproto.CapTTY,
			guestproto.CapFiles, guestproto.CapSync, guestproto.CapShells, guestproto.CapServices,
			guestproto.CapDialTCP,
		},
	}
	if s.OwnNetwork {
		h.Capabilities = append(h.Capabilities, guestproto.CapNetwork)
	}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	return h
}

func (q *request) shutdown(line []byte) error {
	var req guestproto.Shutdown
	if err := decodeRequest(line, &req); err != nil {
		return err
	}
	const maxGrace = 10 * 60 * 1000
	if req.GraceMS < 0 || req.GraceMS > maxGrace {
		return api.Errorf(api.ErrInvalid, "a grace of %d ms is not between 0 and %d", req.GraceMS, maxGrace)
	}
	if err := q.reply(guestproto.ShutdownReply{OK: true}); err != nil {
		return err
	}
	s := q.server
	s.shutdown.Do(func() {
		go func() {
			// The caller has the answer before everything goes, unless it
			// takes its time.
			select {
			case <-q.done:
			case <-time.After(farewell):
			}
			grace := time.Duration(req.GraceMS) * time.Millisecond
			// At the same time: TERM alone does not end an interactive shell,
			// and a service must not be started again.
			go s.EndWorkload(grace)
			s.PowerOff(grace)
		}()
	})
	return nil
}

// farewell is how long the answer to a shutdown may take to be read.
const farewell = 2 * time.Second

// reply sends the one last answer, as a line or as FrameResult.
func (q *request) reply(v any) error {
	line, err := guestproto.Encode(v)
	if err != nil {
		return err
	}
	if q.stream {
		return q.last(guestproto.FrameResult, line[:len(line)-1])
	}
	return q.lastLine(line)
}

// fail sends err as the last answer, unless one was sent or nobody listens.
func (q *request) fail(err error) {
	if q.answered || q.gone {
		return
	}
	w := api.ToWire(err)
	if q.stream {
		if line, e := guestproto.Encode(w); e == nil {
			_ = q.last(guestproto.FrameError, line[:len(line)-1])
		}
		return
	}
	if line, e := guestproto.Encode(guestproto.ErrorReply{Error: w.Message, Code: w.Code, Hint: w.Hint}); e == nil {
		_ = q.lastLine(line)
	}
}

func (q *request) last(t guestproto.FrameType, payload []byte) error {
	_ = q.conn.SetWriteDeadline(time.Now().Add(lingerTimeout))
	q.answered = true
	return q.frame(t, payload)
}

func (q *request) lastLine(line []byte) error {
	_ = q.conn.SetWriteDeadline(time.Now().Add(lingerTimeout))
	q.answered = true
	_, err := q.conn.Write(line)
	return err
}

// frame sends one frame. It may be called concurrently.
func (q *request) frame(t guestproto.FrameType, payload []byte) error {
	q.writeMu.Lock()
	defer q.writeMu.Unlock()
	return guestproto.WriteFrame(q.conn, t, payload)
}

// linger makes sure that the caller can read the answer: a connection closed
// with unread bytes in it may take the answer along. A connection that cannot
// be half-closed is just closed.
func (q *request) linger() {
	if q.gone || !q.hangUp() {
		return
	}
	_ = q.conn.SetReadDeadline(time.Now().Add(lingerTimeout))
	_, _ = io.Copy(io.Discard, io.LimitReader(q.conn, maxLinger))
}

// hangUp ends the agent's side of the connection, if that can be done alone.
func (q *request) hangUp() bool {
	w, ok := q.conn.(interface{ CloseWrite() error })
	return ok && w.CloseWrite() == nil
}

// errGone says that the caller has hung up.
var errGone = fmt.Errorf("the caller has hung up: %w", api.ErrCanceled)
