package mcpserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

const (
	// cloneTimeout is for a large repository over a slow line.
	cloneTimeout = 15 * time.Minute
	clonePrefix  = "pyro-clone-"
	// gitProtocols are those a repository may be fetched with. ext and fd, which
	// run commands, are not among them.
	gitProtocols = "file:https:http:ssh:git"
)

// scpLike is git's short form of an ssh address, HOST:PATH.
var scpLike = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.@-]*:[^:].*$`)

// A clone is a clean checkout of a repository below the temporary directory. It
// goes with the server; one that a killed server left is removed by the next.
type clone struct {
	shown, ref string // without credentials
	top, dir   string
	lock       *os.File
	done       chan struct{}
	err        error // once done
	stop       context.CancelFunc
}

// checkRepo refuses what git would take for an option or a command.
func checkRepo(repo, ref string) error {
	for what, s := range map[string]string{"--repo-url": repo, "--repo-ref": ref} {
		if strings.HasPrefix(s, "-") || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) || len(s) > maxHostPath {
			return api.Errorf(api.ErrInvalid, "%s %s is neither an address nor a name that git knows", what, quote(s))
		}
	}
	if strings.Contains(repo, "::") {
		return api.WithHint(api.Errorf(api.ErrDenied, "--repo-url %s names a transport that runs commands", quote(repo)), "pass an https, ssh or file address, or a path")
	}
	return nil
}

// withoutCredentials returns an address as it may be shown and as it may lie in
// the clone, whose .git goes into guests.
func withoutCredentials(repo string) string {
	u, err := url.Parse(repo)
	if err != nil || u.Scheme == "" || u.User == nil {
		return repo
	}
	if u.Scheme == "ssh" {
		u.User = url.User(u.User.Username())
	} else {
		u.User = nil
	}
	return u.String()
}

// startClone begins to clone and returns. close ends it.
func startClone(ctx context.Context, repo, ref string, log *slog.Logger) (*clone, error) {
	if _, err := exec.LookPath("git"); err != nil {
		return nil, api.WithHint(api.Errorf(api.ErrUnavailable, "cloning %s takes git, which is not on PATH", quote(withoutCredentials(repo))), "install git")
	}
	if !strings.Contains(repo, "://") && !scpLike.MatchString(repo) {
		abs, err := filepath.Abs(repo)
		if err != nil {
			return nil, fmt.Errorf("looking at --repo-url: %w", err)
		}
		if _, err := os.Stat(abs); err != nil {
			return nil, fmt.Errorf("looking at --repo-url: %w", pathError(err, repo))
		}
		repo = abs
	}
	removeClones()
	top, err := os.MkdirTemp("", clonePrefix)
	if err != nil {
		return nil, fmt.Errorf("making a directory for the clone: %w", err)
	}
	c := &clone{shown: withoutCredentials(repo), ref: ref, top: top, dir: filepath.Join(top, "checkout"), done: make(chan struct{})}
	if c.lock, err = lockClone(top); err == nil {
		err = os.Mkdir(c.dir, 0o700)
	}
	if err != nil {
		os.RemoveAll(top)
		return nil, fmt.Errorf("making a directory for the clone: %w", err)
	}
	ctx, c.stop = context.WithTimeout(ctx, cloneTimeout)
	go func() {
		defer close(c.done)
		if c.err = c.run(ctx, repo); c.err != nil {
			log.Warn("cloning the project", "error", c.err)
			return
		}
		log.Info("cloned the project", "source", c.shown)
	}()
	return c, nil
}

// lockClone marks a directory as in use by this process.
func lockClone(top string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(top, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// removeClones removes what killed servers left. A directory whose lock is held
// or not there yet is somebody's; so is what belongs to another user.
func removeClones() {
	found, _ := filepath.Glob(filepath.Join(os.TempDir(), clonePrefix+"*"))
	for _, top := range found {
		st, err := os.Lstat(top)
		if err != nil || !st.IsDir() || !ownedByUs(top) {
			continue
		}
		f, err := os.OpenFile(filepath.Join(top, "lock"), os.O_RDWR|unix.O_NOFOLLOW, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			os.RemoveAll(top)
		}
		f.Close()
	}
}

func (c *clone) run(ctx context.Context, repo string) error {
	about := fmt.Sprintf("cloning %s", quote(c.shown))
	// --no-local: a path goes through git's own checks of the other repository
	// too, instead of its files being copied or linked as they are.
	if _, err := c.git(ctx, "clone", "--quiet", "--no-local", "--no-checkout", "--no-recurse-submodules", "--template=", "--", repo, c.dir); err != nil {
		return fmt.Errorf("%s: %w", about, err)
	}
	if _, err := c.git(ctx, "-C", c.dir, "remote", "set-url", "origin", "--", c.shown); err != nil {
		return fmt.Errorf("%s: %w", about, err)
	}
	commit, err := c.resolve(ctx, repo)
	if err != nil {
		return fmt.Errorf("%s: %w", about, err)
	}
	if commit == "" {
		return nil // a repository without commits
	}
	checkout := []string{"-C", c.dir, "checkout", "--quiet", "--detach", commit}
	if c.ref == "" {
		checkout = []string{"-C", c.dir, "reset", "--quiet", "--hard", "--no-recurse-submodules", commit}
	}
	if _, err := c.git(ctx, checkout...); err != nil {
		return fmt.Errorf("%s: %w", about, err)
	}
	return nil
}

// resolve returns the commit that is wanted, "" for none in an empty repository.
func (c *clone) resolve(ctx context.Context, repo string) (string, error) {
	try := func(name string) string {
		out, err := c.git(ctx, "-C", c.dir, "rev-parse", "--quiet", "--verify", "--end-of-options", name+"^{commit}")
		if err != nil {
			return ""
		}
		return out
	}
	if c.ref == "" {
		return try("HEAD"), nil
	}
	for _, name := range []string{"refs/remotes/origin/" + c.ref, "refs/tags/" + c.ref, c.ref} {
		if commit := try(name); commit != "" {
			return commit, nil
		}
	}
	// A commit that no branch leads to, or a ref such as refs/pull/1/head.
	if _, err := c.git(ctx, "-C", c.dir, "fetch", "--quiet", "--no-recurse-submodules", "--", repo, c.ref); err == nil {
		if commit := try("FETCH_HEAD"); commit != "" {
			return commit, nil
		}
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	return "", api.WithHint(api.Errorf(api.ErrNotFound, "there is no %s in it", quote(c.ref)), "name a branch, a tag or a commit with --repo-ref")
}

// git runs git with nothing of the repository's own taking part: no hooks, no
// helpers, no transports but gitProtocols, and no questions to anybody.
func (c *clone) git(ctx context.Context, args ...string) (string, error) {
	args = append([]string{"-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.symlinks=true",
		"-c", "submodule.recurse=false", "-c", "protocol.ext.allow=never", "-c", "transfer.fsckObjects=true",
		"-c", "gc.auto=0", "-c", "maintenance.auto=false", "-c", "advice.detachedHead=false"}, args...)
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Env = append(os.Environ(), "GIT_TERMINAL_PROMPT=0", "GIT_ALLOW_PROTOCOL="+gitProtocols, "GIT_LFS_SKIP_SMUDGE=1",
		"GIT_SSH_COMMAND=ssh -oBatchMode=yes", "GIT_ASKPASS=true", "SSH_ASKPASS=true", "LC_ALL=C")
	for _, name := range []string{"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_CONFIG_PARAMETERS", "GIT_OBJECT_DIRECTORY", "GIT_TEMPLATE_DIR"} {
		cmd.Env = withoutVariable(cmd.Env, name)
	}
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	cmd.WaitDelay = 2 * time.Second
	err := cmd.Run()
	switch {
	case err == nil:
		return strings.TrimSpace(out.String()), nil
	case errors.Is(context.Cause(ctx), context.DeadlineExceeded):
		return "", api.Errorf(api.ErrDeadline, "git took longer than %s", cloneTimeout)
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	}
	text := strings.TrimSpace(complaint.String())
	if text == "" {
		text = err.Error()
	}
	return "", api.Errorf(api.ErrUnavailable, "git says: %s", clean(text))
}

func withoutVariable(env []string, name string) []string {
	out := env[:0:0]
	for _, v := range env {
		if !strings.HasPrefix(v, name+"=") {
			out = append(out, v)
		}
	}
	return out
}

// wait returns the checkout once it is there.
func (c *clone) wait(ctx context.Context, say func(string)) (string, error) {
	select {
	case <-c.done:
	default:
		say("cloning " + c.shown)
	}
	select {
	case <-c.done:
		return c.dir, c.err
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

func (c *clone) close() {
	c.stop()
	<-c.done
	os.RemoveAll(c.top)
	c.lock.Close()
}
