package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// Limits bounds what one archive may hold; zero fields mean the defaults.
type Limits struct {
	Bytes   int64 // of all files together, holes included; default 64 GiB
	Entries int64 // default 1 000 000
}

const (
	defaultBytes   = 64 << 30
	defaultEntries = 1_000_000
	// maxName and maxComponent are Linux's PATH_MAX and NAME_MAX, limits.h.
	maxName      = 4096
	maxComponent = 255
	// maxDepth bounds how deep a tree may nest.
	maxDepth = 255
	// entryOverhead is how many bytes of headers one entry may cost on
	// average: a header, a PAX header and its records for a long name and link.
	entryOverhead = 16 << 10
)

func (l Limits) withDefaults() Limits {
	if l.Bytes <= 0 {
		l.Bytes = defaultBytes
	}
	if l.Entries <= 0 {
		l.Entries = defaultEntries
	}
	return l
}

// Links says what becomes of symbolic links in an archive.
type Links int

const (
	// LinksKept makes every link as it stands, wherever it points: for a guest,
	// in which following one harms nobody else.
	LinksKept Links = iota
	// LinksInside makes relative links that stay below the root by their text,
	// and skips the others: for a host.
	LinksInside
)

// ExtractOptions says how to unpack.
type ExtractOptions struct {
	Limits Limits
	Links  Links
	// Fresh refuses an entry whose name is already taken, be it by an earlier
	// entry, by case folding, or by what was there before. Without it files and
	// links are replaced; a directory is never replaced by anything else.
	Fresh bool
	// Owner, where not nil, is whom everything that is made belongs to, in the
	// place of this process's user. Directories that are there already keep
	// theirs.
	Owner *Owner
	// OnDirectory, where not nil, is told of every directory that the archive
	// has an entry for, so that a caller who merges what was unpacked knows
	// which modes and times are the archive's. The name is clean and local.
	OnDirectory func(name string)
}

// An Owner is a user and a group by their numbers.
type Owner struct {
	UID, GID int
}

// Result counts what was unpacked or packed.
type Result struct {
	Entries int64
	Bytes   int64 // content of regular files
	// Skipped are the first maxSkipped entries that were left out, and
	// SkippedCount their whole number.
	Skipped      []Skip
	SkippedCount int64
}

// A Skip is one entry that was left out. Path comes from the archive: print it
// escaped.
type Skip struct {
	Path   string
	Reason string
}

const maxSkipped = 1000

func (r *Result) skip(path, reason string) {
	r.SkippedCount++
	if len(r.Skipped) < maxSkipped {
		r.Skipped = append(r.Skipped, Skip{path, reason})
	}
}

// Extract unpacks the tar or tar.gz that r yields into root. Permission bits
// and times are kept. It stops at the archive's end marker or r's end, and
// leaves what it had written when it fails: the caller stages and discards.
//
// A bad archive is ErrDamaged, one that names what it must not ErrDenied, one
// beyond the limits ErrExhausted.
func Extract(ctx context.Context, root *os.Root, r io.Reader, opts ExtractOptions) (Result, error) {
	limits := opts.Limits.withDefaults()
	br := bufio.NewReaderSize(r, 64<<10)
	var src io.Reader = br
	if magic, _ := br.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) { // RFC 1952, 2.3.1
		zr, err := gzip.NewReader(br)
		if err != nil {
			return Result{}, api.Errorf(api.ErrDamaged, "reading the archive's gzip header: %w", err)
		}
		defer zr.Close()
		src = zr
	}
	// Headers count too, or an archive of nothing else would have no end.
	src = &cappedReader{r: src, left: limits.Bytes + limits.Entries*entryOverhead + 1<<20}
	x := &extractor{ctx: ctx, root: root, opts: opts, limits: limits, realDirs: map[string]bool{".": true}, made: map[string]bool{}}
	defer x.forgetDir()
	err := x.run(tar.NewReader(src))
	return x.result, err
}

type extractor struct {
	ctx    context.Context
	root   *os.Root
	opts   ExtractOptions
	limits Limits
	result Result
	// realDirs are directories known to be none of links, at most maxRemembered.
	realDirs map[string]bool
	// made are the regular files that this archive has made, for hard links.
	made map[string]bool
	dirs []dirMeta
	buf  []byte
	// last is the directory lastDir, kept open because a directory's files
	// follow each other: in a sandbox every part of a path costs.
	last    *os.Root
	lastDir string
}

// maxRemembered bounds each of the extractor's sets of names.
const maxRemembered = 1_000_000

type dirMeta struct {
	name string
	mode fs.FileMode
	time time.Time
}

func (x *extractor) run(tr *tar.Reader) error {
	for {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return readError(err)
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue // git archive writes one; it holds nothing of ours
		}
		if x.result.Entries+x.result.SkippedCount >= x.limits.Entries {
			return api.Errorf(api.ErrExhausted, "the archive has more than %d entries", x.limits.Entries)
		}
		name, err := checkName(hdr.Name)
		if err != nil {
			return err
		}
		if err := x.entry(tr, hdr, name); err != nil {
			return fmt.Errorf("unpacking %q: %w", shorten(hdr.Name), err)
		}
	}
	// Directories last: one may be read-only, and every file in it moves its
	// time.
	for i := len(x.dirs) - 1; i >= 0; i-- {
		d := x.dirs[i]
		if err := x.root.Chmod(d.name, d.mode); err != nil {
			return fmt.Errorf("setting the mode of %q: %w", shorten(d.name), pathCause(err))
		}
		_ = x.root.Chtimes(d.name, d.time, d.time)
	}
	return nil
}

// checkName returns the entry's name below the root, "." for the root itself.
func checkName(name string) (string, error) {
	switch {
	case len(name) > maxName:
		return "", api.Errorf(api.ErrDenied, "the archive has a name of %d bytes, the limit is %d", len(name), maxName)
	case strings.ContainsRune(name, 0):
		return "", api.Errorf(api.ErrDenied, "the archive has a name with a NUL in it: %q", shorten(name))
	}
	trimmed := strings.TrimRight(name, "/")
	if trimmed == "" || strings.HasPrefix(name, "/") || !filepath.IsLocal(trimmed) {
		return "", api.Errorf(api.ErrDenied, "the archive has a name that leaves its root: %q", shorten(name))
	}
	clean := path.Clean(trimmed)
	parts := strings.Split(clean, "/")
	if len(parts) > maxDepth {
		return "", api.Errorf(api.ErrDenied, "the archive nests %d directories, the limit is %d", len(parts), maxDepth)
	}
	for _, p := range parts {
		if len(p) > maxComponent {
			return "", api.Errorf(api.ErrDenied, "the archive has a name part of %d bytes, the limit is %d: %q", len(p), maxComponent, shorten(p))
		}
	}
	// "a/../b" is local, but an honest archive has no such name, and readers
	// disagree about it.
	for _, p := range strings.Split(trimmed, "/") {
		if p == ".." {
			return "", api.Errorf(api.ErrDenied, "the archive has a name with .. in it: %q", shorten(name))
		}
	}
	return clean, nil
}

func (x *extractor) entry(tr *tar.Reader, hdr *tar.Header, name string) error {
	mode := hdr.FileInfo().Mode().Perm()
	if hdr.Typeflag == tar.TypeDir {
		if err := x.makeDirs(name); err != nil {
			return err
		}
		if name != "." {
			x.dirs = append(x.dirs, dirMeta{name, mode, hdr.ModTime})
			if x.opts.OnDirectory != nil {
				x.opts.OnDirectory(name)
			}
			x.result.Entries++
		}
		return nil
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeSymlink, tar.TypeLink, tar.TypeGNUSparse:
	default:
		x.result.skip(hdr.Name, "not a file, directory or link")
		return nil
	}
	if name == "." {
		return api.Errorf(api.ErrDenied, "the archive's root is not a directory")
	}
	if err := x.makeDirs(path.Dir(name)); err != nil {
		return err
	}
	switch hdr.Typeflag {
	case tar.TypeSymlink:
		return x.symlink(hdr, name)
	case tar.TypeLink:
		return x.hardlink(hdr, name)
	}
	return x.file(tr, hdr, name, mode)
}

// makeDirs makes sure that every part of name is a directory and no link to one.
func (x *extractor) makeDirs(name string) error {
	if x.realDirs[name] {
		return nil
	}
	if err := x.makeDirs(path.Dir(name)); err != nil {
		return err
	}
	fi, err := x.root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := x.root.Mkdir(name, 0o755); err != nil {
			return pathCause(err)
		}
		if err := x.give(name); err != nil {
			return err
		}
	case err != nil:
		return pathCause(err)
	case fi.IsDir():
	case fi.Mode().Type() == fs.ModeSymlink:
		return api.Errorf(api.ErrDenied, "%q is a symbolic link, not a directory", shorten(name))
	default:
		return api.Errorf(api.ErrExists, "%q is not a directory", shorten(name))
	}
	if len(x.realDirs) < maxRemembered {
		x.realDirs[name] = true
	}
	return nil
}

// in returns the directory that name lies in and the name there. makeDirs has
// made it, and an archive replaces no directory, so it stays what it is.
func (x *extractor) in(name string) (*os.Root, string, error) {
	dir, base := path.Split(name)
	if dir == "" {
		return x.root, name, nil
	}
	if x.last == nil || x.lastDir != dir {
		root, err := x.root.OpenRoot(path.Clean(dir))
		if err != nil {
			return nil, "", pathCause(err)
		}
		x.forgetDir()
		x.last, x.lastDir = root, dir
	}
	return x.last, base, nil
}

func (x *extractor) forgetDir() {
	if x.last != nil {
		_ = x.last.Close()
		x.last = nil
	}
}

// clear makes name free for a new file or link.
func (x *extractor) clear(name string) error {
	fi, err := x.root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return pathCause(err)
	case x.opts.Fresh:
		return api.Errorf(api.ErrExists, "the name is already taken")
	case fi.IsDir():
		return api.Errorf(api.ErrExists, "a directory is in its place")
	}
	delete(x.made, name)
	if err := x.root.Remove(name); err != nil {
		return pathCause(err)
	}
	return nil
}

func (x *extractor) symlink(hdr *tar.Header, name string) error {
	target := hdr.Linkname
	if target == "" || len(target) > maxName || strings.ContainsRune(target, 0) {
		return api.Errorf(api.ErrDenied, "its link target is empty, too long or has a NUL in it")
	}
	if x.opts.Links == LinksInside {
		if path.IsAbs(target) || !filepath.IsLocal(path.Join(path.Dir(name), target)) {
			x.result.skip(hdr.Name, "a link that leads outside")
			return nil
		}
	}
	if err := x.clear(name); err != nil {
		return err
	}
	if err := x.root.Symlink(target, name); err != nil {
		return pathCause(err)
	}
	if err := x.give(name); err != nil {
		return err
	}
	x.result.Entries++
	return nil
}

// give gives what has just been made at name to the owner.
func (x *extractor) give(name string) error {
	if x.opts.Owner == nil {
		return nil
	}
	if err := x.root.Lchown(name, x.opts.Owner.UID, x.opts.Owner.GID); err != nil {
		return pathCause(err)
	}
	return nil
}

// hardlink links to a regular file that this archive has made, and to nothing
// else: what was there before, or a link, might be somebody else's file.
func (x *extractor) hardlink(hdr *tar.Header, name string) error {
	target, err := checkName(hdr.Linkname)
	if err != nil {
		return err
	}
	if !x.made[target] || target == name {
		return api.Errorf(api.ErrDenied, "it is a hard link to %q, which is no file of this archive", shorten(hdr.Linkname))
	}
	fi, err := x.root.Lstat(target)
	if err != nil || !fi.Mode().IsRegular() {
		return api.Errorf(api.ErrDenied, "it is a hard link to %q, which has been replaced", shorten(hdr.Linkname))
	}
	if err := x.clear(name); err != nil {
		return err
	}
	if err := x.root.Link(target, name); err != nil {
		return pathCause(err)
	}
	x.remember(name)
	x.result.Entries++
	return nil
}

func (x *extractor) remember(name string) {
	if len(x.made) < maxRemembered {
		x.made[name] = true
	}
}

func (x *extractor) file(tr *tar.Reader, hdr *tar.Header, name string, mode fs.FileMode) error {
	if hdr.Size < 0 || hdr.Size > x.limits.Bytes-x.result.Bytes {
		return api.Errorf(api.ErrExhausted, "the archive holds more than %d bytes", x.limits.Bytes)
	}
	dir, base, err := x.in(name)
	if err != nil {
		return err
	}
	// O_EXCL also refuses a link that somebody has put there meanwhile.
	const flags = os.O_WRONLY | os.O_CREATE | os.O_EXCL
	f, err := dir.OpenFile(base, flags, 0o600)
	if errors.Is(err, fs.ErrExist) {
		if err := x.clear(name); err != nil {
			return err
		}
		f, err = dir.OpenFile(base, flags, 0o600)
	}
	if err != nil {
		return pathCause(err)
	}
	err = x.copy(f, tr, hdr.Size)
	if o := x.opts.Owner; err == nil && o != nil {
		// Before the mode: giving a file away takes its set-id bits.
		if e := f.Chown(o.UID, o.GID); e != nil {
			err = pathCause(e)
		}
	}
	if err == nil {
		if e := f.Chmod(mode); e != nil {
			err = pathCause(e)
		}
	}
	if e := f.Close(); err == nil && e != nil {
		err = pathCause(e)
	}
	if err != nil {
		_ = dir.Remove(base) // never half a file under its final name
		return err
	}
	_ = dir.Chtimes(base, hdr.ModTime, hdr.ModTime)
	x.result.Entries++
	x.result.Bytes += hdr.Size
	x.remember(name)
	return nil
}

const copyBuffer = 64 << 10

// copy writes size bytes, leaving holes where whole blocks are zero: a sparse
// archive of a few bytes can stand for gigabytes of them.
func (x *extractor) copy(f *os.File, r io.Reader, size int64) error {
	if x.buf == nil {
		x.buf = make([]byte, copyBuffer)
	}
	var done int64
	hole := false
	for done < size {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(r, x.buf[:min(copyBuffer, size-done)])
		if err != nil {
			return readError(err)
		}
		hole = n >= 4096 && allZero(x.buf[:n])
		if !hole {
			if _, err := f.WriteAt(x.buf[:n], done); err != nil {
				return pathCause(err)
			}
		}
		done += int64(n)
	}
	if hole {
		if err := f.Truncate(size); err != nil {
			return pathCause(err)
		}
	}
	return nil
}

func allZero(b []byte) bool {
	return b[0] == 0 && bytes.Equal(b[:len(b)-1], b[1:])
}

// cappedReader ends with ErrExhausted, not with an end that looks honest.
type cappedReader struct {
	r    io.Reader
	left int64
}

func (c *cappedReader) Read(b []byte) (int, error) {
	if c.left <= 0 {
		return 0, api.Errorf(api.ErrExhausted, "the archive is longer than its limits allow")
	}
	n, err := c.r.Read(b[:min(int64(len(b)), c.left)])
	c.left -= int64(n)
	return n, err
}
