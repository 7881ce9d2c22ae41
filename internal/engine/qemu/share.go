package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// Machines of one template share its memory as long as one of them runs: the
// process of each keeps the memfd open and says so in a file, and the next takes
// it from there by way of /proc. The file is a hint only. What it leads to has
// to be a memfd of the template's name that nobody can change any more, in a
// process of our own user; where it does not, the memory is filled anew.

// holder is the content of such a file.
type holder struct {
	Process hostproc.Identity `json:"process"`
	FD      int               `json:"fd"`
}

// lockSuffix is behind the name of such a file for the lock of who fills the
// memory.
const lockSuffix = ".lock"

// holdersDir is below the templates' directory.
const holdersDir = "memory"

func holderFile(dir, digest string) string {
	return filepath.Join(dir, holdersDir, strings.TrimPrefix(digest, "sha256:")+".json")
}

// memoryName is the name of a template's memfd, for /proc and people.
func memoryName(digest string) string {
	return "pyro-template-" + strings.TrimPrefix(digest, "sha256:")
}

// borrowMemory returns the template's memory from a process that has it, nil if
// none does.
func borrowMemory(dir, digest string, size int64) *os.File {
	var h holder
	if statedir.ReadJSON(holderFile(dir, digest), &h) != nil || !h.Process.Alive() {
		return nil
	}
	path := fmt.Sprintf("/proc/%d/fd/%d", h.Process.PID, h.FD)
	// Before it is opened: a descriptor's number may mean something else by now.
	if link, err := os.Readlink(path); err != nil || link != "/memfd:"+memoryName(digest)+" (deleted)" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	st, err := f.Stat()
	if err != nil || st.Size() != size || !isSealed(f) || !h.Process.Alive() {
		f.Close()
		return nil
	}
	return f
}

// lendMemory tells others that this process has the template's memory.
func lendMemory(dir, digest string, f *os.File) error {
	self, err := hostproc.Identify(os.Getpid())
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, holdersDir), 0o700); err != nil {
		return err
	}
	return statedir.WriteJSON(holderFile(dir, digest), holder{Process: self, FD: int(f.Fd())})
}

// fillPatience is how long a start waits for another one that fills the same
// memory. Measured 0.3 s for 400 MB.
const fillPatience = 20 * time.Second

// sharedMemory returns a memory of size bytes in which machines run privately: one
// that a process lends, or a new one, filled in the background from saved, which
// it closes. It may be used when filled has said nil; then it is sealed. The file
// is the caller's also if filled says an error. digest tells what is in it, and
// dir is where its holders are noted; "" shares with nobody.
func sharedMemory(ctx context.Context, log *slog.Logger, dir, digest string, size int64, saved io.ReadCloser) (f *os.File, filled <-chan error, err error) {
	done := make(chan error, 1)
	var lock *hostproc.Lock
	if dir != "" {
		if f = borrowMemory(dir, digest, size); f == nil {
			// One at a time: many at once would have as many copies.
			if err := os.MkdirAll(filepath.Join(dir, holdersDir), 0o700); err != nil {
				log.Debug("sharing a memory", "error", err)
			}
			if lock, err = hostproc.LockWithin(ctx, holderFile(dir, digest)+lockSuffix, fillPatience); err != nil {
				log.Debug("sharing a memory", "error", err)
			}
			f = borrowMemory(dir, digest, size)
		}
	}
	if f != nil {
		lock.Close()
		saved.Close()
		done <- nil
		return f, done, nil
	}
	if f, err = newMemory(memoryName(digest), size); err != nil {
		lock.Close()
		saved.Close()
		return nil, nil, err
	}
	go func() {
		defer lock.Close()
		defer saved.Close()
		err := loadMemory(f, size, saved)
		if err == nil {
			err = sealMemory(f)
		}
		if err == nil && dir != "" {
			// A full snapshot's is noted under a new name each time.
			if err := errors.Join(lendMemory(dir, digest, f), pruneHolders(dir)); err != nil {
				log.Warn("machines will not share memory", "error", err)
			}
		}
		done <- err
	}()
	return f, done, nil
}

// pruneHolders removes the files about processes that are gone, and the locks
// beside them. A start that waits for such a lock fills a memory of its own.
func pruneHolders(dir string) error {
	entries, err := os.ReadDir(filepath.Join(dir, holdersDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		path := filepath.Join(dir, holdersDir, e.Name())
		var h holder
		if !strings.HasSuffix(path, ".json") || statedir.ReadJSON(path, &h) == nil && h.Process.Alive() {
			continue
		}
		for _, path := range []string{path, path + lockSuffix} {
			if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
