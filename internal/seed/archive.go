package seed

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

// An archiveInput is a tar archive. It is read twice: once to learn what it
// holds in the end, since a later entry replaces an earlier one, and how much
// room that takes, and once to copy it.
//
// The archive may be hostile. A name that leads out of it, a file below a link
// or a file, and a hard link to anything but an earlier file are refused; what
// it unpacks to is bounded before it is believed.
type archiveInput struct {
	ctx      context.Context
	path     string
	f        *os.File
	stat     os.FileInfo
	progress func(api.Progress)
	plan     map[string]*planned
	entries  int64
	bytes    int64
	written  int64
	top      int64
	report   report
}

// planned is what an archive makes of one path.
type planned struct {
	item
	last    int  // index of the entry that decides
	special bool // left out
	made    bool // copied
}

func openArchive(ctx context.Context, src Source, progress func(api.Progress)) (_ input, err error) {
	f, err := os.Open(src.Path)
	if err != nil {
		return nil, api.Errorf(api.ErrDenied, "opening seed archive %s: %w", src.Path, err)
	}
	in := &archiveInput{ctx: ctx, path: src.Path, f: f, progress: progress, plan: map[string]*planned{}}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if in.stat, err = f.Stat(); err != nil {
		return nil, err
	}
	if err := in.scan("measuring", in.measure); err != nil {
		return nil, fmt.Errorf("reading seed archive %s: %w", src.Path, err)
	}
	for _, p := range in.plan {
		if !p.special {
			in.entries++
		}
		if p.typ == manifest.File {
			in.written += p.size
		}
	}
	return in, nil
}

func (in *archiveInput) close() { in.f.Close() }

func (in *archiveInput) size() size {
	var s size
	for _, p := range in.plan {
		if !p.special {
			s.add(p.item)
		}
	}
	return s
}

func (in *archiveInput) topTime() int64 { return in.top }
func (in *archiveInput) sorted() bool   { return false }

func (in *archiveInput) info() api.WorkspaceSeed {
	return api.WorkspaceSeed{
		Mode: api.SeedArchive, SeedPath: &in.path, Destination: api.WorkspacePath,
		EntryCount: in.entries, BytesWritten: in.written,
		Skipped: in.report.list(), SkippedCount: in.report.count,
	}
}

// headerBytes is how many bytes of headers one entry may cost on average: a
// header, a PAX header and its records for a long name and link.
const headerBytes = 16 << 10

// scan reads the archive from its beginning and calls f with every entry and
// its number.
func (in *archiveInput) scan(phase string, f func(i int, h *tar.Header, name string, content io.Reader) error) error {
	if _, err := in.f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	m := &meter{phase: phase, message: "reading " + filepath.Base(in.path), total: in.stat.Size(), tell: in.progress}
	src, closeSrc, err := decompress(&meteredReader{ctx: in.ctx, r: in.f, m: m})
	if err != nil {
		return err
	}
	defer closeSrc()
	bounded := &bombReader{r: src, left: maxBytes + int64(headerBytes)*maxEntries}
	tr := tar.NewReader(bounded)
	for i := 0; ; i++ {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return drain(bounded)
		}
		if err != nil {
			return archiveError(err)
		}
		if i > maxEntries {
			return tooManyEntries()
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue // git archive writes one; it holds nothing of ours
		}
		name, err := archiveName(h.Name)
		if err == nil {
			err = f(i, h, name, tr)
		}
		if err != nil {
			return fmt.Errorf("entry %.200q: %w", h.Name, err)
		}
	}
}

// drain reads what is behind an archive's end: there the checksum of what was
// compressed is. Padding behind that is common and means nothing.
func drain(r io.Reader) error {
	if _, err := io.Copy(io.Discard, r); err != nil && !errors.Is(err, gzip.ErrHeader) && !errors.Is(err, zstd.ErrMagicMismatch) {
		return archiveError(err)
	}
	return nil
}

// decompress recognises an archive by its first bytes.
func decompress(r io.Reader) (io.Reader, func(), error) {
	br := bufio.NewReaderSize(r, 256<<10)
	magic, err := br.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}): // RFC 1952, 2.3.1
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, api.Errorf(api.ErrDamaged, "its gzip header is damaged: %w", err)
		}
		return zr, func() { _ = zr.Close() }, nil
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}): // RFC 8878, 3.1.1
		// 128 MiB is the largest window that zstd makes without --ultra.
		zr, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, api.Errorf(api.ErrDamaged, "its zstd header is damaged: %w", err)
		}
		return zr, zr.Close, nil
	case len(magic) == 512 && (bytes.HasPrefix(magic[257:], []byte("ustar")) || isZero(magic)): // tar(5)
		return br, func() {}, nil
	}
	if len(magic) == 512 {
		if _, err := tar.NewReader(bytes.NewReader(magic)).Next(); err == nil { // the format before ustar
			return br, func() {}, nil
		}
	}
	return nil, nil, api.WithHint(api.Errorf(api.ErrInvalid, "it is no tar archive"), "name a directory, or a tar archive: plain, gzip or zstd")
}

func isZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

type meteredReader struct {
	ctx context.Context
	r   io.Reader
	m   *meter
}

func (r *meteredReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	n, err := r.r.Read(p)
	r.m.moved(int64(n))
	return n, err
}

// A bombReader ends an archive that unpacks to more than it may.
type bombReader struct {
	r    io.Reader
	left int64
}

func (b *bombReader) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, tooManyBytes()
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

func tooManyBytes() error {
	return api.Errorf(api.ErrExhausted, "it unpacks to more than %d GiB", maxBytes>>30)
}

// archiveError classes what reading the archive met.
func archiveError(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, api.ErrExhausted) {
		return err
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return api.Errorf(api.ErrDamaged, "the archive is damaged: %w", err)
}

// archiveName returns an entry's path in the seed, "" for the top.
func archiveName(name string) (string, error) {
	trimmed := strings.TrimRight(name, "/")
	if trimmed == "" || strings.HasPrefix(name, "/") {
		return "", api.Errorf(api.ErrDenied, "the name is empty or absolute")
	}
	for part := range strings.SplitSeq(trimmed, "/") {
		// "a/../b" stays inside, but an honest archive has no such name, and
		// readers disagree about it.
		if part == ".." {
			return "", api.Errorf(api.ErrDenied, "the name has .. in it")
		}
	}
	clean := path.Clean(trimmed)
	if clean == "." {
		return "", nil
	}
	if err := manifest.CheckPath(clean); err != nil {
		return "", api.Errorf(api.ErrDenied, "the name cannot be used: %w", err)
	}
	return clean, nil
}

// nanoseconds returns t, or 1970 where that is out of range.
func nanoseconds(t time.Time) int64 {
	if sec := t.Unix(); sec <= math.MinInt64/1_000_000_000 || sec >= math.MaxInt64/1_000_000_000 {
		return 0
	}
	return t.UnixNano()
}

// measure plans what becomes of one entry.
func (in *archiveInput) measure(i int, h *tar.Header, name string, _ io.Reader) error {
	p := &planned{last: i, item: item{path: name, mode: uint32(h.Mode) & 0o777, mtime: nanoseconds(h.ModTime)}}
	switch h.Typeflag {
	case tar.TypeDir:
		p.typ = manifest.Directory
	case tar.TypeReg, tar.TypeGNUSparse:
		p.typ, p.size = manifest.File, h.Size
		if h.Size < 0 || h.Size > maxBytes-in.bytes {
			return tooManyBytes()
		}
		in.bytes += h.Size
	case tar.TypeSymlink:
		if h.Linkname == "" || len(h.Linkname) >= manifest.MaxTarget || strings.IndexByte(h.Linkname, 0) >= 0 {
			return api.Errorf(api.ErrDenied, "its link target is empty, too long or has a NUL in it")
		}
		p.typ, p.mode, p.target, p.size = manifest.Symlink, 0o777, h.Linkname, int64(len(h.Linkname))
	case tar.TypeLink:
		target, err := archiveName(h.Linkname)
		if err != nil {
			return fmt.Errorf("it is a hard link to %.200q: %w", h.Linkname, err)
		}
		of := in.plan[target]
		if of == nil || of.typ == manifest.Directory || target == name {
			return api.Errorf(api.ErrDenied, "it is a hard link to %.200q, which is no file of the archive", h.Linkname)
		}
		link := *of
		link.path, link.last, link.size = name, i, 0
		if of.typ == manifest.Symlink {
			link.size = of.size
		}
		p = &link
	default:
		p.special = true
		in.report.skip(name, reasonSpecial)
	}
	if name == "" {
		if p.typ != manifest.Directory {
			return api.Errorf(api.ErrDenied, "it takes the place of the archive's top")
		}
		in.top = p.mtime
		return nil
	}
	if err := in.parents(name, p.mtime); err != nil {
		return err
	}
	if old := in.plan[name]; old != nil && (old.typ == manifest.Directory) != (p.typ == manifest.Directory) {
		return api.Errorf(api.ErrDenied, "it takes the place of a %s", orSpecial(old))
	}
	in.plan[name] = p
	if len(in.plan) > maxEntries {
		return tooManyEntries()
	}
	return nil
}

func orSpecial(p *planned) string {
	if p.special {
		return "special file"
	}
	return p.typ
}

// parents makes sure that name lies in directories.
func (in *archiveInput) parents(name string, mtime int64) error {
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		p := in.plan[dir]
		if p != nil && p.typ == manifest.Directory {
			return nil // then its own parents are there too
		}
		if p != nil {
			return api.Errorf(api.ErrDenied, "it lies below %.200q, which is a %s", dir, orSpecial(p))
		}
		in.plan[dir] = &planned{last: -1, item: item{path: dir, typ: manifest.Directory, mode: 0o755, mtime: mtime}}
		if len(in.plan) > maxEntries {
			return tooManyEntries()
		}
	}
	return nil
}

func (in *archiveInput) copy(to linkSink) error {
	changed := api.Errorf(api.ErrBusy, "the archive changed while it was read")
	err := in.scan("copying", func(i int, h *tar.Header, name string, r io.Reader) error {
		if name == "" {
			return nil
		}
		p := in.plan[name]
		if p == nil {
			return changed
		}
		if p.last != i || p.special || p.made {
			return nil // a later one decides
		}
		if err := in.makeParents(to, name); err != nil {
			return err
		}
		p.made = true
		switch {
		case h.Typeflag == tar.TypeLink && p.typ == manifest.File:
			return in.copyLink(to, h, p, i)
		case p.typ != manifest.File:
			return to.put(p.item, nil)
		case h.Size != p.size:
			return changed
		}
		c := &content{ctx: in.ctx, r: r, left: p.size, h: sha256.New(), moved: func(int64) {}}
		if err := to.put(p.item, c); err != nil {
			return err
		}
		if c.failed != nil {
			return archiveError(c.failed)
		}
		return nil
	})
	if err != nil {
		return err
	}
	now, err := in.f.Stat()
	if err != nil || now.Size() != in.stat.Size() || !now.ModTime().Equal(in.stat.ModTime()) {
		return changed
	}
	return nil
}

func (in *archiveInput) makeParents(to linkSink, name string) error {
	dir := path.Dir(name)
	p := in.plan[dir]
	if p == nil || p.made {
		return nil // the top, or made with all above it
	}
	if err := in.makeParents(to, dir); err != nil {
		return err
	}
	p.made = true
	return to.put(p.item, nil)
}

func (in *archiveInput) copyLink(to linkSink, h *tar.Header, p *planned, i int) error {
	target, err := archiveName(h.Linkname)
	if err != nil {
		return err
	}
	of := in.plan[target]
	if of == nil || of.typ != manifest.File || of.last > i || !of.made {
		return api.Errorf(api.ErrUnsupported, "it is a hard link to a file that the archive replaces later")
	}
	return to.link(p.path, target, p.item)
}
