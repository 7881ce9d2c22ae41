package seed

import (
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/manifest"
)

// maxConfig bounds a repository's configuration file.
const maxConfig = 1 << 20

// gitFile takes the .git file of a worktree or a submodule. Where it leads to a
// place inside the seed it stays; else the Git directory that it names becomes
// .git itself, so that the guest has the history too.
//
// The file is part of what may be hostile, and could name any directory of the
// host: only a Git directory that names this checkout in turn is believed.
func (w *walker) gitFile(fr *frame, it item) error {
	it.typ = manifest.File
	top := w.hostPath(fr.sources[0].place)
	file := filepath.Join(top, ".git")
	text, ok := readSmall(file, maxGitFile)
	gitDir, isLink := readGitFile(file)
	it.size = int64(len(text))
	if !ok || !isLink {
		w.report.skip(it.path, "it is no Git directory and names none")
		return nil
	}
	target, _ := strings.CutPrefix(strings.TrimRight(text, "\r\n"), "gitdir: ")
	if inside := path.Join(fr.dst, target); !filepath.IsAbs(target) && filepath.IsLocal(inside) {
		if dir, err := w.openPlace(place{0, inside}); err == nil {
			dir.Close()
			return w.add(it)
		}
	}
	common, kind := gitDirOf(gitDir, file, top)
	if kind == "" {
		w.report.skip(it.path, "the Git directory that it names does not belong to this checkout")
		return nil
	}
	return w.gitDir(fr, it, gitDir, common)
}

// gitDirOf finds out whether gitDir belongs to the checkout at top: as a
// worktree's, whose file gitdir names the checkout's .git file, or a
// submodule's, whose configuration names its work tree. common is the directory
// that holds what a worktree shares.
func gitDirOf(gitDir, file, top string) (common, kind string) {
	if back, ok := readSmall(filepath.Join(gitDir, "gitdir"), maxGitFile); ok {
		back = strings.TrimRight(back, "\r\n")
		if !filepath.IsAbs(back) {
			back = filepath.Join(gitDir, back)
		}
		shared, ok := readSmall(filepath.Join(gitDir, "commondir"), maxGitFile)
		if !ok || !sameFile(back, file) {
			return "", ""
		}
		common = strings.TrimRight(shared, "\r\n")
		if !filepath.IsAbs(common) {
			common = filepath.Join(gitDir, common)
		}
		return common, "worktree"
	}
	config, ok := readSmall(filepath.Join(gitDir, "config"), maxConfig)
	if !ok {
		return "", ""
	}
	for line := range strings.SplitSeq(config, "\n") {
		key, value, _ := strings.Cut(line, "=")
		value = strings.Trim(strings.TrimSpace(value), `"`)
		if strings.EqualFold(strings.TrimSpace(key), "worktree") && value != "" {
			if !filepath.IsAbs(value) {
				value = filepath.Join(gitDir, value)
			}
			if sameFile(value, top) {
				return "", "submodule"
			}
		}
	}
	return "", ""
}

func sameFile(a, b string) bool {
	var x, y unix.Stat_t
	return unix.Stat(a, &x) == nil && unix.Stat(b, &y) == nil && x.Dev == y.Dev && x.Ino == y.Ino
}

// shared are the names in a Git directory that its worktrees have in common
// (gitrepository-layout(5)).
var shared = []string{"branches", "common", "config", "description", "hooks", "info", "lfs", "logs", "modules", "objects", "packed-refs", "refs", "shallow", "svn"}

// gitDir makes .git of a Git directory elsewhere on the host, a worktree's
// together with what is shared.
func (w *walker) gitDir(fr *frame, it item, gitDir, common string) error {
	next := frame{dst: it.path, depth: fr.depth + 1, inGit: true}
	dirs := []string{gitDir}
	if common != "" {
		dirs = []string{common, gitDir}
		next.leave = func(source int, rel string) bool {
			top, _, _ := strings.Cut(rel, "/")
			if source == 0 { // what is the main worktree's own
				return !slices.Contains(shared, top) || rel == "logs/HEAD" || rel == "refs/bisect" || rel == "refs/worktree" || rel == "refs/rewritten"
			}
			return rel == "commondir" || rel == "gitdir" || rel == "locked"
		}
	}
	for _, d := range dirs {
		root, err := w.addRoot(d)
		if err != nil {
			w.report.skip(it.path, reasonOf(err))
			return nil
		}
		f, err := w.openPlace(place{root: root})
		if err != nil {
			w.report.skip(it.path, reasonOf(err))
			return nil
		}
		defer f.Close()
		next.sources = append(next.sources, source{place{root: root}, f})
	}
	it.typ, it.mode = manifest.Directory, 0o755
	if err := w.add(it); err != nil {
		return err
	}
	first := len(w.items)
	if err := w.walk(next); err != nil {
		return err
	}
	// Later lines win: the work tree is the directory around .git now.
	if i := slices.IndexFunc(w.items[first:], func(i item) bool { return i.path == it.path+"/config" }); i >= 0 {
		config := &w.items[first+i]
		if text, ok := readSmall(filepath.Join(dirs[0], "config"), maxConfig); ok {
			w.bytes -= config.size
			config.content = []byte(strings.TrimRight(text, "\n") + "\n[core]\n\tbare = false\n\tworktree = ..\n")
			config.size = int64(len(config.content))
			w.bytes += config.size
		}
	}
	return nil
}
