package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
)

// Probe implements engine.Engine.
func (e *Engine) Probe(ctx context.Context) engine.Capabilities {
	c := engine.Capabilities{Isolation: api.IsolationSandboxGVisor, FullSpeed: true, TimeScale: 1, Available: true, NeedsImage: true,
		// Its TUN devices cannot be saved, nor the stack that has one (September
		// 2026: "channel.queue does not implement SaverLoader").
		SaveDropsNetwork: true}
	// need records a finding without which nothing works; the first that fails
	// is the engine's answer.
	need := func(name, value string, err error) {
		f := api.Fact{Name: name, Value: value, OK: err == nil}
		if err != nil {
			f.Value, f.Remedy = err.Error(), api.Hint(err)
			if c.Available {
				c.Available, c.Detail, c.Remedy = false, f.Value, f.Remedy
			}
		}
		c.Facts = append(c.Facts, f)
	}
	rt, err := e.runtime(ctx)
	need("runsc", fmt.Sprintf("%s (gVisor %s)", rt.path, rt.version), err)
	need("processor", goruntime.GOARCH, checkArch(goruntime.GOARCH))
	need("seccomp", "available", checkSeccomp())
	need("ptrace", "allowed", checkPtrace(readLine("/proc/sys/kernel/yama/ptrace_scope")))
	root := os.Geteuid() == 0 && !inUserNamespace()
	filesystems := []string{"overlay"}
	c.Disk = engine.DiskDirectory
	if root {
		c.Disk, c.SeedLayer = engine.DiskExt4, true
		need("privileges", "root", tryNamespaces())
		need("loop devices", "available", checkLoop())
		filesystems = append(filesystems, "ext4")
	} else {
		need("user namespaces", "allowed", checkUserNamespaces(readLine))
		_, err := e.Launcher()
		need("unshare", "installed", err)
		c.Facts = append(c.Facts, rootlessFacts()...)
	}
	for _, fs := range filesystems {
		need(fs, "in the host's kernel", checkFilesystem(fs))
	}

	c.Facts = append(c.Facts, limitsFact(), filesFact())
	if c.Available {
		c.Detail = "gVisor sandbox (runsc of " + rt.date + ", systrap) at near-native speed"
		if !root {
			c.Detail += ", without root: no bound on disk and memory"
		}
	}
	return c
}

func checkArch(goarch string) error {
	if goarch == "amd64" || goarch == "arm64" {
		return nil
	}
	return api.Errorf(api.ErrUnsupported, "gVisor does not run on %s", goarch)
}

// checkSeccomp asks whether the kernel has seccomp filters, seccomp(2): without
// a filter to look at, EFAULT says that the mode itself is known.
func checkSeccomp() error {
	err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, 0, 0, 0)
	if errors.Is(err, unix.EFAULT) || errors.Is(err, unix.EACCES) {
		return nil
	}
	return api.Errorf(api.ErrUnsupported, "the kernel has no seccomp filters (%v)", err)
}

// checkPtrace: systrap sets its stub processes up with ptrace(2), which Yama's
// level 3 forbids to everybody.
func checkPtrace(scope string) error {
	if scope != "3" {
		return nil
	}
	return api.WithHint(api.Errorf(api.ErrDenied, "kernel.yama.ptrace_scope is 3, which forbids what the sandbox is made with"),
		"boot with kernel.yama.ptrace_scope below 3")
}

// tryNamespaces makes the namespaces that a sandbox is made of, for a process
// that does nothing: root may still be refused them, in a container without
// CAP_SYS_ADMIN or in a chroot (user_namespaces(7)), and only trying tells. The
// process is to become a program that there is not, so getting that far is all it
// has to do; it takes half a millisecond.
func tryNamespaces() error {
	const none = "/proc/self/exe/none"
	_, err := os.StartProcess(none, []string{none}, &os.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}},
	}})
	if !errors.Is(err, unix.ENOTDIR) {
		return api.WithHint(api.Errorf(api.ErrDenied, "namespaces for the sandbox are refused (%v)", errors.Unwrap(err)),
			"leave the chroot, or give the container CAP_SYS_ADMIN")
	}
	return nil
}

// rootlessFacts say what a machine without root gives up.
func rootlessFacts() []api.Fact {
	disk := api.Fact{Name: "disk", Value: "a directory, not bounded in size", Remedy: "run pyro as root to bound each workspace's disk"}
	owners := api.Fact{Name: "owners of files", Value: "all of a guest's users", OK: true}
	// Where this process is in a user namespace already, its ids are given.
	if os.Geteuid() != 0 {
		if err := manyIDs(); err != nil {
			owners = api.Fact{Name: owners.Name, Value: "root alone, chown fails in a guest: " + err.Error(), Remedy: api.Hint(err)}
		}
	}
	return []api.Fact{disk, owners}
}

func checkLoop() error {
	if err := unix.Access("/dev/loop-control", unix.R_OK|unix.W_OK); err != nil {
		return api.WithHint(api.Errorf(api.ErrUnsupported, "/dev/loop-control: %w", err),
			"load the loop module (modprobe loop), or give the container its loop devices")
	}
	return nil
}

// checkFilesystem looks for a file system among the registered ones and among
// the modules that a mount would load.
func checkFilesystem(name string) error {
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return fmt.Errorf("reading the kernel's file systems: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 0 && f[len(f)-1] == name {
			return nil
		}
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err == nil {
		dep, _ := os.ReadFile(filepath.Join("/lib/modules", unix.ByteSliceToString(uts.Release[:]), "modules.dep"))
		if strings.Contains(string(dep), "/"+name+".ko") {
			return nil
		}
	}
	return api.WithHint(api.Errorf(api.ErrUnsupported, "the host's kernel has no %s file system", name), "modprobe %s", name)
}

func limitsFact() api.Fact {
	kind, why := cgroups()
	switch kind {
	case cgroupV1:
		return api.Fact{Name: "limits", Value: "memory, processes and processor, by cgroup v1", OK: true}
	case cgroupV2:
		return api.Fact{Name: "limits", Value: "memory, processes and processor, by cgroup v2", OK: true}
	}
	return api.Fact{Name: "limits", Value: "none, a guest may take all of the host's memory: " + why,
		Remedy: "run as root on a host whose cgroups can be written"}
}

// comfortableFiles is how many open files a sandbox wants of its host: about
// two for each that the guest holds open, and a thousand cached ones per mount.
const comfortableFiles = 65536

func filesFact() api.Fact {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return api.Fact{Name: "open files", Value: err.Error()}
	}
	f := api.Fact{Name: "open files", Value: "up to " + strconv.FormatUint(r.Max, 10), OK: r.Max >= comfortableFiles}
	if r.Max > 1<<40 {
		f.Value = "unlimited"
	}
	if !f.OK {
		f.Remedy = fmt.Sprintf("raise the hard limit (ulimit -Hn %d, or LimitNOFILE); with few, a guest with many open files fails", comfortableFiles)
	}
	return f
}

func readLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
