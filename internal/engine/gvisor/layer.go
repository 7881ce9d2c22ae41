package gvisor

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/ext4image"
)

// LayerFile is the name of the writable layer in a machine's Dir where its
// specification names no other place: an ext4 image whose directory [UpperDir]
// holds the machine's changes to what lies below, in overlayfs's upper format. It
// exists from the first Start on.
const LayerFile = "layer.ext4"

// The directories in the layer, as overlayfs wants them.
const (
	UpperDir = "upper"
	workDir  = "work"
)

// minLayer is the smallest layer in bytes, one block group. Sizes are rounded up
// to a whole number of them.
const minLayer = 128 << 20

// layerBlock is the layer's block size in bytes.
const layerBlock = 4096

// layerWait is how long opening a layer waits for the kernel to let go of it
// after the last machine on it was killed. Writing back a full page cache to a
// slow disk is what can take long.
const layerWait = 60 * time.Second

// openLayer opens the writable layer at path, making it where it is not there, at
// least sizeMiB large, and locked: the lock is held until
// the returned file and every loop device on it are gone, so no two kernels' worth
// of caches ever write to one image. It waits for a holder that is on its way out.
func openLayer(ctx context.Context, path string, sizeMiB int64) (*layer, error) {
	const flags = os.O_RDWR | unix.O_NOFOLLOW
	f, err := os.OpenFile(path, flags, 0)
	if errors.Is(err, os.ErrNotExist) {
		if err := makeLayer(path, sizeMiB); err != nil {
			return nil, err
		}
		f, err = os.OpenFile(path, flags, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the writable layer: %w", err)
	}
	if err := lockWait(ctx, f, unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	if err := growFile(f, sizeMiB); err != nil {
		f.Close()
		return nil, err
	}
	return &layer{f, sizeMiB << 20}, nil
}

// openLayerDir is openLayer for a layer that is a directory.
func openLayerDir(ctx context.Context, path string) (*layer, error) {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("making the writable layer: %w", err)
	}
	f, err := os.OpenFile(path, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("opening the writable layer: %w", err)
	}
	if err := lockWait(ctx, f, unix.LOCK_EX); err != nil {
		f.Close()
		return nil, err
	}
	return &layer{File: f}, nil
}

// layer is an open and locked image or directory.
type layer struct {
	*os.File
	size int64 // of an image: how large its file system must be at least, in bytes
}

// hold returns a descriptor of the layer's own, with which its image can be read
// whatever becomes of the machine meanwhile: release waits until it is closed.
func (l *layer) hold() (*os.File, error) {
	raw, err := l.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var dupErr error
	err = raw.Control(func(own uintptr) { fd, dupErr = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(err, dupErr); err != nil {
		return nil, fmt.Errorf("holding the writable layer: %w", err)
	}
	return os.NewFile(uintptr(fd), l.Name()), nil
}

// release gives the lock up and returns when the kernel has, too: then all that
// was written is in the image file and no loop device is left.
func (l *layer) release() error {
	path := l.Name()
	if err := l.Close(); err != nil {
		return err
	}
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return lockWait(context.Background(), f, unix.LOCK_EX)
}

// makeLayer makes a sparse ext4 image. A crash leaves at most a file of another
// name, which the next attempt removes.
func makeLayer(path string, sizeMiB int64) (err error) {
	leftovers, _ := filepath.Glob(path + ".*" + engine.UnfinishedSuffix)
	for _, l := range leftovers {
		if err := os.Remove(l); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("making the writable layer: %w", err)
		}
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*"+engine.UnfinishedSuffix) // mode 0600
	if err != nil {
		return fmt.Errorf("making the writable layer: %w", err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := fillLayer(f, sizeMiB); err != nil {
		return fmt.Errorf("making the writable layer: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("making the writable layer: %w", err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("making the writable layer: %w", err)
	}
	return nil
}

// fillLayer writes an empty file system, which takes two milliseconds; mke2fs
// takes ten, most of them to flush what nobody needs on the disk yet.
func fillLayer(f *os.File, sizeMiB int64) error {
	var uuid [16]byte
	_, _ = rand.Read(uuid[:]) // never fails, crypto/rand
	w, err := ext4image.New(f, ext4image.Options{
		SizeBytes: max(sizeMiB<<20, minLayer), UUID: uuid, Label: "pyro-layer", Time: time.Now(),
	})
	if err != nil {
		return err
	}
	return w.Close()
}

// lockWait takes a flock on f, unix.LOCK_EX or LOCK_SH, waiting up to layerWait
// for others.
func lockWait(ctx context.Context, f *os.File, how int) error {
	ctx, cancel := context.WithTimeout(ctx, layerWait)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("locking the layer %s: %w", f.Name(), err)
		}
		// No event tells when the kernel lets a loop device go.
		select {
		case <-ctx.Done():
			return api.WithHint(api.Errorf(api.ErrBusy, "the layer %s is still in use", f.Name()),
				"stop the machine that uses it, and try again")
		case <-time.After(pause):
		}
	}
}

// growFile makes the image file larger where it is smaller than asked. The file
// system in it follows after the mount, by growMounted.
func growFile(f *os.File, sizeMiB int64) error {
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("opening the writable layer: %w", err)
	}
	if want := sizeMiB << 20; st.Size() < want {
		if err := f.Truncate(want); err != nil {
			return fmt.Errorf("growing the writable layer: %w", err)
		}
	}
	return nil
}

// ext4IocResizeFS is EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64), fs/ext4/ext4.h.
const ext4IocResizeFS = 0x40086610

// growMounted makes the file system in the image, mounted at target, as large as
// the image file, where it is smaller than it must be. The kernel wants
// CAP_SYS_RESOURCE for it, which some containers' root lacks: then a disk keeps
// serving as long as nobody asks for a larger one.
func growMounted(image *layer, target string) error {
	st, err := image.Stat()
	if err != nil {
		return fmt.Errorf("growing the writable layer: %w", err)
	}
	have, err := ext4Size(image.File)
	if err != nil {
		return fmt.Errorf("growing the writable layer: %w", err)
	}
	if image.size-have < layerBlock {
		return nil
	}
	dir, err := os.Open(target)
	if err != nil {
		return fmt.Errorf("growing the writable layer: %w", err)
	}
	defer dir.Close()
	blocks := uint64(st.Size() / layerBlock)
	err = ioctlPointer(dir.Fd(), ext4IocResizeFS, &blocks)
	if errors.Is(err, unix.EPERM) {
		return api.WithHint(api.Errorf(api.ErrDenied, "growing the writable layer from %d to %d MiB: %w", have>>20, st.Size()>>20, err),
			"give the container CAP_SYS_RESOURCE, or keep the disk's size")
	}
	if err != nil {
		return fmt.Errorf("growing the writable layer to %d MiB: %w", st.Size()>>20, err)
	}
	return nil
}

// ext4Size reads a file system's size in bytes from its superblock, by
// Documentation/filesystems/ext4, "Super Block". It believes only what we made:
// with blocks of layerBlock bytes.
func ext4Size(image *os.File) (int64, error) {
	sb, err := superblock(image)
	if err != nil {
		return 0, err
	}
	blocks := int64(binary.LittleEndian.Uint32(sb[0x4:])) | int64(binary.LittleEndian.Uint32(sb[0x150:]))<<32
	return blocks * layerBlock, nil
}

// needsRecovery reports whether the image's journal holds what is not in its
// place yet: INCOMPAT_RECOVER of s_feature_incompat.
func needsRecovery(image *os.File) (bool, error) {
	sb, err := superblock(image)
	if err != nil {
		return false, err
	}
	return binary.LittleEndian.Uint32(sb[0x60:])&0x4 != 0, nil
}

// superblock reads the superblock of an image, which must have one.
func superblock(image *os.File) ([]byte, error) {
	sb := make([]byte, 1024)
	if _, err := image.ReadAt(sb, 1024); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if binary.LittleEndian.Uint16(sb[0x38:]) != 0xef53 {
		return nil, api.Errorf(api.ErrDamaged, "%s is not an ext4 image", image.Name())
	}
	return sb, nil
}

// findTool finds a system program also where PATH lacks the sbin directories,
// as it does for ordinary users on Debian.
func findTool(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", api.WithHint(api.Errorf(api.ErrUnavailable, "%s is not installed", name), "%s", toolHint[name])
}

var toolHint = map[string]string{
	"newuidmap": "install uidmap (apt-get install uidmap)",
	"unshare":   "install util-linux 2.38 or newer",
}

// layerSize returns the layer's size for a machine that asks for diskMiB, the
// image's own size where that is 0.
func layerSize(diskMiB int, rootImage *os.File) (int64, error) {
	if diskMiB > 0 {
		return int64(diskMiB), nil
	}
	st, err := rootImage.Stat()
	if err != nil {
		return 0, fmt.Errorf("reading the size of the environment's image: %w", err)
	}
	return st.Size() >> 20, nil
}

func lastLine(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strconv.QuoteToGraphic(lines[len(lines)-1])
}
