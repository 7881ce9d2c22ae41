package seed

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/manifest"
)

// A tarSink writes a tar of entries relative to the tree's top. Its format is
// PAX, for names of any bytes and times to the nanosecond.
type tarSink struct {
	tw *tar.Writer
}

func (s *tarSink) put(it item, c *content) error {
	h := &tar.Header{
		Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: it.path, Mode: int64(it.mode),
		ModTime: time.Unix(0, it.mtime), Size: it.size,
	}
	switch it.typ {
	case manifest.Directory:
		h.Typeflag, h.Name, h.Size = tar.TypeDir, it.path+"/", 0
	case manifest.Symlink:
		h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, it.target, 0
	}
	if err := s.tw.WriteHeader(h); err != nil {
		return tarError(err)
	}
	if c == nil {
		return nil
	}
	if _, err := io.CopyBuffer(struct{ io.Writer }{s.tw}, struct{ io.Reader }{c}, make([]byte, min(it.size+1, copyBuffer))); err != nil {
		return err
	}
	if c.failed != nil { // its header has been written: there is no way back
		return api.WithHint(api.Errorf(api.ErrBusy, "%s", readReason(c.failed)), "try again when nothing writes to it")
	}
	return nil
}

func (s *tarSink) link(path, target string, it item) error {
	return tarError(s.tw.WriteHeader(&tar.Header{
		Format: tar.FormatPAX, Typeflag: tar.TypeLink, Name: path, Linkname: target,
		Mode: int64(it.mode), ModTime: time.Unix(0, it.mtime),
	}))
}

const copyBuffer = 256 << 10

func tarError(err error) error {
	if errors.Is(err, tar.ErrHeader) {
		return api.Errorf(api.ErrInvalid, "it does not fit a tar: %w", err)
	}
	return err
}

// WriteTar streams a source as a tar relative to its top, without making a seed
// of it. It takes and leaves out what [Store.Build] would. A large file that
// becomes shorter while it is read is ErrBusy. progress may be nil.
func WriteTar(ctx context.Context, src Source, w io.Writer, progress func(api.Progress)) (api.WorkspaceSeed, error) {
	in, err := open(ctx, src, progress)
	if err != nil {
		return api.WorkspaceSeed{}, err
	}
	defer in.close()
	sink := &tarSink{tar.NewWriter(w)}
	if err := in.copy(sink); err != nil {
		return api.WorkspaceSeed{}, fmt.Errorf("sending %s: %w", src.Path, err)
	}
	if err := sink.tw.Close(); err != nil {
		return api.WorkspaceSeed{}, err
	}
	return in.info(), nil
}
