package guestconn

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// A session starts with four records, so that both ends know which bytes are
// of the new session, whatever an older one left in the pipe:
//
//	host to guest   hello nonce    repeated until answered
//	guest to host   ack nonce      for every hello
//	host to guest   go nonce       once; the host's frames follow it
//	guest to host   ready nonce    once; the guest's frames follow it
//
// A record is recordLen bytes: the magic, its kind, the session format, six
// zero bytes and the host's random nonce.
const (
	recordMagic = "PYROMUX\n"
	recordLen   = 32
	muxFormat   = 1

	recordHello = 'h'
	recordAck   = 'a'
	recordGo    = 'g'
	recordReady = 'r'
)

// helloInterval is how long the host waits for an answer before it repeats its
// hello. From the second time on it sends padding first.
const helloInterval = 500 * time.Millisecond

// helloPadding is more than the longest frame of an older session, whose
// receiver may be in the middle of one: these bytes complete that frame, and
// the first of them after it is no valid frame (0xff is no yamux version), so
// that receiver gives its session up.
const helloPadding = muxFrame + 1<<10

type record struct {
	kind   byte
	format byte
	nonce  [16]byte
}

func (r record) encode() []byte {
	b := make([]byte, recordLen)
	copy(b, recordMagic)
	b[8], b[9] = r.kind, r.format
	copy(b[16:], r.nonce[:])
	return b
}

// readRecord reads r up to the end of the next record. It never reads past it,
// and skips everything that is none.
func readRecord(r io.Reader) (record, error) {
	var buf [recordLen]byte
	n := 0
	for {
		// Only as many bytes as the rest of one record, so that a frame that
		// follows stays in r.
		m, err := io.ReadAtLeast(r, buf[n:], 1)
		n += m
		if err != nil {
			return record{}, err
		}
		// Move the first place where the magic can start to the front.
		for n > 0 && !bytes.HasPrefix(buf[:n], []byte(recordMagic)[:min(n, len(recordMagic))]) {
			i := bytes.IndexByte(buf[1:n], recordMagic[0])
			if i < 0 {
				n = 0
				break
			}
			n = copy(buf[:], buf[1+i:n])
		}
		if n == recordLen {
			rec := record{kind: buf[8], format: buf[9]}
			copy(rec.nonce[:], buf[16:])
			return rec, nil
		}
	}
}

func synchronize(pipe io.ReadWriter, role Role) error {
	if role == Guest {
		return synchronizeGuest(pipe)
	}
	return synchronizeHost(pipe)
}

func synchronizeHost(pipe io.ReadWriter) error {
	var nonce [16]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return api.Errorf(api.ErrInternal, "drawing a nonce: %w", err)
	}
	hello := record{recordHello, muxFormat, nonce}.encode()
	if _, err := pipe.Write(hello); err != nil {
		return err
	}
	// The repeats stop for good before go is sent.
	answered := make(chan struct{})
	var repeats sync.WaitGroup
	repeats.Go(func() {
		padded := append(bytes.Repeat([]byte{0xff}, helloPadding), hello...)
		t := time.NewTicker(helloInterval)
		defer t.Stop()
		for {
			select {
			case <-answered:
				return
			case <-t.C:
				if _, err := pipe.Write(padded); err != nil {
					return // the reader meets the same end
				}
			}
		}
	})
	err := awaitRecord(pipe, recordAck, nonce)
	close(answered)
	repeats.Wait()
	if err != nil {
		return err
	}
	if _, err := pipe.Write(record{recordGo, muxFormat, nonce}.encode()); err != nil {
		return err
	}
	return awaitRecord(pipe, recordReady, nonce)
}

func awaitRecord(r io.Reader, kind byte, nonce [16]byte) error {
	for {
		rec, err := readRecord(r)
		if err != nil {
			return err
		}
		if rec.nonce != nonce || rec.kind != kind {
			continue
		}
		if rec.format != muxFormat {
			return api.Errorf(api.ErrUnsupported, "the guest agent multiplexes in format %d, this pyro in format %d", rec.format, muxFormat)
		}
		return nil
	}
}

func synchronizeGuest(pipe io.ReadWriter) error {
	var current [16]byte
	answered := false
	for {
		rec, err := readRecord(pipe)
		if err != nil {
			if errors.Is(err, io.ErrNoProgress) {
				err = io.EOF
			}
			return err
		}
		switch {
		case rec.kind == recordHello:
			// The answer names our own format: the host decides and explains.
			current, answered = rec.nonce, rec.format == muxFormat
			if _, err := pipe.Write(record{recordAck, muxFormat, rec.nonce}.encode()); err != nil {
				return err
			}
		case rec.kind == recordGo && answered && rec.nonce == current:
			_, err := pipe.Write(record{recordReady, muxFormat, rec.nonce}.encode())
			return err
		}
	}
}
