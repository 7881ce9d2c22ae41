package oci

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

const (
	// parallel is how many layers are fetched at once, as docker does.
	parallel = 3
	// attempts is how often something is asked for before it is an error.
	attempts = 3
)

// The cache holds one file for each layer, HEX as its SHA-256 says, complete
// and checked: it gets that name when it is. HEX.part is one that is being
// fetched, locked by who fetches it.
const partSuffix = ".part"

var layerPattern = regexp.MustCompile(`^[0-9a-f]{64}(\.part)?$`)

// fetch brings the image's layers into the cache, those that are not there, and
// opens them. Files that were opened stay readable whatever is pruned.
func (p *Puller) fetch(ctx context.Context, img *Image, progress func(api.Progress)) (_ []*os.File, err error) {
	if err := statedir.MakePrivate(p.CacheDir); err != nil {
		return nil, fmt.Errorf("opening the cache of layers: %w", err)
	}
	files := make([]*os.File, len(img.layers))
	defer func() {
		if err != nil {
			closeAll(files)
		}
	}()
	meter := &meter{progress: progress, total: img.CompressedBytes(), layers: len(img.layers)}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, l := range img.layers {
		g.Go(func() error {
			f, err := p.fetchLayer(ctx, img.source, l, i, meter)
			if err != nil {
				return fmt.Errorf("fetching layer %d of %d: %w", i+1, len(img.layers), err)
			}
			files[i] = f
			return nil
		})
	}
	return files, g.Wait()
}

func closeAll(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// partPoll is how often a process looks whether another one has fetched the
// layer that both need.
const partPoll = 100 * time.Millisecond

func (p *Puller) fetchLayer(ctx context.Context, src source, l layer, index int, m *meter) (*os.File, error) {
	path := filepath.Join(p.CacheDir, l.digest.Hex)
	for {
		if f, err := openCached(path, l.size); f != nil || err != nil {
			m.here(index, l.size)
			return f, err
		}
		part, err := artifact.TryOwn(path + partSuffix)
		if err == nil {
			return p.fill(ctx, src, l, index, m, part, path)
		}
		if !errors.Is(err, api.ErrBusy) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(partPoll):
		}
	}
}

// openCached opens a layer of the cache, nil if it is not there. One of another
// size is removed: it is not what was put there.
func openCached(path string, size int64) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil || fi.Mode().IsRegular() && fi.Size() == size {
		return f, err
	}
	f.Close()
	return nil, os.Remove(path)
}

// fill fetches a layer into part, which this process owns, and gives it its
// name.
func (p *Puller) fill(ctx context.Context, src source, l layer, index int, m *meter, part *os.File, path string) (_ *os.File, err error) {
	kept := false
	defer func() {
		if !kept {
			part.Close()
			err = errors.Join(err, os.Remove(path+partSuffix))
		}
	}()
	// Who owned it before may have finished in between.
	if f, err := openCached(path, l.size); f != nil || err != nil {
		m.here(index, l.size)
		return f, err
	}
	if err := artifact.CheckFree(p.CacheDir, l.size); err != nil {
		return nil, err
	}
	delay := p.RetryDelay
	if delay == 0 {
		delay = time.Second
	}
	for n := 1; ; n++ {
		if err = p.download(ctx, src, l, index, m, part); err == nil {
			break
		}
		if ctx.Err() != nil || n == attempts || !errors.Is(err, api.ErrUnavailable) {
			return nil, err
		}
		p.log().Warn("fetching a layer again", "layer", l.digest.String(), "error", err)
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(delay):
		}
		delay *= 3
	}
	// The name must not come before the content, whatever the host does next.
	if err := part.Sync(); err != nil {
		return nil, err
	}
	if err := os.Rename(path+partSuffix, path); err != nil {
		return nil, err
	}
	kept = true
	return part, statedir.SyncDir(p.CacheDir)
}

// download fetches a layer once. What cannot be had now is api.ErrUnavailable,
// what is not the layer api.ErrDamaged.
func (p *Puller) download(ctx context.Context, src source, l layer, index int, m *meter, part *os.File) error {
	if err := part.Truncate(0); err != nil {
		return err
	}
	limit := p.StallLimit
	if limit == 0 {
		limit = time.Minute
	}
	flowing, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(limit, func() { cancel(errStalled) })
	defer stalled.Stop()
	body, err := src.blob(flowing, l)
	if err != nil {
		return err
	}
	defer body.Close()
	hash := sha256.New()
	to := &errorOf{w: io.MultiWriter(io.NewOffsetWriter(part, 0), hash, m.of(index), restart{stalled, limit})}
	n, err := io.Copy(to, io.LimitReader(body, l.size+1))
	switch {
	case to.err != nil:
		return to.err
	case context.Cause(flowing) == errStalled:
		return api.Errorf(api.ErrUnavailable, "nothing has come for %s", limit)
	case n < l.size && err == nil:
		err = io.ErrUnexpectedEOF
		fallthrough
	case n < l.size:
		return explain(ctx, fmt.Errorf("%d bytes of %d came: %w", n, l.size, errors.Join(err, io.ErrUnexpectedEOF)))
	case n > l.size || hex.EncodeToString(hash.Sum(nil)) != l.digest.Hex:
		// An error of the library's own check would say the same.
		return api.Errorf(api.ErrDamaged, "what came is not the layer %s of %d bytes that the manifest names", l.digest, l.size)
	}
	return nil
}

var errStalled = errors.New("stalled")

// restart starts a timer anew whenever something is written.
type restart struct {
	timer *time.Timer
	limit time.Duration
}

func (r restart) Write(p []byte) (int, error) {
	r.timer.Reset(r.limit)
	return len(p), nil
}

// errorOf keeps the error of a writer apart from that of the reader.
type errorOf struct {
	w   io.Writer
	err error
}

func (e *errorOf) Write(p []byte) (int, error) {
	n, err := e.w.Write(p)
	e.err = err
	return n, err
}

// A meter adds up what several goroutines fetch.
type meter struct {
	progress func(api.Progress)
	total    int64
	layers   int

	mu   sync.Mutex
	done map[int]int64 // by layer
}

// here counts a layer that need not be fetched.
func (m *meter) here(index int, size int64) { m.set(index, size, "is here already") }

func (m *meter) set(index int, n int64, what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.done == nil {
		m.done = map[int]int64{}
	}
	m.done[index] = n
	var sum int64
	for _, n := range m.done {
		sum += n
	}
	m.progress(api.Progress{Phase: "downloading", Message: fmt.Sprintf("layer %d of %d %s", index+1, m.layers, what), Done: sum, Total: m.total})
}

// of returns a writer that counts what it gets as bytes of one layer.
func (m *meter) of(index int) io.Writer { return &layerMeter{m: m, index: index} }

type layerMeter struct {
	m     *meter
	index int
	n     int64
	told  time.Time
}

func (l *layerMeter) Write(p []byte) (int, error) {
	l.n += int64(len(p))
	if now := time.Now(); now.Sub(l.told) > 100*time.Millisecond {
		l.told = now
		l.m.set(l.index, l.n, "is coming")
	}
	return len(p), nil
}

// PruneLayers removes from the cache the layers that keep does not name, and
// those that were half fetched. It returns how many bytes that were.
func (p *Puller) PruneLayers(keep []string) (freed int64, err error) {
	entries, err := os.ReadDir(p.CacheDir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("looking at the cache of layers: %w", err)
	}
	for _, e := range entries {
		if !layerPattern.MatchString(e.Name()) || slices.Contains(keep, "sha256:"+e.Name()) {
			continue
		}
		path := filepath.Join(p.CacheDir, e.Name())
		var owned *os.File
		if strings.HasSuffix(e.Name(), partSuffix) {
			if owned, err = artifact.TryOwn(path); errors.Is(err, api.ErrBusy) {
				continue
			}
			if err != nil {
				return freed, err
			}
		}
		if fi, ierr := e.Info(); ierr == nil {
			freed += fi.Size()
		}
		err = os.Remove(path)
		if owned != nil {
			owned.Close()
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return freed, err
		}
	}
	return freed, nil
}

// dropIfDamaged removes a layer from the cache whose packed bytes are not what
// its name says, and reports whether it did. Otherwise the image itself is
// wrong, and the error is cause.
func (p *Puller) dropIfDamaged(ctx context.Context, l layer, cause error) (bool, error) {
	path := filepath.Join(p.CacheDir, l.digest.Hex)
	f, err := os.Open(path)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist), cause
	}
	defer f.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return false, errors.Join(cause, err)
	}
	if hex.EncodeToString(hash.Sum(nil)) == l.digest.Hex {
		return false, cause
	}
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	if err := os.Remove(path); err != nil {
		return false, errors.Join(cause, err)
	}
	return true, nil
}
