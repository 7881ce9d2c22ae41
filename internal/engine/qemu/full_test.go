package qemu_test

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// smallDisk returns a directory on a file system of that size.
func smallDisk(t *testing.T, size int64) string {
	t.Helper()
	dir := t.TempDir()
	err := unix.Mount("none", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size))
	testenv.Require(t, "root", err == nil, fmt.Sprintf("mounting a small file system: %v", err))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestMergeLayerOnAFullDisk(t *testing.T) {
	made := newStack(t, 2)
	want := made.digest(t, made.layers...)
	var size int64
	for _, path := range made.layers {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		size += st.Size()
	}
	dir := smallDisk(t, size+4*cluster)
	s := stack{root: made.root}
	for _, path := range made.layers {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, filepath.Base(path))
		if err := os.WriteFile(to, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s.layers = append(s.layers, to)
	}
	e := qemu.New(qemu.Options{})
	if _, err := e.MergeLayer(t.Context(), s.layers, 0, s.root, ""); !errors.Is(err, api.ErrExhausted) || api.Hint(err) == "" {
		t.Errorf("merging on a full disk: %v (hint %q), want ErrExhausted with a hint", err, api.Hint(err))
	}
	if s.digest(t, s.layers...) != want {
		t.Error("the chain holds something else now")
	}
	if err := unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT, fmt.Sprintf("size=%d", 4*size)); err != nil {
		t.Fatal(err)
	}
	if _, err := e.MergeLayer(t.Context(), s.layers, 0, s.root, ""); err != nil {
		t.Fatalf("merging with room again: %v", err)
	}
	if s.digest(t, s.without(0)...) != want {
		t.Error("the chain without the layer does not hold what it held")
	}
}

func TestStartOnAFullDisk(t *testing.T) {
	s := newStack(t, 1)
	dir := smallDisk(t, 3*4096)
	_, err := qemu.New(qemu.Options{}).Start(t.Context(), engine.MachineSpec{
		ID: "full", Dir: t.TempDir(), RootImage: s.root, Layers: s.layers, Disk: filepath.Join(dir, "disk"),
		VCPUCount: 1, MemMiB: 128, Kernel: engine.Kernel{Image: filepath.Join(t.TempDir(), "no-kernel")},
		Console: io.Discard, Logger: slog.New(slog.DiscardHandler),
	})
	if !errors.Is(err, api.ErrExhausted) || api.Hint(err) == "" {
		t.Errorf("making a disk on a full disk: %v (hint %q), want ErrExhausted with a hint", err, api.Hint(err))
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("it leaves %v, %v", left, err)
	}
}
