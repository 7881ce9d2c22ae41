package oci

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// A download brings one layer into a file, in as many pieces as it takes. Only
// the digest of the whole counts: where the pieces of several answers, or what an
// earlier download has left, do not make up the layer, it is fetched once more
// in one piece.
type download struct {
	p     *Puller
	src   remoteSource
	layer layer
	part  *os.File
	index int
	meter *meter

	have   int64 // bytes in part
	hash   hash.Hash
	whole  bool // all of it is from one answer
	anew   bool // it did not fit together, and was begun anew
	spoilt bool // what is in part is good for nothing
}

// begin takes over what is in the file.
func (d *download) begin() error {
	d.hash = sha256.New()
	n, err := io.Copy(d.hash, io.NewSectionReader(d.part, 0, d.layer.size+1))
	if err != nil {
		return err
	}
	if n > d.layer.size {
		return d.restart()
	}
	d.have = n
	return nil
}

// restart gives up what is in the file.
func (d *download) restart() error {
	d.have, d.hash = 0, sha256.New()
	return d.part.Truncate(0)
}

// minProgress is how much must have come for a broken answer not to count as an
// attempt in vain.
const minProgress = 1 << 20

// run fetches what is missing. What cannot be had now is api.ErrUnavailable,
// what is not the layer api.ErrDamaged.
func (d *download) run(ctx context.Context) error {
	delay := d.p.RetryDelay
	if delay == 0 {
		delay = time.Second
	}
	pause, vain := delay, 0
	for {
		before := d.have
		err := d.fetch(ctx)
		if err == nil && d.have == d.layer.size && hex.EncodeToString(d.hash.Sum(nil)) == d.layer.digest.Hex {
			return nil
		}
		if err == nil {
			err = api.Errorf(api.ErrDamaged, "what came is not the layer %s of %d bytes that the manifest names", d.layer.digest, d.layer.size)
		}
		if errors.Is(err, api.ErrDamaged) {
			if d.have == 0 || d.whole || d.anew {
				d.spoilt = true
				return err
			}
			d.anew = true
			if err := d.restart(); err != nil {
				return err
			}
		}
		if d.have-before >= minProgress {
			pause, vain = delay, 0
		} else {
			vain++
		}
		again := errors.Is(err, api.ErrUnavailable) || errors.Is(err, api.ErrDamaged)
		if ctx.Err() != nil || !again || vain == attempts {
			return err
		}
		d.p.log().Warn("fetching a layer again", "layer", d.layer.digest.String(), "from", d.have, "error", err)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
		pause *= 3
	}
}

// fetch asks once for what is missing and adds what comes. It returns nil when
// enough has come, or too much.
func (d *download) fetch(ctx context.Context) error {
	if d.have >= d.layer.size {
		return nil
	}
	limit := d.p.StallLimit
	if limit == 0 {
		limit = time.Minute
	}
	flowing, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(limit, func() { cancel(errStalled) })
	defer stalled.Stop()
	body, at, err := d.src.blobFrom(flowing, d.layer, d.have)
	silent := api.Errorf(api.ErrUnavailable, "nothing has come for %s", limit)
	if err != nil && context.Cause(flowing) == errStalled {
		return silent
	}
	if err != nil {
		return err
	}
	defer body.Close()
	if at != d.have {
		if err := d.restart(); err != nil {
			return err
		}
	}
	d.whole = d.have == 0
	to := &errorOf{w: io.MultiWriter(io.NewOffsetWriter(d.part, d.have), d.hash, d.meter.of(d.index, d.have), restart{stalled, limit})}
	n, err := io.Copy(to, io.LimitReader(body, d.layer.size-d.have+1))
	d.have += n
	switch {
	case to.err != nil:
		d.spoilt = true
		return to.err
	case context.Cause(flowing) == errStalled:
		return silent
	case d.have < d.layer.size:
		return explain(ctx, fmt.Errorf("%d bytes of %d came: %w", d.have, d.layer.size, errors.Join(err, io.ErrUnexpectedEOF)))
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
