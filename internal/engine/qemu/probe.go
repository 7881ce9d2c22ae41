package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// Accelerators of QEMU that pyro uses.
const (
	accelKVM = "kvm"
	accelTCG = "tcg"
)

// tcgTimeScale is by how much software emulation is slower than the processor:
// 10 to 20 times was measured with QEMU 7.2 on fork, exec and Python.
const tcgTimeScale = 15

// Probe implements [engine.Engine].
func (e *Engine) Probe(context.Context) engine.Capabilities {
	c := engine.Capabilities{NeedsImage: true, NeedsKernel: true, Disk: engine.DiskQcow2}
	if runtime.GOARCH != "amd64" {
		c.Detail = "pyro boots QEMU guests on x86-64 hosts only, and this is " + runtime.GOARCH
		return c
	}
	for _, tool := range []string{e.binary, e.imgTool} {
		if _, err := exec.LookPath(tool); err != nil {
			c.Detail = tool + " is not installed"
			c.Remedy = "install QEMU: apt-get install qemu-system-x86 qemu-utils"
			return c
		}
	}
	accel, fact, err := e.accelerator()
	c.Facts = append(c.Facts, fact)
	if err != nil {
		c.Detail, c.Remedy = err.Error(), api.Hint(err)
		return c
	}
	c.Available = true
	c.Facts = append(c.Facts, vsockFact())
	if accel == accelKVM {
		c.Isolation, c.FullSpeed, c.TimeScale = api.IsolationVMKVM, true, 1
		c.Detail = "virtual machine on KVM"
		return c
	}
	c.Isolation, c.TimeScale = api.IsolationVMEmulated, tcgTimeScale
	c.Detail = "virtual machine on software emulation (TCG), 10 to 20 times slower than the processor"
	return c
}

// Describe implements [engine.Describer].
func (e *Engine) Describe(ctx context.Context) []api.Fact {
	if _, err := exec.LookPath(e.binary); err != nil {
		return nil
	}
	return []api.Fact{{Name: "qemu", Value: e.version(ctx), OK: true}}
}

// accelerator says which accelerator to use, with the fact behind it. An error
// means that the one that was asked for does not work.
func (e *Engine) accelerator() (string, api.Fact, error) {
	fact := probeKVM(os.ReadFile, openKVM)
	if fact.OK {
		if reason := e.rememberedFailure(); reason != "" {
			fact = api.Fact{Name: "kvm", Value: reason,
				Remedy: "set PYRO_QEMU_ACCEL=kvm to try it again, or reboot the host"}
		}
	}
	switch e.wantAccel {
	case "", "auto":
		if fact.OK {
			return accelKVM, fact, nil
		}
		return accelTCG, fact, nil
	case accelTCG:
		return accelTCG, fact, nil
	case accelKVM:
		// Taken at the user's word, whatever the probe thinks, as long as the
		// device is there at all: the boot deadline decides.
		if _, err := os.Stat(kvmDevice); err != nil {
			return "", fact, api.WithHint(api.Errorf(api.ErrUnsupported, "PYRO_QEMU_ACCEL is kvm and %s", fact.Value), "%s", fact.Remedy)
		}
		return accelKVM, fact, nil
	}
	return "", fact, api.WithHint(api.Errorf(api.ErrInvalid, "PYRO_QEMU_ACCEL is %q", e.wantAccel), "set it to auto, kvm or tcg")
}

const kvmDevice = "/dev/kvm"

// probeKVM decides whether KVM is really usable. The device opening, its API
// version and even KVM_CREATE_VM prove nothing: hosts exist that offer all
// three on a processor without virtualization, for kernels built to know that,
// and every stock kernel hangs there. The processor's flags tell.
func probeKVM(readFile func(string) ([]byte, error), open func() error) api.Fact {
	f := api.Fact{Name: "kvm"}
	err := open()
	if errors.Is(err, os.ErrNotExist) {
		f.Value = "there is no " + kvmDevice
		f.Remedy = "switch on virtualization in the firmware and load kvm_intel or kvm_amd; inside a virtual machine, allow nested virtualization"
		return f
	}
	// The processor before the permission: no group helps where it cannot.
	info, infoErr := readFile("/proc/cpuinfo")
	switch {
	case infoErr != nil:
		f.Value = "the processor's flags cannot be read: " + infoErr.Error()
		return f
	case !hasFlag(string(info), "vmx") && !hasFlag(string(info), "svm"):
		f.Value = kvmDevice + " is present but does not work: the processor shows neither vmx nor svm, and stock kernels hang on such a KVM"
		f.Remedy = "none on this host, unless its own hypervisor allows nested virtualization"
		return f
	case errors.Is(err, os.ErrPermission):
		f.Value = kvmDevice + " is there but not yours to use"
		f.Remedy = "add yourself to the group kvm: sudo usermod -aG kvm $USER, then log in again"
		return f
	case err != nil:
		f.Value = kvmDevice + " is there but does not work: " + err.Error()
		return f
	}
	f.OK, f.Value = true, "usable"
	return f
}

func hasFlag(cpuinfo, flag string) bool {
	for line := range strings.SplitSeq(cpuinfo, "\n") {
		name, flags, ok := strings.Cut(line, ":")
		if ok && strings.TrimSpace(name) == "flags" {
			for f := range strings.FieldsSeq(flags) {
				if f == flag {
					return true
				}
			}
			return false
		}
	}
	return false
}

// kvmGetAPIVersion is KVM_GET_API_VERSION, _IO(KVMIO, 0x00), and 12 the only
// version there has been since 2007: Documentation/virt/kvm/api.rst, 4.1.
const (
	kvmGetAPIVersion = 0xAE00
	kvmAPIVersion    = 12
)

func openKVM() error {
	f, err := os.OpenFile(kvmDevice, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	v, err := unix.IoctlRetInt(int(f.Fd()), kvmGetAPIVersion)
	if err != nil {
		return err
	}
	if v != kvmAPIVersion {
		return fmt.Errorf("its interface has version %d, not %d", v, kvmAPIVersion)
	}
	return nil
}

func vsockFact() api.Fact {
	f, err := openVhostVsock()
	if err != nil {
		return api.Fact{Name: "vsock", Value: "no usable " + vhostVsockDevice + "; the guest channel is virtio-serial", OK: true}
	}
	f.Close()
	return api.Fact{Name: "vsock", Value: "usable", OK: true}
}

func (e *Engine) version(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, e.binary, "--version").Output()
	if err != nil {
		return "unknown version"
	}
	first, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimPrefix(first, "QEMU emulator ")
}

// acceleratorNote is the content of the file that remembers a KVM which let a
// guest hang. It counts for one boot of the host only.
type acceleratorNote struct {
	BootID string    `json:"boot_id"`
	Reason string    `json:"reason"`
	Time   time.Time `json:"time"`
}

func (e *Engine) rememberedFailure() string {
	if e.noteFile == "" {
		return ""
	}
	var n acceleratorNote
	if statedir.ReadJSON(e.noteFile, &n) != nil || n.BootID != hostproc.BootID() {
		return ""
	}
	return n.Reason
}

// BootFailed implements [engine.BootWatcher]: a guest that hung on KVM without
// a word is started again on TCG, and this boot of the host remembers it.
func (e *Engine) BootFailed(m engine.Machine) (retry bool, note string) {
	qm, ok := m.(*machine)
	if !ok || qm.accel != accelKVM || e.wantAccel == accelKVM {
		return false, ""
	}
	reason := kvmDevice + " is present but a guest hung on it since the host booted"
	if e.noteFile != "" {
		n := acceleratorNote{BootID: hostproc.BootID(), Reason: reason, Time: time.Now().UTC()}
		if err := statedir.WriteJSON(e.noteFile, n); err != nil {
			e.log.Warn("remembering the accelerator", "error", err)
		}
	}
	e.wantAccel = accelTCG
	return true, "KVM does not run guests here; going on with software emulation"
}
