// Package all lists the engines of this build, so that nothing needs to
// register itself.
package all

import (
	"log/slog"
	"os"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/engine/host"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
)

// Engines returns every engine, configured from the environment. noteFile is
// statedir.Dir.AcceleratorFile.
func Engines(noteFile string, log *slog.Logger) []engine.Engine {
	return []engine.Engine{
		qemu.New(qemu.Options{
			Binary:   os.Getenv("PYRO_QEMU"),
			ImgTool:  os.Getenv("PYRO_QEMU_IMG"),
			Accel:    os.Getenv("PYRO_QEMU_ACCEL"),
			NoteFile: noteFile,
			Logger:   log,
		}),
		gvisor.New(gvisor.Options{Logger: log}),
		host.New(),
	}
}
