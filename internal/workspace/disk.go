package workspace

import (
	"context"
	"fmt"
	"os"
	"path"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// openDisk opens a disk of the workspace by its layers, for reading.
func (m *Manager) openDisk(ctx context.Context, ws *store.Workspace, chain []string) (_ *workspacedisk.Disk, release func(), err error) {
	if engine.DiskFormat(ws.DiskFormat) == engine.DiskDirectory {
		why := "it is a directory, as gVisor keeps disks without root"
		if ws.ExecutionMode == api.ModeHostCompat {
			why = "the workspace runs on the host and has none"
		}
		return nil, nil, api.WithHint(api.Errorf(api.ErrUnsupported, "the disk of workspace %s cannot be inspected: %s", label(ws), why),
			"start the workspace and use pyro workspace file, or pyro workspace export")
	}
	var undo []func()
	release = func() {
		for i := len(undo) - 1; i >= 0; i-- {
			undo[i]()
		}
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	image, err := m.environments.UseDigest(ctx, ws.Environment, ws.EnvironmentDigest)
	if err != nil {
		return nil, nil, err
	}
	undo = append(undo, func() { image.Close() })
	paths, seeds, err := m.layerPaths(ctx, chain)
	for _, sd := range seeds {
		undo = append(undo, func() { sd.Close() })
	}
	if err != nil {
		return nil, nil, err
	}
	d, err := workspacedisk.Open(ctx, diskSource(ws, image, paths), workspacedisk.Options{
		HideRuntime: true, DiskBytes: int64(ws.DiskMiB) << 20,
	})
	if err != nil {
		return nil, nil, err
	}
	undo = append(undo, func() { d.Close() })
	return d, release, nil
}

// diskSource says how the layers lie on one another.
func diskSource(ws *store.Workspace, image *environment.Image, paths []string) workspacedisk.Source {
	src := workspacedisk.Source{Path: image.Path, Format: workspacedisk.FormatRaw}
	for _, p := range paths {
		if engine.DiskFormat(ws.DiskFormat) == engine.DiskQcow2 {
			below := src
			src = workspacedisk.Source{Path: p, Format: workspacedisk.FormatQcow2, Backing: &below}
		} else {
			src.Layers = append(src.Layers, workspacedisk.Source{Path: p, Format: workspacedisk.FormatRaw})
		}
	}
	return src
}

// stoppedDisk opens the disk of a stopped workspace, and holds the workspace
// until release so that nobody starts it meanwhile.
func (m *Manager) stoppedDisk(ctx context.Context, ref string) (_ *held, _ *workspacedisk.Disk, release func(), err error) {
	h, err := m.hold(ctx, ref)
	if err != nil {
		return nil, nil, nil, err
	}
	if h.State != api.StateStopped && !h.PausedToDisk {
		h.release()
		return nil, nil, nil, api.WithHint(api.Errorf(api.ErrState, "workspace %s must be stopped before its disk is inspected; it is %s", label(h.Workspace), h.State),
			"pyro workspace stop %s, or use pyro workspace file", refOf(h.Workspace))
	}
	chain := h.Layers
	if _, err := os.Lstat(m.state.Layer(h.ActiveLayer)); err == nil {
		chain = append(chain[:len(chain):len(chain)], h.ActiveLayer)
	}
	d, closeDisk, err := m.openDisk(ctx, h.Workspace, chain)
	if err != nil {
		h.release()
		return nil, nil, nil, err
	}
	return h, d, func() { closeDisk(); h.release() }, nil
}

// DiskList lists a path of a stopped workspace's disk.
func (m *Manager) DiskList(ctx context.Context, ref, path string, recursive bool) (*api.DiskList, error) {
	h, d, release, err := m.stoppedDisk(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer release()
	list, err := d.List(ctx, inWorkspace(path), recursive)
	if err != nil {
		return nil, err
	}
	list.WorkspaceID = h.WorkspaceID
	return list, nil
}

// DiskRead reads a regular file of a stopped workspace's disk.
func (m *Manager) DiskRead(ctx context.Context, ref, path string, maxBytes int64) (*api.DiskRead, error) {
	h, d, release, err := m.stoppedDisk(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer release()
	read, err := d.Read(ctx, inWorkspace(path), maxBytes)
	if err != nil {
		return nil, err
	}
	read.WorkspaceID = h.WorkspaceID
	return read, nil
}

// DiskExport writes a stopped workspace's disk as a raw ext4 image.
func (m *Manager) DiskExport(ctx context.Context, ref, output string) (*api.DiskExport, error) {
	h, d, release, err := m.stoppedDisk(ctx, ref)
	if err != nil {
		return nil, err
	}
	defer release()
	res, err := d.Export(ctx, output)
	if err != nil {
		return nil, err
	}
	res.WorkspaceID = h.WorkspaceID
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	return res, st.AppendEvent(ctx, h.WorkspaceID, eventExport, map[string]any{"path": "disk", "output": fmt.Sprint(res.OutputPath)})
}

// inWorkspace takes a relative path from the workspace; "" is the workspace itself.
func inWorkspace(name string) string {
	if strings.HasPrefix(name, "/") {
		return name
	}
	return path.Join(api.WorkspacePath, name)
}
