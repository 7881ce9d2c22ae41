package initramfs

import (
	"fmt"
	"io"
	"strings"
)

// Mode bits as in the file modes of stat(2); the format stores them as they are.
const (
	modeDir  = 0o040000
	modeChar = 0o020000
	modeFile = 0o100000
)

type deviceNumber struct{ major, minor uint32 }

// archive writes the newc form of cpio, as described in the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst. Libraries exist,
// but this is shorter than the glue around one. The first error sticks.
type archive struct {
	w      io.Writer
	err    error
	offset int64
	inode  uint32
}

func (a *archive) Write(p []byte) (int, error) {
	if a.err != nil {
		return 0, a.err
	}
	n, err := a.w.Write(p)
	a.offset += int64(n)
	a.err = err
	return n, err
}

// entry writes a header; size bytes of content have to follow, padded by data
// or pad.
func (a *archive) entry(name string, mode uint32, size int64, dev deviceNumber) {
	a.inode++
	links := 1
	if mode&modeDir != 0 && mode&modeFile == 0 {
		links = 2
	}
	name = strings.TrimPrefix(name, "/")
	fmt.Fprintf(a, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		a.inode, mode, 0, 0, links, 0, size, 0, 0, dev.major, dev.minor, len(name)+1, 0)
	a.data([]byte(name + "\x00"))
}

func (a *archive) data(p []byte) {
	_, _ = a.Write(p) // kept in a.err
	a.pad(4)
}

func (a *archive) pad(to int64) {
	if rest := a.offset % to; rest != 0 {
		_, _ = a.Write(make([]byte, to-rest))
	}
}

func (a *archive) trailer() {
	a.inode = ^uint32(0) // entry makes it 0, as the kernel's own tool writes it
	a.entry("TRAILER!!!", 0, 0, deviceNumber{})
	a.pad(512)
}
