package qemu

import "github.com/pyro-mcp/pyro/internal/engine"

// What the tests of package qemu_test use of it.
var (
	NewMemory     = newMemory
	SealMemory    = sealMemory
	SaveMemory    = saveMemory
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
	TemplateFiles = []string{templateMemory, templateState}
)

// Recipe returns the name and recipe of the template for machines like spec.
func (e *Engine) Recipe(spec engine.MachineSpec) (name, recipe string, err error) {
	t, err := e.template(spec, accelTCG)
	if err != nil {
		return "", "", err
	}
	return t.name, t.recipe, nil
}
