package qemu_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/internal/workspacedisk/qcow2"
)

// A stack is a chain of qcow2 files that qemu-img and qemu-io made, without any
// machine.
type stack struct {
	root   string
	layers []string
}

const (
	stackSize = 64 << 20
	cluster   = 64 << 10
)

// newStack makes n layers on a raw image. Each has clusters of its own, some that
// it shares with those around it, zeros over data, and parts of a cluster.
func newStack(t *testing.T, n int) stack {
	t.Helper()
	testenv.RequireTools(t, "qemu", "qemu-img", "qemu-io", "qemu-system-x86_64")
	dir := t.TempDir()
	s := stack{root: filepath.Join(dir, "root.raw")}
	image := bytes.Repeat([]byte("environment "), stackSize/2/12)
	if err := os.WriteFile(s.root, image, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(s.root, stackSize/2); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	below, format := s.root, "raw"
	for i := range n {
		path := filepath.Join(dir, fmt.Sprintf("layer%d", i))
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", below, path, fmt.Sprint(stackSize))
		args := []string{"-f", "qcow2"}
		for range 60 {
			at := r.IntN(stackSize/cluster) * cluster
			switch r.IntN(4) {
			case 0:
				args = append(args, "-c", fmt.Sprintf("write -z %d %d", at, cluster))
			case 1:
				args = append(args, "-c", fmt.Sprintf("write -P %d %d 4096", 1+r.IntN(255), at+4096*r.IntN(16)))
			default:
				args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", 1+r.IntN(255), at, cluster))
			}
		}
		run(t, "qemu-io", append(args, path)...)
		s.layers = append(s.layers, path)
		below, format = path, "qcow2"
	}
	return s
}

// copied returns a copy of the stack's files.
func (s stack) copied(t *testing.T) stack {
	t.Helper()
	dir := t.TempDir()
	c := stack{root: s.root}
	for _, path := range s.layers {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, filepath.Base(path))
		if err := os.WriteFile(to, b, 0o600); err != nil {
			t.Fatal(err)
		}
		c.layers = append(c.layers, to)
	}
	return c
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// digest reads the whole disk through our own reader, which goes by the given
// chain and not by the headers.
func (s stack) digest(t *testing.T, layers ...string) [32]byte {
	t.Helper()
	f, err := os.Open(s.root)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var top qcow2.Layer = io.NewSectionReader(f, 0, stackSize/2)
	for _, path := range layers {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		st, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if top, err = qcow2.Open(f, st.Size(), top); err != nil {
			t.Fatal(err)
		}
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(top, 0, top.Size())); err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

// openQcow2 opens one image without what it stands on.
func openQcow2(t *testing.T, path string) *qcow2.Image {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	image, err := qcow2.Open(f, st.Size(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// without returns the layers but number i.
func (s stack) without(i int) []string { return slices.Delete(slices.Clone(s.layers), i, i+1) }

func TestMergeLayer(t *testing.T) {
	made := newStack(t, 4)
	for _, i := range []int{0, 1, 2} {
		t.Run(fmt.Sprintf("Layer%d", i), func(t *testing.T) {
			s := made.copied(t)
			want := s.digest(t, s.layers...)
			lower := s.digest(t, s.layers[:i+1]...)
			if s.digest(t, s.without(i)...) == want {
				t.Fatal("the layer holds nothing that would be missed")
			}
			// The upper layer gets what the lower one holds and nothing from below.
			most := usedBytes(t, s.layers[i]) + usedBytes(t, s.layers[i+1]) + 4*cluster
			e := qemu.New(qemu.Options{})
			for range 2 { // the second time there is nothing left to do
				if _, err := e.MergeLayer(t.Context(), s.layers, i, s.root, ""); err != nil {
					t.Fatal(err)
				}
				if s.digest(t, s.layers...) != want {
					t.Error("the old chain holds something else now")
				}
				if s.digest(t, s.without(i)...) != want {
					t.Error("the chain without the layer does not hold what it held")
				}
				if s.digest(t, s.layers[:i+1]...) != lower {
					t.Error("the merged layer was changed itself")
				}
				if n := usedBytes(t, s.layers[i+1]); n > most {
					t.Errorf("the upper layer takes %d bytes, want at most %d", n, most)
				}
				run(t, "qemu-img", "check", "-q", s.layers[i+1])
			}
		})
	}
}

func usedBytes(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512
}

// The header of a layer lies: nothing may follow it.
func TestMergeLayerGoesByTheGivenChain(t *testing.T) {
	s := newStack(t, 3)
	want := s.digest(t, s.layers...)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("secret "), stackSize/7), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, layer := range s.layers {
		run(t, "qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", secret, layer)
	}
	if _, err := qemu.New(qemu.Options{}).MergeLayer(t.Context(), s.layers, 1, s.root, ""); err != nil {
		t.Fatal(err)
	}
	if s.digest(t, s.without(1)...) != want {
		t.Error("the chain without the layer does not hold what it held")
	}
}

// TestMergeLayerKilled ends a merge at moments of its life: the chain stays
// right, and another merge finishes.
func TestMergeLayerKilled(t *testing.T) {
	s := newStack(t, 3)
	want := s.digest(t, s.layers...)
	e := qemu.New(qemu.Options{})
	began := time.Now()
	saved, err := os.ReadFile(s.layers[2])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.MergeLayer(t.Context(), s.layers, 1, s.root, ""); err != nil {
		t.Fatal(err)
	}
	whole := time.Since(began)
	interrupted := 0
	const rounds = 12
	for round := range rounds {
		if err := os.WriteFile(s.layers[2], saved, 0o600); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), whole*time.Duration(round+1)/rounds)
		_, err := e.MergeLayer(ctx, s.layers, 1, s.root, "")
		cancel()
		if err != nil {
			interrupted++
			if !errors.Is(err, api.ErrDeadline) && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a merge that is given up: %v", err)
			}
		}
		if s.digest(t, s.layers...) != want {
			t.Fatalf("round %d: the chain holds something else after %v", round, err)
		}
	}
	if interrupted == 0 {
		t.Error("no merge was interrupted")
	}
	t.Logf("%d of %d merges interrupted within %v", interrupted, rounds, whole)
	if _, err := e.MergeLayer(t.Context(), s.layers, 1, s.root, ""); err != nil {
		t.Fatal(err)
	}
	if s.digest(t, s.without(1)...) != want {
		t.Error("the chain without the layer does not hold what it held")
	}
}

func TestMergeLayerRefuses(t *testing.T) {
	e := qemu.New(qemu.Options{})
	made := newStack(t, 2)
	t.Run("NothingAbove", func(t *testing.T) {
		s := made
		for _, i := range []int{-1, 1, 2} {
			if _, err := e.MergeLayer(t.Context(), s.layers, i, s.root, ""); !errors.Is(err, api.ErrInvalid) {
				t.Errorf("merging layer %d of 2: %v, want ErrInvalid", i, err)
			}
		}
	})
	t.Run("InUse", func(t *testing.T) {
		s := made.copied(t)
		f, err := os.OpenFile(s.layers[1], os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		// QEMU's lock bytes of a reader that tolerates no writer, block/file-posix.c.
		for _, at := range []int64{100, 201} {
			if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: at, Len: 1}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := e.MergeLayer(t.Context(), s.layers, 0, s.root, ""); !errors.Is(err, api.ErrBusy) || api.Hint(err) == "" {
			t.Errorf("merging into a layer in use: %v (hint %q), want ErrBusy with a hint", err, api.Hint(err))
		}
	})
	for name, spoil := range map[string]func(path string) error{
		"Missing":    os.Remove,
		"Raw":        func(path string) error { return os.WriteFile(path, make([]byte, stackSize), 0o600) },
		"Empty":      func(path string) error { return os.Truncate(path, 0) },
		"Cut":        func(path string) error { return os.Truncate(path, 4096) },
		"Pipe":       func(path string) error { return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)) },
		"Smaller":    func(path string) error { return overwrite(path, 24, []byte{0, 0, 0, 0, 0, 1, 0, 0}) },
		"OtherFile":  func(path string) error { return overwrite(path, 79, []byte{1 << 2}) }, // an external data file
		"OtherMagic": func(path string) error { return overwrite(path, 0, []byte("VMDK")) },
	} {
		t.Run(name, func(t *testing.T) {
			for _, layer := range []int{0, 1} {
				s := made.copied(t)
				if err := spoil(s.layers[layer]); err != nil {
					t.Fatal(err)
				}
				if _, err := e.MergeLayer(t.Context(), s.layers, 0, s.root, ""); !errors.Is(err, api.ErrDamaged) {
					t.Errorf("merging with layer %d spoilt: %v, want ErrDamaged", layer, err)
				}
			}
		})
	}
}

func overwrite(path string, at int64, with []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(with, at)
	return errors.Join(err, f.Close())
}
