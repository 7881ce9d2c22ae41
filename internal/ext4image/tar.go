package ext4image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// A Filter sees every entry of an archive before it is added. It may change
// the header, also of content that it replaces, and returns the content to
// use; a nil reader leaves the entry out.
type Filter func(h *tar.Header, content io.Reader) (io.Reader, error)

// AddTar adds every entry of an archive. filter may be nil.
func (w *Writer) AddTar(ctx context.Context, r io.Reader, filter Filter) error {
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the archive: %w", err)
		}
		content := io.Reader(tr)
		if filter != nil {
			if content, err = filter(h, tr); err != nil {
				return fmt.Errorf("archive entry %.200q: %w", h.Name, err)
			}
			if content == nil {
				continue
			}
		}
		if err := w.addTarEntry(h, content); err != nil {
			return fmt.Errorf("archive entry %.200q: %w", h.Name, err)
		}
	}
}

func (w *Writer) addTarEntry(h *tar.Header, content io.Reader) error {
	const maxID = 1<<32 - 2 // -1 means "no id" to the kernel
	if h.Uid < 0 || h.Uid > maxID || h.Gid < 0 || h.Gid > maxID {
		return api.Errorf(api.ErrInvalid, "owner %d:%d is out of range", h.Uid, h.Gid)
	}
	e := Entry{
		Path: h.Name,
		Mode: uint16(h.Mode & 0o7777),
		UID:  uint32(h.Uid), GID: uint32(h.Gid),
		ModTime: h.ModTime,
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		e.Mode |= ModeFile
		e.Size = h.Size
	case tar.TypeDir:
		e.Mode |= ModeDir
	case tar.TypeSymlink:
		e.Mode |= ModeSymlink
		e.Target = h.Linkname
	case tar.TypeLink:
		return w.Link(h.Name, h.Linkname)
	case tar.TypeChar, tar.TypeBlock:
		e.Mode |= ModeChar
		if h.Typeflag == tar.TypeBlock {
			e.Mode = e.Mode&^modeType | ModeBlock
		}
		// The kernel's numbers: 12 and 20 bits.
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return api.Errorf(api.ErrInvalid, "device %d:%d is out of range", h.Devmajor, h.Devminor)
		}
		e.Major, e.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	case tar.TypeFifo:
		e.Mode |= ModeFIFO
	case tar.TypeXGlobalHeader:
		return nil
	default:
		return api.Errorf(api.ErrUnsupported, "entry type %q is unknown", string(h.Typeflag))
	}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			if e.Xattrs == nil {
				e.Xattrs = map[string][]byte{}
			}
			e.Xattrs[name] = []byte(value)
		}
	}
	return w.Add(e, content)
}
