package oci

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
)

// A tree is the file system that the layers make, one on the other.
type tree struct {
	w       *ext4image.Writer
	limits  Limits
	entries int64 // of all layers, and directories that are made on the way
	dropped int   // device files that were left out
}

// apply takes away what the layer takes away from those below, then adds its
// files.
func (t *tree) apply(ctx context.Context, r io.Reader, l layer, gone removals) error {
	for _, dir := range gone.opaque {
		if err := t.remove(dir, true, gone.dirs); err != nil {
			return fmt.Errorf("emptying %.200q: %w", dir, err)
		}
	}
	for _, victim := range gone.paths {
		if err := t.remove(victim, false, gone.dirs); err != nil {
			return fmt.Errorf("removing %.200q: %w", victim, err)
		}
	}
	u, err := newUnpacker(r, l, t.limits.TreeBytes)
	if err != nil {
		return err
	}
	defer u.close()
	if err := t.w.AddTar(ctx, u, t.filter); err != nil {
		return readingArchive(err)
	}
	return u.finish()
}

// remove takes name away, or empties it. No whiteout leads through a link:
// what a builder means lies where it says, and the path could lead anywhere in
// the image. Only where the layer puts a directory in the link's place, there
// is nothing below to take away.
func (t *tree) remove(name string, opaque bool, dirs map[string]bool) error {
	elems := strings.Split(name, "/")
	if !opaque {
		elems = elems[:len(elems)-1]
	}
	for i := range elems {
		prefix := strings.Join(elems[:i+1], "/")
		mode, ok := t.w.Mode(prefix)
		switch {
		case !ok:
			return nil
		case mode&fileType == ext4image.ModeDir:
		case dirs[prefix]:
			return nil
		case mode&fileType == ext4image.ModeSymlink:
			return api.Errorf(api.ErrInvalid, "the whiteout leads through the link %.200q", prefix)
		default:
			return nil // below a file there is nothing
		}
	}
	if opaque {
		return t.w.Clear(name)
	}
	if name == "lost+found" {
		return nil
	}
	return t.w.Remove(name)
}

// fileType is the part of a mode that says what a file is, as in stat(2).
const fileType = 0o170000

// mountPoints are directories that a guest mounts on. What the image has in the
// first three nobody would ever see.
var mountPoints = []struct {
	name string
	mode uint16
}{
	{"dev", 0o755}, {"proc", 0o555}, {"sys", 0o555}, {"run", 0o755}, {"tmp", 0o1777}, {"workspace", 0o755},
}

// neverSeen are the mount points whose content is left out.
var neverSeen = []string{"dev", "proc", "sys"}

// filter is an ext4image.Filter that leaves out what does not belong into an
// image.
func (t *tree) filter(h *tar.Header, content io.Reader) (io.Reader, error) {
	name, err := clean(h.Name)
	if err != nil {
		return nil, err
	}
	if h.Typeflag == tar.TypeXGlobalHeader || strings.HasPrefix(path.Base(name), whiteoutPrefix) {
		return nil, nil
	}
	top, _, deep := strings.Cut(name, "/")
	if top == "lost+found" || deep && slices.Contains(neverSeen, top) {
		return nil, nil
	}
	if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
		// A guest makes its own. In an image they serve nobody, and the file
		// system is mounted by hosts too.
		t.dropped++
		return nil, nil
	}
	// Directories that no entry describes are counted as such.
	for dir := path.Dir(name); dir != "." && !t.w.Exists(dir); dir = path.Dir(dir) {
		if t.entries++; t.entries > t.limits.Entries {
			return nil, tooMuch("the image has %d entries or more, the limit is %d", t.entries, t.limits.Entries)
		}
	}
	for key := range h.PAXRecords {
		if attr, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok && !wanted(attr) {
			delete(h.PAXRecords, key)
		}
	}
	return content, nil
}

// wanted reports whether an extended attribute goes into the image: what
// programs keep there, and what lets a program do more than its user. All
// others are for the kernel or the file system of the host that they come
// from; those of overlayfs (trusted.overlay, user.overlay) would even make a
// file something else where the image is a layer.
func wanted(attr string) bool {
	return attr == "security.capability" || strings.HasPrefix(attr, "user.") && !strings.HasPrefix(attr, "user.overlay.")
}

// standardFiles say nothing about the host that built the image, and let the
// guest agent put the guest's own in their place.
var standardFiles = []struct{ name, text string }{
	{"etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"},
	{"etc/hostname", "pyro\n"},
	{"etc/resolv.conf", ""},
	{"etc/machine-id", ""}, // empty: "not yet", machine-id(5)
}

// complete adds what every guest needs and an image may lack, be it that it
// holds nothing but one program.
func (t *tree) complete(workingDir string, made time.Time) error {
	for _, m := range mountPoints {
		if mode, ok := t.w.Mode(m.name); ok && mode&fileType == ext4image.ModeDir {
			continue
		}
		// A link in its place would lead the mount elsewhere.
		if err := t.w.Remove(m.name); err != nil {
			return err
		}
		if err := t.w.Add(ext4image.Entry{Path: m.name, Mode: ext4image.ModeDir | m.mode, ModTime: made}, nil); err != nil {
			return err
		}
	}
	for _, name := range neverSeen { // also what came there through links
		if err := t.w.Clear(name); err != nil {
			return err
		}
	}
	for _, f := range standardFiles {
		if err := t.w.Remove(f.name); err != nil {
			return err
		}
		err := t.w.Add(ext4image.Entry{Path: f.name, Mode: ext4image.ModeFile | 0o644, ModTime: made, Size: int64(len(f.text))}, strings.NewReader(f.text))
		if err != nil {
			return fmt.Errorf("writing %s: %w", f.name, err)
		}
	}
	if workingDir == "" {
		return nil
	}
	if mode, ok := t.w.Mode(workingDir); ok {
		if kind := mode & fileType; kind != ext4image.ModeDir && kind != ext4image.ModeSymlink {
			return api.Errorf(api.ErrInvalid, "the working directory %.200q is no directory", workingDir)
		}
		return nil
	}
	// As docker does.
	if err := t.w.Add(ext4image.Entry{Path: workingDir, Mode: ext4image.ModeDir | 0o755, ModTime: made}, nil); err != nil {
		return fmt.Errorf("making the working directory: %w", err)
	}
	return nil
}
