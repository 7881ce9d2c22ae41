package qemu

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// A machine from a template or a full snapshot runs in a private mapping of a
// memory. What it has changed is in its process alone, and QEMU has no way to tell
// it without reading all the rest, too, which takes the host memory for what
// nobody has ever touched. So it is read out of the process.

// privatePages are the pages of a mapped memory that its process has made its own.
type privatePages struct {
	mem, pagemap *os.File
	parts        []mappedPart
	flags        []byte
}

// mappedPart is a range of the memory and where the process has it.
type mappedPart struct{ offset, size, address int64 }

// The flags of /proc/PID/pagemap, from
// https://docs.kernel.org/admin-guide/mm/pagemap.html.
const (
	pagePresent = 1 << 63
	pageSwapped = 1 << 62
	pageOfFile  = 1 << 61 // or shared memory: as in the memory itself
	pageFlags   = 8       // bytes for each page
)

// openPrivatePages opens those of the memory that process pid has mapped. Its
// caller needs the right to trace the process. It closes them.
func openPrivatePages(pid int, memory *os.File) (_ *privatePages, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(memory.Fd()), &st); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	file := fmt.Sprintf("%02x:%02x %d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	p := &privatePages{flags: make([]byte, memoryRun/memoryPage*pageFlags)}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	proc := fmt.Sprintf("/proc/%d/", pid)
	maps, err := os.Open(proc + "maps")
	if err != nil {
		return nil, err
	}
	defer maps.Close()
	covered := int64(0)
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		// address perms offset dev inode path
		f := strings.Fields(lines.Text())
		if len(f) < 5 || f[3]+" "+f[4] != file {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		var n [3]int64
		for i, s := range []string{from, to, f[2]} {
			if n[i], err = strconv.ParseInt(s, 16, 64); err != nil {
				return nil, fmt.Errorf("reading the process's mappings: %w", err)
			}
		}
		p.parts = append(p.parts, mappedPart{offset: n[2], size: n[1] - n[0], address: n[0]})
		covered += n[1] - n[0]
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if covered != st.Size {
		return nil, api.Errorf(api.ErrInternal, "the process has mapped %d bytes of its memory of %d", covered, st.Size)
	}
	if p.mem, err = os.Open(proc + "mem"); err != nil {
		return nil, err
	}
	if p.pagemap, err = os.Open(proc + "pagemap"); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *privatePages) close() {
	p.mem.Close()
	p.pagemap.Close()
}

// read puts the private pages of what b holds, the memory from offset on, in
// their place. b has at most memoryRun bytes. There are none in a nil p.
func (p *privatePages) read(b []byte, offset int64) error {
	if p == nil {
		return nil
	}
	for _, part := range p.parts {
		from, to := max(offset, part.offset), min(offset+int64(len(b)), part.offset+part.size)
		if from >= to {
			continue
		}
		if err := p.readPart(b[from-offset:to-offset], part.address+from-part.offset); err != nil {
			return err
		}
	}
	return nil
}

func (p *privatePages) readPart(b []byte, address int64) error {
	flags := p.flags[:len(b)/memoryPage*pageFlags]
	if _, err := p.pagemap.ReadAt(flags, address/memoryPage*pageFlags); err != nil {
		return fmt.Errorf("reading which pages are private: %w", err)
	}
	private := func(page int) bool {
		if page*memoryPage >= len(b) {
			return false
		}
		f := binary.NativeEndian.Uint64(flags[page*pageFlags:])
		return f&(pagePresent|pageSwapped) != 0 && f&pageOfFile == 0
	}
	for i := 0; i*memoryPage < len(b); i++ {
		if !private(i) {
			continue
		}
		j := i
		for private(j) {
			j++
		}
		if _, err := p.mem.ReadAt(b[i*memoryPage:j*memoryPage], address+int64(i*memoryPage)); err != nil {
			return fmt.Errorf("reading the process's memory: %w", err)
		}
		i = j
	}
	return nil
}
