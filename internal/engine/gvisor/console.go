package gvisor

import (
	"bytes"
	"io"
	"os"
	"sync"
)

// console carries what the guest agent and runsc print to the machine's console
// writer. The pipe is always drained, so a guest that floods it is slowed down
// by the writer alone and fills nothing.
type console struct {
	r    *os.File
	done chan struct{}
	once sync.Once
	tail []byte // the end of what was printed, valid after done
}

// maxTail bounds a console's tail, in bytes.
const maxTail = 32 << 10

// newConsole returns a console and the end of its pipe for the child's stdout
// and stderr, which the caller closes once the child has it.
func newConsole(to io.Writer) (*console, *os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	c := &console{r: r, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		buf := make([]byte, 32<<10)
		for {
			n, err := r.Read(buf)
			if n > 0 && to != nil {
				_, _ = to.Write(buf[:n])
			}
			c.tail = append(c.tail, buf[:n]...)
			c.tail = c.tail[max(0, len(c.tail)-maxTail):]
			if err != nil {
				return
			}
		}
	}()
	return c, w, nil
}

// close waits until all that was written is with the writer, then frees the
// pipe. Every process that holds the other end must be gone.
func (c *console) close() {
	<-c.done
	c.once.Do(func() { c.r.Close() })
}

// lastWords returns the end of what was printed. It waits as close does.
func (c *console) lastWords() []byte {
	<-c.done
	return c.tail
}

// cappedBuffer keeps the first max bytes and drops the rest.
type cappedBuffer struct {
	bytes.Buffer
	max int
}

func (b *cappedBuffer) Write(p []byte) (int, error) {
	if room := b.max - b.Len(); room > 0 {
		b.Buffer.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}
