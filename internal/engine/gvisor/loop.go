package gvisor

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// maxLoopRaces bounds how often another process may take the loop device that
// the kernel has just named free to us.
const maxLoopRaces = 64

// attachLoop makes the open image a block device and returns its open device
// file. The kernel keeps a reference to image's open file description for as
// long as the device exists, so a flock on image is held for exactly that time.
// The device goes away by itself when it is neither open nor mounted any more.
func attachLoop(image *os.File, readOnly bool) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, api.Errorf(api.ErrUnsupported, "opening the loop device control: %w", err)
	}
	defer control.Close()

	config := unix.LoopConfig{
		Fd:   uint32(image.Fd()),
		Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR},
	}
	mode := os.O_RDWR
	if readOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
		mode = os.O_RDONLY
	}
	for range maxLoopRaces {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("finding a free loop device: %w", err)
		}
		path := "/dev/loop" + strconv.Itoa(n)
		dev, err := os.OpenFile(path, mode, 0)
		if err != nil {
			return nil, api.Errorf(api.ErrUnsupported, "opening a free loop device: %w", err)
		}
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &config)
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("attaching %s to %s: %w", image.Name(), path, err)
		}
	}
	return nil, api.Errorf(api.ErrBusy, "attaching %s: every free loop device was taken by somebody else", image.Name())
}

// mountImage mounts the ext4 image on target. The loop device is released with
// the mount.
func mountImage(image *os.File, target string, readOnly bool, options string) error {
	dev, err := attachLoop(image, readOnly)
	if err != nil {
		return err
	}
	defer dev.Close()
	// Nothing runs or is looked up through this mount on the host; exec stays
	// allowed, because the sandbox maps the guest's programs from it.
	flags := uintptr(unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOATIME)
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount(dev.Name(), target, "ext4", flags, options); err != nil {
		return fmt.Errorf("mounting %s: %w", image.Name(), err)
	}
	return nil
}
