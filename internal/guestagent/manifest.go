package guestagent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

const (
	// maxDigesters bounds how many files are read at once, each through a
	// buffer of digestBuffer bytes.
	maxDigesters = 8
	digestBuffer = 256 << 10
	// manifestWindow is how many entries may be found before the first of them
	// is sent. Each may hold a directory open.
	manifestWindow = 256
)

// manifest sends what is below a directory. One goroutine walks, several read
// files, and this one sends in the walk's order.
func (q *request) manifest(ctx context.Context, line []byte) error {
	var req guestproto.ManifestRequest
	if err := decodeRequest(line, &req); err != nil {
		return err
	}
	if err := q.streamOnly(guestproto.ActionManifest); err != nil {
		return err
	}
	if req.Path == "" {
		req.Path = defaultCwd
	}
	p, err := q.server.openPlace(req.Path)
	if err != nil {
		return err
	}
	defer p.close()
	top, err := p.openDirectory()
	if err != nil {
		return fmt.Errorf("reading the manifest: %w", err)
	}
	ctx, unheed := q.heedHangUp(ctx)
	result, w, err := q.sendManifest(ctx, top, p.rel == ".")
	hungUp := ctx.Err() != nil
	unheed()
	if hungUp {
		return q.sent(errGone)
	}
	if err != nil {
		return fmt.Errorf("reading the manifest: %w", err)
	}
	if err := q.endData(w); err != nil {
		return err
	}
	return q.reply(result)
}

// sendManifest walks top, which it releases, and sends its entries.
func (q *request) sendManifest(ctx context.Context, top *directory, isWorkspace bool) (guestproto.ManifestResult, *dataWriter, error) {
	ctx, cancel := context.WithCancel(ctx)
	w := &dataWriter{q: q, buf: make([]byte, 0, outputChunk)}
	m := &manifestWalk{
		ctx:    ctx,
		inTurn: make(chan *manifestItem, manifestWindow),
		toRead: make(chan *manifestItem, manifestWindow),
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(m.inTurn)
		defer close(m.toRead)
		m.err = m.directory(top, "", 0, isWorkspace)
		top.release()
	})
	for range min(runtime.GOMAXPROCS(0), maxDigesters) {
		wg.Go(func() {
			d := digester{ctx: ctx, hash: sha256.New(), buf: make([]byte, digestBuffer)}
			for item := range m.toRead {
				d.read(item)
				close(item.done)
			}
		})
	}
	var result guestproto.ManifestResult
	var sendErr error
	for item := range m.inTurn {
		if item.done != nil {
			<-item.done
		}
		if sendErr != nil {
			continue // until the walk, which has been told, ends
		}
		if sendErr = send(w, item, &result); sendErr != nil {
			cancel()
		}
	}
	wg.Wait()
	cancel()
	if sendErr != nil {
		return result, w, sendErr
	}
	result.SkippedCount += m.skipped
	return result, w, m.err
}

// send sends one entry and counts it.
func send(w *dataWriter, item *manifestItem, result *guestproto.ManifestResult) error {
	switch {
	case item.gone:
		return nil
	case item.special:
		result.SkippedCount++
		return nil
	}
	line, err := guestproto.Encode(item.entry)
	if err != nil {
		return err
	}
	if result.EntryCount++; result.EntryCount > guestproto.MaxFileEntries {
		return api.Errorf(api.ErrExhausted, "there are more than %d entries", guestproto.MaxFileEntries)
	}
	if item.entry.Type == guestproto.TypeFile {
		result.ByteCount += item.entry.Size
	}
	if item.entry.Error != "" {
		result.ErrorCount++
	}
	_, err = w.Write(line)
	return err
}

// A manifestItem is an entry on its way. Where done is not nil the entry is
// complete only when that is closed.
type manifestItem struct {
	entry guestproto.ManifestEntry
	done  chan struct{}
	// dir is held for reading the file name in it.
	dir  *directory
	name string
	// gone and special say that there is no such entry after all.
	gone, special bool
}

// A manifestWalk goes through a tree depth first.
type manifestWalk struct {
	ctx            context.Context
	inTurn, toRead chan *manifestItem
	skipped        int64
	err            error
}

// directory walks the content of d, which is at path.
func (m *manifestWalk) directory(d *directory, path string, depth int, isWorkspace bool) error {
	entries, err := d.entries()
	if err != nil {
		return err
	}
	return m.content(d, entries, path, depth, isWorkspace)
}

func (m *manifestWalk) content(d *directory, entries []dirent, path string, depth int, isWorkspace bool) error {
	slices.SortFunc(entries, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
	for _, e := range entries {
		full := joinPath(path, e.name)
		switch {
		case isWorkspace && isStageName(e.name):
			continue
		case len(full) > guestproto.MaxPath:
			m.skipped++
			continue
		}
		item := &manifestItem{entry: guestproto.ManifestEntry{Path: guestproto.Path(full)}, dir: d, name: e.name}
		var err error
		switch e.kind {
		case unix.S_IFREG:
			err = m.file(item)
		case unix.S_IFLNK:
			err = m.symlink(item)
		case unix.S_IFDIR:
			err = m.subdirectory(item, depth)
		default:
			m.skipped++
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *manifestWalk) emit(item *manifestItem) error {
	select {
	case m.inTurn <- item:
		return nil
	case <-m.ctx.Done():
		return m.ctx.Err()
	}
}

func (m *manifestWalk) file(item *manifestItem) error {
	item.done = make(chan struct{})
	item.dir.hold()
	select {
	case m.toRead <- item:
		return m.emit(item)
	case <-m.ctx.Done():
		item.dir.release()
		return m.ctx.Err()
	}
}

func (m *manifestWalk) symlink(item *manifestItem) error {
	item.entry.Type, item.entry.Mode = guestproto.TypeSymlink, 0o777
	target, err := item.dir.readlink(item.name)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL): // gone, or no link any more
		return nil
	case err != nil:
		item.entry.Error = err.Error()
	}
	item.entry.Target, item.entry.Size = guestproto.Path(target), int64(len(target))
	return m.emit(item)
}

// subdirectory emits a directory and what is in it. What keeps it from looking
// into it is the entry's error.
func (m *manifestWalk) subdirectory(item *manifestItem, depth int) error {
	e := &item.entry
	e.Type = guestproto.TypeDirectory
	var st unix.Stat_t
	d, err := item.dir.sub(item.name)
	if err == nil {
		defer d.release()
		err = unix.Fstat(d.fd, &st)
	} else if !vanished(err) {
		st, _ = item.dir.stat(item.name)
	}
	if vanished(err) {
		return nil
	}
	e.Mode = st.Mode & 0o777
	var entries []dirent
	switch {
	case err != nil:
	case depth+2 > guestproto.MaxDepth:
		err = fmt.Errorf("it nests deeper than %d directories", guestproto.MaxDepth)
	default:
		entries, err = d.entries()
		if errors.Is(err, api.ErrExhausted) {
			return err
		}
	}
	if err != nil {
		e.Error = err.Error()
	}
	path := string(e.Path) // the item is the sender's from here on
	if err := m.emit(item); err != nil {
		return err
	}
	return m.content(d, entries, path, depth+1, false)
}

// vanished reports whether err says that a name is gone, or not any more what
// the directory's list said.
func vanished(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// A digester reads files, one at a time.
type digester struct {
	ctx  context.Context
	hash hash.Hash
	buf  []byte
}

// read fills in the entry of a file and releases its directory.
func (d *digester) read(item *manifestItem) {
	defer item.dir.release()
	e := &item.entry
	e.Type = guestproto.TypeFile
	if d.ctx.Err() != nil {
		item.gone = true
		return
	}
	// A FIFO that has taken the file's place must not be waited for.
	fd, err := openAt(item.dir.fd, item.name, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		st, statErr := item.dir.stat(item.name)
		if vanished(err) || vanished(statErr) || st.Mode&unix.S_IFMT != unix.S_IFREG {
			item.gone = true
			return
		}
		e.Mode, e.Size, e.Error = st.Mode&0o777, st.Size, err.Error()
		return
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		item.special = true
		return
	}
	e.Mode, e.Size = st.Mode&0o777, st.Size
	if st.Size > guestproto.MaxDigestedFile {
		e.Error = fmt.Sprintf("it has more than %d bytes", int64(guestproto.MaxDigestedFile))
		return
	}
	n, err := d.digest(fd, st.Size)
	if err != nil {
		e.Error = err.Error()
		return
	}
	e.Size, e.SHA256 = n, hex.EncodeToString(d.hash.Sum(nil))
}

// digest reads at most size bytes, so that a file which grows has an end, and
// returns how many there were.
func (d *digester) digest(fd int, size int64) (int64, error) {
	d.hash.Reset()
	var done int64
	for done < size {
		if err := d.ctx.Err(); err != nil {
			return done, err
		}
		n := 0
		err := again(func() (err error) {
			n, err = unix.Read(fd, d.buf[:min(int64(len(d.buf)), size-done)])
			return err
		})
		if err != nil {
			return done, err
		}
		if n <= 0 {
			break // it has shrunk
		}
		d.hash.Write(d.buf[:n])
		done += int64(n)
	}
	return done, nil
}
