// Package statedir names every file and socket that pyro keeps on the host, and
// makes the directories they live in. docs/state-dir.md describes them for
// people; a test holds the two together.
package statedir

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"unicode/utf8"

	"github.com/pyro-mcp/pyro/api"
)

// Dir is a state directory.
type Dir struct {
	path string
}

// DefaultState returns PYRO_STATE_DIR, else pyro below XDG_STATE_HOME, else
// below the home directory's .local/state. getenv is os.Getenv but in tests.
func DefaultState(getenv func(string) string) (string, error) {
	return defaultDir(getenv, "PYRO_STATE_DIR", "XDG_STATE_HOME", ".local/state")
}

// DefaultCache returns PYRO_CACHE_DIR, else pyro below XDG_CACHE_HOME, else
// below the home directory's .cache.
func DefaultCache(getenv func(string) string) (string, error) {
	return defaultDir(getenv, "PYRO_CACHE_DIR", "XDG_CACHE_HOME", ".cache")
}

func defaultDir(getenv func(string) string, own, xdg, fallback string) (string, error) {
	if d := getenv(own); d != "" {
		if !filepath.IsAbs(d) {
			return "", api.WithHint(api.Errorf(api.ErrInvalid, "%s is %q, which is not an absolute path", own, d),
				"set %s to an absolute path", own)
		}
		return filepath.Clean(d), nil
	}
	// The XDG base directory specification says to ignore relative values.
	if d := getenv(xdg); filepath.IsAbs(d) {
		return filepath.Join(d, "pyro"), nil
	}
	home := getenv("HOME")
	if !filepath.IsAbs(home) {
		return "", api.WithHint(api.Errorf(api.ErrInvalid, "no home directory is known"),
			"set HOME, or %s to an absolute path", own)
	}
	return filepath.Join(home, fallback, "pyro"), nil
}

// maxPath bounds a state directory's path: SQLite opens no file whose path has more
// than 512 bytes (SQLITE_MAX_PATHNAME), its journal's included.
const maxPath = 480

// Open makes the state directory if it is not there and checks that it is
// ours alone: a real directory, owned by the caller, closed to others. Its path
// goes from process to process as JSON, and so must be UTF-8.
func Open(path string) (*Dir, error) {
	if len(path) > maxPath {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "the state directory's path has %d bytes, and at most %d work", len(path), maxPath),
			"set PYRO_STATE_DIR to a shorter path")
	}
	if !utf8.ValidString(path) {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "the state directory's path %q is not UTF-8", path),
			"set PYRO_STATE_DIR to another path")
	}
	if err := MakePrivate(path); err != nil {
		return nil, fmt.Errorf("opening state directory: %w", err)
	}
	d := &Dir{path}
	for _, dir := range []string{d.MachinesDir(), d.WorkspacesDir(), d.LayersDir(), d.SeedsDir()} {
		if err := MakePrivate(dir); err != nil {
			return nil, fmt.Errorf("opening state directory: %w", err)
		}
	}
	return d, nil
}

// writable is the way out where a directory cannot be used.
const writable = "point PYRO_STATE_DIR or PYRO_CACHE_DIR at a directory you can write to"

// MakePrivate makes path a directory of mode 0700 that belongs to the caller.
// An existing directory with wider permissions is narrowed; a link, a file, or
// somebody else's directory is refused.
func MakePrivate(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		if errors.Is(err, os.ErrPermission) || errors.Is(err, syscall.EROFS) {
			return api.WithHint(api.Errorf(api.ErrDenied, "%v", err), writable)
		}
		return api.WithHint(err, writable)
	}
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return api.WithHint(api.Errorf(api.ErrDenied, "%s is not a directory of its own (%s)", path, st.Mode().Type()),
			"remove it, or name another directory with PYRO_STATE_DIR or PYRO_CACHE_DIR")
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && int(sys.Uid) != os.Geteuid() {
		return api.WithHint(api.Errorf(api.ErrDenied, "%s belongs to user %d, not to you", path, sys.Uid),
			"name another directory with PYRO_STATE_DIR or PYRO_CACHE_DIR")
	}
	if st.Mode().Perm()&0o077 != 0 {
		if err := os.Chmod(path, 0o700); err != nil {
			return api.WithHint(fmt.Errorf("closing %s to other users: %w", path, err), writable)
		}
	}
	return nil
}

// Path returns the directory itself.
func (d *Dir) Path() string { return d.path }

// MachinesDir holds one directory for every machine that runs or that somebody
// left behind.
func (d *Dir) MachinesDir() string { return filepath.Join(d.path, "machines") }

// AcceleratorFile remembers an accelerator that let a guest down in this boot.
func (d *Dir) AcceleratorFile() string { return filepath.Join(d.path, "accelerator.json") }

// MCPTokenFile is what callers of the MCP server over HTTP have to show.
func (d *Dir) MCPTokenFile() string { return filepath.Join(d.path, "mcp-token") }

// Machine names the directory of the machine with that id.
func (d *Dir) Machine(id string) Machine { return Machine(filepath.Join(d.MachinesDir(), id)) }

// Machine is the path of one machine's directory.
type Machine string

// ID is the machine's id.
func (m Machine) ID() string { return filepath.Base(string(m)) }

// StateDir is the state directory that the machine is in.
func (m Machine) StateDir() string { return filepath.Dir(filepath.Dir(string(m))) }

// Path returns the directory itself.
func (m Machine) Path() string { return string(m) }

// LockFile is locked by whoever answers for the machine: first the command that
// creates it, then its supervisor. A directory whose lock is free is garbage.
func (m Machine) LockFile() string { return filepath.Join(string(m), "lock") }

// RecordFile says which processes make up the machine.
func (m Machine) RecordFile() string { return filepath.Join(string(m), "machine.json") }

// EndingFile says how the machine's last run ended.
func (m Machine) EndingFile() string { return filepath.Join(string(m), "ending.json") }

// ControlSocket is the supervisor's HTTP API.
func (m Machine) ControlSocket() string { return filepath.Join(string(m), "control.sock") }

// GuestSocket speaks the hybrid vsock handshake and then the guest protocol.
func (m Machine) GuestSocket() string { return filepath.Join(string(m), "guest.sock") }

// ConsoleLog is what the guest's console and the engine said, bounded.
func (m Machine) ConsoleLog() string { return filepath.Join(string(m), "console.log") }

// SupervisorLog is the supervisor's own log, bounded.
func (m Machine) SupervisorLog() string { return filepath.Join(string(m), "supervisor.log") }

// EngineDir is where the engine keeps its own files.
func (m Machine) EngineDir() string { return filepath.Join(string(m), "engine") }
