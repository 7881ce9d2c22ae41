package ring_test

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/pyro-mcp/pyro/internal/guestagent/ring"
)

func newRing(t testing.TB) *ring.Ring {
	t.Helper()
	// A budget of nothing gives rings of the least capacity.
	r, err := ring.New(&ring.Budget{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func readAll(r *ring.Ring, from int64) (int64, []byte) {
	p := make([]byte, 2*ring.MinCapacity)
	at, n := r.ReadAt(p, from)
	return at, p[:n]
}

// Whatever is written in whatever pieces, the last bytes are there at their
// places.
func TestKeepsTheLast(t *testing.T) {
	r := newRing(t)
	random := rand.New(rand.NewPCG(1, 2))
	var all []byte
	sizes := []int{0, 1, ring.MinCapacity - 1, 1, 1, ring.MinCapacity, ring.MinCapacity + 1, 3*ring.MinCapacity + 7, 100}
	for range 60 {
		sizes = append(sizes, random.IntN(70_000))
	}
	for _, size := range sizes {
		p := make([]byte, size)
		for i := range p {
			p[i] = byte(random.Uint32())
		}
		all = append(all, p...)
		if n, err := r.Write(p); n != size || err != nil {
			t.Fatalf("wrote %d of %d, %v", n, size, err)
		}
		start, end, ended := r.Bounds()
		wantStart := max(0, len(all)-ring.MinCapacity)
		if start != int64(wantStart) || end != int64(len(all)) || ended {
			t.Fatalf("after %d bytes the bounds are %d and %d", len(all), start, end)
		}
		for _, from := range []int64{0, start, start + 1, (start + end) / 2, end - 1, end, end + 5} {
			at, got := readAll(r, from)
			wantAt := min(max(from, start), end)
			if at != wantAt || !bytes.Equal(got, all[wantAt:]) {
				t.Fatalf("read from %d: at %d, %d bytes", from, at, len(got))
			}
		}
	}
	// A short buffer is filled.
	start, _, _ := r.Bounds()
	p := make([]byte, 10)
	if at, n := r.ReadAt(p, start+3); at != start+3 || n != 10 || !bytes.Equal(p, all[start+3:start+13]) {
		t.Errorf("a short read: at %d, %d bytes", at, n)
	}
}

func TestEnd(t *testing.T) {
	r := newRing(t)
	r.Write([]byte("abc"))
	changed := r.Changed()
	r.End()
	<-changed
	<-r.Changed() // does not wait after the end
	r.Write([]byte("late"))
	if at, got := readAll(r, 1); at != 1 || string(got) != "bc" {
		t.Errorf("after the end: %d %q", at, got)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if at, got := readAll(r, 0); at != 3 || len(got) != 0 {
		t.Errorf("after the close: %d %q", at, got)
	}
	r.Write([]byte("x"))
}

// Readers that wait see everything, in order, as long as they keep up.
func TestFollow(t *testing.T) {
	r := newRing(t)
	const total = 1 << 20
	turn := make(chan int64, 1) // keeps the writer from running away
	var wg sync.WaitGroup
	wg.Go(func() {
		for pos := int64(0); pos < total; {
			changed := r.Changed()
			at, got := readAll(r, pos)
			if at != pos {
				t.Errorf("missed %d bytes", at-pos)
				pos = at
			}
			for i, b := range got {
				if b != byte(pos+int64(i)) {
					t.Errorf("at %d is %d", pos+int64(i), b)
					return
				}
			}
			pos += int64(len(got))
			if len(got) == 0 {
				<-changed
				continue
			}
			select {
			case turn <- pos:
			default:
			}
		}
		close(turn)
	})
	p := make([]byte, 1000)
	seen := int64(0)
	for pos := int64(0); pos < total; {
		for pos-seen > ring.MinCapacity/2 {
			seen = <-turn
		}
		for i := range p {
			p[i] = byte(pos + int64(i))
		}
		n, _ := r.Write(p[:min(len(p), int(total-pos))])
		pos += int64(n)
	}
	wg.Wait()
}

func TestBudget(t *testing.T) {
	b := ring.NewBudget()
	capacity := func(r *ring.Ring) int64 {
		r.Write(make([]byte, ring.MaxCapacity+1))
		start, end, _ := r.Bounds()
		return end - start
	}
	var rings []*ring.Ring
	sum := int64(0)
	for range 100 {
		r, err := ring.New(b)
		if err != nil {
			t.Fatal(err)
		}
		rings = append(rings, r)
		c := capacity(r)
		sum += c
		if c < ring.MinCapacity || c > ring.MaxCapacity {
			t.Fatalf("a capacity of %d", c)
		}
	}
	for _, r := range rings {
		r.Close()
	}
	again, err := ring.New(b)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if c := capacity(again); c != min(ring.MaxCapacity, sum) && c < ring.MaxCapacity {
		t.Errorf("after all were closed a ring has %d bytes", c)
	}
}

// A gigabyte goes through without anybody reading.
func BenchmarkWrite(b *testing.B) {
	r, err := ring.New(ring.NewBudget())
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	p := make([]byte, 32<<10)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		r.Write(p)
	}
}
