package workspacedisk

import (
	"context"
	"fmt"
	"os"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/ext4"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/overlayfs"
)

// LayerDir is the directory of each of a [Source]'s Layers that lies over the
// root of its image.
const LayerDir = "upper"

// isWhiteoutDevice reports whether a file stands for "nothing here": the
// character device 0:0.
func isWhiteoutDevice(ino *ext4.Inode) bool {
	major, minor, _ := ino.Device()
	return ino.IsCharacterDevice() && major == 0 && minor == 0
}

// isWhiteoutFile is isWhiteoutDevice for the other form, an empty file with a
// mark (overlayfs.rst, "Nested overlayfs mounts").
func isWhiteoutFile(ino *ext4.Inode, attrs map[string][]byte) bool {
	_, marked := attrs[overlayfs.Trusted+overlayfs.Whiteout]
	return marked && ino.Size == 0
}

// checkWhole refuses a file that holds only attributes, its content being that
// of another one. pyro's machines do not make these (metacopy=off).
func checkWhole(ino *ext4.Inode, attrs map[string][]byte) error {
	if _, marked := attrs[overlayfs.Trusted+overlayfs.Metacopy]; marked {
		return api.Errorf(api.ErrUnsupported, "inode %d is a copy of attributes only (overlayfs metacopy)", ino.Number)
	}
	return nil
}

// decodeMarks reads a directory's marks. We look for whiteouts of either form
// everywhere.
func decodeMarks(attrs map[string][]byte) (overlayfs.Marks, error) {
	redirect, ok := attrs[overlayfs.Trusted+overlayfs.Redirect]
	if ok && redirect == nil {
		redirect = []byte{} // there, and empty
	}
	return overlayfs.DecodeMarks(attrs[overlayfs.Trusted+overlayfs.Opaque], redirect)
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
