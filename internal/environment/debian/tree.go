package debian

import (
	"archive/tar"
	"bytes"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/ext4image"
)

// A verdict says what happens to one entry of the tree.
type verdict int

const (
	take verdict = iota
	drop
	rewriteShadow
)

// emptied are directories that stay and lose what is in them: file systems
// that are mounted in the guest, caches, logs.
var emptied = []string{
	"dev", "proc", "run", "sys", "tmp", "var/tmp",
	"var/cache/apt", "var/cache/ldconfig", "var/lib/apt/lists", "var/log",
}

// dropped are files of this host, of this very build, or that must differ
// between guests.
var dropped = []string{
	"etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/machine-id", "var/lib/dbus/machine-id",
	"etc/.pwd.lock", "etc/passwd-", "etc/group-", "etc/shadow-", "etc/gshadow-", "etc/subuid-", "etc/subgid-",
	"var/lib/dpkg/status-old", "var/lib/dpkg/available-old", "var/lib/dpkg/diversions-old", "var/lib/dpkg/statoverride-old",
	"var/lib/dpkg/lock", "var/lib/dpkg/lock-frontend",
	"var/cache/debconf/config.dat-old", "var/cache/debconf/templates.dat-old",
	"var/lib/systemd/random-seed", "etc/apt/trusted.gpg~",
}

func decide(name string, typeflag byte) verdict {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	if slices.Contains(dropped, name) || strings.HasPrefix(name, "etc/ssh/ssh_host_") {
		return drop
	}
	for _, dir := range emptied {
		// Directories in the logs and caches belong to packages that expect them.
		deep := strings.HasPrefix(name, dir+"/")
		if deep && !(typeflag == tar.TypeDir && strings.HasPrefix(dir, "var/")) {
			return drop
		}
	}
	if name == "etc/shadow" && typeflag == tar.TypeReg {
		return rewriteShadow
	}
	return take
}

// maxShadow bounds the file that is rewritten in memory; a fresh one has 500
// bytes.
const maxShadow = 64 << 10

// withoutDates replaces the day of the last password change (the third field
// of shadow(5)), which is the day of the build, by one that is always in the
// past.
func withoutDates(h *tar.Header, content io.Reader) (io.Reader, error) {
	if h.Size > maxShadow {
		return nil, api.Errorf(api.ErrInvalid, "it has %d bytes, the limit is %d", h.Size, maxShadow)
	}
	b, err := io.ReadAll(content)
	if err != nil {
		return nil, err
	}
	lines := strings.Split(string(b), "\n")
	for i, line := range lines {
		if fields := strings.Split(line, ":"); len(fields) > 3 && fields[2] != "" {
			fields[2] = "19000" // 2022-01-08
			lines[i] = strings.Join(fields, ":")
		}
	}
	out := []byte(strings.Join(lines, "\n"))
	h.Size = int64(len(out))
	return bytes.NewReader(out), nil
}

// A standardEntry is something that every image has.
type standardEntry struct {
	path   string
	mode   uint16
	always bool // also where packages have brought one
	text   string
}

// standardEntries are the places that a guest mounts on, and files that say
// nothing about the host. The guest agent replaces the latter where it knows
// better. Manual pages are left out but not their directories: the set-up of
// some packages (alternatives with pages) fails without them.
var standardEntries = []standardEntry{
	{path: "proc", mode: ext4image.ModeDir | 0o555},
	{path: "sys", mode: ext4image.ModeDir | 0o555},
	{path: "dev", mode: ext4image.ModeDir | 0o755},
	{path: "run", mode: ext4image.ModeDir | 0o755},
	{path: "tmp", mode: ext4image.ModeDir | 0o1777},
	{path: "workspace", mode: ext4image.ModeDir | 0o755},
	{path: "etc/hosts", mode: ext4image.ModeFile | 0o644, always: true, text: "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"},
	{path: "etc/hostname", mode: ext4image.ModeFile | 0o644, always: true, text: "pyro\n"},
	{path: "etc/resolv.conf", mode: ext4image.ModeFile | 0o644, always: true},
	{path: "etc/machine-id", mode: ext4image.ModeFile | 0o644, always: true}, // empty: "not yet", machine-id(5)
	{path: "usr/share/man/man1", mode: ext4image.ModeDir | 0o755},
	{path: "usr/share/man/man5", mode: ext4image.ModeDir | 0o755},
	{path: "usr/share/man/man7", mode: ext4image.ModeDir | 0o755},
	{path: "usr/share/man/man8", mode: ext4image.ModeDir | 0o755},
}

func (e standardEntry) entry(now time.Time) ext4image.Entry {
	return ext4image.Entry{Path: e.path, Mode: e.mode, ModTime: now, Size: int64(len(e.text))}
}

func (e standardEntry) content() io.Reader { return strings.NewReader(e.text) }
