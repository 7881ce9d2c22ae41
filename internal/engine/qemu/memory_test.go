package qemu_test

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
)

const mib = 1 << 20

// someMemory returns a memory with data here and there.
func someMemory(t testing.TB, size int64) *os.File {
	t.Helper()
	f, err := qemu.NewMemory("test", size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	r := rand.NewChaCha8([32]byte{7})
	for _, at := range []int64{0, 4096, 3*mib - 100, 9*mib + 5, size - 4096} {
		b := make([]byte, min(2*mib, size-at))
		_, _ = r.Read(b)
		clear(b[len(b)/3 : len(b)/2])
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func content(t *testing.T, f *os.File) []byte {
	t.Helper()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, st.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSaveAndLoadMemory(t *testing.T) {
	const size = 32 * mib
	f := someMemory(t, size)
	var saved bytes.Buffer
	if err := qemu.SaveMemory(&saved, f); err != nil {
		t.Fatal(err)
	}
	if saved.Len() > 11*mib {
		t.Errorf("%d bytes were saved of a memory with about 8 MiB in it", saved.Len())
	}
	g, err := qemu.NewMemory("copy", size)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if err := qemu.LoadMemory(g, size, bytes.NewReader(saved.Bytes())); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(content(t, f), content(t, g)) {
		t.Error("what was loaded is not what was saved")
	}
	for _, n := range []int{0, 1, 15, 16, 17, saved.Len() / 2, saved.Len() - 1} {
		if err := qemu.LoadMemory(discardAt{}, size, bytes.NewReader(saved.Bytes()[:n])); !errors.Is(err, api.ErrDamaged) {
			t.Errorf("loading the first %d bytes: %v, want ErrDamaged", n, err)
		}
	}
	if err := qemu.LoadMemory(discardAt{}, size-4096, bytes.NewReader(saved.Bytes())); !errors.Is(err, api.ErrDamaged) {
		t.Errorf("loading into a smaller memory: %v, want ErrDamaged", err)
	}
}

type discardAt struct{}

func (discardAt) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// boundedAt fails the test on writes outside of a memory.
type boundedAt struct {
	t    *testing.T
	size int64
}

func (b boundedAt) WriteAt(p []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(p)) > b.size || at+int64(len(p)) < at {
		b.t.Errorf("%d bytes written at %d of %d", len(p), at, b.size)
	}
	return len(p), nil
}

func FuzzLoadMemory(f *testing.F) {
	const size = 4 * mib
	run := func(offset, n uint64, data int) []byte {
		b := binary.LittleEndian.AppendUint64(nil, offset)
		return append(binary.LittleEndian.AppendUint64(b, n), make([]byte, data)...)
	}
	f.Add(run(size, 0, 0))
	f.Add(append(run(4096, 4096, 4096), run(size, 0, 0)...))
	f.Add(append(run(4096, 4096, 4096), run(0, 4096, 4096)...))
	f.Add(run(1<<63, 1<<63, 100))
	f.Add(run(size-1, 2, 2))
	f.Add(run(0, qemu.MaxMemoryRun+1, 100))
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = qemu.LoadMemory(boundedAt{t, size}, size, bytes.NewReader(b))
	})
}

// TestSealedMemory does what a QEMU could do that its guest has taken over.
func TestSealedMemory(t *testing.T) {
	f := someMemory(t, 16*mib)
	if err := qemu.SealMemory(f); err != nil {
		t.Fatal(err)
	}
	before := content(t, f)
	// QEMU opens its memory by descriptor, for reading and writing.
	g, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDWR, 0)
	if err != nil {
		t.Fatalf("QEMU could not open it: %v", err)
	}
	defer g.Close()
	private, err := unix.Mmap(int(g.Fd()), 0, 16*mib, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatalf("QEMU could not map it: %v", err)
	}
	private[4096] ^= 0xff
	if err := unix.Munmap(private); err != nil {
		t.Fatal(err)
	}
	if _, err := g.WriteAt([]byte("evil"), 0); err == nil {
		t.Error("it can be written")
	}
	if err := g.Truncate(4096); err == nil {
		t.Error("it can be cut")
	}
	if err := unix.Fallocate(int(g.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096); err == nil {
		t.Error("holes can be made in it")
	}
	if b, err := unix.Mmap(int(g.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
		_ = unix.Munmap(b)
		t.Error("it can be mapped shared and writable")
	}
	if !bytes.Equal(before, content(t, f)) {
		t.Error("its content has changed")
	}
}

func TestBorrowMemory(t *testing.T) {
	const size, digest = 16 * mib, "sha256:aa"
	dir := t.TempDir()
	if f := qemu.BorrowMemory(dir, digest, size); f != nil {
		t.Fatal("a memory came from nowhere")
	}
	named := func(name string, seal bool) *os.File {
		f, err := qemu.NewMemory(name, size)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if seal {
			if err := qemu.SealMemory(f); err != nil {
				t.Fatal(err)
			}
		}
		return f
	}
	ordinary, err := os.Create(dir + "/file")
	if err != nil {
		t.Fatal(err)
	}
	defer ordinary.Close()
	for _, test := range []struct {
		name string
		file *os.File
		size int64
		ok   bool
	}{
		{"Right", named(qemu.MemoryName(digest), true), size, true},
		{"NotSealed", named(qemu.MemoryName(digest), false), size, false},
		{"OtherTemplate", named(qemu.MemoryName("sha256:bb"), true), size, false},
		{"OtherSize", named(qemu.MemoryName(digest), true), 2 * size, false},
		{"OrdinaryFile", ordinary, size, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			if err := qemu.LendMemory(dir, digest, test.file); err != nil {
				t.Fatal(err)
			}
			got := qemu.BorrowMemory(dir, digest, test.size)
			if (got != nil) != test.ok {
				t.Errorf("borrowed: %v, want %v", got != nil, test.ok)
			}
			if got != nil {
				got.Close()
			}
		})
	}
	t.Run("DeadHolder", func(t *testing.T) {
		if err := qemu.LendMemory(dir, digest, named(qemu.MemoryName(digest), true)); err != nil {
			t.Fatal(err)
		}
		path := qemu.HolderFile(dir, digest)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		// The same pid, started at another time.
		b = bytes.Replace(b, []byte(`"start_time":`), []byte(`"start_time":1`), 1)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if f := qemu.BorrowMemory(dir, digest, size); f != nil {
			f.Close()
			t.Error("a memory was borrowed from a process that is not there")
		}
	})
}

func TestStubKernel(t *testing.T) {
	var b bytes.Buffer
	if err := qemu.WriteStub(&b); err != nil {
		t.Fatal(err)
	}
	f, err := elf.NewFile(bytes.NewReader(b.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	if f.Machine != elf.EM_X86_64 || len(f.Progs) != 2 || b.Len() < 8<<10 {
		t.Errorf("machine %v, %d segments, %d bytes", f.Machine, len(f.Progs), b.Len())
	}
	note, err := io.ReadAll(f.Progs[1].Open())
	if err != nil || f.Progs[1].Type != elf.PT_NOTE || len(note) != 20 || string(note[12:15]) != "Xen" || binary.LittleEndian.Uint32(note[8:]) != 18 {
		t.Errorf("%v %v: %x, %v", f.Progs[1].Type, len(note), note, err)
	}
}

// TestSavePrivateMemory saves a memory of which this process has changed some
// pages for itself.
func TestSavePrivateMemory(t *testing.T) {
	const size = 32 * mib
	f := someMemory(t, size)
	for name, flags := range map[string]int{"Private": unix.MAP_PRIVATE, "Shared": unix.MAP_SHARED} {
		t.Run(name, func(t *testing.T) {
			var before, after unix.Stat_t
			if err := unix.Fstat(int(f.Fd()), &before); err != nil {
				t.Fatal(err)
			}
			mapped, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, flags)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = unix.Munmap(mapped) }()
			// Two mappings, as far as the kernel is concerned.
			if err := unix.Madvise(mapped[4*mib:8*mib], unix.MADV_DONTFORK); err != nil {
				t.Fatal(err)
			}
			want := content(t, f)
			if flags == unix.MAP_PRIVATE {
				for _, at := range []int{0, 5000, mib - 1, 4*mib - 1, 4 * mib, 4*mib + 4096, 7 * mib, 20 * mib, size - 1} {
					mapped[at] = ^mapped[at]
					want[at] = ^want[at]
				}
				clear(mapped[9*mib : 9*mib+8192]) // what was there is not any more
				clear(want[9*mib : 9*mib+8192])
			}
			_ = mapped[4096] // read, and so the file's
			var saved bytes.Buffer
			if err := qemu.SavePrivateMemory(&saved, f, os.Getpid()); err != nil {
				t.Fatal(err)
			}
			loaded, err := qemu.NewMemory("loaded", size)
			if err != nil {
				t.Fatal(err)
			}
			defer loaded.Close()
			if err := qemu.LoadMemory(loaded, size, &saved); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(content(t, loaded), want) {
				t.Error("what was saved is not what the process sees")
			}
			if err := unix.Fstat(int(f.Fd()), &after); err != nil || after.Blocks > before.Blocks+8*9 {
				t.Errorf("saving has filled holes: %d blocks after %d, %v", after.Blocks, before.Blocks, err)
			}
		})
	}
	if err := qemu.SavePrivateMemory(io.Discard, f, os.Getpid()); !errors.Is(err, api.ErrInternal) {
		t.Errorf("a memory that is not mapped: %v, want ErrInternal", err)
	}
}

// TestSharedMemoryOnce begins many machines on one memory at once. One of them
// fills it.
func TestSharedMemoryOnce(t *testing.T) {
	const size, machines = 32 * mib, 8
	dir := t.TempDir()
	f := someMemory(t, size)
	var saved bytes.Buffer
	if err := qemu.SaveMemory(&saved, f); err != nil {
		t.Fatal(err)
	}
	// What a process has left that is gone.
	stale := qemu.HolderFile(dir, "sha256:99")
	if err := os.MkdirAll(filepath.Dir(stale), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{stale, stale + ".lock"} {
		if err := os.WriteFile(path, []byte(`{"process":{"pid":1,"start_time":1,"boot_id":"another"},"fd":3}`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := content(t, f)
	inodes := make([]uint64, machines)
	var all sync.WaitGroup
	for i := range machines {
		all.Go(func() {
			r := io.NopCloser(bytes.NewReader(saved.Bytes()))
			f, filled, err := qemu.SharedMemory(t.Context(), slog.New(slog.DiscardHandler), dir, "sha256:1234", size, r)
			if err == nil {
				err = <-filled
			}
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { f.Close() })
			if !bytes.Equal(content(t, f), want) {
				t.Error("the memory holds something else")
			}
			var st unix.Stat_t
			if err := unix.Fstat(int(f.Fd()), &st); err != nil {
				t.Error(err)
			}
			inodes[i] = st.Ino
		})
	}
	all.Wait()
	if n := len(slices.Compact(slices.Sorted(slices.Values(inodes)))); n != 1 {
		t.Errorf("%d machines have %d memories", machines, n)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(stale), "*"))
	if err != nil || len(left) != 2 {
		t.Errorf("notes about holders: %q, %v; want that of this process and its lock", left, err)
	}
}
