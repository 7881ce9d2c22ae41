package workspacedisk

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/overlayfs"
)

// exportMerged writes the files of a disk with layers into f, which is empty,
// as a filesystem of their own, and returns its size. The runtime paths and
// overlayfs's marks are left out. Nothing is kept of what is not a file: free
// blocks, journals, the filesystems' names.
func (d *Disk) exportMerged(ctx context.Context, f *os.File) (size int64, err error) {
	shown := *d
	shown.opts.HideRuntime = true
	if err := shown.hideRuntime(ctx); err != nil {
		return 0, err
	}
	m := measure{limits: d.opts.Limits, dirs: map[string]int64{}, seen: map[fileID]bool{}}
	if err := shown.walkAll(ctx, m.add); err != nil {
		return 0, err
	}
	least, err := m.size()
	if err != nil {
		return 0, err
	}
	asked := d.opts.DiskBytes
	if asked <= 0 {
		asked = d.layerBytes
	}
	opts := ext4image.Options{SizeBytes: max(asked, least), Time: time.Now()}
	_, _ = rand.Read(opts.UUID[:]) // never fails, crypto/rand
	w, err := ext4image.New(f, opts)
	if err != nil {
		return 0, err
	}
	c := copier{w: w, links: map[fileID]string{}}
	if err := shown.walkAll(ctx, c.add); err != nil {
		return 0, diskFull(err)
	}
	if err := w.Close(); err != nil {
		return 0, diskFull(err)
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// walkAll calls fn for the root and everything below it.
func (d *Disk) walkAll(ctx context.Context, fn func(ctx context.Context, p string, f file) error) error {
	root := d.tree.root()
	visit := func(p string, f file) error {
		if err := fn(ctx, p, f); err != nil {
			return fmt.Errorf("%q: %w", p, err)
		}
		return nil
	}
	if err := visit("/", root); err != nil {
		return err
	}
	return d.walkTree(ctx, root, "/", true, d.budget(), visit)
}

// outBlock is the block size of what ext4image writes.
const outBlock = 4096

// A measure counts what the files take in the exported filesystem, rather too
// much than too little, and checks the limits before anything is written.
type measure struct {
	limits    Limits
	files     int64
	blocks    int64
	data      int64 // bytes of content
	pathBytes int64
	dirs      map[string]int64 // bytes of entries
	seen      map[fileID]bool  // with more than one link
}

func (m *measure) add(ctx context.Context, p string, f file) error {
	if m.files++; m.files > int64(m.limits.MaxEntries) {
		return api.Errorf(api.ErrExhausted, "the disk has more than %d files", m.limits.MaxEntries)
	}
	if m.pathBytes += int64(len(p)); m.pathBytes > m.limits.MaxPathBytes {
		return api.Errorf(api.ErrExhausted, "the disk's paths take more than %d bytes", m.limits.MaxPathBytes)
	}
	// Each block of a directory may end with room for one name too little.
	const room = outBlock - 8 - maxNameLen
	dir, name := splitPath(p)
	entry := int64(8 + len(name) + 3)
	m.dirs[dir] += entry
	if f.IsDir() {
		m.dirs[p] += 24 // the two entries of dots
	}
	if m.dirs[dir]%room < entry {
		m.blocks++
	}
	if m.counted(f) {
		return nil
	}
	switch {
	case f.IsDir():
		m.blocks++
	case f.IsSymlink():
		m.blocks++
	case f.IsRegular():
		content, err := openContent(ctx, f)
		if err != nil {
			return err
		}
		for _, s := range content.stored {
			m.data += s.Len
			m.blocks += (s.Len + outBlock - 1) / outBlock
		}
		if m.data > m.limits.MaxExportBytes {
			return api.Errorf(api.ErrExhausted, "the disk holds more than the limit of %d bytes", m.limits.MaxExportBytes)
		}
		m.blocks += 4 // of extents
	}
	attrs, err := f.fs.Xattrs(f.Inode)
	if len(attrs) > 0 {
		m.blocks++
	}
	return err
}

// counted reports whether another name of f was counted before.
func (m *measure) counted(f file) bool {
	if f.IsDir() || f.Links < 2 {
		return false
	}
	was := m.seen[f.id()]
	m.seen[f.id()] = true
	return was
}

// size is the least size in bytes of the exported filesystem.
func (m *measure) size() (int64, error) { return ext4image.SizeFor(m.files, m.blocks) }

func splitPath(p string) (dir, name string) {
	i := strings.LastIndexByte(p, '/')
	return p[:max(i, 1)], p[i+1:]
}

// A copier puts files into a new filesystem, parents first.
type copier struct {
	w     *ext4image.Writer
	links map[fileID]string // the first path of files with more than one link
}

func (c *copier) add(ctx context.Context, p string, f file) error {
	if first, ok := c.links[f.id()]; ok {
		return c.w.Link(p, first)
	}
	if !f.IsDir() && f.Links > 1 {
		c.links[f.id()] = p
	}
	if p == "/lost+found" && !f.IsDir() {
		return api.WithHint(api.Errorf(api.ErrUnsupported, "an ext4 image must have a directory of this name"),
			"start the workspace and rename the file")
	}
	attrs, err := f.fs.Xattrs(f.Inode)
	if err != nil {
		return err
	}
	for name := range attrs {
		if strings.HasPrefix(name, overlayfs.Trusted) {
			delete(attrs, name)
		}
	}
	e := ext4image.Entry{
		Path: p, Mode: f.Mode, UID: f.UID, GID: f.GID, ModTime: time.Unix(f.Mtime, int64(f.Nanos)), Xattrs: attrs,
	}
	e.Major, e.Minor, _ = f.Device()
	switch {
	case f.IsSymlink():
		if e.Target, err = f.fs.ReadLink(f.Inode); err != nil {
			return err
		}
	case f.IsRegular():
		content, err := openContent(ctx, f)
		if err != nil {
			return err
		}
		e.Size, e.Stored = f.Size, content.stored
		return c.w.Add(e, content)
	}
	return c.w.Add(e, nil)
}

// A content reads the stored stretches of a file, one after the other.
type content struct {
	ctx    context.Context // of the one call that reads it
	file   *ext4.File
	stored []ext4image.Stretch
	next   int   // the stretch that is read
	done   int64 // bytes of it
}

// maxStretches bounds how many pieces a sparse file is written in; the smallest
// holes are filled where it has more. An extent tree of ext4image has room for
// about five times as many.
const maxStretches = 256

// openContent finds out what is stored of a regular file, in blocks of the
// exported filesystem.
func openContent(ctx context.Context, f file) (*content, error) {
	opened, err := f.fs.OpenFile(f.Inode)
	if err != nil {
		return nil, err
	}
	c := &content{ctx: ctx, file: opened, stored: []ext4image.Stretch{}}
	gap := int64(0) // holes up to this size are filled
	for pos := int64(0); ; {
		start, end, ok, err := opened.NextData(ctx, pos)
		if err != nil {
			return nil, err
		}
		if !ok {
			return c, nil
		}
		pos = end
		c.stored = appendStretch(c.stored, start, end, f.Size, gap)
		for len(c.stored) > maxStretches {
			gap = max(2*gap, outBlock)
			merged := c.stored[:0]
			for _, s := range c.stored {
				merged = appendStretch(merged, s.Off, s.Off+s.Len, f.Size, gap)
			}
			c.stored = merged
		}
	}
}

// appendStretch adds the bytes from start to end of a file, widened to whole
// blocks, to the stretches before them, joined with the last if at most gap
// bytes lie between.
func appendStretch(list []ext4image.Stretch, start, end, size, gap int64) []ext4image.Stretch {
	start -= start % outBlock
	end = min((end+outBlock-1)/outBlock*outBlock, size)
	if n := len(list); n > 0 && start-(list[n-1].Off+list[n-1].Len) <= gap {
		list[n-1].Len = max(list[n-1].Len, end-list[n-1].Off)
		return list
	}
	return append(list, ext4image.Stretch{Off: start, Len: end - start})
}

// Read implements [io.Reader].
func (c *content) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	for c.next < len(c.stored) && c.done == c.stored[c.next].Len {
		c.next, c.done = c.next+1, 0
	}
	if c.next == len(c.stored) {
		return 0, io.EOF
	}
	s := c.stored[c.next]
	n, err := c.file.ReadAt(p[:min(int64(len(p)), s.Len-c.done)], s.Off+c.done)
	c.done += int64(n)
	if err == io.EOF { // of the file; the end of the stretch, too
		err = nil
	}
	return n, err
}
