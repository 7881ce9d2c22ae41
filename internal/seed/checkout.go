package seed

import (
	"context"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/manifest"
)

// rules say what of a checkout is ignored.
type rules struct {
	ignored map[string]bool // paths in the seed
}

func (r *rules) ignores(dst string) bool { return r != nil && r.ignored[dst] }

// newRules asks git about the directory dir, which is dst in the seed.
func (w *walker) newRules(c checkout, dir, dst string) (*rules, error) {
	if w.opts.IncludeIgnored {
		return nil, nil
	}
	if w.git == nil {
		w.report.skip(path.Join(dst, ".git"), "git is not installed on this host: what it would ignore was taken too")
		return nil, nil
	}
	names, err := w.git.ignored(w.ctx, c, dir)
	if err != nil {
		if w.ctx.Err() != nil {
			return nil, context.Cause(w.ctx)
		}
		w.report.skip(path.Join(dst, ".git"), "git cannot read this checkout, so what it would ignore was taken too: "+err.Error())
		return nil, nil
	}
	r := &rules{ignored: make(map[string]bool, len(names))}
	for _, name := range names {
		if name = strings.TrimSuffix(name, "/"); name != "" {
			r.ignored[path.Join(dst, name)] = true
		}
	}
	return r, nil
}

// hostPath returns where a source lies on the host, for git.
func (w *walker) hostPath(p place) string {
	return filepath.Join(w.roots[p.root].Name(), filepath.FromSlash(p.path))
}

// enterCheckout gives a frame that is the top of a checkout its rules. Those of
// a checkout around it end here, as they do for git.
func (w *walker) enterCheckout(fr *frame) (err error) {
	top := w.hostPath(fr.sources[0].place)
	c := checkout{top: top, gitDir: filepath.Join(top, ".git")}
	if g, ok := readGitFile(c.gitDir); ok {
		c.gitDir = g
	}
	if fr.rules, err = w.newRules(c, top, fr.dst); err != nil {
		return err
	}
	if fr.dst == "" {
		return w.origin(c, top)
	}
	return nil
}

// enterAround looks for a checkout that the seed's directory lies in without
// being its top.
func (w *walker) enterAround(fr *frame, dir string) error {
	c, ok := around(dir)
	if !ok || w.git == nil || w.git.ignoresAll(w.ctx, c, dir) {
		return nil
	}
	var err error
	if fr.rules, err = w.newRules(c, dir, ""); err != nil {
		return err
	}
	return w.origin(c, dir)
}

func (w *walker) origin(c checkout, dir string) error {
	w.isGit = true
	if w.git == nil {
		return nil
	}
	var err error
	w.commit, err = w.git.head(w.ctx, c, dir)
	if err != nil && w.ctx.Err() != nil {
		return context.Cause(w.ctx)
	}
	return nil // a commit that cannot be told is no reason to take nothing
}

// around returns the nearest checkout above dir. One that belongs to neither
// this user nor the directory's owner is none: anybody may have put it into a
// directory such as /tmp.
func around(dir string) (checkout, bool) {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return checkout{}, false
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return checkout{}, false
	}
	var own, st unix.Stat_t
	if unix.Stat(dir, &own) != nil {
		return checkout{}, false
	}
	for top := filepath.Dir(dir); ; top = filepath.Dir(top) {
		gitDir := filepath.Join(top, ".git")
		if unix.Lstat(gitDir, &st) == nil {
			if st.Uid != own.Uid && int(st.Uid) != os.Geteuid() {
				return checkout{}, false
			}
			if g, ok := readGitFile(gitDir); ok {
				gitDir = g
			}
			return checkout{top: top, gitDir: gitDir}, true
		}
		if top == filepath.Dir(top) {
			return checkout{}, false
		}
	}
}

// maxGitFile bounds the small files that lead from one directory of Git to
// another: a line with a path.
const maxGitFile = manifest.MaxPath + 64

// readGitFile returns where a .git file of a worktree or a submodule leads.
func readGitFile(file string) (gitDir string, ok bool) {
	text, ok := readSmall(file, maxGitFile)
	if !ok {
		return "", false
	}
	target, ok := strings.CutPrefix(strings.TrimRight(text, "\r\n"), "gitdir: ")
	if !ok || target == "" {
		return "", false
	}
	if !filepath.IsAbs(target) {
		target = filepath.Join(filepath.Dir(file), target)
	}
	return target, true
}

// readSmall returns the content of a regular file of at most limit bytes.
func readSmall(file string, limit int64) (string, bool) {
	f, err := os.OpenFile(file, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", false
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() || fi.Size() > limit {
		return "", false
	}
	b := make([]byte, fi.Size())
	n, err := f.ReadAt(b, 0)
	if err != nil && n < len(b) {
		return "", false
	}
	return string(b), true
}
