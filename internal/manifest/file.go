package manifest

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash"
	"io"
	"iter"

	"github.com/pyro-mcp/pyro/api"
)

// The stored form is the line "pyro manifest 1", the entries, and an end: a
// zero byte, the number of entries, and the SHA-256 of all before it. Numbers
// are varints (encoding/binary). An entry is one byte for its type, the number
// of leading path bytes it shares with the entry before, the number of the
// others and these, the mode, and then a file's size and hash or a link's
// target, counted too.
const header = "pyro manifest 1\n"

const (
	codeEnd = iota
	codeFile
	codeDirectory
	codeSymlink
)

// A Writer writes a manifest's stored form.
type Writer struct {
	w     *bufio.Writer
	sum   hash.Hash
	order order
	prev  string
	buf   []byte
}

// NewWriter begins a manifest on w.
func NewWriter(w io.Writer) *Writer {
	sum := sha256.New()
	mw := &Writer{w: bufio.NewWriterSize(io.MultiWriter(w, sum), 64<<10), sum: sum}
	_, _ = mw.w.WriteString(header) // Close reports it
	return mw
}

// Add writes the next entry. One that breaks the rules is ErrInvalid.
func (w *Writer) Add(e Entry) error {
	if err := w.order.next(e); err != nil {
		return err
	}
	shared := 0
	for shared < min(len(w.prev), len(e.Path)) && w.prev[shared] == e.Path[shared] {
		shared++
	}
	w.prev = e.Path
	code := byte(codeFile)
	switch e.Type {
	case Directory:
		code = codeDirectory
	case Symlink:
		code = codeSymlink
	}
	b := append(w.buf[:0], code)
	b = binary.AppendUvarint(b, uint64(shared))
	b = binary.AppendUvarint(b, uint64(len(e.Path)-shared))
	b = append(b, e.Path[shared:]...)
	b = binary.AppendUvarint(b, uint64(e.Mode))
	switch code {
	case codeFile:
		b = binary.AppendUvarint(b, uint64(e.Size))
		b = append(b, e.SHA256[:]...)
	case codeSymlink:
		b = binary.AppendUvarint(b, uint64(len(e.Target)))
		b = append(b, e.Target...)
	}
	w.buf = b
	_, err := w.w.Write(b)
	return err
}

// Close writes the end and returns the manifest's digest, which is equal for
// equal manifests only. It does not close what it writes to.
func (w *Writer) Close() (digest [32]byte, err error) {
	b := binary.AppendUvarint(append(w.buf[:0], codeEnd), uint64(w.order.count))
	if _, err := w.w.Write(b); err != nil {
		return digest, err
	}
	if err := w.w.Flush(); err != nil {
		return digest, err
	}
	w.sum.Sum(digest[:0])
	if _, err := w.w.Write(digest[:]); err != nil {
		return digest, err
	}
	return digest, w.w.Flush()
}

// Read yields the entries of a stored manifest. What is no manifest, or is cut
// off or altered, ends the sequence with ErrDamaged; entries before that have
// been yielded already.
func Read(r io.Reader) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		d := &decoder{r: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
		if err := d.header(); err != nil {
			yield(Entry{}, err)
			return
		}
		for {
			e, done, err := d.next()
			if err != nil {
				yield(Entry{}, damaged(err))
				return
			}
			if done || !yield(e, nil) {
				return
			}
		}
	}
}

func damaged(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, api.ErrInvalid) {
		return api.Errorf(api.ErrDamaged, "reading a manifest: %w", err)
	}
	return err
}

// Digest returns the digest of a manifest that is not stored. It is that of
// [Writer.Close].
func Digest(seq iter.Seq2[Entry, error]) (digest [32]byte, err error) {
	w := NewWriter(io.Discard)
	for e, err := range seq {
		if err != nil {
			return digest, err
		}
		if err := w.Add(e); err != nil {
			return digest, err
		}
	}
	return w.Close()
}

type decoder struct {
	r     *bufio.Reader
	sum   hash.Hash
	order order
	prev  []byte
	one   [1]byte
}

// ReadByte reads a byte that counts for the hash; binary.ReadUvarint wants it.
func (d *decoder) ReadByte() (byte, error) {
	c, err := d.r.ReadByte()
	if err == nil {
		d.one[0] = c
		d.sum.Write(d.one[:])
	}
	return c, err
}

func (d *decoder) full(p []byte) error {
	if _, err := io.ReadFull(d.r, p); err != nil {
		return err
	}
	d.sum.Write(p)
	return nil
}

// number reads one that is at most limit.
func (d *decoder) number(limit int64) (int64, error) {
	n, err := binary.ReadUvarint(d)
	if err != nil {
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			err = api.Errorf(api.ErrInvalid, "%w", err)
		}
		return 0, err
	}
	if n > uint64(limit) {
		return 0, api.Errorf(api.ErrInvalid, "the number %d is above %d", n, limit)
	}
	return int64(n), nil
}

func (d *decoder) header() error {
	b := make([]byte, len(header))
	if err := d.full(b); err != nil || !bytes.Equal(b, []byte(header)) {
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		return api.Errorf(api.ErrDamaged, "this is no manifest")
	}
	return nil
}

func (d *decoder) next() (e Entry, done bool, err error) {
	code, err := d.ReadByte()
	if err != nil {
		return e, false, err
	}
	switch code {
	case codeEnd:
		return e, true, d.end()
	case codeFile:
		e.Type = File
	case codeDirectory:
		e.Type = Directory
	case codeSymlink:
		e.Type = Symlink
	default:
		return e, false, api.Errorf(api.ErrInvalid, "an entry begins with %#x", code)
	}
	if err := d.path(&e); err != nil {
		return e, false, err
	}
	mode, err := d.number(0o777)
	if err != nil {
		return e, false, err
	}
	e.Mode = uint32(mode)
	switch code {
	case codeFile:
		if e.Size, err = d.number(1<<63 - 1); err == nil {
			err = d.full(e.SHA256[:])
		}
	case codeSymlink:
		if e.Size, err = d.number(MaxTarget); err == nil {
			target := make([]byte, e.Size)
			err = d.full(target)
			e.Target = string(target)
		}
	}
	if err != nil {
		return e, false, err
	}
	return e, false, d.order.next(e)
}

func (d *decoder) path(e *Entry) error {
	shared, err := d.number(int64(len(d.prev)))
	if err != nil {
		return err
	}
	rest, err := d.number(MaxPath - shared)
	if err != nil {
		return err
	}
	d.prev = append(d.prev[:shared], make([]byte, rest)...)
	if err := d.full(d.prev[shared:]); err != nil {
		return err
	}
	e.Path = string(d.prev)
	return nil
}

func (d *decoder) end() error {
	n, err := d.number(MaxEntries)
	if err != nil {
		return err
	}
	if n != d.order.count {
		return api.Errorf(api.ErrInvalid, "it has %d entries and should have %d", d.order.count, n)
	}
	var want [32]byte
	if _, err := io.ReadFull(d.r, want[:]); err != nil {
		return err
	}
	if !bytes.Equal(d.sum.Sum(nil), want[:]) {
		return api.Errorf(api.ErrInvalid, "its hash is wrong")
	}
	return nil
}
