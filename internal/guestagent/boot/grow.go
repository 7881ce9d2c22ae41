package boot

import (
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ext4ResizeFS is EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64), of
// include/uapi/linux/ext4.h.
const ext4ResizeFS = 0x40086610

// growRoot grows the mounted ext4 to the size of its device, if that is larger.
func growRoot(device, mount string) error {
	dev, err := os.Open(device)
	if err != nil {
		return err
	}
	defer dev.Close()
	var size uint64
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, dev.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); errno != 0 {
		return os.NewSyscallError("ioctl BLKGETSIZE64", errno)
	}
	var super [1024]byte
	if _, err := dev.ReadAt(super[:], 1024); err != nil {
		return fmt.Errorf("reading the superblock: %w", err)
	}
	block, blocks, err := parseSuper(super[:])
	if err != nil {
		return err
	}
	want := size / block
	if want <= blocks {
		return nil
	}
	root, err := os.Open(mount)
	if err != nil {
		return err
	}
	defer root.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, root.Fd(), ext4ResizeFS, uintptr(unsafe.Pointer(&want))); errno != 0 {
		return os.NewSyscallError("ioctl EXT4_IOC_RESIZE_FS", errno)
	}
	return nil
}

// parseSuper reads the block size and count of an ext4 superblock; offsets from
// Documentation/filesystems/ext4/super.rst.
func parseSuper(super []byte) (block, blocks uint64, err error) {
	if magic := binary.LittleEndian.Uint16(super[0x38:]); magic != 0xef53 {
		return 0, 0, fmt.Errorf("the superblock's magic is %#04x, not ext4's", magic)
	}
	log := binary.LittleEndian.Uint32(super[0x18:])
	if log > 6 {
		return 0, 0, fmt.Errorf("the superblock's block size is 2^%d KiB", log)
	}
	blocks = uint64(binary.LittleEndian.Uint32(super[0x4:]))
	const incompat64bit = 0x80
	if binary.LittleEndian.Uint32(super[0x60:])&incompat64bit != 0 {
		blocks |= uint64(binary.LittleEndian.Uint32(super[0x150:])) << 32
	}
	return 1024 << log, blocks, nil
}
