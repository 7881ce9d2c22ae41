package workspace

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"

	"github.com/dustin/go-humanize"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/gitdiff"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/manifest"
	"github.com/pyro-mcp/pyro/internal/store"
	"github.com/pyro-mcp/pyro/internal/workspacedisk"
)

// Diff compares the files of a running workspace with its seed or a snapshot.
// It does not count as activity.
func (m *Manager) Diff(ctx context.Context, ref string, req api.DiffRequest) (*api.Diff, error) {
	return inGuest(ctx, m, ref, func(ws *store.Workspace, c *guestclient.Client) (*api.Diff, error) {
		base, err := m.diffBase(ctx, ws, req.From)
		if err != nil {
			return nil, err
		}
		defer base.close()
		diff, err := m.diff(ctx, c, base, req)
		if err != nil {
			return nil, err
		}
		diff.WorkspaceID = ws.WorkspaceID
		return diff, nil
	})
}

func (m *Manager) diff(ctx context.Context, client *guestclient.Client, base *diffBase, req api.DiffRequest) (*api.Diff, error) {
	var unread []api.SkippedEntry
	changes, err := manifest.Compare(base.manifest(ctx), guestManifest(ctx, client, &unread))
	if err != nil {
		return nil, fmt.Errorf("comparing the workspace with %s: %w", base.name, err)
	}
	files, err := m.fetchFiles(ctx, client, changedPaths(changes))
	if err != nil {
		return nil, err
	}
	defer files.Close()
	changes = asFetched(changes, files)

	to, kept := req.Patch, (*boundedBuffer)(nil)
	switch {
	case req.NoPatch:
		to = io.Discard
	case to == nil:
		kept = &boundedBuffer{max: api.MaxDiffPatch}
		to = kept
	}
	res, err := gitdiff.Write(ctx, to, changes, gitdiff.Options{
		Old: base.open,
		New: func(_ context.Context, path string) (io.ReadCloser, error) { return files.Open(path) },
	})
	if err != nil {
		return nil, fmt.Errorf("writing the patch: %w", err)
	}
	if req.Stat != nil {
		if err := gitdiff.WriteStat(req.Stat, res.Stats, cmp.Or(req.StatWidth, 80)); err != nil {
			return nil, err
		}
	}
	d := &api.Diff{
		Base: base.name, Changed: len(res.Entries) > 0 || len(res.Unpatched) > 0,
		Summary: res.Summary, Entries: res.Entries, Unpatched: append(res.Unpatched, unread...),
	}
	if kept != nil {
		d.Patch = kept.String()
	}
	if d.Entries == nil {
		d.Entries = []api.DiffEntry{}
	}
	if d.Unpatched == nil {
		d.Unpatched = []api.SkippedEntry{}
	}
	return d, nil
}

// boundedBuffer takes at most max bytes.
type boundedBuffer struct {
	bytes.Buffer
	max int
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	if b.Len()+len(p) > b.max {
		return 0, api.WithHint(api.Errorf(api.ErrExhausted, "the patch is longer than %s", humanize.IBytes(uint64(b.max))),
			"let it be written to a file: pyro workspace diff ID > changes.patch; or look at --stat first")
	}
	return b.Buffer.Write(p)
}

// changedPaths yields what of the changes is in the workspace now.
func changedPaths(changes []manifest.Change) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, c := range changes {
			if c.New != nil && !isGits(c.Path) && !yield(c.Path) {
				return
			}
		}
	}
}

// isGits reports whether the path is one of Git's own files, which no patch
// carries: what they hold need not be fetched.
func isGits(path string) bool { return strings.Contains("/"+path+"/", "/.git/") }

// asFetched corrects the changes by what was fetched: a workspace that runs may
// have changed its files since it listed them, and what counts is the moment in
// which they were read.
func asFetched(changes []manifest.Change, files *spool) []manifest.Change {
	out := changes[:0]
	for _, c := range changes {
		differs := true
		if c.New != nil && !isGits(c.Path) {
			var now *manifest.Entry
			if e, ok := files.entries[c.Path]; ok {
				now = &e.Entry
			}
			c, differs = c.With(now)
		}
		if differs {
			out = append(out, c)
		}
	}
	return out
}

// guestManifest yields what lies in the workspace now. What the guest cannot
// read is left to unread.
func guestManifest(ctx context.Context, client *guestclient.Client, unread *[]api.SkippedEntry) iter.Seq2[manifest.Entry, error] {
	errStopped := errors.New("nobody wants more")
	return func(yield func(manifest.Entry, error) bool) {
		_, err := client.Manifest(ctx, api.WorkspacePath, func(e guestproto.ManifestEntry) error {
			entry := manifest.Entry{Path: string(e.Path), Type: e.Type, Mode: e.Mode, Size: e.Size, Target: string(e.Target)}
			if e.Error != "" {
				*unread = append(*unread, api.SkippedEntry{Path: validText(entry.Path), Reason: validText(e.Error)})
				if e.Type != manifest.Directory {
					return nil
				}
			}
			if e.SHA256 != "" {
				if _, err := hex.Decode(entry.SHA256[:], []byte(e.SHA256)); err != nil {
					return api.Errorf(api.ErrDamaged, "the guest sent the digest %q", e.SHA256)
				}
			}
			if !yield(entry, nil) {
				return errStopped
			}
			return nil
		})
		if err != nil && !errors.Is(err, errStopped) {
			yield(manifest.Entry{}, err)
		}
	}
}

// A diffBase is what a workspace is compared with.
type diffBase struct {
	name     string
	manifest func(context.Context) iter.Seq2[manifest.Entry, error]
	open     gitdiff.Content
	close    func()
}

// diffBase opens the seed, or a snapshot by its name.
func (m *Manager) diffBase(ctx context.Context, ws *store.Workspace, from string) (*diffBase, error) {
	if from == "" || from == api.BaselineSnapshot {
		return m.seedBase(ctx, ws.SeedDigest, cmp.Or(from, "seed"))
	}
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	snap, err := st.Snapshot(ctx, ws.WorkspaceID, from)
	if err != nil {
		return nil, api.WithHint(fmt.Errorf("comparing workspace %s with %q: %w", label(ws), from, err),
			"pyro workspace snapshot list %s shows them", refOf(ws))
	}
	if engine.DiskFormat(ws.DiskFormat) == engine.DiskDirectory {
		return m.seedBase(ctx, snap.SeedDigest, from)
	}
	chain := snap.Chain
	if snap.Layer != "" {
		chain = append(chain[:len(chain):len(chain)], snap.Layer)
	}
	return m.diskBase(ctx, ws, chain, from)
}

func (m *Manager) seedBase(ctx context.Context, digest, name string) (*diffBase, error) {
	if digest == "" {
		return &diffBase{
			name: name,
			manifest: func(context.Context) iter.Seq2[manifest.Entry, error] {
				return func(func(manifest.Entry, error) bool) {}
			},
			open: func(context.Context, string) (io.ReadCloser, error) {
				return nil, api.Errorf(api.ErrInternal, "an empty seed has no files")
			},
			close: func() {},
		}, nil
	}
	seeds, err := m.seeds()
	if err != nil {
		return nil, err
	}
	sd, err := seeds.Get(ctx, digest)
	if err != nil {
		return nil, fmt.Errorf("opening what the workspace was seeded with: %w", err)
	}
	files, err := sd.Files(ctx)
	if err != nil {
		sd.Close()
		return nil, fmt.Errorf("opening what the workspace was seeded with: %w", err)
	}
	return &diffBase{
		name: name, manifest: sd.Manifest, open: files.Open,
		close: func() {
			files.Close()
			sd.Close()
		},
	}, nil
}

// diskBase reads a snapshot's files off its layers, without running anything.
func (m *Manager) diskBase(ctx context.Context, ws *store.Workspace, chain []string, name string) (*diffBase, error) {
	d, release, err := m.openDisk(ctx, ws, chain)
	if err != nil {
		return nil, fmt.Errorf("reading snapshot %q: %w", name, err)
	}
	open := func(ctx context.Context, path string) (io.ReadCloser, error) {
		r, w := io.Pipe()
		go func() {
			_, _, err := d.CopyFile(ctx, w, api.WorkspacePath+"/"+path, 1<<62)
			w.CloseWithError(err)
		}()
		return r, nil
	}
	return &diffBase{
		name: name, open: open, close: release,
		manifest: func(ctx context.Context) iter.Seq2[manifest.Entry, error] {
			return func(yield func(manifest.Entry, error) bool) {
				err := d.Walk(ctx, api.WorkspacePath, func(e workspacedisk.WalkEntry) error {
					entry := manifest.Entry{Path: e.Path, Type: e.Type, Mode: e.Mode & 0o777, Size: e.Size, Target: e.Target}
					if e.Type == manifest.File {
						sum := sha256.New()
						if _, _, err := d.CopyFile(ctx, sum, api.WorkspacePath+"/"+e.Path, 1<<62); err != nil {
							return err
						}
						sum.Sum(entry.SHA256[:0])
					}
					if !yield(entry, nil) {
						return errEnough
					}
					return nil
				})
				if err != nil && !errors.Is(err, errEnough) && !errors.Is(err, api.ErrNotFound) {
					yield(manifest.Entry{}, err)
				}
			}
		},
	}, nil
}
