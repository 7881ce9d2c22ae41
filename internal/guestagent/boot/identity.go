package boot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// Resume does in a running machine what the host asks for: it refreshes the clock
// and the random generator first, and then a copy gets its name and ids.
func Resume(r guestproto.Resume) error {
	if err := refresh(r); err != nil || !r.NewIdentity {
		return err
	}
	return rename(r.Hostname)
}

// refresh sets the clock and gives the kernel's random generator a new key. From
// then on what this guest draws is nobody else's. Both are tried; the error says
// what did not work.
func refresh(r guestproto.Resume) error {
	now := unix.NsecToTimespec(r.TimeNS)
	var clock error
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
		clock = fmt.Errorf("setting the clock: %w", err)
	}
	return errors.Join(clock, reseed(r.Entropy))
}

// reseed mixes entropy into the kernel's pool, as worth all its bits, and makes
// the generator take its key from there at once: random(4). Without the second
// step it would go on with the old key for up to a minute.
func reseed(entropy []byte) error {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("reseeding the random generator: %w", err)
	}
	defer f.Close()
	// struct rand_pool_info of include/uapi/linux/random.h.
	info := make([]byte, 8, 8+len(entropy))
	binary.NativeEndian.PutUint32(info, uint32(8*len(entropy)))
	binary.NativeEndian.PutUint32(info[4:], uint32(len(entropy)))
	info = append(info, entropy...)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return fmt.Errorf("reseeding the random generator: %w", os.NewSyscallError("ioctl RNDADDENTROPY", errno))
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDRESEEDCRNG, 0); errno != 0 {
		return fmt.Errorf("reseeding the random generator: %w", os.NewSyscallError("ioctl RNDRESEEDCRNG", errno))
	}
	return nil
}

// rename gives a running machine its name and ids anew, after refresh.
func rename(hostname string) error {
	var errs []error
	if hostname != "" {
		errs = append(errs, nameHost(hostname))
	}
	// Both lie in memory, one mounted over the other: what was read before
	// stays what it was, and the next to read sees the new.
	if old, err := os.ReadFile(inMemoryMachineID); err == nil && strings.TrimSpace(string(old)) != "" {
		errs = append(errs, writeMachineID())
	}
	return errors.Join(append(errs, bootID())...)
}

const (
	kernelBootID   = "/proc/sys/kernel/random/boot_id"
	inMemoryBootID = "/run/boot-id"
)

// bootID gives the machine a boot id of its own. The kernel draws one when it is
// first asked and keeps it, so a copy of its memory may have it already, and a
// file is mounted over it.
func bootID() error {
	_, err := os.Lstat(inMemoryBootID)
	mounted := !errors.Is(err, fs.ErrNotExist)
	// Root may write what is 0444.
	if err := os.WriteFile(inMemoryBootID, []byte(guestproto.NewBootID()), 0o444); err != nil {
		return fmt.Errorf("writing the boot id: %w", err)
	}
	if mounted {
		return nil
	}
	return mountBootID(inMemoryBootID)
}

func mountBootID(file string) error {
	if err := unix.Mount(file, kernelBootID, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting the boot id: %w", err)
	}
	return nil
}

// ResumeSandbox does in a sandbox what the host asks for. Clock and random
// generator are the host's there, and the ids those that [PrepareSandbox] has
// mounted; so what is left is the name in the files of a copy.
func ResumeSandbox(r guestproto.Resume) error {
	if !r.NewIdentity || r.Hostname == "" {
		return nil
	}
	return nameHost(r.Hostname)
}
