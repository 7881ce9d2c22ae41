package workspace

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/hostproc"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/test/build"
)

// programs is where pyro and pyro-agent are.
var programs string

func TestMain(m *testing.M) { os.Exit(build.Main(m, &programs, false)) }

// onHost opens a Manager that works in state, on engine host.
func onHost(t *testing.T, state string) *Manager {
	t.Helper()
	m, err := New(t.Context(), Options{
		StateDir: state, CacheDir: filepath.Join(t.TempDir(), "cache"), Engine: "host",
		Binary: filepath.Join(programs, "pyro"), Agent: filepath.Join(programs, "pyro-agent"),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() }) // a test that ends early
	return m
}

// started makes a workspace that runs, deleted with the test.
func started(t *testing.T, m *Manager) *api.Workspace {
	t.Helper()
	ws, err := m.CreateWorkspace(t.Context(), api.CreateRequest{Environment: "debian:12", AllowHostCompat: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { killSupervisor(t, m, ws.WorkspaceID) })
	return ws
}

// killSupervisor ends a workspace's supervisor as kill -9 does, if it runs.
func killSupervisor(t *testing.T, m *Manager, id string) {
	t.Helper()
	var rec struct{ Supervisor *hostproc.Identity }
	if err := statedir.ReadJSON(m.state.Machine(id).RecordFile(), &rec); err == nil && rec.Supervisor.Alive() {
		if err := unix.Kill(rec.Supervisor.PID, unix.SIGKILL); err != nil {
			t.Error(err)
		}
	}
}

// A supervisor that is ending has closed its socket and holds its machine still.
// What a broken snapshot has left is settled when it is gone; until then looking
// does not wait, and does not fail either.
func TestMachineThatIsEnding(t *testing.T) {
	m := onHost(t, filepath.Join(t.TempDir(), "state"))
	ws := started(t, m)
	h, err := m.hold(t.Context(), ws.WorkspaceID)
	if err != nil {
		t.Fatal(err)
	}
	err = h.update(t.Context(), func(ws *store.Workspace) error {
		ws.PendingLayer, ws.Intent = newLayer("directory"), intentSnapshot
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	h.release()
	if err := os.Remove(h.machine().ControlSocket()); err != nil {
		t.Fatal(err)
	}
	all, err := m.Workspaces(t.Context(), api.WorkspaceFilter{})
	if err != nil || len(all) != 1 || all[0].State != api.StateStarted {
		t.Errorf("while the machine is ending: %+v, %v", all, err)
	}

	stopped := make(chan error, 1)
	go func() {
		_, err := m.StopWorkspace(t.Context(), ws.WorkspaceID)
		stopped <- err
	}()
	killSupervisor(t, m, ws.WorkspaceID)
	if err := <-stopped; err != nil && !errors.Is(err, api.ErrBusy) {
		t.Errorf("stopping it meanwhile: %v", err)
	}
	if got, err := m.Workspace(t.Context(), ws.WorkspaceID); err != nil || got.State != api.StateStopped {
		t.Errorf("when it is gone: %+v, %v", got, err)
	}
	if _, err := m.DeleteWorkspace(t.Context(), ws.WorkspaceID); err != nil {
		t.Error(err)
	}
}

// A disk may have room to open the database and none to write to it. What is
// listed has to be settled first, and what is deleted makes room.
func TestLittleRoomLeft(t *testing.T) {
	testenv.Require(t, "root", os.Geteuid() == 0, "only root can mount a small disk")
	disk := t.TempDir()
	err := unix.Mount("none", disk, "tmpfs", 0, "mode=0700,size=128m")
	testenv.Require(t, "root", err == nil, "mounting a tmpfs does not work here")
	t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	state := filepath.Join(disk, "state")
	m := onHost(t, state)
	ws := started(t, m)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	killSupervisor(t, m, ws.WorkspaceID)

	filler, err := os.Create(filepath.Join(disk, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	if err := unix.Fallocate(int(filler.Fd()), 0, 0, freeBytes(disk)-40<<10); err != nil {
		t.Fatal(err)
	}
	m = onHost(t, state)
	if got, err := m.Workspace(t.Context(), ws.WorkspaceID); err != nil || got.State != api.StateStopped {
		t.Errorf("on a disk with 40 KiB left: %+v, %v", got, err)
	}
	if _, err := m.DeleteWorkspace(t.Context(), ws.WorkspaceID); err != nil {
		t.Error(err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}
