package gvisor

import (
	"context"
	"errors"
	"os"

	"github.com/pyro-mcp/pyro/internal/workspacedisk/overlayfs"
)

// CopyTree copies the directory upper of one layer into another, which exists.
func CopyTree(ctx context.Context, from, to *os.Root) error {
	c := &treeCopier{to: to, linked: map[uint64]string{}}
	return c.entry(ctx, from, to, UpperDir, UpperDir, 0)
}

// CopyImage makes out a copy of in.
func CopyImage(ctx context.Context, out, in *os.File) (copied int64, err error) {
	return copyImage(ctx, out, in)
}

// Mounted runs f in a thread that sees, at the directory it is given, what a
// machine would have as its root: disk on layers. It must not call t.Fatal.
func Mounted(ctx context.Context, rootImage string, layers []string, disk string, f func(root string) error) (err error) {
	image, err := os.Open(rootImage)
	if err != nil {
		return err
	}
	defer image.Close()
	var p parts
	defer p.close()
	if err := p.openLowers(ctx, disk, layers, 0); err != nil {
		return err
	}
	if p.layer, err = openLayer(ctx, disk, 1); err != nil {
		return err
	}
	ns, err := newNamespace()
	if err != nil {
		return err
	}
	defer ns.close()
	return ns.do(func() error {
		s := stage("/mnt")
		if err := s.mount(); err != nil {
			return err
		}
		err := s.mountRoot(image, p.layer, p.lowers)
		if err == nil {
			err = f(s.root())
		}
		return errors.Join(err, s.unmountRoot())
	})
}

// UniteLayers adds to the layer in to what the one in from holds, below it, both
// being directories of a machine without root.
func UniteLayers(ctx context.Context, from, to *os.Root) error {
	return uniteLayers(ctx, from, to, overlayfs.User, false)
}
