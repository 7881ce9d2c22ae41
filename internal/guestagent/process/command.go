package process

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Runner starts commands.
type Runner struct {
	Reaper *Reaper
	// Workload holds the commands' control groups; nil means trees are found
	// through /proc.
	Workload *Workload

	active active
}

// A Spec says what to run.
type Spec struct {
	Argv []string // Argv[0] is looked up on the PATH of Env
	Env  []string
	Dir  string
	// Files become the command's stdin, stdout and stderr. The caller keeps
	// and closes its own.
	Files [3]*os.File
	// Terminal says that Files[0] is a terminal, to become the controlling one.
	Terminal bool
	// Credential is who the command runs as; nil for this process's own. Pipes
	// and terminals of Files are given to that user, who may then open them by
	// name too, as /dev/stdout.
	Credential *syscall.Credential
}

// A Command is one running command with everything it started.
type Command struct {
	*Child
	tree tree
}

// Start starts a command in a session of its own. A program that does not
// exist is fs.ErrNotExist, one that cannot be executed fs.ErrPermission or
// syscall.ENOEXEC: shells call them 127 and 126.
func (r *Runner) Start(spec Spec) (*Command, error) {
	path, err := lookPath(spec.Argv[0], spec)
	if err != nil {
		return nil, err
	}
	id, err := newID()
	if err != nil {
		return nil, err
	}
	attr := &syscall.ProcAttr{
		Dir: spec.Dir,
		Env: slices.Clone(spec.Env),
		Sys: &syscall.SysProcAttr{Setsid: true, Credential: spec.Credential},
	}
	if spec.Credential != nil {
		for _, f := range spec.Files {
			giveAway(f, int(spec.Credential.Uid))
		}
	}
	for _, f := range spec.Files {
		attr.Files = append(attr.Files, f.Fd())
	}
	if spec.Terminal {
		attr.Sys.Setctty, attr.Sys.Ctty = true, 0
	}
	c := &Command{}
	var inProc *procTree
	if r.Workload != nil {
		t, err := newCgroupTree(r.Workload, id)
		if err != nil {
			return nil, err
		}
		c.tree = t
	} else {
		inProc = newProcTree(r.Reaper, &r.active, id)
		c.tree = inProc
	}
	c.tree.prepare(attr)
	child, err := r.Reaper.start(path, spec.Argv, attr)
	if err != nil {
		c.tree.remove()
		return nil, &os.PathError{Op: "exec", Path: spec.Argv[0], Err: err}
	}
	c.Child = child
	if inProc != nil {
		inProc.began(child.PID)
	}
	return c, nil
}

// Signal sends sig to the command's process group, if it still runs.
func (c *Command) Signal(sig syscall.Signal) { c.Child.signal(sig, true) }

// NewestJob returns the process group in the command's session, other than the
// command's own, whose leader was started last; 0 if there is none. In a shell
// that waits for a job it is that job.
func (c *Command) NewestJob() int {
	var newest entry
	for _, e := range listProcesses() {
		if e.session == c.PID && e.group == e.pid && e.pid != c.PID && !e.dead() && e.started >= newest.started {
			newest = e
		}
	}
	return newest.pid
}

// Terminate ends the whole tree: TERM, and KILL for what is left after grace.
// It reports whether nothing is left.
func (c *Command) Terminate(grace time.Duration) bool {
	c.tree.signal(syscall.SIGTERM)
	// A stopped process gets its TERM only when it continues.
	c.tree.signal(syscall.SIGCONT)
	waitFor(grace, c.tree.empty)
	return c.tree.kill()
}

// Kill ends the whole tree at once and reports whether nothing is left.
func (c *Command) Kill() bool { return c.tree.kill() }

// Quiet reports whether nothing of the tree runs any more.
func (c *Command) Quiet() bool { return c.tree.empty() }

// OOMKilled reports whether the kernel killed part of the tree because the
// workload's memory was used up. Always false without a Workload.
func (c *Command) OOMKilled() bool { return c.tree.oomKilled() }

// Release gives up what the command holds. Call it once, last, after the tree
// was killed.
func (c *Command) Release() { c.tree.remove() }

func newID() (string, error) {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("drawing an id: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}

// giveAway makes a pipe or a terminal the user's. Where that cannot be, as for
// some of gVisor's, the user can still read and write what it was given open.
func giveAway(f *os.File, uid int) {
	if fi, err := f.Stat(); err == nil && (fi.Mode()&fs.ModeNamedPipe != 0 || isTerminal(f)) {
		_ = f.Chown(uid, -1)
	}
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// MayEnter reports whether a user may enter dir, an absolute path, as far as
// the permission bits say. cred may be nil.
func MayEnter(dir string, cred *syscall.Credential) bool {
	for at := dir; ; at = filepath.Dir(at) {
		fi, err := os.Stat(at)
		if err == nil && !allowed(fi, cred) {
			return false
		}
		if at == "/" || at == "." {
			return true
		}
	}
}

// allowed reports whether a user may enter the directory, or execute the file,
// that fi describes. A nil user and root may.
func allowed(fi fs.FileInfo, cred *syscall.Credential) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if cred == nil || cred.Uid == 0 || !ok {
		return true
	}
	bit := fs.FileMode(0o001)
	switch {
	case st.Uid == cred.Uid:
		bit = 0o100
	case st.Gid == cred.Gid || slices.Contains(cred.Groups, st.Gid):
		bit = 0o010
	}
	return fi.Mode()&bit != 0
}

// lookPath finds the program name as execvp(3) would for this command.
func lookPath(name string, spec Spec) (string, error) {
	if name == "" {
		return "", &os.PathError{Op: "exec", Path: name, Err: fs.ErrNotExist}
	}
	if strings.Contains(name, "/") {
		return name, checkProgram(name, spec)
	}
	var path string
	for _, v := range spec.Env { // the last one counts
		if value, ok := strings.CutPrefix(v, "PATH="); ok {
			path = value
		}
	}
	var found error = &os.PathError{Op: "exec", Path: name, Err: fs.ErrNotExist}
	for _, d := range filepath.SplitList(path) {
		if d == "" {
			d = "."
		}
		p := d + "/" + name
		err := checkProgram(p, spec)
		if err == nil {
			return p, nil
		}
		if errors.Is(err, fs.ErrPermission) {
			found = err
		}
	}
	return "", found
}

func checkProgram(path string, spec Spec) error {
	full := path
	if !filepath.IsAbs(full) {
		full = filepath.Join(spec.Dir, full)
	}
	fi, err := os.Stat(full)
	switch {
	case err != nil:
		if errors.Is(err, syscall.ENOTDIR) {
			err = fs.ErrNotExist
		}
		var pe *os.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return &os.PathError{Op: "exec", Path: path, Err: err}
	case fi.IsDir(), !allowed(fi, spec.Credential):
		return &os.PathError{Op: "exec", Path: path, Err: syscall.EACCES}
	}
	if err := unix.Access(full, unix.X_OK); err != nil {
		return &os.PathError{Op: "exec", Path: path, Err: syscall.EACCES}
	}
	return nil
}
