package workspace

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/archive"
	"github.com/pyro-mcp/pyro/internal/failpoint"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// maxExport bounds the bytes of one export, holes included.
const maxExport = 64 << 30

// Export copies a file or directory out of a running workspace to a path of
// this host at which nothing may be. It appears there complete or not at all.
// Links that lead out of what is exported are left out and reported.
func (m *Manager) Export(ctx context.Context, ref string, req api.ExportRequest) (*api.ExportResult, error) {
	if req.OutputPath == "" {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "no output path was given"), "add --output PATH")
	}
	output, err := filepath.Abs(req.OutputPath)
	if err != nil {
		return nil, err
	}
	from, err := guestproto.WorkspacePath(guestproto.Path(cmp.Or(req.Path, api.WorkspacePath)))
	if err != nil {
		return nil, err
	}
	ws, err := m.running(ctx, ref)
	if err != nil {
		return nil, err
	}
	out, err := newOutput(output)
	if err != nil {
		return nil, err
	}
	defer out.discard()
	sup, client := m.guest(ws)
	failpoint.Hit("export/staged")
	res, err := out.receive(ctx, client, string(from))
	failpoint.Hit("export/received")
	if err != nil {
		return nil, m.whyBroken(ctx, ws, sup, fmt.Errorf("exporting %s: %w", from, err))
	}
	if err := out.publish(res.ArtifactType); err != nil {
		return nil, err
	}
	failpoint.Hit("export/published")
	res.WorkspaceID = ws.WorkspaceID
	st, err := m.store(ctx)
	if err != nil {
		return nil, err
	}
	err = st.AppendEvent(ctx, ws.WorkspaceID, eventExport, map[string]any{
		"path": validText(string(from)), "output": output, "entries": res.EntryCount, "bytes": res.BytesWritten,
	})
	return res, err
}

// output is where an export is gathered: a directory beside the place where it
// will appear, so that a rename puts it there. Its flock is held: one that nobody
// holds is left over.
type output struct {
	path   string
	parent *os.File
	stage  string // name in parent
	lock   *os.File
	root   *os.Root
}

const stagePrefix = ".pyro-export-"

func newOutput(path string) (_ *output, err error) {
	o := &output{path: path, stage: stagePrefix + newID()}
	if _, err := os.Lstat(path); err == nil {
		return nil, outputExists(path)
	}
	// The parent is opened once and all goes through it: nobody can put a link
	// in its place meanwhile.
	if o.parent, err = os.Open(filepath.Dir(path)); err != nil {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "the output's directory cannot be opened: %w", err), "make it first, or choose another --output")
	}
	defer func() {
		if err != nil {
			o.parent.Close()
		}
	}()
	removeStages(o.parent)
	// Another export may take it for left over before it is locked.
	for range 10 {
		if err := unix.Mkdirat(int(o.parent.Fd()), o.stage, 0o700); err != nil {
			return nil, fmt.Errorf("making a directory beside %s: %w", path, err)
		}
		// A file system without locks loses only the cleaning up.
		if o.lock, err = lockStage(o.parent, o.stage); !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
		o.stage = stagePrefix + newID()
	}
	o.root, err = os.OpenRoot(o.stagePath())
	if err != nil {
		o.lock.Close()
	}
	return o, err
}

// stagePath is a path of the stage whatever its parent is called meanwhile.
func (o *output) stagePath() string { return stagePath(o.parent, o.stage) }

func stagePath(parent *os.File, name string) string {
	return filepath.Join("/proc/self/fd", fmt.Sprint(parent.Fd()), name)
}

// lockStage takes the flock of a stage of this user, which has that name then.
// One that another holds is EWOULDBLOCK, one that is gone ENOENT.
func lockStage(parent *os.File, name string) (_ *os.File, err error) {
	fd, err := unix.Openat(int(parent.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, err
	}
	var held, there unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &held), unix.Fstatat(int(parent.Fd()), name, &there, unix.AT_SYMLINK_NOFOLLOW)); err != nil {
		return nil, err
	}
	if held.Ino != there.Ino || held.Dev != there.Dev || int(held.Uid) != os.Geteuid() {
		return nil, unix.ENOENT
	}
	return f, nil
}

// removeStages removes the stages in parent of exports that were killed.
func removeStages(parent *os.File) {
	names, err := os.ReadDir(filepath.Join("/proc/self/fd", fmt.Sprint(parent.Fd())))
	if err != nil {
		return // whoever may not list may still write
	}
	for _, e := range names {
		if id, ok := strings.CutPrefix(e.Name(), stagePrefix); !ok || len(id) != idLength || !e.IsDir() {
			continue
		}
		lock, err := lockStage(parent, e.Name())
		if err != nil {
			continue
		}
		_ = os.RemoveAll(stagePath(parent, e.Name()))
		lock.Close()
	}
}

func outputExists(path string) error {
	return api.WithHint(api.Errorf(api.ErrExists, "output_path already exists: %s", path), "choose another path, or remove it first")
}

// receive unpacks what the guest sends into the stage.
func (o *output) receive(ctx context.Context, client *guestclient.Client, from string) (*api.ExportResult, error) {
	if err := o.root.Mkdir("tree", 0o755); err != nil {
		return nil, err
	}
	tree, err := o.root.OpenRoot("tree")
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	r, w := io.Pipe()
	type answer struct {
		head guestproto.ExportHeader
		err  error
	}
	sent := make(chan answer, 1)
	go func() {
		head, err := client.ExportArchive(ctx, from, w)
		w.CloseWithError(err)
		sent <- answer{head, err}
	}()
	got, err := archive.Extract(ctx, tree, r, archive.ExtractOptions{
		Links: archive.LinksInside, Fresh: true, Limits: archive.Limits{Bytes: maxExport},
	})
	if err == nil {
		_, err = io.Copy(io.Discard, r)
	}
	r.Close()
	a := <-sent
	if a.err != nil && !isClosedPipe(a.err) {
		return nil, a.err
	}
	if err != nil {
		return nil, err
	}
	res := &api.ExportResult{
		WorkspacePath: from, OutputPath: o.path, ArtifactType: a.head.ArtifactType,
		EntryCount: got.Entries, BytesWritten: got.Bytes, Skipped: []api.SkippedEntry{}, SkippedCount: got.SkippedCount, Active: []string{},
	}
	for _, s := range got.Skipped {
		res.Skipped = append(res.Skipped, api.SkippedEntry{Path: validText(s.Path), Reason: s.Reason})
	}
	if a.head.ArtifactType != archive.Directory {
		// One file: it comes alone, under the name that the path says.
		if err := single(tree, path.Base(from)); err != nil {
			return nil, err
		}
		return res, nil
	}
	res.Active, err = activeFiles(filepath.Join(o.root.Name(), "tree"))
	return res, err
}

// single checks that exactly the one thing asked for has come.
func single(tree *os.Root, name string) error {
	if _, err := tree.Lstat(name); err != nil {
		return api.WithHint(api.Errorf(api.ErrInvalid, "%q is a link that leads out of the workspace, or the guest sent something else", name),
			"export what it points to, or the directory around it")
	}
	return nil
}

// publish puts the stage's content to the output path, without ever replacing
// anything.
func (o *output) publish(kind string) error {
	from := o.stage + "/tree"
	if kind != archive.Directory {
		entries, err := os.ReadDir(filepath.Join(o.root.Name(), "tree"))
		if err != nil || len(entries) != 1 {
			return api.Errorf(api.ErrDamaged, "the guest sent %d files in the place of one", len(entries))
		}
		from += "/" + entries[0].Name()
	}
	fd := int(o.parent.Fd())
	err := unix.Renameat2(fd, from, fd, filepath.Base(o.path), unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		return outputExists(o.path)
	}
	if err != nil {
		return fmt.Errorf("putting the export to %s: %w", o.path, err)
	}
	return nil
}

// discard removes the stage.
func (o *output) discard() {
	o.root.Close()
	_ = os.RemoveAll(o.stagePath())
	o.lock.Close()
	o.parent.Close()
}

// maxActive bounds the list of active files.
const maxActive = 100

// activeFiles finds what tools of this host run or obey by themselves as soon
// as somebody works in the exported directory. Nobody else writes to that yet. It
// is not walked as an fs.FS, because that knows no names but UTF-8.
func activeFiles(tree string) ([]string, error) {
	found := []string{}
	err := filepath.WalkDir(tree, func(p string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrPermission) {
			return fs.SkipDir // nor can the tools read it
		}
		if rel := strings.TrimPrefix(p, tree+"/"); err == nil && isActive(rel) {
			if found = append(found, validText(rel)); len(found) == maxActive {
				return fs.SkipAll
			}
		}
		return err
	})
	return found, err
}

// isActive knows files by their path: settings and hooks of Git, of editors, of
// agents, and of shells.
func isActive(p string) bool {
	slashed := "/" + p
	for _, suffix := range []string{
		"/.git/config", "/.envrc", "/.mcp.json", "/.vscode/tasks.json", "/.vscode/settings.json", "/.vscode/launch.json",
		"/.claude/settings.json", "/.claude/settings.local.json", "/.cursor/mcp.json", "/.codex/config.toml", "/opencode.json",
		"/.idea/workspace.xml", "/.pre-commit-config.yaml", "/.gitmodules", "/.husky/_/husky.sh",
	} {
		if strings.HasSuffix(slashed, suffix) {
			return true
		}
	}
	if dir, name := path.Split(slashed); strings.HasSuffix(dir, "/.git/hooks/") || strings.Contains(dir, "/.git/modules/") && strings.HasSuffix(dir, "/hooks/") {
		return !strings.HasSuffix(name, ".sample")
	}
	return false
}
