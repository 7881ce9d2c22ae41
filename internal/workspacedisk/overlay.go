package workspacedisk

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// LayerDir is the directory of a [Source]'s Layer that lies over the root of
// its image.
const LayerDir = "upper"

// The extended attributes in which overlayfs keeps its marks, from the kernel's
// fs/overlayfs/overlayfs.h. Those not named here (origin, nlink, impure, uuid,
// protattr) do not change what a reader sees.
const (
	xattrOverlay  = "trusted.overlay."
	xattrOpaque   = xattrOverlay + "opaque"
	xattrRedirect = xattrOverlay + "redirect"
	xattrWhiteout = xattrOverlay + "whiteout"
	xattrMetacopy = xattrOverlay + "metacopy"
)

// isWhiteoutDevice reports whether a file stands for "nothing here": the
// character device 0:0.
func isWhiteoutDevice(ino *ext4.Inode) bool {
	major, minor, _ := ino.Device()
	return ino.IsCharacterDevice() && major == 0 && minor == 0
}

// isWhiteoutFile is isWhiteoutDevice for the other form, an empty file with a
// mark (overlayfs.rst, "Nested overlayfs mounts").
func isWhiteoutFile(ino *ext4.Inode, attrs map[string][]byte) bool {
	_, marked := attrs[xattrWhiteout]
	return marked && ino.Size == 0
}

// checkWhole refuses a file that holds only attributes, its content being that
// of another one. pyro's machines do not make these (metacopy=off).
func checkWhole(ino *ext4.Inode, attrs map[string][]byte) error {
	if _, marked := attrs[xattrMetacopy]; marked {
		return api.Errorf(api.ErrUnsupported, "inode %d is a copy of attributes only (overlayfs metacopy)", ino.Number)
	}
	return nil
}

// marks is what overlayfs noted about a directory of the upper filesystem.
type marks struct {
	opaque   bool     // nothing shows through
	redirect []string // where in the lower filesystem to look; nil: under its own name
	absolute bool     // redirect starts at the root; else it is one other name
}

// decodeMarks reads a directory's marks. A redirect that no kernel writes, or
// with a name that no directory has, is ErrDamaged. The value "x" of opaque
// only tells the kernel to look for whiteout files, which we always do.
func decodeMarks(attrs map[string][]byte) (marks, error) {
	if string(attrs[xattrOpaque]) == "y" {
		return marks{opaque: true}, nil
	}
	value, ok := attrs[xattrRedirect]
	if !ok {
		return marks{}, nil
	}
	if len(value) > maxPathLen {
		return marks{}, api.Errorf(api.ErrDamaged, "an overlay redirect has %d bytes, the limit is %d", len(value), maxPathLen)
	}
	path, absolute := strings.CutPrefix(string(value), "/")
	names := strings.Split(path, "/")
	for _, name := range names {
		if name == "" || name == "." || name == ".." || len(name) > maxNameLen || strings.IndexByte(name, 0) >= 0 {
			return marks{}, api.Errorf(api.ErrDamaged, "the overlay redirect %.200q has an impossible name in it", value)
		}
	}
	if !absolute && len(names) > 1 {
		return marks{}, api.Errorf(api.ErrDamaged, "the overlay redirect %.200q is neither a name nor absolute", value)
	}
	return marks{redirect: names, absolute: absolute}, nil
}

// openUpper opens src.Layer and puts it over the tree. The machine that writes
// it is kept out until the disk is closed.
func (d *Disk) openUpper(ctx context.Context) error {
	src := *d.src.Layer
	if src.Layer != nil {
		return api.Errorf(api.ErrInvalid, "a layer has no layer of its own")
	}
	if info, err := os.Stat(src.Path); err == nil && info.IsDir() {
		return api.WithHint(
			api.Errorf(api.ErrUnsupported, "the machine's changes lie in a directory, %s, as they do without root, and not in an image", src.Path),
			"start the workspace and read its files there")
	}
	c, err := openChain(src)
	if err != nil {
		return err
	}
	d.layerChain = c
	if err := lockLayer(c.files[0]); err != nil {
		return err
	}
	fs, err := ext4.Open(ctx, c.top, c.top.Size())
	if err != nil {
		return err
	}
	root, err := fs.Inode(ext4.RootInode)
	if err != nil {
		return err
	}
	d.tree.upper = fs
	ino, ok, err := find(ctx, fs, root, d.budget(), LayerDir)
	if err != nil || !ok {
		return err
	}
	if !ino.IsDir() {
		return api.Errorf(api.ErrDamaged, "/%s is no directory", LayerDir)
	}
	d.tree.upperRoot = ino
	return nil
}

// wrapOpen adds the path of the image that could not be opened.
func wrapOpen(path string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("opening disk image %s: %w", path, err)
}
