package gvisor

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctlPointer is ioctl(2) with a pointer to an argument of fixed size.
func ioctlPointer[T any](fd, request uintptr, arg *T) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(unsafe.Pointer(arg)))
	if errno != 0 {
		return errno
	}
	return nil
}
