package workspace

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"iter"
	"path"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/manifest"
	"github.com/pyro-mcp/pyro/internal/patch"
)

// ApplyPatch applies a patch to the files of a running workspace: all of it or
// nothing. It is parsed and checked against every file first.
func (m *Manager) ApplyPatch(ctx context.Context, ref string, text []byte) (*api.PatchResult, error) {
	p, err := patch.Parse(text)
	if err != nil {
		return nil, err
	}
	ws, err := m.running(ctx, ref)
	if err != nil {
		return nil, err
	}
	// Between reading the files and writing them nobody else may patch them.
	h, err := m.holdRow(ctx, ws, lockPatience)
	if err != nil {
		return nil, err
	}
	defer h.release()
	if err := mustRun(h.Workspace); err != nil {
		return nil, err
	}
	sup, client := m.guest(h.Workspace)
	res, err := m.applyPatch(ctx, client, p)
	if err != nil {
		return nil, m.whyBroken(ctx, h.Workspace, sup, err)
	}
	failpoint.Hit("patch/applied")
	detail := map[string]any{"files": res.Summary.Total}
	if err := m.edited(ctx, h.Workspace, eventPatch, detail); err != nil {
		return nil, err
	}
	return &api.PatchResult{WorkspaceID: h.WorkspaceID, Changed: len(res.Entries) > 0, Summary: res.Summary, Entries: res.Entries}, nil
}

func (m *Manager) applyPatch(ctx context.Context, client *guestclient.Client, p *patch.Patch) (*patch.Result, error) {
	files, err := m.fetchFiles(ctx, client, withAncestors(p.Paths()))
	if err != nil {
		return nil, err
	}
	defer files.Close()
	tree := &guestTree{client: client, files: files}
	res, err := p.Apply(ctx, tree)
	if err != nil {
		return nil, err
	}
	remove, err := tree.removals(ctx, &res)
	if err != nil {
		return nil, err
	}
	failpoint.Hit("patch/read")
	req := guestproto.SyncRequest{Destination: api.WorkspacePath, ReplaceKinds: true}
	for _, p := range remove {
		req.Remove = append(req.Remove, guestproto.Path(p))
	}
	r, w := io.Pipe()
	go func() { w.CloseWithError(writeFiles(w, res.Write)) }()
	_, err = client.Sync(ctx, req, r)
	r.Close()
	return &res, err
}

// withAncestors yields the paths and the directories that they lie in.
func withAncestors(paths []string) iter.Seq[string] {
	return func(yield func(string) bool) {
		seen := map[string]bool{".": true}
		for _, p := range paths {
			for ; !seen[p]; p = path.Dir(p) {
				seen[p] = true
				if !yield(p) {
					return
				}
			}
		}
	}
}

// writeFiles writes files as an archive.
func writeFiles(w io.Writer, files []patch.File) error {
	tw := tar.NewWriter(w)
	now := time.Now()
	for _, f := range files {
		h := &tar.Header{Name: f.Path, Typeflag: tar.TypeReg, Mode: int64(f.Mode), Size: int64(len(f.Content)), ModTime: now, Format: tar.FormatPAX}
		if f.Type == manifest.Symlink {
			h.Typeflag, h.Linkname, h.Size, h.Mode = tar.TypeSymlink, string(f.Content), 0, 0o777
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := tw.Write(f.Content); err != nil {
				return err
			}
		}
	}
	return tw.Close()
}

// guestTree is the workspace as a patch sees it: what was fetched of it.
type guestTree struct {
	client *guestclient.Client
	files  *spool
}

// Read implements patch.Tree.
func (t *guestTree) Read(_ context.Context, p string) (patch.File, error) {
	for dir := path.Dir(p); dir != "."; dir = path.Dir(dir) {
		if e, ok := t.files.entries[dir]; ok && e.Type != manifest.Directory {
			return patch.File{}, api.Errorf(api.ErrNotFound, "%s: %s is no directory", p, dir)
		}
	}
	e, ok := t.files.entries[p]
	if !ok {
		return patch.File{}, api.Errorf(api.ErrNotFound, "%s does not exist", p)
	}
	f := patch.File{Path: p, Type: e.Type, Mode: e.Mode}
	switch e.Type {
	case manifest.Symlink:
		f.Content = []byte(e.Target)
	case manifest.File:
		if e.Size > patch.MaxFileBytes {
			return patch.File{}, api.Errorf(api.ErrExhausted, "%s has %d bytes, and a patch changes files of at most %d", p, e.Size, int64(patch.MaxFileBytes))
		}
		r, err := t.files.Open(p)
		if err != nil {
			return patch.File{}, err
		}
		defer r.Close()
		if f.Content, err = io.ReadAll(r); err != nil {
			return patch.File{}, err
		}
	}
	return f, nil
}

// List implements patch.Tree.
func (t *guestTree) List(ctx context.Context, dir string) ([]string, error) {
	var names []string
	_, err := t.client.ListFiles(ctx, api.WorkspacePath+"/"+dir, false, func(e guestproto.FileEntry) error {
		names = append(names, path.Base(string(e.Path)))
		return nil
	})
	return names, err
}

// removals returns what the guest is to remove: the files, and in the place of
// all that a directory held the directory itself.
func (t *guestTree) removals(ctx context.Context, res *patch.Result) ([]string, error) {
	gone := map[string]bool{}
	for _, p := range res.Remove {
		gone[p] = true
	}
	kept := func(dir string) bool {
		for _, f := range res.Write {
			if strings.HasPrefix(f.Path, dir+"/") {
				return true
			}
		}
		return false
	}
	pending := res.Remove
	for len(pending) > 0 {
		dir := path.Dir(pending[0])
		pending = pending[1:]
		if dir == "." || gone[dir] || kept(dir) {
			continue
		}
		names, err := t.List(ctx, dir)
		if err != nil && !errors.Is(err, api.ErrNotFound) {
			return nil, err
		}
		empty := true
		for _, name := range names {
			empty = empty && gone[dir+"/"+name]
		}
		if empty {
			gone[dir] = true
			pending = append(pending, dir)
		}
	}
	var out []string
	for p := range gone {
		if !gone[path.Dir(p)] {
			out = append(out, p)
		}
	}
	return out, nil
}
