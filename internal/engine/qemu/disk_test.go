package qemu_test

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
)

// A disk that is not what it has to be never gets as far as QEMU. Nothing here
// needs a guest: the kernel is not reached either.
func TestStartOnSpoiltDisk(t *testing.T) {
	made := newStack(t, 2)
	for _, test := range []struct {
		name  string
		spoil func(path string) error
		says  string
	}{
		{"Raw", func(p string) error { return os.WriteFile(p, make([]byte, stackSize), 0o600) }, "no usable qcow2 image"},
		{"Empty", func(p string) error { return os.Truncate(p, 0) }, "no usable qcow2 image"},
		{"Smaller", func(p string) error { return overwrite(p, 24, []byte{0, 0, 0, 0, 0, 1, 0, 0}) }, "stands on"},
		{"OtherFile", func(p string) error { return overwrite(p, 79, []byte{1 << 2}) }, "no usable qcow2 image"},
		{"Pipe", func(p string) error { return errors.Join(os.Remove(p), unix.Mkfifo(p, 0o600)) }, "not a regular file"},
		{"Directory", func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) }, ""},
		{"Missing", os.Remove, "missing"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, layer := range []int{0, 1} {
				s := made.copied(t)
				if err := test.spoil(s.layers[layer]); err != nil {
					t.Fatal(err)
				}
				if layer == 1 && test.name == "Missing" {
					continue // the disk is made then
				}
				m, err := qemu.New(qemu.Options{}).Start(t.Context(), engine.MachineSpec{
					ID: "spoilt", Dir: t.TempDir(), RootImage: s.root, Layers: s.layers[:1], Disk: s.layers[1],
					VCPUCount: 1, MemMiB: 128, Kernel: engine.Kernel{Image: filepath.Join(t.TempDir(), "no-kernel")},
					Console: io.Discard, Logger: slog.New(slog.DiscardHandler),
				})
				if err == nil {
					_ = m.Stop(t.Context(), 0)
					t.Fatal("it started")
				}
				if test.name == "Directory" && layer == 1 {
					continue // opening it for writing is refused by the host
				}
				if !errors.Is(err, api.ErrDamaged) || !strings.Contains(err.Error(), test.says) {
					t.Errorf("starting with file %d spoilt: %v, want ErrDamaged and %q", layer, err, test.says)
				}
			}
		})
	}
}

// What Start makes is whole, as large as it has to be, and there is nothing
// beside it, also when the rest of Start fails.
func TestStartMakesTheDisk(t *testing.T) {
	s := newStack(t, 2)
	for _, test := range []struct {
		name    string
		layers  int
		diskMiB int
		want    int64 // bytes; 0: ErrInvalid
	}{
		{"OnTheImage", 0, 0, stackSize / 2},
		{"LargerThanTheImage", 0, 1000, 1000 << 20},
		{"SmallerThanTheImage", 0, 1, 0},
		{"OnALayer", 2, 0, stackSize},
		{"LargerThanTheLayer", 2, 1000, 1000 << 20},
		{"SmallerThanTheLayer", 2, stackSize/2>>20 + 1, stackSize},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			disk := filepath.Join(dir, "disk")
			// What somebody left who was killed.
			if err := os.WriteFile(disk+engine.UnfinishedSuffix, []byte("part"), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := qemu.New(qemu.Options{}).Start(t.Context(), engine.MachineSpec{
				ID: "made", Dir: t.TempDir(), RootImage: s.root, Layers: s.layers[:test.layers], Disk: disk, DiskMiB: test.diskMiB,
				VCPUCount: 1, MemMiB: 128, Kernel: engine.Kernel{Image: filepath.Join(t.TempDir(), "no-kernel")},
				Console: io.Discard, Logger: slog.New(slog.DiscardHandler),
			})
			if test.want == 0 {
				if !errors.Is(err, api.ErrInvalid) || api.Hint(err) == "" {
					t.Errorf("%v (hint %q), want ErrInvalid with a hint", err, api.Hint(err))
				}
				return
			}
			if !errors.Is(err, os.ErrNotExist) {
				t.Fatalf("Start without a kernel: %v", err)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
				t.Errorf("in the disk's directory: %v, %v", left, err)
			}
			image := openQcow2(t, disk)
			below := s.root
			if test.layers > 0 {
				below = s.layers[test.layers-1]
			}
			if image.Size() != test.want || image.BackingName() != below {
				t.Errorf("the disk has %d bytes on %s, want %d on %s", image.Size(), image.BackingName(), test.want, below)
			}
		})
	}
}
