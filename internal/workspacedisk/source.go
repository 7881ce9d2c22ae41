package workspacedisk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/qcow2"
)

// A Format is the container format of an image file.
type Format string

// The formats. FormatAuto looks at the first bytes; use it only for a file
// that a person named, never for one that a guest could write as a raw disk.
const (
	FormatRaw   Format = "raw"
	FormatQcow2 Format = "qcow2"
	FormatAuto  Format = "auto"
)

// A Source names an image file and what lies beneath it.
type Source struct {
	Path   string
	Format Format
	// Backing is the image that a qcow2 overlay stands on. Only this is
	// opened, whatever the overlay's header says; its format must be explicit.
	// An overlay whose header names a backing file is refused without it.
	Backing *Source
	// Layers are the layers of a gVisor machine's disk that stands on this
	// image, the lowest first: ext4 images whose directories [LayerDir] the
	// host's overlayfs has joined with the root of this one. The disk is then
	// all of them together.
	Layers []Source
}

// maxChain bounds the images of a chain, and the layers of a disk: the 256 that a
// machine may stand on, its own and its environment fit.
const maxChain = 258

// A layer is one open image file of a chain, seen as a disk.
type layer interface {
	qcow2.Layer
	// NextData is as in [qcow2.Image.NextData].
	NextData(off int64) (end int64, zero bool, err error)
}

// A chain is an open source with its backing images.
type chain struct {
	top   layer
	files []*os.File // top first
}

func (c *chain) Close() error {
	var errs []error
	for _, f := range c.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// openChain opens src and everything beneath it and locks each file against
// machines that would write it.
func openChain(src Source) (*chain, error) {
	c := &chain{}
	var headers []Source
	for s := &src; s != nil; s = s.Backing {
		if len(c.files) == maxChain {
			_ = c.Close()
			return nil, api.Errorf(api.ErrInvalid, "the disk image stands on more than %d others", maxChain)
		}
		f, err := openImageFile(s.Path)
		if err != nil {
			_ = c.Close()
			return nil, err
		}
		c.files = append(c.files, f)
		headers = append(headers, *s)
	}
	for i := len(headers) - 1; i >= 0; i-- {
		l, err := openLayer(c.files[i], headers[i], c.top, i > 0)
		if err != nil {
			_ = c.Close()
			return nil, fmt.Errorf("opening disk image %s: %w", headers[i].Path, err)
		}
		c.top = l
	}
	return c, nil
}

// openImageFile opens one image file read-only and locks it.
func openImageFile(path string) (*os.File, error) {
	// O_NONBLOCK: opening a pipe must not wait for its writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, api.Errorf(api.ErrNotFound, "disk image does not exist: %s", path)
	case errors.Is(err, os.ErrPermission):
		return nil, api.Errorf(api.ErrDenied, "opening disk image: %w", err)
	case err != nil:
		return nil, fmt.Errorf("opening disk image: %w", err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = api.Errorf(api.ErrInvalid, "disk image is not a regular file: %s", path)
	}
	if err == nil {
		err = lockShared(f)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func openLayer(f *os.File, src Source, backing layer, isBacking bool) (layer, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	format := src.Format
	if format == FormatAuto && !isBacking {
		if format, err = detect(f); err != nil {
			return nil, err
		}
	}
	switch format {
	case FormatRaw:
		if backing != nil {
			return nil, api.Errorf(api.ErrInvalid, "a raw disk image has no backing image")
		}
		return &rawLayer{file: f, size: info.Size()}, nil
	case FormatQcow2:
		var below qcow2.Layer
		if backing != nil {
			below = backing
		}
		img, err := qcow2.Open(f, info.Size(), below)
		if err != nil {
			return nil, err
		}
		if img.BackingName() != "" && backing == nil {
			return nil, api.WithHint(
				api.Errorf(api.ErrDenied, "the image stands on another file, which is not opened because the image could name any file of this host"),
				"use pyro workspace disk for a workspace's disk, or flatten an image you trust with qemu-img convert -O qcow2")
		}
		return img, nil
	}
	return nil, api.Errorf(api.ErrInvalid, "disk image format %q is not one of raw and qcow2", format)
}

// detect tells qcow2 from raw by its magic.
func detect(f *os.File) (Format, error) {
	magic := make([]byte, len(qcow2.Magic))
	n, err := f.ReadAt(magic, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("reading its first bytes: %w", err)
	}
	if string(magic[:n]) == qcow2.Magic {
		return FormatQcow2, nil
	}
	return FormatRaw, nil
}

// A rawLayer is a raw image file.
type rawLayer struct {
	file *os.File
	size int64
}

func (l *rawLayer) Size() int64                             { return l.size }
func (l *rawLayer) ReadAt(p []byte, off int64) (int, error) { return l.file.ReadAt(p, off) }
