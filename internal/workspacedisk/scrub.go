package workspacedisk

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/pyro-mcp/pyro/api"
)

// Scrub removes the runtime paths from the image at src.Path, with their data
// and their traces in the journal, and recovers its journal. It works on a
// copy in the image's directory that takes the image's place when it is proven
// clean: on any error the image is as before. An image with nothing to do is
// not touched. A qcow2 image is written anew by qemu-img and loses its internal
// snapshots; one that stands on another image is ErrInvalid. Owner and
// permissions stay, hard links to the image keep the old content.
func Scrub(ctx context.Context, src Source, limits Limits) (*api.DiskScrub, error) {
	if src.Backing != nil || len(src.Layers) > 0 {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "an image that stands on another cannot be scrubbed in place"), "export the disk, which scrubs the copy")
	}
	// A link must not be replaced by the image it points to.
	real, err := filepath.EvalSymlinks(src.Path)
	if err != nil {
		return nil, api.Errorf(classOf(err), "disk image does not exist: %s", src.Path)
	}
	named := src.Path
	src.Path = real
	d, err := Open(ctx, src, Options{Limits: limits})
	if err != nil {
		return nil, err
	}
	defer d.Close()
	if err := probeExclusive(d.chain.files[0]); err != nil {
		return nil, err
	}
	removed, err := d.scrubInPlace(ctx)
	if err != nil {
		return nil, fmt.Errorf("scrubbing disk image %s: %w", named, err)
	}
	if removed == nil {
		removed = []string{}
	}
	return &api.DiskScrub{Path: named, Removed: removed}, nil
}

func (d *Disk) scrubInPlace(ctx context.Context) ([]string, error) {
	tree, err := d.runtimeTree(ctx)
	if err != nil {
		return nil, err
	}
	if len(tree.paths) == 0 && !d.fs.Replayed() {
		return nil, nil
	}
	info, err := d.chain.files[0].Stat()
	if err != nil {
		return nil, err
	}
	out, err := newPartial(d.src.Path)
	if err != nil {
		return nil, err
	}
	defer out.discard()
	if err := d.copyImage(ctx, out.file, 0, d.chain.top.Size()); err != nil {
		return nil, err
	}
	removed, err := cleanImage(ctx, out.file, d.opts.Limits)
	if err != nil {
		return nil, err
	}
	if _, isRaw := d.chain.top.(*rawLayer); !isRaw {
		packed, err := newPartial(d.src.Path)
		if err != nil {
			return nil, err
		}
		defer packed.discard()
		if err := packQcow2(ctx, out.file, packed.file); err != nil {
			return nil, err
		}
		out, packed = packed, out
	}
	if err := keepOwner(out.file, info); err != nil {
		return nil, err
	}
	return removed, out.replace()
}

// keepOwner gives a copy the permissions and, where we may, the owner of the
// original.
func keepOwner(f *os.File, info fs.FileInfo) error {
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 {
		if err := f.Chown(int(owner.Uid), int(owner.Gid)); err != nil {
			return fmt.Errorf("keeping the image's owner: %w", err)
		}
	}
	if err := f.Chmod(info.Mode().Perm()); err != nil {
		return fmt.Errorf("keeping the image's permissions: %w", err)
	}
	return nil
}

// packQcow2 converts a raw image of ours. Both formats are given, so nothing
// in the image can make qemu-img open anything else.
func packQcow2(ctx context.Context, raw, packed *os.File) error {
	bin, err := exec.LookPath("qemu-img")
	if err != nil {
		return api.WithHint(api.Errorf(api.ErrUnavailable, "qemu-img is required to write a qcow2 image"), "install the package qemu-utils, or convert the image to raw")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*toolTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "convert", "-f", "raw", "-O", "qcow2", "/proc/self/fd/3", "/proc/self/fd/4")
	cmd.ExtraFiles = []*os.File{raw, packed}
	cmd.Env = []string{"LC_ALL=C"}
	var output boundedText
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("running qemu-img: %w", ctx.Err())
		}
		return api.Errorf(api.ErrUnavailable, "qemu-img convert: %w: %q", err, output.String())
	}
	return nil
}
