package qemu

import (
	"io"
	"os"

	"github.com/pyro-mcp/pyro/internal/engine"
)

// What the tests of package qemu_test use of it.
var (
	NewMemory     = newMemory
	SealMemory    = sealMemory
	LoadMemory    = loadMemory
	BorrowMemory  = borrowMemory
	LendMemory    = lendMemory
	MemoryName    = memoryName
	HolderFile    = holderFile
	WriteStub     = writeStubKernel
	ProcessorOf   = processor
	PruneToSize   = (*Engine).pruneTemplates
	UsedFile      = usedFile
	MaxMemoryRun  = uint64(memoryRun)
	SharedMemory  = sharedMemory
	TemplateFiles = []string{templateMemory, templateState}
)

// SaveMemory is saveMemory of what no process has changed.
func SaveMemory(w io.Writer, memory *os.File) error { return saveMemory(w, memory, nil) }

// SavePrivateMemory is saveMemory with what the process pid has changed.
func SavePrivateMemory(w io.Writer, memory *os.File, pid int) error {
	p, err := openPrivatePages(pid, memory)
	if err != nil {
		return err
	}
	defer p.close()
	return saveMemory(w, memory, p)
}

// Recipe returns the name and recipe of the template for machines like spec.
func (e *Engine) Recipe(spec engine.MachineSpec) (name, recipe string, err error) {
	t, err := e.template(spec, accelTCG)
	if err != nil {
		return "", "", err
	}
	return t.name, t.recipe, nil
}
