package seed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// git runs the host's git on checkouts that may have been made to harm whoever
// looks at them. Only commands that read are run, with a directory and a work
// tree that are named and not searched for, and everything in a checkout's
// configuration that can start a program is overridden.
type git struct {
	program string
	env     []string
}

// gitTimeout bounds one command: a checkout on a slow network mount, or one
// whose configuration includes a pipe.
const gitTimeout = 5 * time.Minute

// gitOutput bounds what a command may print: a million paths of 256 bytes.
const gitOutput = 256 << 20

// findGit returns nil where there is no git.
func findGit() *git {
	program, err := exec.LookPath("git")
	if err != nil {
		return nil
	}
	g := &git{program: program}
	for _, kv := range os.Environ() {
		// GIT_DIR and its like would lead elsewhere, GIT_CONFIG_* inject.
		if !strings.HasPrefix(kv, "GIT_") {
			g.env = append(g.env, kv)
		}
	}
	g.env = append(g.env,
		"GIT_CONFIG_NOSYSTEM=1",
		"GIT_OPTIONAL_LOCKS=0",
		"GIT_TERMINAL_PROMPT=0",
		"GIT_ASKPASS=true", "SSH_ASKPASS=true",
		"GIT_PAGER=cat",
		// Overrides protocol.*.allow: a partial clone would fetch what it
		// lacks, by a command that its configuration names.
		"GIT_ALLOW_PROTOCOL=none",
		"GIT_NO_LAZY_FETCH=1",
		"LC_ALL=C")
	return g
}

// A checkout is a work tree and its Git directory, as host paths.
type checkout struct {
	top, gitDir string
}

func (g *git) run(ctx context.Context, c checkout, dir string, env []string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, gitTimeout)
	defer cancel()
	// An explicit Git directory also spares the test of whose it is: root may
	// seed from a user's checkout.
	cmd := exec.CommandContext(ctx, g.program, append([]string{
		"--git-dir=" + c.gitDir, "--work-tree=" + c.top, "--no-pager",
		"-c", "core.hooksPath=/dev/null",
		"-c", "core.fsmonitor=",
		"-c", "core.untrackedCache=false",
		"-c", "protocol.file.allow=never",
		"-c", "protocol.allow=never",
	}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(append(cmd.Env, g.env...), env...)
	cmd.WaitDelay = 5 * time.Second
	var stderr limitedBuffer
	stderr.limit = 4 << 10
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	text, rerr := io.ReadAll(io.LimitReader(out, gitOutput+1))
	if len(text) > gitOutput {
		cancel()
		rerr = api.Errorf(api.ErrExhausted, "git prints more than %d bytes", gitOutput)
	}
	err = cmd.Wait()
	if ctx.Err() != nil && rerr == nil {
		return nil, context.Cause(ctx)
	}
	if err = errors.Join(rerr, err); err != nil {
		line, _, _ := bytes.Cut(bytes.TrimSpace(stderr.Bytes()), []byte("\n"))
		return nil, fmt.Errorf("git %s: %w: %s", args[0], err, line)
	}
	return text, nil
}

// ignored returns what git ignores below dir, relative to it; a name with a
// slash at its end stands for a directory with all that is in it.
func (g *git) ignored(ctx context.Context, c checkout, dir string) ([]string, error) {
	out, err := g.run(ctx, c, dir, nil, "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory")
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00"), nil
}

// ignoresAll reports whether the checkout ignores the directory at dir itself.
func (g *git) ignoresAll(ctx context.Context, c checkout, dir string) bool {
	_, err := g.run(ctx, c, c.top, nil, "check-ignore", "-q", "--", dir)
	return err == nil
}

// head returns the commit, "" where there is none, with "+dirty" behind it
// where the files below dir differ from it.
func (g *git) head(ctx context.Context, c checkout, dir string) (string, error) {
	out, err := g.run(ctx, c, c.top, nil, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
	if err != nil {
		if ctx.Err() != nil {
			return "", err
		}
		return "", nil // a repository without a commit
	}
	commit := strings.TrimSpace(string(out))
	env, err := g.withoutFilters(ctx, c)
	if err != nil {
		return commit, err
	}
	// Submodules would be looked at by further processes, with what their own
	// configuration says.
	out, err = g.run(ctx, c, dir, env, "status", "--porcelain=v1", "-z", "--untracked-files=normal", "--ignore-submodules=all", "--no-renames", "--", ".")
	if err != nil {
		return commit, err
	}
	if len(out) > 0 {
		commit += "+dirty"
	}
	return commit, nil
}

// withoutFilters returns the environment that takes every filter's commands
// away: to compare a file with the index git would run it through them.
func (g *git) withoutFilters(ctx context.Context, c checkout) ([]string, error) {
	out, err := g.run(ctx, c, c.top, nil, "config", "-z", "--name-only", "--get-regexp", `^filter\.`)
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 1 {
		return nil, nil // none
	}
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var env []string
	n := 0
	for key := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		i := strings.LastIndexByte(key, '.')
		if i <= len("filter") || seen[key[:i]] {
			continue
		}
		seen[key[:i]] = true
		for _, kv := range [][2]string{{"clean", ""}, {"smudge", ""}, {"process", ""}, {"required", "false"}} {
			env = append(env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s.%s", n, key[:i], kv[0]), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", n, kv[1]))
			n++
		}
	}
	return append(env, fmt.Sprintf("GIT_CONFIG_COUNT=%d", n)), nil
}

// limitedBuffer keeps the first bytes of what is written to it.
type limitedBuffer struct {
	bytes.Buffer
	limit int
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	b.Buffer.Write(p[:min(len(p), max(0, b.limit-b.Len()))])
	return len(p), nil
}
