package host_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/host"
)

// start starts a machine whose guest agent is a process that only waits: a disk
// needs no more.
func start(t *testing.T, spec engine.MachineSpec) (engine.Machine, error) {
	t.Helper()
	sleep := filepath.Join(t.TempDir(), "sleep")
	if err := os.WriteFile(sleep, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	spec.ID, spec.Dir, spec.AgentPath = fmt.Sprintf("t%x", time.Now().UnixNano()), t.TempDir(), sleep
	spec.Console, spec.Logger = io.Discard, slog.New(slog.DiscardHandler)
	m, err := host.New().Start(t.Context(), spec)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		if err := m.Stop(t.Context(), 0); err != nil {
			t.Error(err)
		}
	})
	return m, nil
}

func snapshot(t *testing.T, m engine.Machine) string {
	t.Helper()
	dir := t.TempDir()
	frozen, err := m.(engine.DiskSnapshotter).SnapshotDisk(t.Context(), filepath.Join(dir, "spare"))
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Fatalf("beside the copy: %v, %v", left, err)
	}
	return frozen
}

// describe lists a tree: what is what, with mode, owner, time, links and content.
func describe(t *testing.T, root string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	first := map[uint64]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := os.Lstat(path)
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		sys := st.Sys().(*syscall.Stat_t)
		line := fmt.Sprintf("%v %d:%d", st.Mode(), sys.Uid, sys.Gid)
		switch {
		case st.Mode().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %s %d %x", st.ModTime().UTC(), len(b), b[:min(len(b), 100)])
			if other, ok := first[sys.Ino]; ok {
				line += " is " + other
			}
			first[sys.Ino] = rel
		case d.IsDir():
			line += fmt.Sprintf(" %s", st.ModTime().UTC())
		case st.Mode().Type() == fs.ModeSymlink:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " to " + to
		}
		tree[rel] = line
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func TestSnapshotCopiesTheTree(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	m, err := start(t, engine.MachineSpec{Disk: disk})
	if err != nil {
		t.Fatal(err)
	}
	script := `set -e; cd "$1/workspace"
mkdir -p deep/er empty closed && echo one > deep/er/file && ln deep/er/file hard && ln -s deep/er/file link && ln -s /nowhere dangling
printf x > "$(printf 'odd \n\\\377 name')" && : > nothing && chmod 4751 nothing && chmod 1777 empty
truncate -s 64M sparse && printf end >> sparse && printf mid | dd of=sparse bs=1 seek=33554432 conv=notrunc status=none
touch -d '2001-02-03 04:05:06.789' deep/er/file deep/er && echo in > closed/in && chmod 500 closed`
	if out, err := exec.Command("sh", "-c", script, "sh", disk).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if os.Geteuid() == 0 {
		if err := os.Lchown(filepath.Join(disk, "workspace", "link"), 12, 34); err != nil {
			t.Fatal(err)
		}
	}
	want := describe(t, disk)
	// What holds nothing, or is nobody's but the machine's.
	l, err := net.Listen("unix", filepath.Join(disk, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := unix.Mkfifo(filepath.Join(disk, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(disk, ".pyro-stage-1", "part"), 0o700); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(disk)
	if err != nil {
		t.Fatal(err)
	}
	want["."] = fmt.Sprintf("%v %d:%d %s", st.Mode(), os.Getuid(), os.Getgid(), st.ModTime().UTC())

	frozen := snapshot(t, m)
	if diff := cmp.Diff(want, describe(t, frozen)); diff != "" {
		t.Errorf("the copy (-disk +copy):\n%s", diff)
	}
	if st, err := os.Stat(filepath.Join(frozen, "workspace", "sparse")); err != nil || st.Sys().(*syscall.Stat_t).Blocks > 1000 {
		t.Errorf("the sparse file takes %+v blocks, %v", st.Sys(), err)
	}
	// The copy shares no file with what the machine goes on with.
	if err := os.WriteFile(filepath.Join(disk, "workspace", "hard"), []byte("changed"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(frozen, "workspace", "hard")); err != nil || string(b) != "one\n" {
		t.Errorf("the copy's file is %q, %v", b, err)
	}

	again := filepath.Join(t.TempDir(), "disk")
	if _, err := start(t, engine.MachineSpec{Disk: again, Layers: []string{"/nowhere", frozen}}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, describe(t, again)); diff != "" {
		t.Errorf("a disk on the copy (-disk +its copy):\n%s", diff)
	}
}

// Files come, go, grow and change their kind while they are copied.
func TestSnapshotOfAChangingTree(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	m, err := start(t, engine.MachineSpec{Disk: disk})
	if err != nil {
		t.Fatal(err)
	}
	steady := bytes.Repeat([]byte("steady "), 10000)
	for i := range 50 {
		if err := os.WriteFile(filepath.Join(disk, fmt.Sprintf("steady%d", i)), steady, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var changing sync.WaitGroup
	for w := range 2 {
		changing.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				p := filepath.Join(disk, fmt.Sprintf("changing%d-%d", w, i%50))
				os.RemoveAll(p)
				switch i % 4 {
				case 0:
					os.MkdirAll(filepath.Join(p, "a", "b"), 0o700)
				case 1:
					os.WriteFile(p, steady, 0o600)
				case 2:
					os.Symlink("steady1", p)
				case 3:
					unix.Mkfifo(p, 0o600)
				}
			}
		})
	}
	t.Cleanup(func() {
		close(stop)
		changing.Wait()
	})
	for range 6 {
		frozen := snapshot(t, m)
		for i := range 50 {
			if b, err := os.ReadFile(filepath.Join(frozen, fmt.Sprintf("steady%d", i))); err != nil || !bytes.Equal(b, steady) {
				t.Fatalf("file %d of the copy: %d bytes, %v", i, len(b), err)
			}
		}
	}
}

func TestDiskThatIsNoDirectory(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := start(t, engine.MachineSpec{Disk: disk}); !errors.Is(err, api.ErrDamaged) || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("starting on a file: %v, want ErrDamaged", err)
	}
	if _, err := start(t, engine.MachineSpec{Disk: disk + "2", Layers: []string{disk}}); !errors.Is(err, api.ErrDamaged) {
		t.Errorf("starting on a layer that is a file: %v, want ErrDamaged", err)
	}
	if _, err := start(t, engine.MachineSpec{Disk: disk + "2", Layers: []string{disk + "3"}}); !errors.Is(err, api.ErrDamaged) {
		t.Errorf("starting on a layer that is missing: %v, want ErrDamaged", err)
	}
}
