package workspacedisk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// The programs of e2fsprogs that write.
const (
	progDebugfs = "debugfs"
	progE2fsck  = "e2fsck"
)

const (
	// toolTime bounds one run of a tool. e2fsck takes about a second for a
	// full check of an image of 8 GiB.
	toolTime = 2 * time.Minute
	// toolOutput is how much of a tool's output is kept; a hostile image can
	// make it print without end.
	toolOutput = 64 << 10
)

// Exit code bits of e2fsck, from its manual page.
const (
	e2fsckFixed = 1 // errors were corrected
)

// e2fsTool is one run of a tool on a private image file.
type e2fsTool struct {
	name string
	args []string // the image's path is appended
	ok   int      // exit code bits that are no failure
	// script is given as a file for debugfs -f; the tool sees it as its
	// fourth file. It must hold nothing that an image said but numbers.
	script string
}

// findTool looks where Debian keeps the tools, too: an ordinary user's PATH
// has no sbin.
func findTool(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return filepath.Abs(p)
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", api.WithHint(api.Errorf(api.ErrUnavailable, "%s is required", name), "install the package e2fsprogs")
}

// needTools finds all tools before anything is written.
func needTools() error {
	for _, name := range []string{progDebugfs, progE2fsck} {
		if _, err := findTool(name); err != nil {
			return err
		}
	}
	return nil
}

// run runs the tool on image, confined as far as [confine] can on this host,
// and returns its output. An exit code outside of t.ok, or any message of
// debugfs on stderr besides its banner, is an error that names the command.
func (t e2fsTool) run(ctx context.Context, image *os.File) (string, error) {
	bin, err := findTool(t.name)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, toolTime)
	defer cancel()
	// The tool gets the open file, not its path, so that nobody can swap the
	// file and no directory has to be open to the tool's user.
	args := append([]string{}, t.args...)
	cmd := exec.CommandContext(ctx, bin)
	cmd.ExtraFiles = []*os.File{image}
	if t.script != "" {
		script, err := scriptFile(t.script)
		if err != nil {
			return "", err
		}
		defer script.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, script)
		args = append(args, "-f", "/proc/self/fd/4")
	}
	args = append(args, "/proc/self/fd/3")
	cmd.Args = append(cmd.Args, args...)
	// An empty environment but for these: SS_READLINE_PATH and PAGER make
	// debugfs load and run what they name.
	cmd.Env = []string{"LC_ALL=C", "TZ=UTC"}
	cmd.Dir = "/"
	stdout, stderr := &boundedText{}, &boundedText{}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.WaitDelay = time.Second
	release, err := confine(cmd, image)
	if err != nil {
		return "", err
	}
	defer release()
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("starting %s: %w", t.name, err)
	}
	limitProcess(cmd.Process.Pid)
	err = cmd.Wait()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return "", fmt.Errorf("running %s: %w", t.command(), ctx.Err())
	case err == nil:
	case errors.As(err, &exit) && exit.Exited() && exit.ExitCode()&^t.ok == 0:
	default:
		return "", t.failure(err.Error(), stdout.String()+stderr.String())
	}
	if t.name == progDebugfs {
		if text := withoutBanner(stderr.String()); text != "" {
			return "", t.failure(text, "")
		}
	}
	return stdout.String(), nil
}

func (t e2fsTool) command() string { return strings.Join(append([]string{t.name}, t.args...), " ") }

// failure is ErrDamaged: what these tools fail on is the image.
func (t e2fsTool) failure(why, output string) error {
	why = strings.TrimSpace(why)
	if len(output) > 400 {
		output = output[:400]
	}
	// The output quotes names of the image: %q keeps it on one line.
	if output = strings.TrimSpace(withoutBanner(output)); output != "" {
		return api.Errorf(api.ErrDamaged, "%s command failed: %s: %s: %q", t.name, t.command(), why, output)
	}
	return api.Errorf(api.ErrDamaged, "%s command failed: %s: %q", t.name, t.command(), why)
}

// withoutBanner drops the version line with which each tool opens stderr.
func withoutBanner(text string) string {
	var out []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, progDebugfs+" 1.") && !strings.HasPrefix(line, progE2fsck+" 1.") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "; ")
}

// scriptFile holds text in an unlinked file.
func scriptFile(text string) (*os.File, error) {
	f, err := os.CreateTemp("", "pyro-debugfs-")
	if err != nil {
		return nil, fmt.Errorf("making the command file: %w", err)
	}
	err = os.Remove(f.Name())
	if err == nil {
		_, err = f.WriteString(text)
	}
	if err == nil {
		err = f.Chmod(0o444) // the tool runs as another user and opens it anew
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("writing the command file: %w", err)
	}
	return f, nil
}

// boundedText keeps the first toolOutput bytes and drops the rest.
type boundedText struct{ text []byte }

func (b *boundedText) Write(p []byte) (int, error) {
	b.text = append(b.text, p[:min(len(p), toolOutput-len(b.text))]...)
	return len(p), nil
}

func (b *boundedText) String() string { return string(b.text) }
