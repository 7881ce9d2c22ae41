// Package mmdebstrap runs Debian's mmdebstrap, which fetches packages, checks
// their signatures and installs them into a tree of its own, as root or in a
// user namespace, and hands over that tree as a tar stream.
//
// What the package adds is manners: progress that people can follow, failures
// as one sentence with the way out, downloads that survive a failed attempt,
// and nothing left behind, whoever is killed when.
package mmdebstrap

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/artifact"
)

// A Tool is how to run mmdebstrap.
type Tool struct {
	// Path is the program, "" for the one on PATH.
	Path string
	// Mirror is used in place of Debian's own mirrors: one URL for the release
	// and its updates, and optionally, after a space, one for the security
	// updates. "" for Debian's own. Signatures are checked all the same.
	Mirror string
	// TempDir is where packages are unpacked, "" for $TMPDIR or /var/tmp.
	// Other users must be able to pass through it.
	TempDir string
	Logger  *slog.Logger
}

// A Job is one run.
type Job struct {
	Suite   string // Debian's code name
	Variant string
	Include []string
	// Options are further arguments.
	Options []string
	// NeedBytes is the room that the tree takes in TempDir.
	NeedBytes int64
	// Consume reads the tar stream. Its end is the job's end; an error in it
	// ends the job at once and comes first in importance.
	Consume func(ctx context.Context, r io.Reader) error
	// Progress may be nil.
	Progress func(api.Progress)
}

// archives is the name, below Build.Keep, of the directory of downloads.
const archives = "archives"

// Run does the job in the frame of the build b. When it returns, nothing of
// the job runs any more.
func (t *Tool) Run(ctx context.Context, b *artifact.Build, job Job) error {
	path, err := t.find()
	if err != nil {
		return err
	}
	temp, err := t.makeTemp(b)
	if err != nil {
		return err
	}
	if err := artifact.CheckFree(temp, job.NeedBytes); err != nil {
		return err
	}
	// apt writes here as (mapped) root, which in a user namespace is not this
	// user: everybody may write. Nobody else passes through the parents.
	keep := filepath.Join(b.Keep, archives)
	if err := os.MkdirAll(keep, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(keep, 0o777); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd := exec.CommandContext(ctx, path, t.arguments(job)...)
	// The downloads are reached through the working directory: that works for
	// a mapped root too, who could not pass through the directories above.
	cmd.Dir = keep
	cmd.Env = environment(temp)
	cmd.ExtraFiles = []*os.File{b.Leash}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() == 0 {
		// A mount namespace whose mounts do not spread to the host's: when its
		// last process is gone, so are they.
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS
	}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting mmdebstrap: %w", err)
	}
	log := newLog(job.Progress, t.Logger)
	read := make(chan struct{})
	go func() {
		defer close(read)
		log.read(stderr)
	}()
	// A process that has left the group could keep the pipe open.
	stop := context.AfterFunc(ctx, func() { stdout.Close() })
	defer stop()
	stream := &endReader{r: stdout}
	consumeErr := job.Consume(ctx, bufio.NewReaderSize(stream, 1<<20))
	if consumeErr == nil {
		// The end of the archive is two zero blocks; tar pads behind them.
		_, consumeErr = io.Copy(io.Discard, stream)
	}
	// After the stream's end the tool is done or has failed by itself, and why
	// it failed is better known from what it says than from what is missing.
	if consumeErr != nil && !stream.ended {
		cancel(consumeErr)
	}
	select {
	case <-read:
	case <-ctx.Done(): // the same for the other pipe, which Wait closes
	}
	waitErr := cmd.Wait()
	<-read
	switch {
	case context.Cause(ctx) != nil:
		return context.Cause(ctx)
	case waitErr != nil:
		return log.explain(waitErr)
	}
	return consumeErr
}

// An endReader notes that its reader has come to its end.
type endReader struct {
	r     io.Reader
	ended bool
}

func (e *endReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	e.ended = e.ended || errors.Is(err, io.EOF)
	return n, err
}

// Clean removes what a job in the frame of b may have left, whatever state it
// was killed in; with all set, the downloads too. It is an artifact.Cleaner.
func (t *Tool) Clean(ctx context.Context, b *artifact.Build, all bool) error {
	temp, err := os.ReadFile(recordOf(b))
	if err == nil {
		err = t.removeTemp(ctx, string(temp))
	} else if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return err
	}
	if keep := filepath.Join(b.Keep, archives); all {
		return t.removeTree(ctx, keep)
	}
	return nil
}

func (t *Tool) find() (string, error) {
	if t.Path != "" {
		return t.Path, nil
	}
	path, err := exec.LookPath("mmdebstrap")
	if err != nil {
		return "", api.WithHint(api.Errorf(api.ErrUnavailable, "the program mmdebstrap is not installed"), "%s", installHint)
	}
	if os.Geteuid() == 0 {
		return path, nil
	}
	if _, err := exec.LookPath("newuidmap"); err != nil {
		return "", api.WithHint(api.Errorf(api.ErrUnavailable, "the program newuidmap is not installed"), "%s", installHint)
	}
	return path, nil
}

const installHint = "run apt-get install mmdebstrap uidmap debian-archive-keyring as root"

func (t *Tool) arguments(job Job) []string {
	mode := "unshare"
	if os.Geteuid() == 0 {
		mode = "root"
	}
	args := []string{
		"--mode=" + mode, "--variant=" + job.Variant, "--format=tar", "--verbose",
		"--aptopt=Acquire::Retries \"3\"", "--aptopt=Acquire::http::Timeout \"30\"",
		// Otherwise it removes each package from the downloads once installed.
		"--skip=essential/unlink",
		// The hook runs inside the job's mount namespace. apt continues a
		// half-downloaded file and takes a whole one after checking its hash.
		// The directory is made there so that it belongs to the (mapped) root:
		// the package apt sets its owner and time.
		`--setup-hook=mkdir -p debs "$1/var/cache/apt/archives" && mount --no-canonicalize --bind debs "$1/var/cache/apt/archives"`,
	}
	if len(job.Include) > 0 {
		args = append(args, "--include="+strings.Join(job.Include, ","))
	}
	args = append(args, job.Options...)
	// Last: mmdebstrap cannot remove its tree through a mount.
	args = append(args, `--customize-hook=umount "$1/var/cache/apt/archives"`, "--", job.Suite, "-")
	if t.Mirror == "" {
		return args // with no mirror named it uses Debian's, security and updates included
	}
	main, security, _ := strings.Cut(t.Mirror, " ")
	args = append(args,
		fmt.Sprintf("deb %s %s main", main, job.Suite),
		fmt.Sprintf("deb %s %s-updates main", main, job.Suite))
	if security = strings.TrimSpace(security); security != "" {
		args = append(args, fmt.Sprintf("deb %s %s-security main", security, job.Suite))
	}
	return args
}

// environment is this process's, without what would change the result.
func environment(temp string) []string {
	var env []string
	for _, kv := range os.Environ() {
		switch name, _, _ := strings.Cut(kv, "="); name {
		case "TMPDIR", "SOURCE_DATE_EPOCH", "APT_CONFIG", "DPKG_ROOT", "LC_ALL", "LANG", "LANGUAGE",
			"TAR_OPTIONS", "PERL5LIB", "PERL5OPT":
		default:
			env = append(env, kv)
		}
	}
	return append(env, "TMPDIR="+temp, "LC_ALL=C.UTF-8")
}
