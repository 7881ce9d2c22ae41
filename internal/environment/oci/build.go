package oci

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
)

// BuildVersion is counted up whenever what Build makes of an image changes.
const BuildVersion = "1"

// minDiskMiB is the size of the disk unless the image is large. The file is
// sparse: unused room costs nothing on the host.
const minDiskMiB = 8192

// Build writes the image's tree as an ext4 file system into f, and returns the
// size of the disk that this is. Layers that are not in the cache are fetched
// into it first. progress is called from one goroutine at a time, and not any
// more when Build has returned.
func (p *Puller) Build(ctx context.Context, img *Image, f *os.File, progress func(api.Progress)) (diskMiB int, err error) {
	if progress == nil {
		progress = func(api.Progress) {}
	}
	s, layers, err := p.survey(ctx, img, progress)
	if err != nil {
		return 0, err
	}
	defer layers.Close()
	size, err := diskSize(s)
	if err != nil {
		return 0, err
	}
	w, err := ext4image.New(f, ext4image.Options{SizeBytes: size, UUID: imageUUID(img.Digest), Label: "pyro-root", Time: madeAt(img)})
	if err != nil {
		return 0, err
	}
	t := &tree{w: w, limits: p.limits(), entries: s.entries}
	for i, l := range img.layers {
		progress(api.Progress{Phase: "writing", Message: fmt.Sprintf("writing layer %d of %d", i+1, len(img.layers)), Done: int64(i), Total: int64(len(img.layers))})
		err := func() error {
			r, err := layers.open(ctx, i)
			if err != nil {
				return err
			}
			defer r.Close()
			return t.apply(ctx, r, l, s.removals[i])
		}()
		if err := inLayer(ctx, i, len(img.layers), err); err != nil {
			return 0, err
		}
	}
	if t.dropped > 0 {
		p.log().Info("left device files of the image out", "count", t.dropped)
	}
	if err := t.complete(img.Config.WorkingDir, madeAt(img)); err != nil {
		return 0, fmt.Errorf("completing the image: %w", err)
	}
	return int(size >> 20), w.Close()
}

// survey makes the layers readable and reads them. A layer in the cache that
// is not what it was is fetched once more.
func (p *Puller) survey(ctx context.Context, img *Image, progress func(api.Progress)) (_ *survey, _ *openLayers, err error) {
	for again := false; ; again = true {
		layers := &openLayers{img: img}
		if remote, ok := img.source.(remoteSource); ok {
			if layers.files, err = p.fetch(ctx, img, remote, progress); err != nil {
				return nil, nil, err
			}
		}
		s := &survey{limits: p.limits()}
		bad := -1
		for i, l := range img.layers {
			progress(api.Progress{Phase: "checking", Message: fmt.Sprintf("checking layer %d of %d", i+1, len(img.layers)), Done: int64(i), Total: int64(len(img.layers))})
			if err = layers.look(ctx, s, i, l); err != nil {
				bad = i
				break
			}
		}
		if err == nil {
			return s, layers, nil
		}
		layers.Close()
		healed := false
		if !again && ctx.Err() == nil && layers.files != nil {
			if healed, err = p.dropIfDamaged(ctx, img.layers[bad], err); healed {
				p.log().Warn("a layer in the cache was damaged, fetching it again", "layer", img.layers[bad].digest.String())
				continue
			}
		}
		return nil, nil, inLayer(ctx, bad, len(img.layers), err)
	}
}

// openLayers are an image's layers, to be read any number of times.
type openLayers struct {
	img   *Image
	files []*os.File // of the cache; nil for a local image
}

func (o *openLayers) open(ctx context.Context, i int) (io.ReadCloser, error) {
	if o.files == nil {
		return o.img.source.blob(ctx, o.img.layers[i])
	}
	fi, err := o.files[i].Stat()
	if err != nil {
		return nil, err
	}
	return io.NopCloser(io.NewSectionReader(o.files[i], 0, fi.Size())), nil
}

func (o *openLayers) look(ctx context.Context, s *survey, i int, l layer) error {
	r, err := o.open(ctx, i)
	if err != nil {
		return err
	}
	defer r.Close()
	return s.look(ctx, r, l)
}

func (o *openLayers) Close() { closeAll(o.files) }

// diskSize leaves as much room as the tree takes.
func diskSize(s *survey) (int64, error) {
	size, err := ext4image.SizeFor(2*s.files, 2*s.blocks)
	if err != nil {
		return 0, err
	}
	return max(size, minDiskMiB<<20), nil
}

// madeAt is the time of what the image's layers give none: that of the image,
// so that equal images make equal file systems.
func madeAt(img *Image) time.Time {
	if img.Created.Unix() < 0 {
		return time.Unix(0, 0)
	}
	return img.Created
}

// imageUUID has the form of a random UUID (RFC 9562, version 4).
func imageUUID(digest string) (id [16]byte) {
	sum := sha256.Sum256([]byte("pyro image " + digest))
	copy(id[:], sum[:])
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return id
}
