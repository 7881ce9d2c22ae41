package guestkernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
)

// useOwn installs the user's kernel beside Debian's: a copy, so that machines
// go on running on what they were started with, and its modules unpacked. A
// changed file is another recipe and makes a new copy.
func (s *Store) useOwn(ctx context.Context, progress func(api.Progress)) (*artifact.Held, error) {
	id, err := s.ownRecipe()
	if err != nil {
		return nil, api.WithHint(err, "PYRO_KERNEL names an ELF vmlinux or a bzImage, PYRO_KERNEL_MODULES the /lib/modules/RELEASE that belongs to it")
	}
	sum := sha256.Sum256([]byte(s.opts.Image))
	own := "own:" + hex.EncodeToString(sum[:8])
	if ref, _, err := s.artifacts.Lookup(own); err == nil && ref.Recipe == id {
		if held, err := s.artifacts.Acquire(ctx, own); err == nil {
			return held, nil
		}
	}
	return s.artifacts.Do(ctx, artifact.Install{
		Name:      own,
		Recipe:    id,
		NeedBytes: needBytes,
		Progress:  progress,
		Build:     s.buildOwn,
	})
}

// ownRecipe changes when a file that the copy is made from does.
func (s *Store) ownRecipe() (string, error) {
	fi, err := os.Stat(s.opts.Image)
	if err != nil {
		return "", api.Errorf(api.ErrInvalid, "%w", err)
	}
	if !fi.Mode().IsRegular() {
		return "", api.Errorf(api.ErrInvalid, "%s is not a regular file", s.opts.Image)
	}
	text := fmt.Sprintf("%s %d %d", s.opts.Image, fi.Size(), fi.ModTime().UnixNano())
	if s.opts.ModulesDir != "" {
		files, err := findModules(s.opts.ModulesDir)
		if err != nil {
			return "", api.Errorf(api.ErrInvalid, "%w", err)
		}
		for _, n := range needed {
			if fi, err := os.Stat(files[n]); err == nil {
				text += fmt.Sprintf(" %s %d %d", files[n], fi.Size(), fi.ModTime().UnixNano())
			}
		}
	}
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:8]), nil
}

func (s *Store) buildOwn(ctx context.Context, b *artifact.Build) error {
	in, err := os.Open(s.opts.Image)
	if err != nil {
		return err
	}
	defer in.Close()
	fi, err := in.Stat()
	if err != nil {
		return err
	}
	release, err := identify(in, fi.Size())
	if err != nil {
		return api.Errorf(api.ErrInvalid, "%s: %w", s.opts.Image, err)
	}
	if err := writeFile(filepath.Join(b.Out, imageFile), in, fi.Size(), maxKernelSize); err != nil {
		return err
	}
	var modules []module
	if s.opts.ModulesDir != "" {
		files, err := findModules(s.opts.ModulesDir)
		if err != nil {
			return err
		}
		if modules, err = closure(files, needed); err != nil {
			return err
		}
		if release == "" {
			release = filepath.Base(s.opts.ModulesDir)
		}
	}
	b.Properties[releaseEntry] = release
	return writeModules(b.Out, modules)
}

// identify tells whether r is a kernel, and its release if it says so. It
// leaves r at its beginning.
func identify(r io.ReaderAt, size int64) (release string, err error) {
	head := make([]byte, 4)
	if _, err := r.ReadAt(head, 0); err != nil {
		return "", api.Errorf(api.ErrInvalid, "it is too short for a kernel")
	}
	if string(head) == "\x7fELF" {
		return "", nil
	}
	b, err := openBzImage(r, size)
	if err != nil {
		return "", fmt.Errorf("neither an ELF file nor a bzImage: %w", err)
	}
	return b.release, nil
}
