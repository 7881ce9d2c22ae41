package mmdebstrap

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
)

// tempPrefix begins the name of every directory that makeTemp makes.
const tempPrefix = "pyro-build-"

// recordOf is the file that says where a build's temporary directory is.
func recordOf(b *artifact.Build) string { return filepath.Join(b.Dir, "tempdir") }

// makeTemp makes the directory that the packages are unpacked below. It cannot
// be in the cache: apt drops its privileges to download, and in a user
// namespace root is another user than this one, and neither can pass through
// directories of mode 0700.
func (t *Tool) makeTemp(b *artifact.Build) (string, error) {
	parent := t.TempDir
	if parent == "" {
		parent = os.Getenv("TMPDIR")
	}
	if parent == "" {
		parent = "/var/tmp" // on a disk, unlike /tmp on many hosts
	}
	dir := filepath.Join(parent, tempPrefix+rand.Text())
	// Written first: a directory that nobody remembers would stay for good.
	if err := os.WriteFile(recordOf(b), []byte(dir), 0o600); err != nil {
		return "", err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("making a directory to unpack packages in: %w", err)
	}
	return dir, os.Chmod(dir, 0o755) // whatever the umask
}

// removeTemp removes a directory that makeTemp has made.
func (t *Tool) removeTemp(ctx context.Context, dir string) error {
	if !filepath.IsAbs(dir) || !strings.HasPrefix(filepath.Base(dir), tempPrefix) {
		return api.Errorf(api.ErrInternal, "%q is no build directory", dir)
	}
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	// None are expected: the job's mount namespace has ended with the job. But
	// to remove files through a forgotten bind mount would be a disaster.
	for _, m := range mounts {
		if err := unix.Unmount(m, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmounting %s: %w", m, err)
		}
	}
	return t.removeTree(ctx, dir)
}

// removeTree removes a directory that may hold files of mapped users.
func (t *Tool) removeTree(ctx context.Context, dir string) error {
	// The last of a namespace's killed processes may be still at work for a
	// moment, making files where others have just been removed.
	const attempts = 20
	for try := 1; ; try++ {
		err := t.tryRemoveTree(ctx, dir)
		if err == nil || try == attempts {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (t *Tool) tryRemoveTree(ctx context.Context, dir string) error {
	err := os.RemoveAll(dir)
	if err == nil || os.Geteuid() == 0 || !errors.Is(err, fs.ErrPermission) {
		return err
	}
	path, ferr := t.find()
	if ferr != nil {
		return errors.Join(err, ferr)
	}
	// As the root of the user namespace, through the working directory as in
	// Run. What belongs to this user itself is left to RemoveAll.
	cmd := exec.CommandContext(ctx, path, "--unshare-helper", "find", ".", "-xdev", "-mindepth", "1", "-delete")
	cmd.Dir = dir
	out, herr := cmd.CombinedOutput()
	if err = os.RemoveAll(dir); err != nil && herr != nil {
		err = fmt.Errorf("%w (%s)", err, lastLine(string(out)))
	}
	return err
}

// mountsBelow returns the mount points below dir, the deepest first.
func mountsBelow(dir string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []string
	sc := bufio.NewScanner(f)
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		if len(fields) < 5 {
			continue
		}
		point := unescape(fields[4])
		if strings.HasPrefix(point, dir+"/") {
			out = append(out, point)
		}
	}
	slices.Reverse(out) // mounted later, unmounted first
	return out, sc.Err()
}

// unescape undoes what the kernel does to blanks in mountinfo (proc(5)).
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace
