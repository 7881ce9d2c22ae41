package guestconn

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

func peerGone(c net.Conn) bool {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return true // closed on our own side
	}
	gone := false
	err = raw.Control(func(fd uintptr) {
		// poll(2) reports POLLHUP and POLLERR unasked: for stream sockets when
		// both directions are shut down (unix_poll in net/unix/af_unix.c,
		// vsock_poll in net/vmw_vsock/af_vsock.c).
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		gone = err == nil && n > 0 && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone || err != nil
}
