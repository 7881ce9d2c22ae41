package guestagent

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/archive"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/passwd"
)

// A user is who a command runs as.
type user passwd.User

// user returns who text names, as [passwd.Database.Look] does. It is nil, the
// agent's own, for "".
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
	u, err := passwd.Database(readRegular).Look(text)
	return (*user)(u), err
}

// readRegular reads up to limit bytes of a file of the guest's, and none of one
// that does not exist.
func readRegular(path string, limit int64) ([]byte, error) {
	// A FIFO in its place must not be waited for.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, api.Errorf(api.ErrUnavailable, "looking for a user: %w", err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, api.Errorf(api.ErrInvalid, "looking for a user: %s is not a regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return nil, api.Errorf(api.ErrUnavailable, "looking for a user: %w", err)
	}
	return data, nil
}

// environ sets what login(1) would.
func (u *user) environ(env map[string]string) {
	if u != nil {
		env["USER"], env["HOME"] = u.Name, u.Home
	}
}

// credential is what a command of the user's starts with.
func (u *user) credential() *syscall.Credential {
	if u == nil {
		return nil
	}
	return &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
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
	err = unix.Fchown(p.workspace.fd, int(u.UID), int(u.GID))
	if errors.Is(err, unix.EINVAL) {
		// A sandbox of somebody without ranges of ids, seen on gVisor.
		return api.WithHint(api.Errorf(api.ErrUnsupported, "user %q can have no files here: in this guest all of them belong to root", req.User),
			"use --user root; pyro doctor says what lets guests have other users")
	}
	if err != nil {
		return api.Errorf(api.ErrUnavailable, "giving %s to user %d: %w", defaultCwd, u.UID, err)
	}
	return q.reply(guestproto.OwnWorkspaceReply{UID: u.UID, GID: u.GID})
}
