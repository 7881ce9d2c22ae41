package gvisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

// The bounds of the steps of a full snapshot and of a start from one. The guest
// has a part in all of them, and so may draw them out.
const (
	// hangUpTimeout is for the guest agent to end its connection.
	hangUpTimeout = 10 * time.Second
	// redialTimeout is for it to come back, in a guest that may be busy.
	redialTimeout = time.Minute
	// imageRate is how fast the slowest host that this is for writes or reads a
	// sandbox's memory, in MiB per second, and imageSlack what comes on top.
	imageRate  = 32
	imageSlack = 30 * time.Second
)

// imageTimeout bounds the writing or reading of a machine's whole memory.
func imageTimeout(memMiB int) time.Duration {
	return imageSlack + time.Duration(memMiB)*time.Second/imageRate
}

var _ engine.FullSnapshotter = (*machine)(nil)

// SnapshotFull implements [engine.FullSnapshotter]: memory becomes a directory
// with the files of runsc checkpoint and a record of ours.
//
// runsc can save no sandbox with a connection to its host, so the guest agent's is
// taken away for that time; the session on it goes on, see
// [guestconn.SplicedPipe]. The sandbox is paused around the checkpoint, because
// the disk is to be of the same instant, and it is always left running: a
// checkpoint without that ends a sandbox that could not be saved.
func (m *machine) SnapshotFull(ctx context.Context, spare, memory string) (frozen string, err error) {
	m.snapshotMu.Lock()
	defer m.snapshotMu.Unlock()
	if err := nothingAt(memory); err != nil {
		return "", err
	}
	begin := time.Now()
	tmp := memory + engine.UnfinishedSuffix
	if err := os.RemoveAll(tmp); err != nil { // of somebody who was killed
		return "", err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	identity, err := m.runsc.identity()
	if err != nil {
		return "", err
	}
	var saved time.Duration
	err = m.snapshot(ctx, spare, func(ctx context.Context, f func() error) (time.Duration, error) {
		return m.heldAlone(ctx, func() error {
			begin := time.Now()
			if err := m.checkpoint(ctx, tmp); err != nil {
				return err
			}
			saved = time.Since(begin)
			failpoint.Hit("supervise-save/still")
			return f()
		})
	})
	if err != nil {
		return "", fmt.Errorf("saving the machine: %w", err)
	}
	err = writeImageRecord(tmp, imageRecord{Format: imageFormat, Runtime: identity, Token: m.token, IDs: m.ids})
	failpoint.Hit("supervise-save/written")
	if err == nil {
		err = publishDir(tmp, memory)
	}
	if err != nil {
		return "", errors.Join(fmt.Errorf("saving the machine's memory: %w", err), os.RemoveAll(spare))
	}
	m.logger.Info("machine saved", "memory written in", saved.Round(time.Millisecond), "took", time.Since(begin).Round(time.Millisecond))
	return spare, nil
}

// heldAlone is held while the sandbox has no connection to this process. The
// session goes on afterwards, whatever happens to f and ctx.
func (m *machine) heldAlone(ctx context.Context, f func() error) (_ time.Duration, err error) {
	select {
	case <-m.attached:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	if m.mux == nil {
		return 0, m.attErr
	}
	if m.isPaused() {
		return 0, api.WithHint(api.Errorf(api.ErrState, "the machine is paused, and its guest agent has to let go of its connection"), "resume it first")
	}
	hangUp, cancel := context.WithTimeout(ctx, hangUpTimeout)
	defer cancel()
	defer func() { err = errors.Join(err, m.reconnect()) }()
	if err := m.pipe.Detach(hangUp); err != nil {
		return 0, fmt.Errorf("hanging up on the guest agent: %w", err)
	}
	return m.held(ctx, f)
}

// reconnect lets the guest agent dial again and go on with its session, unless it
// has a connection. A guest whose agent does not come loses the session.
func (m *machine) reconnect() error {
	if m.pipe.Attached() {
		return nil
	}
	err := m.redial()
	if err == nil {
		return nil
	}
	if gone := m.running(); gone != nil {
		err = gone
	}
	return errors.Join(fmt.Errorf("waiting for the guest agent to come back: %w", err), m.mux.Close())
}

func (m *machine) redial() error {
	// Also of a machine that is being stopped: politely means by its agent.
	ctx, cancel := context.WithTimeout(context.Background(), redialTimeout)
	defer cancel()
	go func() {
		select {
		case <-m.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	var l net.Listener
	err := m.ns.do(func() (err error) {
		l, err = m.stage.listen()
		return err
	})
	if err != nil {
		return err
	}
	conn, err := acceptAgent(ctx, l, m.token, m.logger)
	if err != nil {
		return err
	}
	if err := guestconn.GreetContinue(conn); err != nil {
		conn.Close()
		return err
	}
	return m.pipe.Attach(conn)
}

// checkpoint has runsc write the paused sandbox's memory into dir.
func (m *machine) checkpoint(ctx context.Context, dir string) error {
	if err := m.checkImageFits(dir); err != nil {
		return err
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	// By way of the open directory: the path may not be seen in the namespace.
	err = m.commandWith(ctx, imageTimeout(m.memMiB), []*os.File{f}, "checkpoint", "--leave-running", "--compression=none",
		"--image-path=/proc/self/fd/3", m.id)
	switch {
	case err != nil && strings.Contains(err.Error(), unix.ENOSPC.Error()):
		err = api.WithHint(api.Errorf(api.ErrExhausted, "%w", err), "free some space, or leave the memory out")
	case err != nil:
		err = api.WithHint(err, "there are things that gVisor cannot save: end what holds them, or leave the memory out, the snapshot then has the disk")
	}
	return err
}

// imageFloor is what must be left of the host's file system beside an image, in
// bytes: for the state of the sandbox's kernel, some MiB, and for others.
const imageFloor = 64 << 20

// checkImageFits refuses to write an image that the sandbox or the host has no
// room for. The sandbox is paused.
func (m *machine) checkImageFits(dir string) error {
	var memory, deleted int64
	for _, id := range m.children() {
		a, b := openFiles(id.PID)
		memory, deleted = max(memory, a), max(deleted, b)
	}
	// runsc reads files that were deleted but are still open into the sandbox's own
	// memory, which the host bounds.
	if limit := int64(sandboxOverheadMiB(m.memMiB)) << 20 / 8; deleted > limit {
		return api.WithHint(api.Errorf(api.ErrExhausted, "the guest holds %s in files that it has deleted, and %s of that can be saved with its memory",
			humanize.IBytes(uint64(deleted)), humanize.IBytes(uint64(limit))), "end what holds them, or leave the memory out: the snapshot then has the disk")
	}
	disk, err := m.parts.layer.Stat()
	if err != nil {
		return err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("looking for room on the host: %w", err)
	}
	need := memory + deleted + imageFloor
	if disk.Mode().IsRegular() {
		need += disk.Sys().(*syscall.Stat_t).Blocks * 512
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < need {
		return api.WithHint(api.Errorf(api.ErrExhausted, "the machine's memory and disk need %s on the host, and %s are free",
			humanize.IBytes(uint64(need)), humanize.IBytes(uint64(free))), "free some space, or leave the memory out")
	}
	return nil
}

// openFiles returns how much memory of a guest's the process with that pid holds,
// and how much there is in the deleted files that it has open, in bytes.
func openFiles(pid int) (memory, deleted int64) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, _ := os.ReadDir(dir)
	seen := map[[2]uint64]bool{} // device and inode
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 0 || seen[[2]uint64{st.Dev, st.Ino}] {
			continue
		}
		seen[[2]uint64{st.Dev, st.Ino}] = true
		if name, err := os.Readlink(path); err == nil && strings.HasPrefix(name, "/memfd:") {
			memory += st.Blocks * 512
		} else {
			deleted += st.Size
		}
	}
	return memory, deleted
}

// resumed waits until the machine that was restored from spec.Memory is one of its
// own.
func (m *machine) resumed(ctx context.Context, spec engine.MachineSpec) error {
	ctx, cancel := context.WithTimeout(ctx, imageTimeout(spec.MemMiB)+redialTimeout)
	defer cancel()
	select {
	case <-m.attached:
	case <-ctx.Done():
		return fmt.Errorf("waiting for the guest agent: %w", ctx.Err())
	}
	select {
	case <-m.ended:
		return api.WithHint(api.Errorf(api.ErrUnavailable, "%s", runscFault(m.console.lastWords())),
			"a full snapshot belongs to the gVisor and the processor that it was taken with; its disk can be used with any")
	default:
	}
	if m.attErr != nil {
		return m.attErr
	}
	req, err := guestclient.NewResume(spec.Hostname)
	if err != nil {
		return err
	}
	req.NewIdentity = !spec.Continues
	return guestclient.New(m.DialGuest, guestclient.Options{}).Resume(ctx, req)
}

// imageRecordFile is the record's name in the image's directory.
const imageRecordFile = "pyro.json"

// imageFormat is the version of what lies in that directory.
const imageFormat = 1

// imageRecord is what a start from an image has to know.
type imageRecord struct {
	Format int `json:"format"`
	// Runtime identifies the runsc that made it.
	Runtime string `json:"runtime"`
	// Token is what the guest agent in it says when it dials.
	Token string `json:"token"`
	// IDs are those that the machine had.
	IDs hostIDs `json:"ids"`
}

func writeImageRecord(dir string, r imageRecord) error {
	return statedir.WriteJSON(filepath.Join(dir, imageRecordFile), r)
}

// readImageRecord reads the record of the image in dir and refuses one that this
// runtime did not make.
func (r runsc) readImageRecord(dir string) (imageRecord, error) {
	var rec imageRecord
	if err := statedir.ReadJSON(filepath.Join(dir, imageRecordFile), &rec); err != nil {
		return rec, fmt.Errorf("reading the saved memory: %w", err)
	}
	identity, err := r.identity()
	if err != nil {
		return rec, err
	}
	if rec.Format != imageFormat || rec.Runtime != identity {
		return rec, api.WithHint(api.Errorf(api.ErrUnsupported, "the saved memory is not of this runsc (%s)", r.path),
			"a full snapshot belongs to the gVisor that it was taken with; its disk can be used with any")
	}
	return rec, nil
}

// publishDir gives the directory that is complete at tmp its name, after what is
// in it has become its owner's alone and has reached the disk.
func publishDir(tmp, name string) error {
	entries, err := os.ReadDir(tmp)
	if err != nil {
		return err
	}
	for _, e := range entries {
		f, err := os.Open(filepath.Join(tmp, e.Name()))
		if err != nil {
			return err
		}
		err = f.Chmod(0o600)
		if err == nil {
			err = f.Sync()
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	if err := statedir.SyncDir(tmp); err != nil {
		return err
	}
	return publish(tmp, name)
}
