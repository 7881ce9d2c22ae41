//go:build unix

package archive

import (
	"errors"
	"syscall"
)

// isFull reports whether err means that the disk or a quota is used up.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// oNonblock keeps an open from waiting for a FIFO's other end.
const oNonblock = syscall.O_NONBLOCK
