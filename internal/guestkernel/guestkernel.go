// Package guestkernel provides the Linux kernel that virtual machines boot:
// Debian's cloud kernel, fetched and checked by apt, kept uncompressed (it
// boots about a second sooner under emulation) with the few modules a guest
// needs beside it; or a kernel of the user's own.
package guestkernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/mmdebstrap"
)

// Options configures a Store.
type Options struct {
	// CacheDir is pyro's cache directory; the store uses kernels below it.
	CacheDir string
	Logger   *slog.Logger
	// Image is a kernel of the user's own, an ELF vmlinux or a bzImage, to use
	// in place of Debian's (PYRO_KERNEL); "" for Debian's.
	Image string
	// ModulesDir is the /lib/modules/RELEASE directory that belongs to Image,
	// "" if all the guest needs is built in (PYRO_KERNEL_MODULES).
	ModulesDir string
	// DebianMirror, TempDir and Mmdebstrap are as for package environment.
	DebianMirror string
	TempDir      string
	Mmdebstrap   string
}

// A Store hands out the guest kernel. Its methods may be called concurrently,
// by several processes too.
type Store struct {
	opts      Options
	artifacts *artifact.Store
	tool      mmdebstrap.Tool
}

// Open makes the store's directory if it is not there.
func Open(opts Options) (*Store, error) {
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	artifacts, err := artifact.Open(artifact.Options{Dir: filepath.Join(opts.CacheDir, "kernels"), Noun: "guest kernel", Logger: opts.Logger})
	if err != nil {
		return nil, err
	}
	return &Store{
		opts:      opts,
		artifacts: artifacts,
		tool: mmdebstrap.Tool{
			Path:    opts.Mmdebstrap,
			Mirror:  opts.DebianMirror,
			TempDir: opts.TempDir,
			Logger:  opts.Logger,
		},
	}, nil
}

// A Kernel is a guest kernel that was checked and will not be removed until
// Close.
type Kernel struct {
	engine.Kernel
	Digest string
	// Lock holds the kernel. A child process that inherits it holds the kernel
	// too, also after Close here.
	Lock *os.File
}

// Close gives up this process's hold. Safe to call twice and on nil.
func (k *Kernel) Close() error {
	if k == nil || k.Lock == nil {
		return nil
	}
	err := k.Lock.Close()
	k.Lock = nil
	return err
}

const (
	imageFile    = "vmlinux"
	orderFile    = "modules.order"
	releaseEntry = "release"
)

// Installed reports whether a kernel is there without fetching or checking it.
func (s *Store) Installed() bool {
	if s.opts.Image != "" {
		_, err := os.Stat(s.opts.Image)
		return err == nil
	}
	_, _, err := s.artifacts.Lookup(name)
	return err == nil
}

// Use returns the guest kernel, fetching Debian's if it is not installed. An
// installed one is checked: at little cost unless somebody touched it. A
// damaged one is fetched again. progress may be nil.
func (s *Store) Use(ctx context.Context, progress func(api.Progress)) (*Kernel, error) {
	held, err := s.hold(ctx, progress)
	if err != nil {
		return nil, fmt.Errorf("getting the guest kernel: %w", err)
	}
	return newKernel(held)
}

func (s *Store) hold(ctx context.Context, progress func(api.Progress)) (*artifact.Held, error) {
	if s.opts.Image != "" {
		return s.useOwn(ctx, progress)
	}
	held, err := s.artifacts.Acquire(ctx, name)
	if errors.Is(err, api.ErrNotFound) || errors.Is(err, api.ErrDamaged) {
		return s.install(ctx, progress)
	}
	return held, err
}

// Prune removes kernels that are no longer used by any new machine and that
// nobody holds, and what broken-off installs have left. inUse are the digests
// that saved machines need.
func (s *Store) Prune(ctx context.Context, inUse []string) (api.PruneResult, error) {
	pruned, err := s.artifacts.Prune(ctx, inUse, s.tool.Clean)
	out := api.PruneResult{Removed: []string{}, FreedBytes: pruned.FreedBytes}
	for _, what := range pruned.Removed {
		out.Removed = append(out.Removed, "guest kernel "+what)
	}
	return out, err
}

func newKernel(held *artifact.Held) (*Kernel, error) {
	k := &Kernel{
		Kernel: engine.Kernel{Image: held.Path(imageFile), Release: held.Properties[releaseEntry]},
		Digest: held.Digest,
		Lock:   held.Lock,
	}
	order, err := os.ReadFile(held.Path(orderFile))
	if err != nil {
		held.Close()
		return nil, fmt.Errorf("reading the guest kernel's module list: %w", err)
	}
	for _, m := range strings.Fields(string(order)) {
		k.Modules = append(k.Modules, held.Path(m))
	}
	return k, nil
}
