package workspace

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/store"
)

// compact gives back the room of layers that no snapshot is any more and that
// the disk only stands on: such a layer becomes one with that above it.
// That needs an engine that can, and a machine that does not run; else the
// layers stay until the workspace is stopped, reset or deleted.
func (h *held) compact(ctx context.Context) error {
	if h.State == api.StateStopped || h.PausedToDisk {
		if err := h.mergeLayers(ctx); err != nil {
			return err
		}
	}
	_, err := h.m.collect(ctx)
	return err
}

func (h *held) mergeLayers(ctx context.Context) (err error) {
	merger, ok := engineAs[engine.LayerMerger](h)
	if !ok {
		return nil
	}
	st, err := h.m.store(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if h.Intent == intentCompact {
			err = errors.Join(err, h.update(context.WithoutCancel(ctx), func(ws *store.Workspace) error {
				ws.Intent, ws.PendingLayer = "", ""
				return nil
			}))
		}
	}()
	for {
		snapshots, err := st.Snapshots(ctx, h.WorkspaceID)
		if err != nil {
			return err
		}
		shared, err := st.LayersOfOthers(ctx, h.WorkspaceID)
		if err != nil {
			return err
		}
		chain := append(slices.Clone(h.Layers), h.ActiveLayer)
		i := mergeable(chain, snapshots, shared, func(layer string) bool {
			_, err := os.Lstat(h.m.state.Layer(layer))
			return err == nil
		})
		if i < 0 {
			return nil
		}
		merged, err := h.merge(ctx, merger, chain, i)
		if errors.Is(err, api.ErrBusy) {
			// A fork stands on it, and so on all that is below: another time.
			h.m.log.Info("leaving the layers of a disk as they are", "workspace", h.WorkspaceID, "error", err)
			return nil
		}
		if err != nil {
			return err
		}
		failpoint.Hit("compact/merged")
		if err := st.MergeLayers(ctx, h.WorkspaceID, chain[i], chain[i+1], merged); err != nil {
			return err
		}
		failpoint.Hit("compact/recorded")
		if h.Workspace, err = st.Get(ctx, h.WorkspaceID); err != nil {
			return err
		}
		// At once: the next merge needs room, too.
		if _, err := h.m.collect(ctx); err != nil {
			return err
		}
	}
}

// engineAs returns the workspace's engine, if it is a T.
func engineAs[T any](h *held) (T, bool) {
	for _, e := range h.m.engines {
		if e.Name() == h.Engine {
			t, ok := e.(T)
			return t, ok
		}
	}
	var none T
	return none, false
}

// mergeable returns the highest element of a disk's chain that can become one
// with the one above it, of which there is a file: it is no snapshot's own layer,
// and nothing stands on it but that one. It returns -1 if there is none.
//
// The highest first, because what is merged is merged again with the next: so
// the layers of a long chain are copied together from the latest, mostly small,
// to the oldest, mostly large. What is shared with other workspaces, such as
// forks, would only be there twice: it is merged where the chain is too long.
func mergeable(chain []string, snapshots []*store.Snapshot, shared map[string]bool, exists func(layer string) bool) int {
	for i := len(chain) - 2; i >= 0; i-- {
		layer, above := chain[i], chain[i+1]
		if strings.HasPrefix(layer, seedPrefix) {
			continue
		}
		free := !shared[layer] || len(chain)-1 > compactAt
		for _, s := range snapshots {
			whole := append(slices.Clone(s.Chain), s.Layer)
			j := slices.Index(whole, layer)
			if j < 0 {
				continue
			}
			if s.Layer == layer || whole[j+1] != above {
				free = false
			}
		}
		if free && exists(above) { // else a new disk that nobody has started yet
			return i
		}
	}
	return -1
}

// merge has the engine merge element i of chain with the one above, and returns
// the name of the layer that holds both.
func (h *held) merge(ctx context.Context, merger engine.LayerMerger, chain []string, i int) (merged string, err error) {
	spare := newLayer(engine.DiskFormat(h.DiskFormat))
	err = h.update(ctx, func(ws *store.Workspace) error {
		ws.Intent, ws.PendingLayer = intentCompact, spare
		return nil
	})
	if err != nil {
		return "", err
	}
	paths, locks, err := h.m.layerPaths(ctx, chain)
	for _, l := range locks {
		defer l.Close()
	}
	if err != nil {
		return "", err
	}
	rootImage := ""
	if h.EnvironmentDigest != "" { // engine host needs none
		image, err := h.m.environments.UseDigest(ctx, h.Environment, h.EnvironmentDigest)
		if err != nil {
			return "", err
		}
		defer image.Close()
		rootImage = image.Path
	}
	var launcher []string
	if l, ok := merger.(engine.Launcher); ok {
		if launcher, err = l.Launcher(); err != nil {
			return "", err
		}
	}
	failpoint.Hit("compact/begun")
	path, err := "", error(nil)
	if len(launcher) == 0 {
		path, err = merger.MergeLayer(ctx, paths, i, rootImage, h.m.state.Layer(spare))
	} else {
		path, err = h.m.mergeBehind(ctx, launcher, mergeRequest{
			Engine: h.Engine, Chain: paths, Index: i, RootImage: rootImage, Spare: h.m.state.Layer(spare),
		})
	}
	switch {
	case err != nil:
		return "", err
	case path == h.m.state.Layer(spare):
		return spare, nil
	}
	return chain[i+1], nil
}

// MergeCommand is the hidden subcommand that merges two layers in the
// surroundings of an engine's [engine.Launcher].
const MergeCommand = "merge-layers"

// mergeRequest is what it reads on stdin, which stays open for as long as the
// result is wanted, and mergeReply what it answers on stdout.
type mergeRequest struct {
	Engine    string   `json:"engine"`
	Chain     []string `json:"chain"`
	Index     int      `json:"index"`
	RootImage string   `json:"root_image"`
	Spare     string   `json:"spare"`
}

type mergeReply struct {
	Merged string         `json:"merged"`
	Error  *api.WireError `json:"error,omitempty"`
}

// mergeBehind runs that command behind launcher.
func (m *Manager) mergeBehind(ctx context.Context, launcher []string, req mergeRequest) (merged string, err error) {
	binary, err := m.findBinary()
	if err != nil {
		return "", err
	}
	argv := append(slices.Clone(launcher), binary, MergeCommand)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("starting the process that merges layers: %w", err)
	}
	defer context.AfterFunc(ctx, func() { in.Close() })()
	sendErr := json.NewEncoder(in).Encode(req)
	var reply mergeReply
	readErr := json.NewDecoder(io.LimitReader(out, 64<<10)).Decode(&reply)
	in.Close()
	endErr := cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case readErr != nil:
		return "", api.Errorf(api.ErrInternal, "the process that merges layers died: %w", errors.Join(sendErr, endErr))
	case reply.Error != nil:
		return "", reply.Error.Err()
	}
	return reply.Merged, nil
}

// MainMerge is that command, given the engines that there are.
func MainMerge(ctx context.Context, engines []engine.Engine, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var req mergeRequest
	requests := json.NewDecoder(in)
	if err := requests.Decode(&req); err != nil {
		return api.WithHint(api.Errorf(api.ErrInvalid, "reading the request: %w", err), "%s is started by pyro itself; it is no command for people", MergeCommand)
	}
	go func() {
		_, _ = io.Copy(io.Discard, in) // until nobody wants it any more
		cancel()
	}()
	var reply mergeReply
	err := api.Errorf(api.ErrInvalid, "there is no engine %q that merges layers", req.Engine)
	for _, e := range engines {
		if merger, ok := e.(engine.LayerMerger); ok && e.Name() == req.Engine {
			reply.Merged, err = merger.MergeLayer(ctx, req.Chain, req.Index, req.RootImage, req.Spare)
		}
	}
	if err != nil {
		reply.Error = api.ToWire(err)
	}
	return json.NewEncoder(out).Encode(reply)
}
