package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// qmp speaks QEMU's machine protocol (docs/interop/qmp-spec in QEMU's source)
// over one connection: commands with their replies, and events to a function.
// QEMU itself is on our side of the trust boundary, but a guest that broke out
// into it is not: lines are bounded.
type qmp struct {
	conn    net.Conn
	onEvent func(event string, data json.RawMessage)

	mu      sync.Mutex
	nextID  int64
	waiting map[int64]chan qmpReply
	err     error // why the reader ended
	done    chan struct{}
}

type qmpReply struct {
	ID     int64           `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string          `json:"event"`
	Data  json.RawMessage `json:"data"`
}

// maxQMPLine bounds one line from QEMU. The largest replies that pyro asks for
// are some kilobytes.
const maxQMPLine = 1 << 20

// newQMP starts reading conn, which it owns from here on. QEMU answers nothing
// but qmp_capabilities first, so that is sent by [qmp.negotiate].
func newQMP(conn net.Conn, onEvent func(string, json.RawMessage)) *qmp {
	q := &qmp{conn: conn, onEvent: onEvent, waiting: map[int64]chan qmpReply{}, done: make(chan struct{})}
	go q.read()
	return q
}

func (q *qmp) read() {
	sc := bufio.NewScanner(q.conn)
	sc.Buffer(make([]byte, 0, 4096), maxQMPLine)
	for sc.Scan() {
		var r qmpReply
		if json.Unmarshal(sc.Bytes(), &r) != nil {
			continue
		}
		switch {
		case r.Event != "":
			q.onEvent(r.Event, r.Data)
		case r.Return != nil || r.Error != nil:
			q.mu.Lock()
			ch := q.waiting[r.ID]
			delete(q.waiting, r.ID)
			q.mu.Unlock()
			if ch != nil {
				ch <- r
			}
		}
	}
	q.mu.Lock()
	q.err = api.Errorf(api.ErrUnavailable, "QEMU closed its control connection")
	q.mu.Unlock()
	close(q.done)
	q.conn.Close()
}

// errRefused is in the error of a command that QEMU has answered with an error:
// it was not done.
var errRefused = errors.New("refused")

// A refusal is QEMU's own error.
type refusal struct{ command, desc string }

func (r *refusal) Error() string { return "QEMU refuses " + r.command + ": " + r.desc }

func (r *refusal) Is(target error) bool { return target == errRefused || target == api.ErrUnavailable }

// execute runs one command and decodes its return value into out, which may be
// nil.
func (q *qmp) execute(ctx context.Context, command string, args, out any) error {
	return q.executeWith(ctx, nil, command, args, out)
}

// executeWith is execute that sends an open file along, unless it is nil.
func (q *qmp) executeWith(ctx context.Context, file *os.File, command string, args, out any) error {
	reply := make(chan qmpReply, 1)
	q.mu.Lock()
	q.nextID++
	id := q.nextID
	q.waiting[id] = reply
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        int64  `json:"id"`
	}{command, args, id})
	if err == nil {
		err = q.send(append(line, '\n'), file)
	}
	q.mu.Unlock()
	if err != nil {
		return api.Errorf(api.ErrUnavailable, "asking QEMU to %s: %v", command, err)
	}
	select {
	case r := <-reply:
		if r.Error != nil {
			return &refusal{command, r.Error.Desc}
		}
		if out == nil {
			return nil
		}
		if err := json.Unmarshal(r.Return, out); err != nil {
			return fmt.Errorf("reading QEMU's answer to %s: %w", command, err)
		}
		return nil
	case <-q.done:
		return fmt.Errorf("asking QEMU to %s: %w", command, q.err)
	case <-ctx.Done():
		q.mu.Lock()
		delete(q.waiting, id)
		q.mu.Unlock()
		return fmt.Errorf("asking QEMU to %s: %w", command, ctx.Err())
	}
}

// send writes one line. QEMU takes the file that came last as the one that a
// command means.
func (q *qmp) send(line []byte, file *os.File) error {
	if file != nil {
		conn, ok := q.conn.(*net.UnixConn)
		if !ok {
			return api.Errorf(api.ErrInternal, "the control connection is no Unix socket")
		}
		n, _, err := conn.WriteMsgUnix(line, unix.UnixRights(int(file.Fd())), nil)
		if err != nil {
			return err
		}
		line = line[n:]
	}
	_, err := q.conn.Write(line)
	return err
}

func (q *qmp) negotiate(ctx context.Context) error {
	return q.execute(ctx, "qmp_capabilities", nil, nil)
}

func (q *qmp) close() { q.conn.Close() }
