package qemu

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// Guest memory that QEMU maps is a memfd of ours. A template's is sealed against
// writing before a guest runs in a private mapping of it: QEMU wants to open its
// memory for writing whatever it does with it (until 8.2), and one that was taken
// over by its guest must not reach the memory of the next.

// newMemory makes an empty memory of that many bytes.
func newMemory(name string, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("making the guest's memory: %w", os.NewSyscallError("memfd_create", err))
	}
	f := os.NewFile(uintptr(fd), name)
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, fmt.Errorf("making the guest's memory: %w", err)
	}
	return f, nil
}

// memorySeals forbid every change of a memory's content and size.
const memorySeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

func sealMemory(f *os.File) error {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, memorySeals); err != nil {
		return fmt.Errorf("sealing the guest's memory: %w", os.NewSyscallError("fcntl F_ADD_SEALS", err))
	}
	return nil
}

func isSealed(f *os.File) bool {
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	return err == nil && seals&memorySeals == memorySeals
}

// A saved memory is a sequence of runs: the offset and the length of each as
// 8 bytes, little-endian, and behind them that many bytes. Offsets grow, and
// what no run covers is zero. It ends with a run of length 0 at the memory's
// size.
const (
	memoryPage = 4096
	// memoryRun bounds one run, and so the buffer of its reader.
	memoryRun = 1 << 20
	runHeader = 16
)

var zeroPage [memoryPage]byte

// saveMemory writes what is not zero in memory, whose size is a multiple of
// memoryPage, with the pages in place that a process has changed for itself;
// private may be nil.
func saveMemory(w io.Writer, memory *os.File, private *privatePages) error {
	st, err := memory.Stat()
	if err != nil {
		return err
	}
	size := st.Size()
	out := bufio.NewWriterSize(w, memoryRun)
	buf := make([]byte, memoryRun)
	next := int64(0) // where the next data is, not before offset
	for offset := int64(0); offset < size; offset += memoryRun {
		b := buf[:min(memoryRun, size-offset)]
		if next <= offset {
			next, err = unix.Seek(int(memory.Fd()), offset, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) { // none up to the end
				next, err = size, nil
			}
			if err != nil {
				return os.NewSyscallError("lseek", err)
			}
		}
		if next < offset+int64(len(b)) {
			// A hole that is read stays one.
			if _, err := memory.ReadAt(b, offset); err != nil {
				return err
			}
		} else {
			clear(b)
		}
		if err := private.read(b, offset); err != nil {
			return err
		}
		if err := writeRuns(out, b, offset); err != nil {
			return err
		}
	}
	if err := writeRun(out, nil, size); err != nil {
		return err
	}
	return out.Flush()
}

// writeRuns writes the pages of b that hold something.
func writeRuns(w io.Writer, b []byte, offset int64) error {
	for i := 0; i < len(b); {
		j := i
		for j < len(b) && !bytes.Equal(b[j:min(j+memoryPage, len(b))], zeroPage[:min(memoryPage, len(b)-j)]) {
			j += min(memoryPage, len(b)-j)
		}
		if j > i {
			if err := writeRun(w, b[i:j], offset+int64(i)); err != nil {
				return err
			}
		}
		i = j + memoryPage
	}
	return nil
}

func writeRun(w io.Writer, b []byte, offset int64) error {
	var header [runHeader]byte
	binary.LittleEndian.PutUint64(header[:], uint64(offset))
	binary.LittleEndian.PutUint64(header[8:], uint64(len(b)))
	if _, err := w.Write(header[:]); err != nil {
		return err
	}
	_, err := w.Write(b)
	return err
}

// loadMemory fills memory, which is empty and has the size that was saved, from
// what saveMemory has written. Anything else is ErrDamaged.
func loadMemory(memory io.WriterAt, size int64, r io.Reader) error {
	in := bufio.NewReaderSize(r, memoryRun)
	buf := make([]byte, memoryRun)
	var header [runHeader]byte
	for next := int64(0); ; {
		if _, err := io.ReadFull(in, header[:]); err != nil {
			return api.Errorf(api.ErrDamaged, "the saved memory ends early: %w", err)
		}
		offset, n := binary.LittleEndian.Uint64(header[:]), binary.LittleEndian.Uint64(header[8:])
		if n == 0 && offset == uint64(size) {
			return nil
		}
		if n == 0 || n > memoryRun || offset < uint64(next) || offset > uint64(size) || n > uint64(size)-offset {
			return api.Errorf(api.ErrDamaged, "the saved memory has %d bytes at %d, which do not belong there", n, offset)
		}
		if _, err := io.ReadFull(in, buf[:n]); err != nil {
			return api.Errorf(api.ErrDamaged, "the saved memory ends early: %w", err)
		}
		if _, err := memory.WriteAt(buf[:n], int64(offset)); err != nil {
			return fmt.Errorf("filling the guest's memory: %w", err)
		}
		next = int64(offset + n)
	}
}
