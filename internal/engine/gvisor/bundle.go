package gvisor

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// Where the guest sees what comes from outside its disk. Both are below /run,
// which is a tmpfs, so nothing of ours gets onto the disk.
const (
	guestAgentPath = "/run/pyro/agent"
	guestSocketDir = "/run/pyro/host"
)

// hostIDs are the ids of a machine that its guest agent mounts over their usual
// places. They come from here and not from the guest's memory, so that a copy of
// that has its own before anything in it runs.
type hostIDs struct {
	Machine string `json:"machine_id"`
	Boot    string `json:"boot_id"`
}

func newIDs() hostIDs {
	return hostIDs{Machine: guestproto.NewMachineID(), Boot: guestproto.NewBootID()}
}

// writeIDs puts the ids beside the socket. It runs in the namespace.
func (s stage) writeIDs(ids hostIDs) error {
	for name, id := range map[string]string{guestproto.MachineIDFile: ids.Machine, guestproto.BootIDFile: ids.Boot} {
		if err := os.WriteFile(filepath.Join(s.socket(), name), []byte(id), 0o444); err != nil {
			return fmt.Errorf("giving the machine ids: %w", err)
		}
	}
	return nil
}

// tokenVariable is the guest agent's environment variable for the word that it
// must say first on its connection.
const tokenVariable = "PYRO_AGENT_TOKEN"

// writeBundle writes config.json, by the OCI runtime specification, into the
// stage. It runs in the namespace.
func (s stage) writeBundle(hostname, token string, files uint64) error {
	b, err := json.Marshal(s.spec(hostname, token, files))
	if err != nil {
		return fmt.Errorf("writing the sandbox's configuration: %w", err)
	}
	if err := os.WriteFile(filepath.Join(s.bundle(), "config.json"), b, 0o600); err != nil {
		return fmt.Errorf("writing the sandbox's configuration: %w", err)
	}
	return nil
}

func (s stage) spec(hostname, token string, files uint64) *specs.Spec {
	memory := func(dest, mode string) specs.Mount {
		return specs.Mount{Destination: dest, Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "mode=" + mode}}
	}
	return &specs.Spec{
		Version:  specs.Version,
		Hostname: hostname,
		Root:     &specs.Root{Path: s.root()},
		Process: &specs.Process{
			Args: []string{guestAgentPath, "--dial", "unix:" + filepath.Join(guestSocketDir, "agent.sock")},
			Env: []string{
				"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
				tokenVariable + "=" + token,
			},
			Cwd: "/",
			Capabilities: &specs.LinuxCapabilities{
				Bounding: allCapabilities, Effective: allCapabilities, Permitted: allCapabilities,
			},
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: min(1024, files), Hard: files}},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts"},
			memory("/dev/shm", "1777"),
			memory("/tmp", "1777"),
			memory("/run", "755"),
			// Read-only, or the guest could fill the host's tmpfs. Connecting to
			// a socket does not count as writing.
			{Destination: guestSocketDir, Type: "bind", Source: s.socket(), Options: []string{"bind", "ro", "nosuid", "nodev"}},
			{Destination: guestAgentPath, Type: "bind", Source: s.agent(), Options: []string{"bind", "ro", "nosuid", "nodev"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: sizeGroup,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
				{Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
			},
		},
	}
}

// guestFiles returns how many files one guest process may hold open. The
// sandbox needs about two descriptors of the host for each and some thousands
// for itself; with all of them gone the whole guest fails with EMFILE.
func guestFiles() (uint64, error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, fmt.Errorf("reading the limit on open files: %w", err)
	}
	return max(min(r.Max, 1<<20)/5*2, 256), nil
}

// allCapabilities is what root has inside, as in a machine of its own. They
// are gVisor's notion: no host capability stands behind any of them.
var allCapabilities = []string{
	"CAP_AUDIT_CONTROL", "CAP_AUDIT_READ", "CAP_AUDIT_WRITE", "CAP_BLOCK_SUSPEND", "CAP_BPF",
	"CAP_CHECKPOINT_RESTORE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER",
	"CAP_FSETID", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_KILL", "CAP_LEASE", "CAP_LINUX_IMMUTABLE",
	"CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE",
	"CAP_NET_BROADCAST", "CAP_NET_RAW", "CAP_PERFMON", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP",
	"CAP_SETUID", "CAP_SYSLOG", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_CHROOT", "CAP_SYS_MODULE",
	"CAP_SYS_NICE", "CAP_SYS_PACCT", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_WAKE_ALARM",
}
