package qemu

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// command collects QEMU's arguments and the files that go with them.
type command struct {
	args  []string
	files []*os.File // file i becomes descriptor 3+i
	// diskSet is the fdset of the writable layer, once it was added.
	diskSet int
}

// pass arranges for f to be inherited and returns its number in QEMU.
func (c *command) pass(f *os.File) int {
	c.files = append(c.files, f)
	return 2 + len(c.files)
}

func (c *command) add(args ...string) { c.args = append(c.args, args...) }

// passSet makes f an fdset, which QEMU opens by its [fdsetPath], and returns its
// number. Only block devices and character devices can be opened so.
func (c *command) passSet(f *os.File) int {
	fd := c.pass(f)
	c.add("-add-fd", fmt.Sprintf("fd=%d,set=%d", fd, fd))
	return fd
}

func fdsetPath(set int) string { return fmt.Sprintf("/dev/fdset/%d", set) }

// passPath makes f readable by a path that needs no permission on any
// directory, for the options that take nothing but a path.
func (c *command) passPath(f *os.File) string {
	return fmt.Sprintf("/proc/self/fd/%d", c.pass(f))
}

// inputs are the open files of a machine.
type inputs struct {
	disk                  chain
	kernel, initramfs     *os.File
	console, qmp, channel *os.File
	vhostVsock            *os.File // nil without vsock
	cid                   uint32
	memory                *os.File // nil for memory of QEMU's own
	private               bool     // memory is others', too, and not changed
	waits                 bool     // the guest waits for its host
	incoming              bool     // nothing boots, a state will come
	devicesOnly           bool     // of the devices alone, see saveDevicesAlone
}

// newCommand starts a command line of whatever QEMU is used for.
func newCommand(name string) *command {
	c := &command{}
	c.add("-name", name)
	// Nothing that was not asked for: QEMU's default devices and configuration
	// files are attack surface without a use here.
	c.add("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot")
	// spawn=deny forbids fork and exec, elevateprivileges=deny setuid and its
	// kin. State travels by descriptors, so nothing of that is missed.
	c.add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	return c
}

func (c *command) addMonitor(f *os.File) {
	c.add("-chardev", fmt.Sprintf("socket,id=qmp,fd=%d", c.pass(f)), "-mon", "chardev=qmp,mode=control")
}

// build returns the whole command line. The device list is part of what makes
// a saved machine loadable again, so it depends on nothing but its arguments.
func build(spec engine.MachineSpec, accel string, in inputs) *command {
	c := newCommand("pyro-" + spec.ID)
	machine := "q35,usb=off,smm=off,sata=off,smbus=off,vmport=off,hpet=off,memory-backend=mem,accel="
	if accel == accelKVM {
		c.add("-machine", machine+"kvm", "-cpu", "host")
	} else {
		// Nehalem is the oldest model that satisfies x86-64-v2. The wider vectors
		// of newer models are slower to emulate than the code they replace.
		c.add("-machine", machine+"tcg", "-cpu", "Nehalem")
	}
	c.add("-m", strconv.Itoa(spec.MemMiB)+"M", "-smp", strconv.Itoa(spec.VCPUCount))
	c.addMemory(spec, in)

	// A machine that does not boot has the same firmware, and with it memory
	// blocks, only with a kernel of the same form.
	c.add("-kernel", c.passPath(in.kernel))
	if in.incoming {
		c.add("-incoming", "defer")
		if in.devicesOnly {
			// It does not begin with what it is for.
			c.add("-global", "migration.send-configuration=off")
		}
	} else {
		c.add("-initrd", c.passPath(in.initramfs), "-append", kernelCommandLine(spec, accel, in.waits))
	}

	c.addMonitor(in.qmp)
	c.add("-chardev", fmt.Sprintf("socket,id=console,fd=%d", c.pass(in.console)), "-serial", "chardev:console")
	c.add("-chardev", fmt.Sprintf("socket,id=agent,fd=%d", c.pass(in.channel)),
		"-device", "virtio-serial-pci,max_ports=2", "-device", "virtserialport,chardev=agent,name=agent")

	if in.disk.base != nil {
		c.addChain(in.disk, spec.Ephemeral)
	} else {
		c.blockdev(map[string]any{"driver": "null-co", "node-name": "disk", "size": 1 << 20, "read-zeroes": true})
	}
	c.add("-device", "virtio-blk-pci,drive=disk,discard=on,write-cache=on")

	c.add("-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng")
	if in.vhostVsock != nil {
		c.add("-device", fmt.Sprintf("vhost-vsock-pci,guest-cid=%d,vhostfd=%d", in.cid, c.pass(in.vhostVsock)))
	}
	return c
}

func (c *command) addMemory(spec engine.MachineSpec, in inputs) {
	if in.memory == nil {
		c.add("-object", fmt.Sprintf("memory-backend-ram,id=mem,size=%dM", spec.MemMiB))
		return
	}
	share := "on"
	if in.private {
		share = "off"
	}
	c.add("-object", fmt.Sprintf("memory-backend-file,id=mem,size=%dM,mem-path=%s,share=%s", spec.MemMiB, c.passPath(in.memory), share))
}

// kernelCommandLine holds nothing secret: the guest and anybody who may list
// the host's processes can read it.
func kernelCommandLine(spec engine.MachineSpec, accel string, waits bool) string {
	words := []string{
		"console=ttyS0", "quiet",
		// A panic ends the machine at once: reboot by triple fault, which
		// -no-reboot turns into an exit.
		"panic=-1", "reboot=t",
		"pyro.root=/dev/vda",
	}
	if accel == accelTCG {
		// Speculation does not exist under emulation, and moving the kernel
		// about costs boot time without hiding it from its own guest.
		// The kernel waits a few ticks for its timer and panics without them
		// ("IO-APIC + timer doesn't work!"), which on a host under load says
		// nothing about the timer; on KVM it does not look either.
		words = append(words, "mitigations=off", "nokaslr", "no_timer_check")
	}
	if waits {
		// The host says the name when the wait is over.
		words = append(words, guestproto.WaitWord)
	} else if spec.Hostname != "" {
		words = append(words, "pyro.hostname="+spec.Hostname)
	}
	return strings.Join(words, " ")
}
