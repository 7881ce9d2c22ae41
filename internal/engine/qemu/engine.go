// Package qemu runs guests as virtual machines under QEMU: on KVM where that
// really works, else on TCG, QEMU's software emulation.
//
// QEMU gets everything as open files: its disks, its console, its control
// connection and the guest channel. So it needs no path of ours, runs as a user
// of its own where we are root, in empty network and IPC namespaces, and under
// its own seccomp sandbox with spawning denied. It dies with the process that
// started it.
package qemu

import (
	"cmp"
	"log/slog"

	"github.com/pyro-mcp/pyro/internal/engine"
)

// Name is the engine's name.
const Name = "qemu"

// Options configure an Engine. The zero value works.
type Options struct {
	Binary  string // qemu-system-x86_64 by default
	ImgTool string // qemu-img by default
	// Accel is auto (default), kvm or tcg.
	Accel string
	// NoteFile remembers an accelerator that let a guest down; "" for none.
	NoteFile string
	Logger   *slog.Logger
}

// Engine implements [engine.Engine].
type Engine struct {
	binary, imgTool string
	wantAccel       string
	noteFile        string
	log             *slog.Logger
}

var (
	_ engine.Engine      = (*Engine)(nil)
	_ engine.BootWatcher = (*Engine)(nil)
	_ engine.Describer   = (*Engine)(nil)
	_ engine.LayerMerger = (*Engine)(nil)
)

// New returns the engine.
func New(o Options) *Engine {
	return &Engine{
		binary:    cmp.Or(o.Binary, "qemu-system-x86_64"),
		imgTool:   cmp.Or(o.ImgTool, "qemu-img"),
		wantAccel: o.Accel,
		noteFile:  o.NoteFile,
		log:       cmp.Or(o.Logger, slog.New(slog.DiscardHandler)),
	}
}

// Name implements [engine.Engine].
func (e *Engine) Name() string { return Name }
