package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// saveMemoryTimeout bounds how long a machine's whole memory takes to be written
// or read: 64 GiB at 200 MB/s.
const saveMemoryTimeout = 6 * time.Minute

// migrationBandwidth, in bytes a second, is more than any disk takes: QEMU's own
// bound is meant for networks that others use as well.
const migrationBandwidth = 1 << 40

// SnapshotFull implements [engine.FullSnapshotter].
func (m *machine) SnapshotFull(ctx context.Context, spare, memory string) (frozen string, err error) {
	if _, err := os.Lstat(memory); err == nil {
		return "", api.Errorf(api.ErrExists, "there is something at %s already", memory)
	}
	// Commands must not run in a copy before it has a random generator of its own.
	if err := guestclient.New(m.DialGuest, guestclient.Options{}).Suspend(ctx); err != nil {
		return "", fmt.Errorf("saving the machine: %w", err)
	}
	defer func() {
		// Whatever happened: this machine goes on.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		err = errors.Join(err, m.goOn(ctx, false, ""))
	}()
	if err := m.qmp.execute(ctx, "stop", nil, nil); err != nil {
		return "", fmt.Errorf("saving the machine: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		err = errors.Join(err, m.qmp.execute(ctx, "cont", nil, nil))
	}()
	if frozen, err = m.SnapshotDisk(ctx, spare); err != nil {
		return frozen, err
	}
	failpoint.Hit("supervise-save/still")
	if err := m.saveAll(ctx, memory); err != nil {
		return frozen, fmt.Errorf("saving the machine's memory: %w", err)
	}
	return frozen, nil
}

// A saved machine is a file with savedMagic, the length of the devices' state as 8
// bytes, little-endian, that state, and the memory in saveMemory's form; or a
// migration stream of QEMU's, which begins with a word of its own.
const savedMagic = "pyro machine 1\n\x00"

// saveAll writes the stopped machine's memory and devices to a file at path,
// which appears whole and lasts.
func (m *machine) saveAll(ctx context.Context, path string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, saveMemoryTimeout)
	defer cancel()
	tmp := path + engine.UnfinishedSuffix
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(tmp)
		}
	}()
	err = m.saveApart(ctx, f)
	if err != nil && ctx.Err() == nil {
		// The host may keep us from another process's memory.
		m.log.Warn("QEMU itself saves the machine's memory, and copies will not share it", "error", err)
		if err = f.Truncate(0); err == nil {
			_, err = f.Seek(0, io.SeekStart)
		}
		if err == nil {
			err = m.saveStream(ctx, f)
		}
	}
	if err != nil {
		return err
	}
	failpoint.Hit("supervise-save/written")
	if err := errors.Join(f.Sync(), os.Rename(tmp, path)); err != nil {
		return err
	}
	return statedir.SyncDir(filepath.Dir(path))
}

// saveApart writes devices and memory so that copies can share the latter.
func (m *machine) saveApart(ctx context.Context, f *os.File) error {
	if m.memory == nil {
		return api.Errorf(api.ErrUnsupported, "the memory is QEMU's own")
	}
	private, err := openPrivatePages(m.cmd.Process.Pid, m.memory)
	if err != nil {
		return err
	}
	defer private.close()
	state, err := m.saveDevicesAlone(ctx)
	if err != nil {
		return fmt.Errorf("saving the machine's devices: %w", err)
	}
	header := binary.LittleEndian.AppendUint64([]byte(savedMagic), uint64(len(state)))
	if _, err := f.Write(append(header, state...)); err != nil {
		return err
	}
	return saveMemory(f, m.memory, private)
}

// saveDevicesAlone returns the state of a stopped machine's devices where its
// memory is a private mapping: a migration would take that along whatever it is
// told. This command is meant for Xen, whose tools keep the memory themselves, and
// needs nothing of it. What it leaves out beside the memory is the firmware, which
// nothing needs that has booted.
func (m *machine) saveDevicesAlone(ctx context.Context) ([]byte, error) {
	fd, err := unix.MemfdCreate("pyro-devices", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "pyro-devices")
	defer f.Close()
	// QEMU takes a descriptor of an fdset that is as it wants to open it.
	w, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	defer w.Close()
	set, err := m.addFile(ctx, w, nil)
	if err != nil {
		return nil, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		if err := m.qmp.execute(ctx, "remove-fd", map[string]any{"fdset-id": set}, nil); err != nil {
			m.log.Debug("taking back a file", "error", err)
		}
	}()
	err = m.qmp.execute(ctx, "xen-save-devices-state", map[string]any{"filename": fdsetPath(set), "live": false}, nil)
	if err != nil {
		return nil, err
	}
	state, err := io.ReadAll(io.LimitReader(f, maxDeviceState+1))
	if err == nil && len(state) > maxDeviceState {
		err = api.Errorf(api.ErrExhausted, "the state has more than %d bytes", maxDeviceState)
	}
	return append(state, noDescription...), err
}

// noDescription is an empty description of the state, which who loads it expects
// behind it: QEMU_VM_VMDESCRIPTION in migration/savevm.h, and a length of 4 bytes.
const noDescription = "\x06\x00\x00\x00\x00"

// saveStream writes a migration stream.
func (m *machine) saveStream(ctx context.Context, f *os.File) error {
	if err := m.prepareMigration(ctx, false); err != nil {
		return err
	}
	if err := m.qmp.execute(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": int64(migrationBandwidth)}, nil); err != nil {
		return err
	}
	if err := m.qmp.executeWith(ctx, f, "getfd", map[string]any{"fdname": "state"}, nil); err != nil {
		return err
	}
	if err := m.qmp.execute(ctx, "migrate", map[string]any{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	return m.awaitMigration(ctx)
}

// goOn tells the guest agent that time has passed, or that it is a copy.
func (m *machine) goOn(ctx context.Context, isCopy bool, hostname string) error {
	req, err := guestclient.NewResume(hostname)
	if err != nil {
		return err
	}
	req.NewIdentity = isCopy
	return guestclient.New(m.DialGuest, guestclient.Options{}).Resume(ctx, req)
}

// startSaved starts a machine from a full snapshot. It returns when the guest
// knows who it is. On an error nothing is left running.
func (e *Engine) startSaved(ctx context.Context, spec engine.MachineSpec, accel string) (_ *machine, err error) {
	ctx, cancel := context.WithTimeout(ctx, saveMemoryTimeout)
	defer cancel()
	f, err := os.Open(spec.Memory)
	if err != nil {
		return nil, fmt.Errorf("opening the saved memory: %w", err)
	}
	defer f.Close()
	how := start{incoming: true}
	state, err := readSavedDevices(f)
	if err != nil {
		return nil, err
	}
	var filled <-chan error
	if state != nil {
		how.devicesOnly, how.private = true, !spec.Continues
		if how.memory, filled, err = savedMemory(ctx, spec, f); err != nil {
			return nil, err
		}
	}
	m, channel, err := e.launch(ctx, spec, accel, how)
	if err != nil {
		if how.memory != nil {
			err = errors.Join(err, <-filled, how.memory.Close())
		}
		return nil, err
	}
	m.warm = true
	defer func() {
		if err != nil {
			if stopErr := m.Stop(context.WithoutCancel(ctx), 0); stopErr != nil {
				m.log.Error("stopping a machine that did not start", "error", stopErr)
			}
		}
	}()
	if state != nil {
		if err = <-filled; err == nil {
			err = m.loadDevices(ctx, state)
		}
	} else {
		err = m.load(ctx, f, false)
	}
	if err != nil {
		channel.Close()
		return nil, api.WithHint(fmt.Errorf("loading the saved memory: %w", err),
			"a full snapshot belongs to the QEMU, kernel and processor that it was taken with; its disk can be used with any")
	}
	go m.connect(channel, nil)
	if err := m.goOn(ctx, !spec.Continues, spec.Hostname); err != nil {
		return nil, err
	}
	return m, nil
}

// savedMemory returns the memory that f, an open spec.Memory, has behind the
// devices, as sharedMemory does. A machine that takes the place of the one that
// was saved gets one of its own, which is not sealed: there is no other to share
// it, and what it changes would take its room twice.
func savedMemory(ctx context.Context, spec engine.MachineSpec, f *os.File) (memory *os.File, filled <-chan error, err error) {
	size := int64(spec.MemMiB) << 20
	if spec.Continues {
		if memory, err = newMemory("pyro-"+spec.ID, size); err != nil {
			return nil, nil, err
		}
		done := make(chan error, 1)
		done <- loadMemory(memory, size, f)
		return memory, done, nil
	}
	id, err := stamp(spec.Memory)
	if err != nil {
		return nil, nil, err
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0) // at the same position
	if err != nil {
		return nil, nil, os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
	}
	sum := sha256.Sum256([]byte(id))
	return sharedMemory(ctx, spec.Logger, spec.Templates, hex.EncodeToString(sum[:]), size, os.NewFile(uintptr(fd), f.Name()))
}

// readSavedDevices reads what is before the memory in a saved machine. It returns
// nil for a migration stream, which it leaves at its beginning.
func readSavedDevices(f *os.File) ([]byte, error) {
	var header [len(savedMagic) + 8]byte
	if _, err := io.ReadFull(f, header[:]); err != nil {
		return nil, api.Errorf(api.ErrDamaged, "the saved memory ends early: %w", err)
	}
	if string(header[:len(savedMagic)]) != savedMagic {
		_, err := f.Seek(0, io.SeekStart)
		return nil, err
	}
	n := binary.LittleEndian.Uint64(header[len(savedMagic):])
	if n > maxDeviceState {
		return nil, api.Errorf(api.ErrDamaged, "the saved memory begins with %d bytes of devices", n)
	}
	state := make([]byte, n)
	if _, err := io.ReadFull(f, state); err != nil {
		return nil, api.Errorf(api.ErrDamaged, "the saved memory ends early: %w", err)
	}
	return state, nil
}

var _ engine.FullSnapshotter = (*machine)(nil)
