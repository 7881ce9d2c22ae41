package gvisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// stageCandidates are directories of which one is covered, inside the private
// namespace only, by a small tmpfs that holds everything of the machine that
// the sandbox needs by path. A short path, because runsc puts Unix sockets
// below it (108 bytes at most, unix(7)); an existing one, because nothing is
// to stay behind on the host.
var stageCandidates = []string{"/mnt", "/media", "/srv", "/opt", "/home", "/boot"}

// chooseStage returns the first candidate that exists and that none of the
// paths lies in: those must stay visible in the namespace.
func chooseStage(candidates, paths []string) (string, error) {
	for _, c := range candidates {
		st, err := os.Lstat(c)
		if err != nil || !st.IsDir() {
			continue
		}
		used := false
		for _, p := range paths {
			if real, err := filepath.EvalSymlinks(p); err == nil {
				p = real
			}
			used = used || p == c || strings.HasPrefix(p, c+"/")
		}
		if !used {
			return c, nil
		}
	}
	return "", api.WithHint(api.Errorf(api.ErrUnsupported, "none of %s is free to work in", strings.Join(candidates, ", ")),
		"make an empty directory /mnt")
}

// A stage is the tmpfs of one machine and the names in it.
type stage string

func (s stage) path(name string) string { return filepath.Join(string(s), name) }

func (s stage) base() string   { return s.path("base") }  // environment, read-only
func (s stage) layer() string  { return s.path("layer") } // the machine's own image
func (s stage) root() string   { return s.path("root") }  // overlay of the two
func (s stage) bundle() string { return s.path("bundle") }
func (s stage) state() string  { return s.path("state") } // runsc --root
func (s stage) socket() string { return s.path("socket") }
func (s stage) agent() string  { return s.path("agent") }
func (s stage) pid() string    { return s.path("pid") }

func (s stage) agentSocket() string { return filepath.Join(s.socket(), "agent.sock") }

// stageSize bounds the tmpfs: runsc's state, configuration and sockets.
const stageSize = "16m"

// mount mounts the tmpfs and makes the directories. It runs in the namespace.
func (s stage) mount() error {
	err := unix.Mount("pyro", string(s), "tmpfs", unix.MS_NODEV|unix.MS_NOSUID, "mode=0700,size="+stageSize)
	if err != nil {
		return fmt.Errorf("mounting a private tmpfs on %s: %w", string(s), err)
	}
	for _, dir := range []string{s.base(), s.layer(), s.root(), s.bundle(), s.state(), s.socket()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	return nil
}

// overlayOptions: redirect_dir lets a guest rename directories of its
// environment as it could on a disk of its own (without it rename(2) answers
// EXDEV); its xattrs are in the trusted namespace, which gVisor gives no guest.
// xino keeps inode numbers unique across the two layers. Hard links within the
// environment break when one name is written to: index=on would keep them, but
// ties the upper layer to one mount of the lower one.
const overlayOptions = "redirect_dir=on,xino=on,index=off,metacopy=off"

// mountRoot puts the machine's root file system together. It runs in the
// namespace. layer is locked and stays the caller's to close.
func (s stage) mountRoot(rootImage, layer *os.File, ephemeral bool) error {
	if err := mountImage(rootImage, s.base(), true, ""); err != nil {
		return fmt.Errorf("mounting the environment: %w", err)
	}
	// The fresh image's inode tables are zeros already: no kernel thread needs
	// to write them, which would make the sparse file fat.
	options := "noinit_itable"
	if ephemeral {
		options += ",nobarrier"
	}
	if err := mountImage(layer, s.layer(), false, options); err != nil {
		return fmt.Errorf("mounting the writable layer: %w", err)
	}
	if err := growMounted(layer, s.layer()); err != nil {
		return err
	}
	upper, work := filepath.Join(s.layer(), UpperDir), filepath.Join(s.layer(), workDir)
	for _, dir := range []string{upper, work} {
		// 0755 is the mode of the guest's own "/".
		if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
			return err
		}
	}
	options = fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,%s", s.base(), upper, work, overlayOptions)
	if ephemeral {
		options += ",volatile"
	}
	if err := unix.Mount("overlay", s.root(), "overlay", unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOATIME, options); err != nil {
		return fmt.Errorf("mounting the overlay: %w", err)
	}
	return nil
}

// unmountRoot takes the mounts apart. When it returns without an error, all
// that the guest wrote is in the layer's image file. It runs in the namespace.
func (s stage) unmountRoot(ephemeral bool) error {
	flags := 0
	if ephemeral {
		flags = unix.MNT_DETACH
	}
	var first error
	for _, target := range []string{s.root(), s.layer(), s.base()} {
		err := unix.Unmount(target, flags)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // Start failed half-way
			err = nil
		}
		if err != nil && first == nil {
			first = fmt.Errorf("unmounting %s: %w", filepath.Base(target), err)
		}
	}
	return first
}
