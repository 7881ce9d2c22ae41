package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/overlayfs"
)

// mergeWait is how long a merge waits for the kernel to let go of a layer after
// the machine that wrote to it was killed. Whoever has it longer is at work.
const mergeWait = 5 * time.Second

// MergeLayer implements [engine.LayerMerger]: the two layers become a new one at
// spare. Whoever stands on the old ones, a fork that runs for example, goes on
// with them. See union for what is done, and why chain[i+1] could not just be
// replaced: where a directory was moved in chain[i] and below it, overlayfs
// finds its content by another path in the new chain than in the old one.
//
// It is to be called as root, of the host or behind [Engine.Launcher].
func (e *Engine) MergeLayer(ctx context.Context, chain []string, i int, _, spare string) (merged string, err error) {
	if i < 0 || i+1 >= len(chain) {
		return "", api.Errorf(api.ErrInvalid, "layer %d of %d has no layer above it to be merged with", i, len(chain))
	}
	if err := e.merge(ctx, chain[i], chain[i+1], spare); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			err = api.WithHint(api.Errorf(api.ErrExhausted, "%w", err), "free some space in the state directory")
		}
		return "", fmt.Errorf("merging layer %s into %s: %w", chain[i], chain[i+1], err)
	}
	return spare, nil
}

func (e *Engine) merge(ctx context.Context, lower, upper, spare string) error {
	if os.Geteuid() != 0 {
		return api.WithHint(api.Errorf(api.ErrInternal, "layers are to be merged behind Engine.Launcher"), "report this as a fault of pyro")
	}
	if err := nothingAt(spare); err != nil {
		return err
	}
	flags := 0
	if inUserNamespace() {
		flags = unix.O_DIRECTORY
	}
	waiting, cancel := context.WithTimeout(ctx, mergeWait)
	defer cancel()
	var p parts
	defer p.close()
	if err := p.openLowers(waiting, spare, []string{lower, upper}, flags); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return err
	}
	tmp := spare + engine.UnfinishedSuffix
	if err := os.RemoveAll(tmp); err != nil { // of somebody who was killed
		return err
	}
	mergeInto := mergeImages
	if inUserNamespace() {
		mergeInto = mergeDirectories
	}
	err := mergeInto(ctx, p.lowers[0], p.lowers[1], tmp)
	if err == nil {
		failpoint.Hit("merge/made")
		err = publish(tmp, spare)
	}
	if err != nil {
		err = errors.Join(err, os.RemoveAll(tmp))
	}
	return err
}

// mergeDirectories makes at tmp the union of two layers that are directories.
func mergeDirectories(ctx context.Context, lower, upper *os.File, tmp string) error {
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	to, err := os.OpenRoot(tmp)
	if err != nil {
		return err
	}
	defer to.Close()
	for _, layer := range []*os.File{upper, lower} {
		from, err := os.OpenRoot(layer.Name())
		if err != nil {
			return err
		}
		err = uniteLayers(ctx, from, to, overlayfs.User, false)
		from.Close()
		if err != nil {
			return err
		}
	}
	if err := to.Mkdir(workDir, 0o755); err != nil {
		return err
	}
	return onDirectory(to, unix.Syncfs)
}

// mergeImages makes at tmp the union of two layers that are images. It begins
// with a copy of the upper one: mostly the host's file system can share it, and
// if its machine was killed the kernel recovers the copy's journal.
func mergeImages(ctx context.Context, lower, upper *os.File, tmp string) (err error) {
	if err := checkFrozen(lower); err != nil {
		return err
	}
	image, err := newImage(tmp)
	if err != nil {
		return err
	}
	defer func() { image.Close() }()
	if _, err := copyImage(ctx, image, upper); err != nil {
		return err
	}
	failpoint.Hit("merge/copied")
	s, ns, err := newStage(filepath.Dir(tmp)) // the images are open already
	if err != nil {
		return err
	}
	defer ns.close() // and with it every mount that an error leaves
	var room bool
	err = ns.do(func() error {
		err := s.mountLower(0, func(target string) error { return mountImage(lower, target, true, "noload") })
		if err != nil {
			return err
		}
		if err := damaged(mountImage(image, s.layer(), false, mergeOptions)); err != nil {
			return fmt.Errorf("mounting the copy of %s: %w", upper.Name(), err)
		}
		room, err = s.fits(tmp)
		return err
	})
	if err != nil {
		return err
	}
	target := s.layer()
	if !room {
		wide, err := widen(ctx, ns, s, image, lower, tmp)
		if err != nil {
			return err
		}
		image.Close()
		image, target = wide, s.spare()
	}
	if err := unite(ctx, ns, s.lower(0), target); err != nil {
		return err
	}
	failpoint.Hit("merge/united")
	err = ns.do(func() error {
		if err := flush(target); err != nil {
			return err
		}
		_ = trim(target) // what the upper layer's machine had deleted; not every host can
		return errors.Join(unmount(target), unmount(s.lower(0)))
	})
	if err != nil {
		return err
	}
	if err := checkFrozen(image); err != nil {
		return err
	}
	return image.Sync()
}

// mergeOptions: without barriers, because the whole file is flushed in the end.
const mergeOptions = "noinit_itable,nobarrier"

func newImage(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
}

// unite adds to the layer mounted at upper what the one at lower holds.
func unite(ctx context.Context, ns *namespace, lower, upper string) error {
	var from, to *os.Root
	err := ns.do(func() (err error) {
		if from, err = os.OpenRoot(lower); err == nil {
			to, err = os.OpenRoot(upper)
		}
		return err
	})
	for _, r := range []*os.Root{from, to} {
		if r != nil {
			defer r.Close()
		}
	}
	if err != nil {
		return err
	}
	return uniteLayers(ctx, from, to, overlayfs.Trusted, true)
}

// widen gives what the image at s.layer holds a larger one, at s.spare and at
// tmp, in which there is room for all of lower as well. The kernel could grow the
// file system, but not for every root: see growMounted.
func widen(ctx context.Context, ns *namespace, s stage, image, lower *os.File, tmp string) (wide *os.File, err error) {
	size := int64(0)
	for _, f := range []*os.File{image, lower} {
		n, err := ext4Size(f)
		if err != nil {
			return nil, err
		}
		size += n
	}
	if err := os.Remove(tmp); err != nil {
		return nil, err
	}
	if wide, err = newImage(tmp); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			wide.Close()
		}
	}()
	if err := fillLayer(wide, size>>20); err != nil {
		return nil, err
	}
	err = ns.do(func() error { return mountImage(wide, s.spare(), false, mergeOptions) })
	if err == nil {
		err = unite(ctx, ns, s.layer(), s.spare())
	}
	if err == nil {
		err = ns.do(func() error { return unmount(s.layer()) })
	}
	return wide, err
}

// fits reports whether all that the file system at s.lower(0) holds would fit
// into the one at s.layer. Some of it is mostly hidden and will not be copied. A
// host without room for it is an error: what a loop device cannot write is lost.
func (s stage) fits(tmp string) (bool, error) {
	var from, to, host unix.Statfs_t
	for path, st := range map[string]*unix.Statfs_t{s.lower(0): &from, s.layer(): &to, filepath.Dir(tmp): &host} {
		if err := unix.Statfs(path, st); err != nil {
			return false, fmt.Errorf("measuring the layers: %w", err)
		}
	}
	blocks := from.Blocks - from.Bfree
	if need := int64(blocks)*from.Bsize + imageFloor; int64(host.Bavail)*host.Bsize < need {
		return false, fmt.Errorf("%d MiB are needed: %w", need>>20, unix.ENOSPC)
	}
	// Directories may take more blocks once they are joined.
	return blocks+blocks/16+256 <= to.Bavail && from.Files-from.Ffree+16 <= to.Ffree, nil
}

func unmount(target string) error {
	if err := unix.Unmount(target, 0); err != nil {
		return fmt.Errorf("unmounting %s: %w", target, err)
	}
	return nil
}
