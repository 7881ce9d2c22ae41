package guestagent

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// outputChunk is how much of an output is read at once.
const outputChunk = 32 << 10

var chunks = sync.Pool{New: func() any { return new([outputChunk]byte) }}

// An output is the agent's end of a command's stdout or stderr.
type output struct {
	f        *os.File
	flushing atomic.Bool
	// keep says that the end of the output is not the end of f. Closing a
	// terminal sends SIGHUP to a command that has only closed its own side.
	keep bool
}

// newPipe returns a pipe whose parent end waits in the runtime's poller and
// whose child end blocks, as programs expect. toChild says which end is whose.
func newPipe(toChild bool) (parent, child *os.File, err error) {
	var fd [2]int
	if err := unix.Pipe2(fd[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, api.Errorf(api.ErrExhausted, "making a pipe: %w", err)
	}
	mine, theirs := fd[0], fd[1]
	if toChild {
		mine, theirs = fd[1], fd[0]
	}
	_ = unix.SetNonblock(mine, true)
	return os.NewFile(uintptr(mine), "pipe"), os.NewFile(uintptr(theirs), "pipe"), nil
}

// flush says that no more is to be expected than what is there: reads go on
// while they yield something, and end after a wait of flushLimit.
func (o *output) flush() {
	o.flushing.Store(true)
	_ = o.f.SetReadDeadline(time.Now().Add(flushLimit))
}

// close ends a read that waits.
func (o *output) close() { _ = o.f.Close() }

// pump delivers an output until it ends.
func (o *output) pump(stream int, s sink) error {
	if !o.keep {
		defer o.f.Close()
	}
	buf := chunks.Get().(*[outputChunk]byte)
	defer chunks.Put(buf)
	for {
		if o.flushing.Load() {
			_ = o.f.SetReadDeadline(time.Now().Add(flushLimit))
		}
		n, err := o.f.Read(buf[:])
		if n > 0 {
			if serr := s(stream, buf[:n]); serr != nil {
				return serr
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF), errors.Is(err, os.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case errors.Is(err, syscall.EIO): // a terminal that nobody has open any more
			return nil
		default:
			return api.Errorf(api.ErrInternal, "reading the command's output: %w", err)
		}
	}
}

// pumpAll delivers all outputs and returns the first error once all have ended.
func pumpAll(outputs []*output, s sink) error {
	var wg sync.WaitGroup
	errs := make([]error, len(outputs))
	for i, o := range outputs {
		if o == nil {
			continue
		}
		wg.Go(func() {
			if errs[i] = o.pump(i, s); errs[i] != nil {
				// The command is ended for it: let the others not wait.
				for _, other := range outputs {
					if other != nil {
						other.close()
					}
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
