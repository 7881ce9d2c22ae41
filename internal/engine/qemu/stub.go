package qemu

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"io"
	"os"
)

// isELF reports whether the file at path is an uncompressed kernel.
func isELF(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	magic := make([]byte, len(elf.ELFMAG))
	_, err = io.ReadFull(f, magic)
	return err == nil && string(magic) == elf.ELFMAG
}

// stubAddress is where the stub would be loaded: the start of high memory.
const stubAddress = 1 << 20

// xenPhys32Entry is XEN_ELFNOTE_PHYS32_ENTRY of xen/include/public/elfnote.h,
// the note by which QEMU finds where to enter an uncompressed kernel (PVH).
const xenPhys32Entry = 18

// writeStubKernel writes the least that QEMU takes for an uncompressed kernel.
// A machine that goes on from a template has its kernel in its memory, but needs
// to be given one of the same form, so that the same boot firmware is there.
// Reading and copying the real one takes longer than all the rest of QEMU's
// start.
func writeStubKernel(w io.Writer) error {
	const headers, programs = 64, 2
	note := struct {
		NameSize, DescSize, Type uint32
		Name                     [4]byte
		Entry                    uint32
	}{4, 4, xenPhys32Entry, [4]byte{'X', 'e', 'n'}, stubAddress}
	noteAt := uint64(headers + programs*56)
	codeAt := noteAt + 32
	var b bytes.Buffer
	for _, part := range []any{
		elf.Header64{
			Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT), Entry: stubAddress,
			Phoff: headers, Ehsize: headers, Phentsize: 56, Phnum: programs,
		},
		elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Off: codeAt, Vaddr: stubAddress, Paddr: stubAddress, Filesz: 16, Memsz: 16, Align: 4096},
		elf.Prog64{Type: uint32(elf.PT_NOTE), Flags: uint32(elf.PF_R), Off: noteAt, Filesz: uint64(binary.Size(note)), Memsz: uint64(binary.Size(note)), Align: 4},
		note,
	} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			return err
		}
	}
	// QEMU reads 8 KiB to tell a kernel's form (x86_load_linux in hw/i386/x86.c).
	b.Write(make([]byte, 8<<10-b.Len()))
	// hlt; jmp to it: where a machine would end that booted it by mistake.
	copy(b.Bytes()[codeAt:], []byte{0xf4, 0xeb, 0xfd})
	_, err := w.Write(b.Bytes())
	return err
}
