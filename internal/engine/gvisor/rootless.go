package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
)

// Without root a machine runs in a user namespace of its owner's: the whole
// supervisor is started in one (see [Engine.Launcher]), and there it is root.
// What it cannot do there is to mount an image, so the environment is unpacked
// once and the machine's changes are a directory; and cgroups stay closed.

// LayerDir is the name of the writable layer in a machine's Dir where it is a
// directory, that of a machine without root, and its specification names no other
// place.
const LayerDir = "layer"

var _ engine.Launcher = (*Engine)(nil)

// Launcher implements engine.Launcher. As root, of the host or of a user
// namespace, there is none.
func (e *Engine) Launcher() ([]string, error) {
	if os.Geteuid() == 0 {
		return nil, nil
	}
	return launcher()
}

func launcher() ([]string, error) {
	unshare, err := findTool("unshare")
	if err != nil {
		return nil, err
	}
	args := []string{unshare, "--user", "--map-root-user"}
	if manyIDs() == nil {
		args = append(args, "--map-auto")
	}
	return append(args, "--"), nil
}

// manyIDs says why files can have no owner but one in the user namespace; nil
// means that they can.
func manyIDs() error {
	if _, err := findTool("newuidmap"); err != nil {
		return err
	}
	u, err := user.Current()
	if err != nil {
		return fmt.Errorf("looking up the current user: %w", err)
	}
	for _, file := range []string{"/etc/subuid", "/etc/subgid"} {
		if !hasRange(file, u) {
			return api.WithHint(api.Errorf(api.ErrUnavailable, "%s has no range for %s", file, u.Username),
				"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s", u.Username)
		}
	}
	return nil
}

// hasRange looks for a range of at least 65,536 ids, subuid(5).
func hasRange(file string, u *user.User) bool {
	b, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) != 3 || f[0] != u.Username && f[0] != u.Uid {
			continue
		}
		if n, err := strconv.ParseUint(f[2], 10, 32); err == nil && n >= 65536 {
			return true
		}
	}
	return false
}

// checkUserNamespaces asks whether an ordinary user may make one here.
func checkUserNamespaces(read func(string) string) error {
	for _, s := range []struct{ file, forbids string }{
		{"/proc/sys/kernel/unprivileged_userns_clone", "0"},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"},
		{"/proc/sys/user/max_user_namespaces", "0"},
	} {
		if read(s.file) == s.forbids {
			name := strings.ReplaceAll(strings.TrimPrefix(s.file, "/proc/sys/"), "/", ".")
			return api.WithHint(api.Errorf(api.ErrDenied, "%s is %s, which forbids user namespaces", name, s.forbids),
				"run pyro as root, or set %s otherwise with sysctl", name)
		}
	}
	return nil
}

// treeOptions are [overlayOptions] for an overlay that root of a user namespace
// mounts: its marks are user.* attributes, which the guest may write too, so
// the kernel follows no redirects here and a guest can only spoil its own view.
const treeOptions = "userxattr,xino=on,index=off,metacopy=off"

// mountTree puts the root file system together from directories. It runs in
// the namespace. lowers has the lowest first.
func (s stage) mountTree(tree, layer string, lowers []*os.File) error {
	// By way of bind mounts, because the options allow no comma and no colon.
	for i, f := range lowers {
		if err := s.mountLower(i, func(target string) error {
			return unix.Mount(f.Name(), target, "", unix.MS_BIND, "")
		}); err != nil {
			return err
		}
	}
	for _, b := range []struct{ from, to string }{{tree, s.base()}, {layer, s.layer()}} {
		if err := unix.Mount(b.from, b.to, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("binding %s: %w", b.from, err)
		}
	}
	return s.mountOverlay(len(lowers), s.layer(), treeOptions)
}

// RemoveDir removes a machine's directory or an unpacked environment, also
// where files of the guest's users are in it, which belong to ids that only a
// user namespace of ours may touch.
func RemoveDir(ctx context.Context, dir string) error {
	err := os.RemoveAll(dir)
	if !errors.Is(err, os.ErrPermission) || os.Geteuid() == 0 {
		return err
	}
	args, launchErr := launcher()
	if launchErr != nil {
		return errors.Join(err, launchErr)
	}
	args = append(args, "rm", "-rf", "--", dir)
	if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("removing %s: %w: %s", dir, err, lastLine(out))
	}
	return nil
}
