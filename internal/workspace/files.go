package workspace

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"unicode/utf8"

	"github.com/dustin/go-humanize"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/seed"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// maxListed bounds the entries of one file listing.
const maxListed = 100_000

// ListFiles lists a directory of a running workspace, one level or all of it.
func (m *Manager) ListFiles(ctx context.Context, ref, path string, recursive bool) (*api.FileList, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.FileList, error) {
		path := inWorkspace(path)
		list := &api.FileList{WorkspaceID: ws.WorkspaceID, Path: path, Entries: []api.DiskEntry{}}
		_, err := c.ListFiles(ctx, path, recursive, func(e guestproto.FileEntry) error {
			if len(list.Entries) == maxListed {
				list.Truncated = true
				return errEnough
			}
			list.Entries = append(list.Entries, api.NewDiskEntry(string(e.Path), e.ArtifactType, e.SizeBytes, string(e.LinkTarget)))
			return nil
		})
		if list.Truncated {
			err = nil
		}
		return list, err
	})
}

// errEnough ends a listing of which no more is wanted.
var errEnough = api.Errorf(api.ErrExhausted, "enough")

// ReadFile reads at most maxBytes bytes of a file of a running workspace, from
// offset on. It does not count as activity.
func (m *Manager) ReadFile(ctx context.Context, ref, path string, offset, maxBytes int64) (*api.FileRead, error) {
	if maxBytes <= 0 {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "max_bytes must be positive"), "give --max-bytes a number of bytes above 0")
	}
	if maxBytes > workspacedisk.MaxReadBytes {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "max_bytes is %d, and one read returns at most %d", maxBytes, workspacedisk.MaxReadBytes),
			"read on with --offset, or use pyro workspace export")
	}
	if offset < 0 {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "the offset is %d", offset), "give --offset a number of bytes, 0 or more")
	}
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.FileRead, error) {
		var content bytes.Buffer
		reply, err := c.ReadFile(ctx, path, offset, maxBytes, &content)
		if err != nil {
			return nil, err
		}
		read := &api.FileRead{
			WorkspaceID: ws.WorkspaceID, Path: inWorkspace(path), SizeBytes: reply.SizeBytes,
			Offset: offset, MaxBytes: maxBytes, Truncated: reply.Truncated,
		}
		read.Content, read.ContentBase64 = asText(content.Bytes(), reply.Truncated)
		return read, nil
	})
}

// asText returns content as text, or in base64 where it is none. A character
// that the bound cut in two at the end is left out.
func asText(b []byte, cutAtEnd bool) (text, encoded string) {
	if whole := wholeRunes(b); cutAtEnd && utf8.Valid(whole) {
		return string(whole), ""
	}
	if utf8.Valid(b) {
		return string(b), ""
	}
	return "", base64.StdEncoding.EncodeToString(b)
}

// MaxFileWrite bounds the content of one file write; more than that is for sync.
const MaxFileWrite = 1 << 20

// WriteFile writes a file of a running workspace: all of it or nothing.
func (m *Manager) WriteFile(ctx context.Context, ref, path string, content []byte) (*api.FileWrite, error) {
	if len(content) > MaxFileWrite {
		return nil, api.WithHint(api.Errorf(api.ErrExhausted, "the content has more than %s, which is all that a file write takes", humanize.IBytes(MaxFileWrite)),
			"bring larger files in with pyro workspace sync push")
	}
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.FileWrite, error) {
		reply, err := c.WriteFile(ctx, guestproto.WriteFileRequest{Path: guestproto.Path(path)}, bytes.NewReader(content))
		if err != nil {
			return nil, err
		}
		out := &api.FileWrite{WorkspaceID: ws.WorkspaceID, Path: string(reply.Path), BytesWritten: reply.BytesWritten, Created: reply.Created}
		return out, m.edited(ctx, ws, eventWrite, map[string]any{"path": validText(path), "bytes": reply.BytesWritten})
	})
}

// edited records a change of the workspace's files from outside.
func (m *Manager) edited(ctx context.Context, ws *store.Workspace, kind string, detail map[string]any) error {
	st, err := m.store(ctx)
	if err != nil {
		return err
	}
	if err := st.AppendEvent(ctx, ws.WorkspaceID, kind, detail); err != nil {
		return err
	}
	return m.active(ctx, ws)
}

// SyncPush copies a directory or an archive of this host over a directory of a
// running workspace: all of it or nothing.
func (m *Manager) SyncPush(ctx context.Context, ref string, req api.SyncRequest) (*api.SyncResult, error) {
	if req.SourcePath == "" {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "no source was given"), "name a directory or a tar archive on this host")
	}
	source, err := sourceAt(req.SourcePath, req.IncludeIgnored)
	if err != nil {
		return nil, err
	}
	ws, err := m.running(ctx, ref)
	if err != nil {
		return nil, err
	}
	sup, client := m.guest(ws)
	dest := cmp.Or(req.Destination, api.WorkspacePath)
	progress := orSilent(req.Progress)

	var info api.WorkspaceSeed
	r, w := io.Pipe()
	read := make(chan error, 1)
	go func() {
		var err error
		info, err = seed.WriteTar(ctx, source, w, progress)
		w.CloseWithError(err)
		read <- err
	}()
	reply, err := client.Sync(ctx, guestproto.SyncRequest{Destination: guestproto.Path(dest)}, r)
	r.Close() // a writer that the guest no longer reads from ends
	if readErr := <-read; readErr != nil && !isClosedPipe(readErr) {
		return nil, fmt.Errorf("reading %s: %w", req.SourcePath, readErr)
	}
	if err != nil {
		return nil, m.whyBroken(ctx, ws, sup, err)
	}
	failpoint.Hit("sync/applied")
	err = m.edited(ctx, ws, eventSync, map[string]any{"source": source.Path, "destination": string(reply.Destination), "entries": reply.EntryCount})
	if err != nil {
		return nil, err
	}
	return &api.SyncResult{
		WorkspaceID: ws.WorkspaceID, SourcePath: source.Path, Destination: string(reply.Destination),
		EntryCount: reply.EntryCount, BytesWritten: reply.BytesWritten, Skipped: info.Skipped, SkippedCount: info.SkippedCount,
	}, nil
}
