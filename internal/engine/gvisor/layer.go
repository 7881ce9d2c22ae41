package gvisor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// LayerFile is the name of the writable layer in a machine's Dir: an ext4 image
// whose directory [UpperDir] holds the machine's changes to its environment in
// overlayfs's upper format. It exists from the first Start on.
const LayerFile = "layer.ext4"

// The directories in the layer, as overlayfs wants them.
const (
	UpperDir = "upper"
	workDir  = "work"
)

// minLayerMiB is the smallest layer that mke2fs gives a journal and that still
// has room for work.
const minLayerMiB = 16

// layerBlock is the layer's block size in bytes.
const layerBlock = 4096

// layerFeatures are the ext4 features of a new layer, spelled out so that every
// host makes the same image and every reader of ours knows it.
const layerFeatures = "none,ext_attr,resize_inode,dir_index,filetype,extent,64bit," +
	"flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"

// layerWait is how long opening a layer waits for the kernel to let go of it
// after the last machine on it was killed. Writing back a full page cache to a
// slow disk is what can take long.
const layerWait = 60 * time.Second

// openLayer opens the layer in dir, making it where it is not there, at least
// sizeMiB large, and locked: the lock is held until the returned file and every
// loop device on it are gone, so no two kernels' worth of caches ever write to
// one image. It waits for a holder that is on its way out.
func openLayer(ctx context.Context, dir string, sizeMiB int64, ephemeral bool) (*layer, error) {
	path := filepath.Join(dir, LayerFile)
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		if err := makeLayer(ctx, path, sizeMiB, ephemeral); err != nil {
			return nil, err
		}
		f, err = os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the writable layer: %w", err)
	}
	if err := lockWait(ctx, f); err != nil {
		f.Close()
		return nil, err
	}
	if err := growFile(f, sizeMiB); err != nil {
		f.Close()
		return nil, err
	}
	return &layer{f}, nil
}

// openLayerDir is openLayer for a layer that is a directory, [LayerDir], which
// mounting makes: it only locks.
func openLayerDir(ctx context.Context, dir string) (*layer, error) {
	f, err := os.OpenFile(filepath.Join(dir, LayerDir+".lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the writable layer: %w", err)
	}
	if err := lockWait(ctx, f); err != nil {
		f.Close()
		return nil, err
	}
	return &layer{f}, nil
}

// layer is an open and locked image, or the lock of a directory.
type layer struct {
	*os.File
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
	return lockWait(context.Background(), f)
}

// makeLayer makes a sparse ext4 image, without a journal where nobody will
// mount it a second time. A crash leaves at most a file of another
// name, which the next attempt removes. Each attempt has a name of its own: the
// mke2fs of a process that was killed may outlive it for a moment.
func makeLayer(ctx context.Context, path string, sizeMiB int64, ephemeral bool) error {
	leftovers, _ := filepath.Glob(path + ".*.new")
	for _, l := range leftovers {
		if err := os.Remove(l); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("making the writable layer: %w", err)
		}
	}
	f, err := os.CreateTemp(filepath.Dir(path), LayerFile+".*.new") // mode 0600
	if err != nil {
		return fmt.Errorf("making the writable layer: %w", err)
	}
	tmp := f.Name()
	defer os.Remove(tmp)
	defer f.Close()
	if err := f.Truncate(max(sizeMiB, minLayerMiB) << 20); err != nil {
		return fmt.Errorf("making the writable layer: %w", err)
	}
	mke2fs, err := findTool("mke2fs")
	if err != nil {
		return err
	}
	features := layerFeatures
	if !ephemeral {
		features += ",has_journal"
	}
	// A fresh sparse file reads as zeros, so neither the inode tables nor the
	// journal need writing now, and nothing needs discarding.
	cmd := exec.CommandContext(ctx, mke2fs, "-q", "-F", "-t", "ext4", "-b", strconv.Itoa(layerBlock), "-m", "0",
		"-O", features, "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0", tmp)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out := &cappedBuffer{max: 16 << 10}
	cmd.Stdout, cmd.Stderr = out, out
	err = hostproc.StartTied(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return fmt.Errorf("making the writable layer: running mke2fs: %w: %s", err, lastLine(out.Bytes()))
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("making the writable layer: %w", err)
	}
	return nil
}

// lockWait takes an exclusive flock on f, waiting up to layerWait for others.
func lockWait(ctx context.Context, f *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, layerWait)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("locking the writable layer: %w", err)
		}
		// No event tells when the kernel lets a loop device go.
		select {
		case <-ctx.Done():
			return api.WithHint(api.Errorf(api.ErrBusy, "the writable layer %s is still in use", f.Name()),
				"stop the machine that uses it, and try again")
		case <-time.After(10 * time.Millisecond):
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
// the image file. The kernel wants CAP_SYS_RESOURCE for it, which some
// containers' root lacks, so it is asked only where there is something to do.
func growMounted(image *os.File, target string) error {
	st, err := image.Stat()
	if err != nil {
		return fmt.Errorf("growing the writable layer: %w", err)
	}
	have, err := ext4Size(image)
	if err != nil {
		return fmt.Errorf("growing the writable layer: %w", err)
	}
	if st.Size()-have < layerBlock {
		return nil
	}
	dir, err := os.Open(target)
	if err != nil {
		return fmt.Errorf("growing the writable layer: %w", err)
	}
	defer dir.Close()
	blocks := uint64(st.Size() / layerBlock)
	if err := ioctlPointer(dir.Fd(), ext4IocResizeFS, &blocks); err != nil {
		return fmt.Errorf("growing the writable layer to %d MiB: %w", st.Size()>>20, err)
	}
	return nil
}

// ext4Size reads a file system's size in bytes from its superblock, by
// "Ext4 Data Structures and Algorithms", section 3.1. The image is one of ours,
// with blocks of layerBlock bytes.
func ext4Size(image *os.File) (int64, error) {
	var sb [0x160]byte
	if _, err := image.ReadAt(sb[:], 1024); err != nil {
		return 0, err
	}
	if binary.LittleEndian.Uint16(sb[0x38:]) != 0xef53 {
		return 0, api.Errorf(api.ErrDamaged, "%s is not an ext4 image", image.Name())
	}
	blocks := int64(binary.LittleEndian.Uint32(sb[0x4:])) | int64(binary.LittleEndian.Uint32(sb[0x150:]))<<32
	return blocks * layerBlock, nil
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
	"mke2fs":    "install e2fsprogs (apt-get install e2fsprogs)",
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
