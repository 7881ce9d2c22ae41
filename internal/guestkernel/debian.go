package guestkernel

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/mmdebstrap"
)

const (
	// name is what the store calls Debian's kernel.
	name  = "debian:12-cloud"
	suite = "bookworm"
	// recipe is counted up whenever what is made of the package changes.
	recipe = "1"
	// needBytes is the room for package, unpacked modules and result.
	needBytes = 512 << 20
	// maxPackage bounds the package file, which has about 30 MB.
	maxPackage = 256 << 20
)

// The meta package depends on the kernel proper, whose name has its version in
// it. apt checks the download against the signed lists.
const fetchHook = `--customize-hook=set -e
cd "$1"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
if [ -z "$kernel" ]; then echo "E: linux-image-cloud-amd64 names no kernel" >&2; exit 1; fi
apt-get download "$kernel"`

func (s *Store) install(ctx context.Context, progress func(api.Progress)) (*artifact.Held, error) {
	if runtime.GOARCH != "amd64" {
		return nil, api.WithHint(
			api.Errorf(api.ErrUnsupported, "there is no guest kernel for %s yet", runtime.GOARCH),
			"set PYRO_KERNEL to a kernel image of your own")
	}
	if progress == nil {
		progress = func(api.Progress) {}
	}
	return s.artifacts.Do(ctx, artifact.Install{
		Name:      name,
		Recipe:    recipe,
		NeedBytes: needBytes,
		Progress:  progress,
		Clean:     s.tool.Clean,
		Build: func(ctx context.Context, b *artifact.Build) error {
			return s.buildDebian(ctx, b, progress)
		},
	})
}

func (s *Store) buildDebian(ctx context.Context, b *artifact.Build, progress func(api.Progress)) error {
	deb := filepath.Join(b.Dir, "kernel.deb")
	progress(api.Progress{Phase: "lists", Message: "guest kernel: reading Debian's package lists"})
	err := s.tool.Run(ctx, b, mmdebstrap.Job{
		Suite:     suite,
		Variant:   "custom",
		Options:   []string{fetchHook},
		NeedBytes: needBytes,
		Consume: func(ctx context.Context, r io.Reader) error {
			progress(api.Progress{Phase: "downloading", Message: "guest kernel: downloading"})
			return findPackage(r, deb)
		},
	})
	if err != nil {
		return err
	}
	progress(api.Progress{Phase: "unpacking", Message: "guest kernel: unpacking"})
	modulesDir := filepath.Join(b.Dir, "modules")
	if err := os.Mkdir(modulesDir, 0o700); err != nil {
		return err
	}
	compressed := filepath.Join(b.Dir, "vmlinuz")
	release, err := unpack(ctx, b, deb, compressed, modulesDir)
	if err != nil {
		return fmt.Errorf("unpacking Debian's kernel package: %w", err)
	}
	if err := extractKernel(compressed, filepath.Join(b.Out, imageFile)); err != nil {
		return fmt.Errorf("taking the kernel out of Debian's package: %w", err)
	}
	files, err := findModules(modulesDir)
	if err != nil {
		return err
	}
	modules, err := closure(files, needed)
	if err != nil {
		return err
	}
	b.Properties[releaseEntry] = release
	return writeModules(b.Out, modules)
}

// findPackage writes the one package file at the top of the tree to dest.
func findPackage(r io.Reader, dest string) error {
	tr := tar.NewReader(r)
	found := false
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("reading mmdebstrap's archive: %w", err)
		}
		base := path.Clean("/" + h.Name)
		if h.Typeflag != tar.TypeReg || path.Dir(base) != "/" || path.Ext(base) != ".deb" {
			continue
		}
		if found {
			return api.Errorf(api.ErrInternal, "apt fetched more than one kernel package")
		}
		found = true
		if err := writeFile(dest, tr, h.Size, maxPackage); err != nil {
			return err
		}
	}
	if !found {
		return api.Errorf(api.ErrUnavailable, "apt fetched no kernel package")
	}
	return nil
}

// unpack takes the kernel and all modules out of a package; modules go into
// one flat directory. It returns the kernel's release.
func unpack(ctx context.Context, b *artifact.Build, deb, kernel, modulesDir string) (release string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	cmd.ExtraFiles = []*os.File{b.Leash}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", api.WithHint(api.Errorf(api.ErrUnavailable, "starting dpkg-deb: %w", err), "run apt-get install dpkg as root")
	}
	release, err = unpackTree(bufio.NewReaderSize(stdout, 1<<20), kernel, modulesDir)
	if err != nil {
		cancel()
		_ = cmd.Wait() // it was killed; why is known
		return "", err
	}
	_, err = io.Copy(io.Discard, stdout)
	if werr := cmd.Wait(); werr != nil {
		return "", api.Errorf(api.ErrDamaged, "dpkg-deb failed (%w): %.300s", werr, strings.TrimSpace(stderr.String()))
	}
	return release, err
}

func unpackTree(r io.Reader, kernel, modulesDir string) (release string, err error) {
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		clean := path.Clean("/" + h.Name)
		if rest, ok := strings.CutPrefix(clean, "/boot/vmlinuz-"); ok {
			release = rest
			if err := writeFile(kernel, tr, h.Size, maxPackage); err != nil {
				return "", err
			}
			continue
		}
		// Only the last element becomes a name here, and only a module's.
		if base := path.Base(clean); moduleName(base) != "" {
			if err := writeFile(filepath.Join(modulesDir, base), tr, h.Size, maxModule); err != nil {
				return "", err
			}
		}
	}
	if release == "" {
		return "", api.Errorf(api.ErrDamaged, "there is no kernel in it")
	}
	return release, nil
}

// extractKernel writes the uncompressed form of the bzImage at path to dest.
func extractKernel(path, dest string) error {
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer in.Close()
	fi, err := in.Stat()
	if err != nil {
		return err
	}
	b, err := openBzImage(in, fi.Size())
	if err != nil {
		return err
	}
	out, err := os.OpenFile(dest, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	bw := bufio.NewWriterSize(out, 1<<20)
	if err := b.extract(bw); err != nil {
		return err
	}
	if err := bw.Flush(); err != nil {
		return err
	}
	return out.Close()
}

// writeFile makes a file of exactly size bytes of r.
func writeFile(dest string, r io.Reader, size, limit int64) error {
	if size > limit {
		return api.Errorf(api.ErrExhausted, "%s would have %d bytes, the limit is %d", filepath.Base(dest), size, limit)
	}
	f, err := os.OpenFile(dest, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.CopyN(f, r, size); err != nil {
		return fmt.Errorf("writing %s: %w", filepath.Base(dest), err)
	}
	return f.Close()
}
