package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"net"

	"github.com/pyro-mcp/pyro/api"
)

// MergeLayer implements [engine.LayerMerger]. A QEMU without a machine copies:
// its block-stream job fills the upper layer with what the lower one has and it
// has not. It is confined like one with a guest, so that qcow2 files which a QEMU
// that was taken over may have written are read by nothing that could open
// another file; qemu-img would follow the names in their headers.
//
// What the upper layer shows does not change at any time of the job, whether it
// is read with the lower one below or, in the end, without. The header's name of
// the backing file is changed, too, but nothing of ours goes by it.
func (e *Engine) MergeLayer(ctx context.Context, layers []string, i int, rootImage, _ string) (merged string, err error) {
	if i < 0 || i+1 >= len(layers) {
		return "", api.Errorf(api.ErrInvalid, "layer %d of %d has no layer above it to be merged with", i, len(layers))
	}
	if err := e.merge(ctx, layers[:i+2], rootImage); err != nil {
		return "", fmt.Errorf("merging layer %s into %s: %w", layers[i], layers[i+1], err)
	}
	return layers[i+1], nil
}

// merge merges the last but one of layers into the last.
func (e *Engine) merge(ctx context.Context, layers []string, rootImage string) error {
	files := &opener{}
	defer files.closeAll()
	top := len(layers) - 1
	disk, err := openLayers(files, rootImage, layers[:top])
	if err != nil {
		return err
	}
	if err := disk.openTop(files, layers[top]); err != nil {
		return err
	}
	conn, control := files.pair("qmp")
	if files.err != nil {
		return files.err
	}
	c := newCommand("pyro-merge")
	c.add("-machine", "none")
	c.addMonitor(control)
	nodes := c.addChain(disk, false)
	below, belowPath := nodes[len(nodes)-3], rootImage
	if top > 1 {
		belowPath = layers[top-2]
	}

	var stderr tailBuffer
	cmd, err := e.run(c, layers[top], accelTCG, &stderr)
	if err != nil {
		conn.Close()
		return fmt.Errorf("starting qemu: %w", err)
	}
	control.Close() // so that QEMU's end is the end of the connection
	limit(cmd.Process.Pid, 0, len(layers), disk.size)
	err = stream(ctx, conn, below, belowPath)
	if err != nil {
		_ = cmd.Process.Kill()
	}
	ended := cmd.Wait()
	switch said := stderr.String(); {
	case err == nil && ended == nil:
		// QEMU has written everything; now the host's disk has to have it, before
		// the layer that it is in as well can be removed.
		return disk.disk.Sync()
	case said != "" && ctx.Err() == nil:
		return refusedStart(said)
	case err != nil:
		return err
	default:
		return api.Errorf(api.ErrUnavailable, "qemu %s", describeExit(ended))
	}
}

// stream runs the job in the QEMU behind conn, which it closes, and lets QEMU
// end. Afterwards "disk" stands on the node below.
func stream(ctx context.Context, conn net.Conn, below, belowPath string) error {
	completed := make(chan error, 1)
	q := newQMP(conn, func(event string, data json.RawMessage) {
		// BLOCK_JOB_COMPLETED, qapi/block-core.json. It comes once.
		if event != "BLOCK_JOB_COMPLETED" {
			return
		}
		var d struct {
			Error string `json:"error"`
		}
		err := json.Unmarshal(data, &d)
		switch {
		case err != nil:
			err = fmt.Errorf("reading QEMU's event: %w", err)
		case hostDiskFull(d.Error):
			err = errHostDiskFull
		case d.Error != "":
			err = api.Errorf(api.ErrUnavailable, "qemu said: %s", d.Error)
		}
		select {
		case completed <- err:
		default:
		}
	})
	defer q.close()
	negotiating, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	if err := q.negotiate(negotiating); err != nil {
		return err
	}
	job := map[string]any{"job-id": "merge", "device": "disk", "base-node": below, "backing-file": belowPath}
	if err := q.execute(ctx, "block-stream", job, nil); err != nil {
		return err
	}
	select {
	case err := <-completed:
		if err != nil {
			return err
		}
	case <-q.done:
		return fmt.Errorf("copying the layer: %w", q.err)
	case <-ctx.Done():
		return fmt.Errorf("copying the layer: %w", ctx.Err())
	}
	return q.execute(ctx, "quit", nil, nil)
}
