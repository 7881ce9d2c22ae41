// Package ring keeps the last part of an endless output: what a shell or a
// service in the guest has written lately. Positions in it are those in the
// whole output, so a reader that comes late knows what it has missed.
//
// The bytes lie in anonymous memory outside of the agent's heap, which the
// garbage collector need not look at, and never on a disk: they may be secret.
package ring

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// The bounds of one ring's capacity in bytes. MinCapacity is what a ring gets
// also where the budget is used up.
const (
	MaxCapacity = 8 << 20
	MinCapacity = 256 << 10
)

// A Budget is the memory for all rings together. A ring gets a quarter of what
// is left, within its bounds: so many rings are smaller than few, and there is
// no number at which there suddenly are none.
type Budget struct {
	mu   sync.Mutex
	free int64
}

// NewBudget returns a budget of an eighth of the system's memory.
func NewBudget() *Budget {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return &Budget{}
	}
	return &Budget{free: int64(uint64(info.Totalram) * uint64(info.Unit) / 8)}
}

func (b *Budget) take() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := min(max(b.free/4, MinCapacity), MaxCapacity)
	b.free -= n
	return n
}

func (b *Budget) give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += n
}

// A Ring keeps the last bytes written to it. One goroutine writes; any number
// read. Its memory is used as it fills.
type Ring struct {
	budget   *Budget
	capacity int64

	mu         sync.Mutex
	f          *os.File // nil after Close
	start, end int64    // the part of the whole output that is kept
	ended      bool
	changed    chan struct{} // closed at the next change; nil if nobody waits
}

// New returns an empty ring. Close gives its memory back.
func New(b *Budget) (*Ring, error) {
	fd, err := unix.MemfdCreate("pyro-output", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making memory for an output: %w", err)
	}
	return &Ring{budget: b, capacity: b.take(), f: os.NewFile(uintptr(fd), "ring")}, nil
}

// Write appends p and drops the oldest bytes that have no room any more. It
// never fails: what the system has no memory for is missed by every reader.
func (r *Ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(p)
	if n == 0 || r.ended {
		return n, nil
	}
	if over := int64(n) - r.capacity; over > 0 {
		p = p[over:]
		r.end += over
	}
	for len(p) > 0 {
		at := r.end % r.capacity
		part := p[:min(int64(len(p)), r.capacity-at)]
		if _, err := r.f.WriteAt(part, at); err != nil {
			r.end += int64(len(p))
			r.start = r.end
			break
		}
		r.end += int64(len(part))
		p = p[len(part):]
	}
	r.start = max(r.start, r.end-r.capacity)
	r.wake()
	return n, nil
}

// ReadAt fills p from position from on, or from the oldest byte that is kept if
// that is later, and returns where what it has read begins. It does not wait: at
// the end of what was written it reads nothing.
func (r *Ring) ReadAt(p []byte, from int64) (at int64, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at = min(max(from, r.start), r.end)
	for pos := at; pos < r.end && n < len(p) && r.f != nil; {
		offset := pos % r.capacity
		want := min(int64(len(p)-n), r.end-pos, r.capacity-offset)
		m, err := r.f.ReadAt(p[n:int64(n)+want], offset)
		n, pos = n+m, pos+int64(m)
		if err != nil || m == 0 {
			break
		}
	}
	return at, n
}

// Bounds returns the first position that is kept, the one behind the last, and
// whether nothing more will come.
func (r *Ring) Bounds() (start, end int64, ended bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.start, r.end, r.ended
}

// Changed returns a channel that is closed when something is written after this
// call, or the output ends. Look at Bounds after it, not before.
func (r *Ring) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.changed == nil {
		r.changed = make(chan struct{})
		if r.ended {
			close(r.changed)
		}
	}
	return r.changed
}

// wake tells those who wait. After the end the channel stays closed.
func (r *Ring) wake() {
	if r.changed != nil && !r.ended {
		close(r.changed)
		r.changed = nil
	}
}

// End says that nothing more will come. What is kept can still be read.
func (r *Ring) End() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endLocked()
}

func (r *Ring) endLocked() {
	if r.ended {
		return
	}
	r.wake()
	r.ended = true
	r.changed = nil
}

// Close ends the output and gives the memory back; readers then find nothing.
// Safe to call twice.
func (r *Ring) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endLocked()
	if r.f == nil {
		return nil
	}
	err := r.f.Close()
	r.f, r.start = nil, r.end
	r.budget.give(r.capacity)
	if err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
