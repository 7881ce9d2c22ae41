// Package engine says what it takes to run a guest and leaves the how to the
// packages below it: qemu, gvisor, host.
//
// An [Engine] starts machines of one kind, a [Machine] is one running guest.
// Abilities that only some engines have are separate interfaces, found by type
// assertion. Which engine runs is decided by [Choose] from what each engine's
// Probe saw on this host, never from the operating system's name or the
// presence of a file.
package engine

import (
	"context"
	"io"
	"log/slog"
	"net"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// An Engine starts machines of one kind.
type Engine interface {
	// Name is the word for --engine and for every answer: "qemu".
	Name() string
	// Probe says what works on this host. It returns quickly (well under a
	// second), starts no guest and changes nothing. An engine that cannot work
	// is described in Capabilities, not by an error.
	Probe(ctx context.Context) Capabilities
	// Start returns when the machine's boot has begun, with the guest maybe
	// not yet answering. The machine lives on when ctx is cancelled later;
	// only Stop, its own end, or the end of this process ends it. On an error
	// nothing is left running.
	Start(ctx context.Context, spec MachineSpec) (Machine, error)
}

// Capabilities is what Probe found.
type Capabilities struct {
	Available bool
	Isolation api.Isolation
	// FullSpeed says that guests run at about native speed. Choose prefers
	// such engines over emulation.
	FullSpeed bool
	// TimeScale is by how much time limits for the guest's own work (boot,
	// answers) are to be stretched: 1 at full speed, more under emulation.
	TimeScale int
	// NeedsImage and NeedsKernel say which fields of MachineSpec must be filled.
	NeedsImage, NeedsKernel bool
	// Disk is what MachineSpec.Disk and Layers are for this engine.
	Disk DiskFormat
	// SeedLayer says that a seed's ext4 image may be the lowest of
	// MachineSpec.Layers, so that no file of it has to be copied into the guest.
	SeedLayer bool
	// SaveDropsNetwork says that a machine cannot be saved with its memory while
	// its guest has a network device: the device goes before and another comes
	// after, with none of the guest's connections out.
	SaveDropsNetwork bool
	// Detail says in one sentence what will be used or why it does not work.
	Detail string
	// Remedy is the command or step that mends it, "" if none is known.
	Remedy string
	// Facts are further findings for doctor, in the order to print them.
	Facts []api.Fact
}

// A MachineSpec says what to start. The engine keeps no other state than what
// it puts into Dir.
type MachineSpec struct {
	ID string
	// Dir is the machine's private directory, mode 0700, made by the caller
	// and removed by the caller after the machine is gone. The engine's own
	// files (overlay disk, initramfs, bundle) live in it.
	Dir string
	// RootImage is the environment's raw ext4 image. It is never written.
	// Engine host ignores it.
	RootImage string
	VCPUCount int
	MemMiB    int
	DiskMiB   int // 0: as large as the image
	// Disk is the path of the machine's writable layer, which Start makes
	// where nothing is. "" means a place in Dir: the disk then has no life of
	// its own.
	Disk string
	// Layers lie between RootImage and Disk, the lowest first. Each was a
	// machine's Disk of the same engine before it was frozen, or the image of
	// a seed (Capabilities.SeedLayer). They are never written.
	Layers []string
	// Memory is the path of a file that a FullSnapshotter's SnapshotFull has
	// made: the machine goes on from there instead of booting. Then Layers are
	// those of the snapshot with the frozen one, nothing is at Disk yet, and
	// what makes up the machine (see Warmer) and the size of its disk are what
	// they were. The file is believed: the caller has kept it from others.
	Memory string
	// Continues says of a machine with a Memory that it takes the place of the
	// one that was saved, which is gone: it is no copy and keeps its ids.
	Continues bool
	// Kernel is used by engines that boot one.
	Kernel Kernel
	// AgentPath is the pyro-agent binary for the guest.
	AgentPath string
	Hostname  string
	// Ephemeral says that the machine's disk dies with it. Nothing needs to
	// reach the host's disk, and an engine may keep the changes where they can
	// be had from nowhere else: it may then refuse to take a snapshot.
	Ephemeral bool
	// Templates is the directory in which an engine that is a Warmer keeps its
	// templates. With one of this machine's shape in it Start is warm; without,
	// the machine leaves one there for the next. "" means neither.
	Templates string
	// Console receives the guest's console and the engine's own messages. The
	// engine never blocks the guest on it: the writer must be quick.
	Console io.Writer    `json:"-"`
	Logger  *slog.Logger `json:"-"`
}

// Kernel is a guest kernel on the host's disk.
type Kernel struct {
	// Image is a bzImage or an uncompressed ELF vmlinux.
	Image string
	// Modules are the module files (.ko) the guest needs to reach its disk,
	// its channel and its network, in load order.
	Modules []string
	Release string // as uname -r will show it
}

// A Machine is one running guest. Its methods may be called concurrently.
type Machine interface {
	// DialGuest opens one connection to the guest agent's port 5005. It waits
	// for a guest that is still starting until ctx ends, and fails at once
	// when the machine is gone.
	DialGuest(ctx context.Context) (net.Conn, error)
	// Wait returns when the machine has ended, with why.
	Wait(ctx context.Context) (Exit, error)
	// Stop ends the machine: politely for grace, then by force. It returns
	// when nothing of it runs any more. Safe to call twice and on a machine
	// that has ended by itself. A grace of 0 goes straight to force.
	Stop(ctx context.Context, grace time.Duration) error
	// PIDs are the host processes that make up the machine, for limits,
	// figures and the record that a later clean-up trusts.
	PIDs() []int
}

// A Pauser is a Machine whose processors can be halted and released.
type Pauser interface {
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error
}

// Warmth is how Start would begin a machine.
type Warmth string

// The kinds of Warmth. A stale template was made by or for something else, an
// older guest agent for example: the next start is cold and replaces it.
const (
	WarmthCold  Warmth = "cold"
	WarmthStale Warmth = "stale"
	WarmthWarm  Warmth = "warm"
)

// A Warmer is an Engine that can start machines from a template: the memory of
// a machine whose kernel and guest agent were up and had not touched their disk
// yet. So a template serves every environment and every disk. It goes by what
// the machine is made of: MachineSpec's VCPUCount, MemMiB, Kernel and AgentPath,
// and the engine itself. A template that is of no use is no error: Start then
// boots.
type Warmer interface {
	// Prepare makes the template that Start of spec would use, unless it is
	// there. Of spec only what a template goes by, ID, Dir, Templates, Console
	// and Logger count. It takes as long as a boot.
	Prepare(ctx context.Context, spec MachineSpec) error
	// Warmth says how Start of spec would begin. It takes milliseconds and
	// changes nothing.
	Warmth(ctx context.Context, spec MachineSpec) Warmth
	// PruneTemplates removes the templates in dir that have not been used for
	// longest until the rest is small enough, with all every one, and what
	// killed processes have left. No running machine minds.
	PruneTemplates(ctx context.Context, dir string, all bool) (freedBytes int64, err error)
}

// A Beginner is a Machine that tells how it began.
type Beginner interface {
	// Began reports whether Start was warm. note is one sentence for the user,
	// "" if there is nothing to tell: a template was there and of no use.
	Began() (warm bool, note string)
}

// A DiskFormat is the kind of file that holds a layer of a machine's disk.
type DiskFormat string

// The disk formats. One layer stands on the next by the format's own means: a
// backing file, an overlay file system. An engine whose format is a directory
// may have to copy instead.
const (
	DiskQcow2     DiskFormat = "qcow2"     // qcow2 over a raw image
	DiskExt4      DiskFormat = "ext4"      // ext4 image whose directory upper is an overlayfs layer
	DiskDirectory DiskFormat = "directory" // directory whose content is the layer's
)

// UnfinishedSuffix is behind the name of a disk or layer that is still being
// made: it is renamed when it is whole. Whoever clears up after a killed process
// removes what is called so.
const UnfinishedSuffix = ".new"

// A DiskSnapshotter is a Machine whose disk can be frozen while it runs.
type DiskSnapshotter interface {
	// SnapshotDisk makes what the disk holds now an immutable layer. The
	// caller has let the guest flush its files. spare is a path at which
	// nothing is. Afterwards one of the machine's Disk and spare is the frozen
	// layer, which is returned, and the machine writes to the other one:
	//
	//   - frozen is the old Disk: the machine goes on in spare, which stands
	//     on Layers and the old Disk;
	//   - frozen is spare: a copy, shared with Disk as far as the host's file
	//     system can, which stands on Layers.
	//
	// On an error the machine goes on in its old Disk and there is nothing at
	// spare. If this process is killed in between, a qcow2 at spare is to be
	// taken as the machine's disk, standing on the old one (it is empty or in
	// use), and anything else at spare is to be removed; a complete layer only
	// ever appears at spare whole.
	SnapshotDisk(ctx context.Context, spare string) (frozen string, err error)
}

// A FullSnapshotter is a Machine that can be saved with its memory while it runs.
type FullSnapshotter interface {
	// SnapshotFull is DiskSnapshotter's SnapshotDisk that also saves the
	// machine's memory as of the same instant to a file at memory, where nothing
	// is. The machine stands still meanwhile and then goes on, with its clock
	// set. A Start with that file as its Memory is a copy of it with a name and
	// ids of its own; commands that somebody waits for on a connection do not
	// outlive it there.
	//
	// On an error nothing is at memory; frozen says whether the disk was frozen
	// all the same.
	SnapshotFull(ctx context.Context, spare, memory string) (frozen string, err error)
}

// A LayerMerger is an Engine that can make one layer of two in the disk of a
// machine that does not run.
type LayerMerger interface {
	// MergeLayer makes one layer of chain[i] and the layer above it, chain[i+1].
	// A disk that stands on chain with merged in the place of the two holds what
	// it holds on chain. spare is a path at which nothing is. merged is one of
	// chain[i+1] and spare:
	//
	//   - chain[i+1] has got what chain[i] holds and it did not, so that a disk
	//     on chain goes on being right, too;
	//   - spare is a new layer, and neither of the two is changed.
	//
	// chain[i] is changed in no case. So a process that is killed at any moment
	// leaves a chain that is right, and calling again, with another spare,
	// finishes; what is at the first spare or is called so with UnfinishedSuffix
	// is garbage then. On an error there is nothing at spare.
	//
	// chain holds MachineSpec's Layers, and Disk as the last if that is
	// to be chain[i+1] or lies above it. ErrBusy means that a machine is in the
	// way: one that writes to chain[i+1] always is, one that stands on it where
	// that layer is to be changed.
	MergeLayer(ctx context.Context, chain []string, i int, rootImage, spare string) (merged string, err error)
}

// A DiskRecoverer is an Engine whose machines put right at their start what a power
// cut has left of the file system on their own disk, and not on the layers that
// it stands on.
type DiskRecoverer interface {
	// RecoverDisk puts it right without a machine, so that others can stand on
	// it. No machine may use the disk: ErrBusy if one does.
	RecoverDisk(ctx context.Context, disk string) error
}

// A LayerLimiter is an Engine whose machines cannot stand on any number of layers.
type LayerLimiter interface {
	// MaxLayers is how many MachineSpec.Layers there can be.
	MaxLayers() int
}

// A Describer is an Engine that knows more facts for doctor than Probe tells,
// because finding them out takes too long for every start.
type Describer interface {
	Describe(ctx context.Context) []api.Fact
}

// A Reaper is an Engine whose machines can leave something on the host outside
// their directory when their supervisor is killed.
type Reaper interface {
	// Reap removes it, and never touches a machine whose supervisor lives. It
	// is cheap when there is nothing to do.
	Reap()
}

// A BootWatcher is an Engine that can do better after a guest that never came
// up, by starting the next one in another way.
type BootWatcher interface {
	// BootFailed tells the engine that m's guest did not answer in time or
	// died before it did. It reports whether another Start may work and, in
	// one sentence for the user, what will be different.
	BootFailed(m Machine) (retry bool, note string)
}

// A Launcher is an Engine whose supervisor may have to be started behind another
// command, such as one that makes a user namespace.
type Launcher interface {
	// Launcher returns the words to put in front of the supervisor's command
	// line, nil for none. They become that command, in the same process.
	Launcher() ([]string, error)
}

// ReasonHostDiskFull is the Exit.Reason of a machine that the host had no space
// left for.
const ReasonHostDiskFull = "the host's disk is full"

// Exit is how a machine ended.
type Exit struct {
	// Requested is true after Stop or a power-off from inside.
	Requested bool
	// Reason is one phrase for people: "guest kernel panic", "qemu was killed".
	Reason string
}
