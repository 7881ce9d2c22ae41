package mcpserver

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"

	"github.com/pyro-mcp/pyro/api"
)

// ProjectOptions say what workspaces are seeded from where a call names
// nothing. At most one of Path, RepoURL and None is set; with none of them it is
// the Git checkout that contains Dir.
type ProjectOptions struct {
	// Path is a directory or a tar archive.
	Path string
	// RepoURL is cloned on this host, RepoRef of it: a branch, a tag or a
	// commit, the default branch if "".
	RepoURL, RepoRef string
	None             bool
	IncludeIgnored   bool
	// Dir is the directory to look for a checkout in, the working directory if
	// "".
	Dir string
}

// Check reports whether the options go together.
func (o ProjectOptions) Check() error {
	n := 0
	for _, set := range []bool{o.Path != "", o.RepoURL != "", o.None} {
		if set {
			n++
		}
	}
	if n > 1 {
		return api.Errorf(api.ErrInvalid, "--project-path, --repo-url and --no-project-source exclude each other")
	}
	if o.RepoRef != "" && o.RepoURL == "" {
		return api.WithHint(api.Errorf(api.ErrInvalid, "--repo-ref was given without --repo-url"), "pass --repo-url as well")
	}
	if o.RepoURL != "" {
		return checkRepo(o.RepoURL, o.RepoRef)
	}
	return nil
}

// A project is what workspaces are seeded from by default; one without a path
// and a clone is none.
type project struct {
	path           string // real path
	includeIgnored bool
	clone          *clone
	// found says how it came to be, for people.
	found string
}

// openProject finds the project. Not finding one by itself is no error; not
// finding one that was named is.
func openProject(ctx context.Context, o ProjectOptions, log *slog.Logger) (*project, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	p := &project{includeIgnored: o.IncludeIgnored}
	switch {
	case o.None:
		p.found = "--no-project-source was given"
	case o.RepoURL != "":
		c, err := startClone(ctx, o.RepoURL, o.RepoRef, log)
		if err != nil {
			return nil, err
		}
		p.clone, p.found = c, "--repo-url"
	case o.Path != "":
		abs, err := filepath.Abs(o.Path)
		if err != nil {
			return nil, fmt.Errorf("looking at --project-path: %w", err)
		}
		if p.path, err = filepath.EvalSymlinks(abs); err != nil {
			return nil, fmt.Errorf("looking at --project-path: %w", pathError(err, o.Path))
		}
		p.found = "--project-path"
	default:
		p.path, p.found = findCheckout(o.Dir)
	}
	log.Info("project source", "source", p.name(), "because", p.found)
	return p, nil
}

// findCheckout returns the top of the Git checkout that contains dir. Whatever
// is wrong with it is a reason for there being no project.
func findCheckout(dir string) (top, why string) {
	if dir == "" {
		var err error
		if dir, err = os.Getwd(); err != nil {
			return "", "the working directory is gone"
		}
	}
	start, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", "the working directory cannot be resolved"
	}
	home, _ := os.UserHomeDir()
	if resolved, err := filepath.EvalSymlinks(home); err == nil {
		home = resolved
	}
	for at := start; ; at = filepath.Dir(at) {
		if _, err := os.Lstat(filepath.Join(at, ".git")); err == nil {
			switch {
			case at == home || at == string(filepath.Separator):
				// Dotfiles kept in Git: a checkout of everything, keys included.
				return "", "the checkout is " + at + ", which is no project; --project-path takes it all the same"
			case !ownedByUs(at):
				// Anybody may put a .git into a directory such as /tmp.
				return "", at + " belongs to another user; --project-path takes it all the same"
			}
			return at, "the working directory is in this Git checkout"
		}
		if at == filepath.Dir(at) {
			return "", "no Git checkout contains " + start + "; --project-path names a project"
		}
	}
}

func ownedByUs(dir string) bool {
	st, err := os.Stat(dir)
	if err != nil {
		return false
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	return !ok || int(sys.Uid) == os.Geteuid() || os.Geteuid() == 0
}

// seed returns what a workspace is seeded from, "" for nothing. It waits for a
// clone.
func (p *project) seed(ctx context.Context, say func(string)) (string, error) {
	if p.clone == nil {
		return p.path, nil
	}
	return p.clone.wait(ctx, say)
}

// directory is where relative paths of this host begin, "" for nowhere.
func (p *project) directory() string {
	if p.clone != nil {
		return p.clone.dir
	}
	if st, err := os.Stat(p.path); p.path != "" && err == nil && st.IsDir() {
		return p.path
	}
	return ""
}

// name is the project for people and models.
func (p *project) name() string {
	switch {
	case p.clone != nil && p.clone.ref != "":
		return p.clone.shown + " at " + p.clone.ref
	case p.clone != nil:
		return p.clone.shown
	case p.path != "":
		return p.path
	}
	return "none"
}

func (p *project) sentence() string {
	switch {
	case p.clone != nil:
		return "Without seed_path a workspace begins with a clean clone of " + quote(p.name()) + "."
	case p.path != "" && p.includeIgnored:
		return "Without seed_path a workspace begins with a copy of " + quote(p.name()) + ", ignored files included."
	case p.path != "":
		return "Without seed_path a workspace begins with a copy of the project " + quote(p.name()) + "."
	}
	return "This server has no project: without seed_path a workspace begins empty."
}

func (p *project) close() {
	if p != nil && p.clone != nil {
		p.clone.close()
	}
}
