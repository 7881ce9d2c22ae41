// Package initramfs writes the file system that a guest kernel starts in: the
// guest agent as /init, the kernel modules it has to load, and empty
// directories to mount on. The archive is an uncompressed newc cpio, which the
// kernel unpacks fastest; the modules dominate its size, about 1 MB.
package initramfs

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/pyro-mcp/pyro/api"
)

// OrderFile is the guest path of the list of modules: one guest path per line,
// in the order in which they have to be inserted.
const OrderFile = "/modules/order"

// Spec says what goes in.
type Spec struct {
	// Init is the host path of the program that becomes /init.
	Init string
	// Modules are the host paths of kernel modules (.ko), in load order.
	Modules []string
}

// directories are made in this order, so that parents come first. Links and
// devices beyond /dev/console are the agent's business: it mounts devtmpfs.
var directories = []string{"/dev", "/modules", "/newroot", "/proc", "/run", "/sys", "/tmp"}

// maxFile bounds each file that goes in: the format's own size field ends at
// 4 GiB, and an initramfs is unpacked into the guest's memory.
const maxFile = 256 << 20

// Write writes the archive to w. Equal files make equal archives: owners are
// root, times zero. The archive is padded to 512 bytes.
func Write(w io.Writer, spec Spec) error {
	bw := bufio.NewWriterSize(w, 1<<20)
	a := &archive{w: bw}
	for _, dir := range directories {
		a.entry(dir, modeDir|0o755, 0, deviceNumber{})
	}
	// The kernel opens /dev/console for /init before devtmpfs is mounted.
	a.entry("/dev/console", modeChar|0o600, 0, deviceNumber{5, 1})
	order := ""
	for i, m := range spec.Modules {
		name := fmt.Sprintf("/modules/%02d-%s", i, filepath.Base(m))
		if err := a.file(name, 0o400, m); err != nil {
			return fmt.Errorf("putting a module into the initramfs: %w", err)
		}
		order += name + "\n"
	}
	a.entry(OrderFile, modeFile|0o400, int64(len(order)), deviceNumber{})
	a.data([]byte(order))
	if err := a.file("/init", 0o755, spec.Init); err != nil {
		return fmt.Errorf("putting the guest agent into the initramfs: %w", err)
	}
	a.trailer()
	if a.err == nil {
		a.err = bw.Flush()
	}
	if a.err != nil {
		return fmt.Errorf("writing the initramfs: %w", a.err)
	}
	return nil
}

// file adds a host file. Its own errors are about reading; those of writing
// stay in a.err.
func (a *archive) file(name string, perm uint32, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() {
		return api.Errorf(api.ErrInvalid, "%s is not a regular file", path)
	}
	if fi.Size() > maxFile {
		return api.Errorf(api.ErrExhausted, "%s has %d bytes, the limit is %d", path, fi.Size(), int64(maxFile))
	}
	a.entry(name, modeFile|perm, fi.Size(), deviceNumber{})
	n, err := io.Copy(a, io.LimitReader(f, fi.Size()))
	if err == nil && n != fi.Size() {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && a.err == nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	a.pad(4)
	return nil
}
