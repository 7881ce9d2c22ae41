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
	// attempts is how often something is asked for in vain before it is an
	// error.
	attempts = 3
)

// The cache holds one file for each layer, HEX as its SHA-256 says, complete
// and checked: it gets that name when it is. HEX.part is one that is being
// fetched, locked by who fetches it, or whose fetching was broken off.
const partSuffix = ".part"

var layerPattern = regexp.MustCompile(`^[0-9a-f]{64}(\.part)?$`)

// fetch brings the image's layers into the cache, those that are not there, and
// opens them. Files that were opened stay readable whatever is pruned.
func (p *Puller) fetch(ctx context.Context, img *Image, src remoteSource, progress func(api.Progress)) (_ []*os.File, err error) {
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
			f, err := p.fetchLayer(ctx, src, l, i, meter)
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

func (p *Puller) fetchLayer(ctx context.Context, src remoteSource, l layer, index int, m *meter) (*os.File, error) {
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
// name. What has come of it when that fails stays in the cache, for the next one
// to go on from.
func (p *Puller) fill(ctx context.Context, src remoteSource, l layer, index int, m *meter, part *os.File, path string) (_ *os.File, err error) {
	d := &download{p: p, src: src, layer: l, part: part, index: index, meter: m}
	done := false
	defer func() {
		if done {
			return
		}
		if d.have == 0 || d.spoilt {
			err = errors.Join(err, os.Remove(path+partSuffix))
		}
		part.Close()
	}()
	// Who owned it before may have finished in between.
	if f, err := openCached(path, l.size); f != nil || err != nil {
		m.here(index, l.size)
		return f, err
	}
	if err := d.begin(); err != nil {
		return nil, err
	}
	if err := artifact.CheckFree(p.CacheDir, l.size-d.have); err != nil {
		return nil, err
	}
	if err := d.run(ctx); err != nil {
		return nil, err
	}
	// The name must not come before the content, whatever the host does next.
	if err := part.Sync(); err != nil {
		return nil, err
	}
	if err := os.Rename(path+partSuffix, path); err != nil {
		return nil, err
	}
	done = true
	return part, statedir.SyncDir(p.CacheDir)
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

// of returns a writer that counts what it gets as bytes of one layer, behind
// those that are there.
func (m *meter) of(index int, have int64) io.Writer { return &layerMeter{m: m, index: index, n: have} }

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
