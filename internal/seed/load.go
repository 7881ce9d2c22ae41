package seed

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

// A sink takes what a source yields, each directory before what is in it.
type sink interface {
	// put adds an entry. content is nil but for a regular file, of which it
	// yields exactly it.size bytes, and knows their hash afterwards.
	put(it item, content *content) error
}

// smallFile is up to which size files are read ahead, whole; readAhead is how
// many. Reading and hashing then happen while the one before is written.
const (
	smallFile = 256 << 10
	readAhead = 64
)

// loaded is an item with its content at hand, or the reason why it is not.
type loaded struct {
	item
	data   []byte   // of a small file; goes back to w.buffers
	file   *os.File // of a large one
	sum    [32]byte // of data
	reason string
}

// A content is what a regular file holds. It never yields fewer bytes than it
// was said to: where the file has become shorter, zeros stand in, and failed
// says that the entry has to be taken back.
type content struct {
	r      io.Reader
	left   int64
	h      hash.Hash // nil where sum is known
	sum    [32]byte
	failed error
	ctx    context.Context
	moved  func(n int64)
}

func (c *content) Read(p []byte) (int, error) {
	if c.left == 0 {
		return 0, io.EOF
	}
	if err := c.ctx.Err(); err != nil {
		return 0, context.Cause(c.ctx)
	}
	p = p[:min(int64(len(p)), c.left)]
	n := 0
	if c.failed == nil {
		var err error
		n, err = io.ReadFull(c.r, p)
		if err != nil {
			c.failed = err
		}
		if c.h != nil {
			c.h.Write(p[:n])
		}
	}
	clear(p[n:])
	c.left -= int64(len(p))
	c.moved(int64(len(p)))
	return len(p), nil
}

func (c *content) hash() [32]byte {
	if c.h != nil {
		c.h.Sum(c.sum[:0])
	}
	return c.sum
}

// load hands every item of the walk to the sink. Files that cannot be read are
// reported and left out.
func (w *walker) load(to sink) (entries, written int64, err error) {
	ctx, cancel := context.WithCancel(w.ctx)
	ch := make(chan loaded, readAhead)
	w.buffers = make(chan []byte, readAhead)
	go w.read(ctx, ch)
	defer func() {
		cancel()
		for l := range ch {
			w.recycle(l)
		}
	}()
	p := w.meter("copying")
	for l := range ch {
		if l.reason != "" {
			w.report.skip(l.path, l.reason)
			continue
		}
		var c *content
		switch {
		case l.file != nil:
			c = &content{ctx: ctx, r: l.file, left: l.size, h: sha256.New(), moved: p.moved}
		case l.typ == manifest.File:
			c = &content{ctx: ctx, r: bytes.NewReader(l.data), left: l.size, sum: l.sum, moved: p.moved}
		}
		err := to.put(l.item, c)
		w.recycle(l)
		if c != nil && c.failed != nil && err == nil {
			w.report.skip(l.path, readReason(c.failed))
			continue
		}
		if err != nil {
			return entries, written, fmt.Errorf("copying %.200q: %w", l.path, err)
		}
		entries++
		if c != nil {
			written += l.size
		}
	}
	if err := ctx.Err(); err != nil {
		return entries, written, context.Cause(ctx)
	}
	p.done()
	return entries, written, nil
}

// readReason is reasonOf for a read that ended early.
func readReason(err error) string {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return reasonChanged
	}
	return reasonOf(err)
}

func (l *loaded) close() {
	if l.file != nil {
		_ = l.file.Close()
	}
}

// buffer returns one of smallFile bytes. There are as many as are read ahead.
func (w *walker) buffer() []byte {
	select {
	case b := <-w.buffers:
		return b
	default:
		return make([]byte, smallFile)
	}
}

// recycle gives up what a loaded item holds.
func (w *walker) recycle(l loaded) {
	l.close()
	if cap(l.data) != smallFile {
		return
	}
	select {
	case w.buffers <- l.data[:smallFile]:
	default:
	}
}

// read opens the files, and reads those that are small, until ctx ends.
func (w *walker) read(ctx context.Context, ch chan<- loaded) {
	defer close(ch)
	d := directories{w: w}
	defer d.close()
	for _, it := range w.items {
		l := loaded{item: it}
		if it.typ == manifest.File {
			d.load(&l)
		}
		select {
		case ch <- l:
		case <-ctx.Done():
			l.close()
			return
		}
	}
}

// directories opens files; it keeps the directory of the last one open.
type directories struct {
	w     *walker
	place place
	f     *os.File
}

func (d *directories) close() {
	if d.f != nil {
		d.f.Close()
		d.f = nil
	}
}

func (d *directories) load(l *loaded) {
	if l.content != nil {
		l.data, l.sum = l.content, sha256.Sum256(l.content)
		return
	}
	// A file that became shorter between being measured and read is tried once
	// more: an editor had just begun to write it.
	for range 2 {
		err := d.tryLoad(l)
		if err == nil {
			return
		}
		l.close()
		l.file, l.reason = nil, readReason(err)
	}
}

func (d *directories) tryLoad(l *loaded) error {
	f, err := d.open(l.item)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		f.Close()
		return io.ErrUnexpectedEOF // it was replaced
	}
	l.size, l.mtime, l.mode = st.Size, st.Mtim.Nano(), uint32(st.Mode)&0o777
	if st.Size > smallFile {
		l.file, l.reason = f, ""
		return nil
	}
	defer f.Close()
	l.data = d.w.buffer()[:st.Size]
	if _, err := io.ReadFull(f, l.data); err != nil {
		return err
	}
	l.sum, l.reason = sha256.Sum256(l.data), ""
	return nil
}

func (d *directories) open(it item) (*os.File, error) {
	dir, name := path.Split(it.src)
	at := place{it.root, path.Clean(dir)}
	if dir == "" {
		at.path = ""
	}
	if d.f == nil || d.place != at {
		d.close()
		f, err := d.w.openPlace(at)
		if err != nil {
			return nil, err
		}
		d.f, d.place = f, at
	}
	return openIn(d.f, name, unix.O_RDONLY|unix.O_NONBLOCK)
}

// A meter tells how far a copy is, not more often than people can see.
type meter struct {
	phase, message string
	bytes, total   int64
	next           time.Time
	tell           func(api.Progress)
}

const meterPause = 100 * time.Millisecond

func (w *walker) meter(phase string) *meter {
	return &meter{
		phase: phase, total: w.bytes, tell: w.progress,
		message: fmt.Sprintf("copying %d files and directories", len(w.items)),
	}
}

func (m *meter) moved(n int64) {
	m.bytes += n
	if now := time.Now(); now.After(m.next) {
		m.next = now.Add(meterPause)
		m.tell(api.Progress{Phase: m.phase, Message: m.message, Done: m.bytes, Total: max(m.bytes, m.total)})
	}
}

func (m *meter) done() {
	m.tell(api.Progress{Phase: m.phase, Message: m.message, Done: m.bytes, Total: max(m.bytes, m.total)})
}
