package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// defaultHostname names a machine whose host gave it no name.
const defaultHostname = "pyro"

// nameHost gives the machine its name, in the kernel and in its files.
func nameHost(name string) error {
	if name == "" {
		name = defaultHostname
	}
	if len(name) > 63 || strings.ContainsAny(name, "/ \t\n") {
		return fmt.Errorf("pyro.hostname=%q is no host name", name)
	}
	// A sandbox has its name by its host, which gives a copy another one; gVisor
	// leaves a name alone that was set inside.
	if now, err := os.Hostname(); err != nil || now != name {
		if err := unix.Sethostname([]byte(name)); err != nil {
			return fmt.Errorf("naming the machine: %w", err)
		}
	}
	if err := writeIfDifferent("/etc/hostname", name+"\n"); err != nil {
		return err
	}
	hosts, err := os.ReadFile("/etc/hosts")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading /etc/hosts: %w", err)
	}
	return writeIfDifferent("/etc/hosts", mendHosts(string(hosts), name))
}

// mendHosts adds the lines that every system's /etc/hosts has, and one for the
// machine's own name.
func mendHosts(hosts, name string) string {
	has := func(host string) bool {
		for line := range strings.Lines(hosts) {
			line, _, _ = strings.Cut(line, "#")
			for i, word := range strings.Fields(line) {
				if i > 0 && word == host {
					return true
				}
			}
		}
		return false
	}
	if hosts != "" && !strings.HasSuffix(hosts, "\n") {
		hosts += "\n"
	}
	if !has("localhost") {
		hosts += "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	}
	if !has(name) {
		hosts += "127.0.1.1\t" + name + "\n"
	}
	return hosts
}

// writeFiles makes the resolver's file where an image has none or an empty one.
// Without a network a look-up then fails at once instead of after a wait.
func writeFiles() error {
	if fi, err := os.Stat("/etc/resolv.conf"); err == nil && fi.Size() > 0 {
		return nil
	}
	// A link to a file that some service would make at boot.
	if fi, err := os.Lstat("/etc/resolv.conf"); err == nil && fi.Mode().Type() == fs.ModeSymlink {
		if err := os.Remove("/etc/resolv.conf"); err != nil {
			return fmt.Errorf("replacing /etc/resolv.conf: %w", err)
		}
	}
	return writeIfDifferent("/etc/resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
}

func writeIfDifferent(path, content string) error {
	if old, err := os.ReadFile(path); err == nil && string(old) == content {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

// inMemoryMachineID is where the machine's id is if its image has none.
const inMemoryMachineID = "/run/machine-id"

// machineID gives the machine an id that lives in memory, if its image has none:
// one on the disk would be shared by every copy. provide puts it at
// inMemoryMachineID. See machine-id(5).
func machineID(provide func() error) error {
	const file = "/etc/machine-id"
	old, err := os.ReadFile(file)
	if id := strings.TrimSpace(string(old)); err == nil && id != "" && id != "uninitialized" {
		return nil
	}
	if err := provide(); err != nil {
		return err
	}
	if err != nil {
		// An image without the file, or with a dangling link to /run.
		if fi, err := os.Lstat(file); err == nil && fi.Mode().Type() == fs.ModeSymlink {
			return nil
		}
		if err := writeIfDifferent(file, ""); err != nil {
			return err
		}
	}
	if err := unix.Mount(inMemoryMachineID, file, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting the machine id: %w", err)
	}
	return nil
}

func writeMachineID() error {
	if err := os.WriteFile(inMemoryMachineID, []byte(guestproto.NewMachineID()), 0o444); err != nil {
		return fmt.Errorf("writing the machine id: %w", err)
	}
	return nil
}

// loopbackUp starts the loopback device, netdevice(7).
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("starting the loopback device: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("starting the loopback device: %w", err)
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("starting the loopback device: %w", err)
	}
	return nil
}
