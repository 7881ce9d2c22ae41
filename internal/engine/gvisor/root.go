package gvisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
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

func (s stage) base() string   { return s.path("base") }   // environment, read-only
func (s stage) lowers() string { return s.path("l") }      // the layers between, by number
func (s stage) layer() string  { return s.path("layer") }  // the machine's own
func (s stage) spare() string  { return s.path("spare") }  // a snapshot on its way
func (s stage) points() string { return s.path("points") } // for what runsc mounts into an ephemeral root
func (s stage) root() string   { return s.path("root") }   // overlay of them all
func (s stage) bundle() string { return s.path("bundle") }
func (s stage) state() string  { return s.path("state") } // runsc --root
func (s stage) socket() string { return s.path("socket") }
func (s stage) size() string   { return s.path("size") } // what runsc reads of the guest's size
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
	for _, dir := range []string{s.base(), s.lowers(), s.layer(), s.spare(), s.points(), s.root(), s.bundle(), s.state(), s.socket(), s.size()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	return nil
}

// newStage mounts a stage for work on images without a machine, beside the paths
// that must stay visible in its namespace. The caller closes that, with which every
// mount in it ends.
func newStage(visible ...string) (stage, *namespace, error) {
	top, err := chooseStage(stageCandidates, visible)
	if err != nil {
		return "", nil, err
	}
	ns, err := newNamespace()
	if err != nil {
		return "", nil, err
	}
	s := stage(top)
	if err := ns.do(s.mount); err != nil {
		ns.close()
		return "", nil, err
	}
	return s, ns, nil
}

// overlayOptions: redirect_dir lets a guest rename directories of its
// environment as it could on a disk of its own (without it rename(2) answers
// EXDEV); its xattrs are in the trusted namespace, which gVisor gives no guest.
// xino keeps inode numbers unique across the layers. Hard links within a lower
// layer break when one name is written to: index=on would keep them, but ties
// the upper layer to one mount of the lower ones, which are mounted anew at every
// start, as copies elsewhere maybe. What the upper layer remembers of them
// without it (trusted.overlay.origin) is a hint for inode numbers only.
const overlayOptions = "redirect_dir=on,xino=on,index=off,metacopy=off"

// mountRoot puts the machine's root file system together. It runs in the
// namespace. layer and lowers, the lowest first, are locked and stay the
// caller's to close.
func (s stage) mountRoot(rootImage *os.File, layer *layer, lowers []*os.File) error {
	if err := mountImage(rootImage, s.base(), true, ""); err != nil {
		return fmt.Errorf("mounting the environment: %w", err)
	}
	for i, f := range lowers {
		if err := s.mountLower(i, func(target string) error {
			// Several machines may have the same image mounted, each by a loop
			// device of its own. None of them writes a byte of it: the devices
			// are read-only, and there is no journal to replay.
			return mountImage(f, target, true, "noload")
		}); err != nil {
			return err
		}
	}
	// The fresh image's inode tables are zeros already: no kernel thread needs
	// to write them, which would make the sparse file fat.
	if err := mountImage(layer.File, s.layer(), false, "noinit_itable"); err != nil {
		return fmt.Errorf("mounting the writable layer: %w", err)
	}
	if err := growMounted(layer, s.layer()); err != nil {
		return err
	}
	return s.mountOverlay(len(lowers), s.layer(), overlayOptions)
}

// mountEphemeral is mountRoot for a machine whose changes are its sandbox's own:
// runsc keeps them in a file in the layer's directory. Of the host's overlay only
// the places are used that runsc makes for what it mounts into the guest.
func (s stage) mountEphemeral(rootImage *os.File, layer *layer) error {
	if err := mountImage(rootImage, s.base(), true, ""); err != nil {
		return fmt.Errorf("mounting the environment: %w", err)
	}
	if err := unix.Mount(layer.Name(), s.layer(), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("binding %s: %w", layer.Name(), err)
	}
	return s.mountOverlay(0, s.points(), overlayOptions)
}

// maxLayers bounds the layers between environment and disk: overlayfs takes 500
// (OVL_MAX_STACK), and the names of 256 fit the one page that mount(2) has for
// options.
const maxLayers = 256

func (s stage) lower(i int) string { return filepath.Join(s.lowers(), strconv.Itoa(i)) }

// mountLower gives layer i its place and has mount put it there.
func (s stage) mountLower(i int, mount func(target string) error) error {
	target := s.lower(i)
	if err := os.Mkdir(target, 0o700); err != nil {
		return err
	}
	if err := damaged(mount(target)); err != nil {
		return fmt.Errorf("mounting layer %d of the disk: %w", i+1, err)
	}
	if st, err := os.Lstat(filepath.Join(target, UpperDir)); err != nil || !st.IsDir() {
		return api.Errorf(api.ErrDamaged, "layer %d of the disk has no directory %s", i+1, UpperDir)
	}
	return nil
}

// damaged gives the failure to mount an image its class.
func damaged(err error) error {
	for _, damage := range []error{unix.EINVAL, unix.EUCLEAN, unix.EBADMSG} { // what ext4 says of what is none
		if errors.Is(err, damage) {
			return api.Errorf(api.ErrDamaged, "%w", err)
		}
	}
	return err
}

// mountOverlay joins what is mounted at base and lower, and lets writes go to
// directories in top, which it makes.
func (s stage) mountOverlay(lowers int, top, options string) (err error) {
	upper, work := filepath.Join(top, UpperDir), filepath.Join(top, workDir)
	for _, dir := range []string{upper, work} {
		// 0755 is the mode of the guest's own "/".
		if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
			return err
		}
	}
	// Names relative to where the layers are, which are short. The thread's
	// working directory is its own.
	if err := unix.Chdir(s.lowers()); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Chdir("/")) }()
	var dirs []string
	for i := lowers - 1; i >= 0; i-- {
		dirs = append(dirs, strconv.Itoa(i)+"/"+UpperDir)
	}
	dirs = append(dirs, s.base())
	options = fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,%s", strings.Join(dirs, ":"),
		upper, work, options)
	if err := unix.Mount("overlay", s.root(), "overlay", unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOATIME, options); err != nil {
		return fmt.Errorf("mounting the overlay: %w", err)
	}
	return nil
}

// unmountRoot takes the mounts apart. When it returns without an error, all
// that the guest wrote is in the layer's image file. It runs in the namespace.
func (s stage) unmountRoot() error {
	targets := []string{s.root(), s.layer()}
	lowers, _ := os.ReadDir(s.lowers())
	for _, l := range lowers {
		targets = append(targets, filepath.Join(s.lowers(), l.Name()))
	}
	var first error
	for _, target := range append(targets, s.base()) {
		err := unix.Unmount(target, 0)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // Start failed half-way
			err = nil
		}
		if err != nil && first == nil {
			first = fmt.Errorf("unmounting %s: %w", filepath.Base(target), err)
		}
	}
	return first
}
