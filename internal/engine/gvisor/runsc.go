package gvisor

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// RuntimeVariable is the environment variable that names the runtime to use.
const RuntimeVariable = "PYRO_RUNSC"

// runtimeFloor is the date of the oldest runsc this engine works with: the one
// that runsc/go.mod pins. May 2026's lacked --in-sandbox-cgroup's control groups
// of version 2, and releases between were not tried.
const runtimeFloor = "20260905"

// runsc is a runtime binary that may be used.
type runsc struct {
	path    string
	version string // as found, for people
	date    string // yyyymmdd of the version, "" where it has none
}

// findRuntime looks for a runtime in the order explicit path, beside this
// program, pyro-runsc on PATH, runsc on PATH. An explicit path that does not
// serve is an error; it never falls through to another.
func findRuntime(ctx context.Context, explicit, self string) (runsc, error) {
	if explicit != "" {
		return checkRuntime(ctx, explicit)
	}
	var why []string
	for _, candidate := range []string{filepath.Join(filepath.Dir(self), "pyro-runsc"), "pyro-runsc", "runsc"} {
		path, err := exec.LookPath(candidate)
		if err != nil {
			continue
		}
		r, err := checkRuntime(ctx, path)
		if err == nil {
			return r, nil
		}
		why = append(why, err.Error())
	}
	if len(why) > 0 {
		return runsc{}, api.WithHint(api.Errorf(api.ErrUnavailable, "%s", strings.Join(why, "; ")), "%s", runtimeHint)
	}
	return runsc{}, api.WithHint(api.Errorf(api.ErrUnavailable, "neither pyro-runsc nor runsc is installed"), "%s", runtimeHint)
}

const runtimeHint = "install pyro-runsc beside pyro (make build makes it), or set " + RuntimeVariable + " to a runsc"

// checkRuntime returns the runtime at path if its version is new enough.
func checkRuntime(ctx context.Context, path string) (runsc, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return runsc{}, err
	}
	if _, err := exec.LookPath(path); err != nil {
		return runsc{}, api.WithHint(api.Errorf(api.ErrUnavailable, "%s cannot be run: %v", path, err), "%s", runtimeHint)
	}
	version, err := runtimeVersion(ctx, path)
	if err != nil {
		return runsc{}, err
	}
	r := runsc{path: path, version: version, date: versionDate(version)}
	if r.date == "" {
		return runsc{}, api.WithHint(api.Errorf(api.ErrUnsupported, "%s does not say which gVisor it is (%q)", path, version), "%s", runtimeHint)
	}
	if r.date < runtimeFloor {
		return runsc{}, api.WithHint(api.Errorf(api.ErrUnsupported, "%s is gVisor of %s, older than %s", path, r.date, runtimeFloor), "%s", runtimeHint)
	}
	return r, nil
}

// runtimeVersion reads the version that a Go build recorded in the file, which
// costs no process, and asks the program where there is none, as in gVisor's
// own releases.
func runtimeVersion(ctx context.Context, path string) (string, error) {
	if info, err := buildinfo.ReadFile(path); err == nil {
		const module = "gvisor.dev/gvisor"
		if info.Main.Path == module && info.Main.Version != "" && info.Main.Version != "(devel)" {
			return info.Main.Version, nil
		}
		for _, dep := range info.Deps {
			if dep.Path == module && dep.Replace == nil {
				return dep.Version, nil
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", api.WithHint(api.Errorf(api.ErrUnavailable, "running %s --version: %w", path, err), "%s", runtimeHint)
	}
	line, _, _ := bytes.Cut(out, []byte("\n"))
	return strings.ToValidUTF8(string(line[:min(len(line), 200)]), "?"), nil
}

// identity tells builds of runsc apart: a sandbox that was saved by one can be
// restored by no other. It is the id that the linker gave the program, or the
// hash of a program that has none.
func (r runsc) identity() (string, error) {
	f, err := os.Open(r.path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if program, err := elf.NewFile(f); err == nil {
		for _, name := range []string{".note.go.buildid", ".note.gnu.build-id"} {
			section := program.Section(name)
			if section == nil || section.Size > maxNote {
				continue
			}
			// The note's header, 12 bytes, and its owner, 4, come first: elf(5).
			if note, err := section.Data(); err == nil && len(note) > 16 && strings.Trim(string(note[16:]), "\x00") != "redacted" {
				return fmt.Sprintf("%s %q", r.version, note[16:]), nil
			}
		}
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, io.NewSectionReader(f, 0, math.MaxInt64)); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %x", r.version, hash.Sum(nil)), nil
}

// maxNote bounds what is read of a program's note, in bytes.
const maxNote = 4 << 10

// runscFault finds what went wrong among what runsc, and a sandbox, have printed,
// quoted: gVisor adds the stacks of whatever found out that it cannot save or
// restore something.
func runscFault(printed []byte) string {
	for line := range bytes.Lines(printed) {
		for _, prefix := range []string{"starting container: ", "checkpoint failed: "} {
			if rest, ok := bytes.CutPrefix(line, []byte(prefix)); ok {
				return lastLine(bytes.TrimRight(rest, ":\n"))
			}
		}
	}
	return lastLine(printed)
}

// versionDates match the two forms of a gVisor version: a Go module's
// v0.0.0-20260905035102-160fafc42237 and a release's release-20260601.0.
var versionDates = regexp.MustCompile(`(?:v0\.0\.0-|release-)(20[0-9]{6})`)

func versionDate(version string) string {
	m := versionDates.FindStringSubmatch(version)
	if m == nil {
		return ""
	}
	return m[1]
}

// globalFlags are the flags that every runsc command of one sandbox must be
// given alike: start without --network=none, for example, silently makes a
// sandbox without a loopback.
//
// ownMiB is the size of the disk that the sandbox keeps for itself: its changes
// are in a file without a name then, and end with it. Making and looking at
// files takes half the time there, because they need not be the host's, too. With
// 0 they go to the host's overlay, and survive whatever ends the sandbox.
func (r runsc) globalFlags(s stage, ownMiB int64) []string {
	overlay := "none"
	if ownMiB > 0 {
		overlay = fmt.Sprintf("root:dir=%s,size=%dm", s.layer(), ownMiB)
	}
	flags := []string{
		"--root=" + s.state(),
		"--platform=systrap",
		// Loopback only. What else a guest may reach goes through the guest
		// agent's channel.
		"--network=none",
		// Raw sockets reach the loopback of gVisor's own network stack alone;
		// ping wants one.
		"--net-raw",
		// The guest may become who it likes inside, as in a virtual machine:
		// sudo works.
		"--allow-suid",
		"--overlay2=" + overlay,
		"--file-access=exclusive",
		"--directfs=true",
		// The guest agent connects to our socket; no guest can make one.
		"--host-uds=open",
		// Control groups inside, with which the guest agent bounds and ends
		// what a command has started.
		"--in-sandbox-cgroup=v2",
		"--host-settings=ignore",
	}
	if !canShowSize() {
		flags = append(flags, "--ignore-cgroups")
	}
	return flags
}

// command returns the runsc command with the given arguments, for
// namespace.start.
func (r runsc) command(s stage, ownMiB int64, args ...string) *exec.Cmd {
	cmd := exec.Command(r.path, append(r.globalFlags(s, ownMiB), args...)...)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH")}
	cmd.Dir = "/"
	return cmd
}
