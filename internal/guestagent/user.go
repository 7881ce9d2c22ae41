package guestagent

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/archive"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// The bounds of what is believed of /etc/passwd and /etc/group, which the guest
// may have written.
const (
	maxDatabase = 4 << 20
	maxGroups   = 1000
)

// A userDatabase is where users and groups are looked up: passwd(5) and
// group(5).
type userDatabase struct{ passwd, group string }

var guestUsers = userDatabase{"/etc/passwd", "/etc/group"}

// A user is who a command runs as.
type user struct {
	cred syscall.Credential
	name string // "1000" where it has none
	home string
}

// user returns who text names: NAME-OR-NUMBER[:GROUP-OR-NUMBER], as an image's
// configuration has it (OCI image specification, config, "User"). It is nil,
// the agent's own, for "". A number needs no entry in any file. Without a group
// the user's own are taken, and with one only that.
func (s *Server) user(text string) (*user, error) {
	if text == "" {
		return nil, nil
	}
	if s.Root != "/" || os.Geteuid() != 0 {
		return nil, api.WithHint(api.Errorf(api.ErrUnsupported, "this guest agent is an ordinary process and runs commands as its own user, not as %q", text),
			"leave the user out, or take an engine that isolates")
	}
	if err := api.CheckUser(text); err != nil {
		return nil, err
	}
	return guestUsers.look(text)
}

// look finds a user by NAME-OR-NUMBER[:GROUP-OR-NUMBER].
func (db userDatabase) look(text string) (*user, error) {
	name, group, grouped := strings.Cut(text, ":")
	u, err := db.user(name)
	if err == nil && grouped {
		u.cred.Groups = nil
		u.cred.Gid, err = db.groupID(group)
	}
	return u, err
}

// user looks a user up, with the groups that it is in.
func (db userDatabase) user(name string) (*user, error) {
	id, numeric := number(name)
	u := &user{cred: syscall.Credential{Uid: id}, name: name, home: "/"}
	found := false
	// The first entry counts, as for getpwnam(3).
	err := eachEntry(db.passwd, 7, func(f []string) bool {
		uid, ok := number(f[2])
		gid, ok2 := number(f[3])
		if !ok || !ok2 || numeric && uid != id || !numeric && f[0] != name {
			return true
		}
		found = true
		u.cred.Uid, u.cred.Gid, u.name = uid, gid, f[0]
		if strings.HasPrefix(f[5], "/") {
			u.home = f[5]
		}
		return false
	})
	if err != nil {
		return nil, err
	}
	if !found && name != "root" && !numeric {
		return nil, api.WithHint(api.Errorf(api.ErrInvalid, "the guest has no user %q: %s has no such entry", name, db.passwd),
			"name another one with --user, such as root or 1000:1000")
	}
	if !found && u.cred.Uid == 0 {
		u.name, u.home = "root", "/root"
	}
	if !found {
		return u, nil
	}
	err = eachEntry(db.group, 4, func(f []string) bool {
		gid, ok := number(f[2])
		if !ok || gid == u.cred.Gid {
			return true
		}
		for member := range strings.SplitSeq(f[3], ",") {
			if member == u.name {
				u.cred.Groups = append(u.cred.Groups, gid)
				break
			}
		}
		return len(u.cred.Groups) < maxGroups
	})
	return u, err
}

func (db userDatabase) groupID(name string) (gid uint32, err error) {
	if gid, ok := number(name); ok {
		return gid, nil
	}
	found := name == "root"
	err = eachEntry(db.group, 4, func(f []string) bool {
		n, ok := number(f[2])
		if !ok || f[0] != name {
			return true
		}
		gid, found = n, true
		return false
	})
	if err == nil && !found {
		err = api.WithHint(api.Errorf(api.ErrInvalid, "the guest has no group %q: %s has no such entry", name, db.group),
			"name another one with --user, such as root or 1000:1000")
	}
	return gid, err
}

// number reads an id. The largest number means "no id" to the kernel.
func number(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n < 1<<32-1
}

// eachEntry calls do with every line of a user database that has that many
// fields or more, until it returns false. A file that does not exist has no
// lines.
func eachEntry(path string, fields int, do func(f []string) bool) error {
	// A FIFO in its place must not be waited for.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err != nil {
		return api.Errorf(api.ErrUnavailable, "looking for a user: %w", err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return api.Errorf(api.ErrInvalid, "looking for a user: %s is not a regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxDatabase+1))
	if err != nil {
		return api.Errorf(api.ErrUnavailable, "looking for a user: %w", err)
	}
	if len(data) > maxDatabase {
		return api.Errorf(api.ErrExhausted, "looking for a user: %s is larger than %d bytes", path, maxDatabase)
	}
	for line := range bytes.Lines(data) {
		entry := strings.Split(strings.TrimSpace(string(line)), ":")
		if len(entry) >= fields && !strings.HasPrefix(entry[0], "#") && !do(entry) {
			return nil
		}
	}
	return nil
}

// environ sets what login(1) would.
func (u *user) environ(env map[string]string) {
	if u != nil {
		env["USER"], env["HOME"] = u.name, u.home
	}
}

// credential is what a command of the user's starts with.
func (u *user) credential() *syscall.Credential {
	if u == nil {
		return nil
	}
	return &u.cred
}

// owner returns whom the workspace belongs to, and so what is made in it; nil
// where that is the agent itself, or the agent may not give files away.
func (s *Server) owner(workspace *directory) (*archive.Owner, error) {
	if s.Root != "/" || os.Geteuid() != 0 {
		return nil, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(workspace.fd, &st); err != nil {
		return nil, fileError(defaultCwd, err)
	}
	if st.Uid == 0 && st.Gid == uint32(os.Getegid()) {
		return nil, nil
	}
	return &archive.Owner{UID: int(st.Uid), GID: int(st.Gid)}, nil
}

// ownWorkspace gives the workspace, not what is in it, to a user.
func (q *request) ownWorkspace(line []byte) error {
	var req guestproto.OwnWorkspace
	if err := decodeRequest(line, &req, "user"); err != nil {
		return err
	}
	u, err := q.server.user(req.User)
	if err != nil {
		return err
	}
	if u == nil {
		return api.Errorf(api.ErrInvalid, "the request names no user")
	}
	p, err := q.server.openPlace(defaultCwd)
	if err != nil {
		return err
	}
	defer p.close()
	err = unix.Fchown(p.workspace.fd, int(u.cred.Uid), int(u.cred.Gid))
	if errors.Is(err, unix.EINVAL) {
		// A sandbox of somebody without ranges of ids, seen on gVisor.
		return api.WithHint(api.Errorf(api.ErrUnsupported, "user %q can have no files here: in this guest all of them belong to root", req.User),
			"use --user root; pyro doctor says what lets guests have other users")
	}
	if err != nil {
		return api.Errorf(api.ErrUnavailable, "giving %s to user %d: %w", defaultCwd, u.cred.Uid, err)
	}
	return q.reply(guestproto.OwnWorkspaceReply{UID: u.cred.Uid, GID: u.cred.Gid})
}
