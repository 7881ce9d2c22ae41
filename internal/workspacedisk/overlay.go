package workspacedisk

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
)

// LayerDir is the directory of each of a [Source]'s Layers that lies over the
// root of its image.
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

// marks is what overlayfs noted about a directory of a layer.
type marks struct {
	opaque bool // nothing shows through
	// redirect is where in the layers below to look: another name or, absolute,
	// a path from the root. "" is under its own name.
	redirect string
	absolute bool
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
	return marks{redirect: string(value), absolute: absolute}, nil
}

// openLayers opens src.Layers and puts them over the tree.
func (d *Disk) openLayers(ctx context.Context) error {
	if len(d.src.Layers) > maxChain {
		return api.Errorf(api.ErrInvalid, "the disk has more than %d layers", maxChain)
	}
	for _, src := range d.src.Layers {
		if err := d.openUpper(ctx, src); err != nil {
			return wrapOpen(src.Path, err)
		}
	}
	// All of them together keep no more of metadata than one image.
	for _, l := range d.tree.layers {
		l.fs.LimitCache(max(minCache, ext4.CacheBlocks/len(d.tree.layers)))
	}
	return nil
}

// minCache is the metadata blocks that each of many layers may keep in memory.
const minCache = 64

// openUpper puts one layer over the tree. A machine that writes it is kept out
// until the disk is closed.
func (d *Disk) openUpper(ctx context.Context, src Source) error {
	if src.Layers != nil {
		return api.Errorf(api.ErrInvalid, "a layer has no layers of its own")
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
	d.layerChains = append(d.layerChains, c)
	if err := lockLayer(c.files[0]); err != nil {
		return err
	}
	fs, err := ext4.Open(ctx, c.top, c.top.Size())
	if err != nil {
		return err
	}
	d.layerBytes = fs.Size()
	d.replayed = d.replayed || fs.Replayed()
	root, err := fs.Inode(ext4.RootInode)
	if err != nil {
		return err
	}
	number, ok, err := fs.Lookup(ctx, root, d.budget(), LayerDir)
	if !ok || err != nil { // no machine was started on it
		return err
	}
	ino, err := fs.Inode(number)
	if err != nil {
		return err
	}
	if !ino.IsDir() {
		return api.Errorf(api.ErrDamaged, "/%s is no directory", LayerDir)
	}
	d.tree.layers = append(d.tree.layers, treeLayer{fs, ino})
	return nil
}

// wrapOpen adds the path of the image that could not be opened.
func wrapOpen(path string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("opening disk image %s: %w", path, err)
}
