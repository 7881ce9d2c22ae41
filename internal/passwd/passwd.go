// Package passwd looks up users and groups in passwd(5) and group(5), as an
// image's configuration names them (OCI image specification, config, "User").
// The guest agent does so for what it runs, and the host for a disk that nothing
// runs on yet: both must mean the same user by the same name.
package passwd

import (
	"bytes"
	"strconv"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// The bounds of what is believed of the two files, which a guest may have
// written.
const (
	maxBytes  = 4 << 20
	maxGroups = 1000
)

// The two files, as a guest names them.
const (
	passwdPath = "/etc/passwd"
	groupPath  = "/etc/group"
)

// A Database is a guest's users and groups. It returns up to limit bytes of the
// regular file at path, and none where there is no such file.
type Database func(path string, limit int64) ([]byte, error)

// A User is somebody to run commands as.
type User struct {
	UID, GID uint32
	Groups   []uint32 // further ones
	Name     string   // "1000" where it has none
	Home     string
}

// Look returns who text names: NAME-OR-NUMBER[:GROUP-OR-NUMBER]. A number needs
// no entry in any file, nor does root. Without a group the user's own are taken,
// and with one only that. A name that is not there is ErrInvalid, a file that is
// too large ErrExhausted.
func (db Database) Look(text string) (*User, error) {
	name, group, grouped := strings.Cut(text, ":")
	u, err := db.user(name)
	if err == nil && grouped {
		u.Groups = nil
		u.GID, err = db.groupID(group)
	}
	return u, err
}

// user looks a user up, with the groups that it is in.
func (db Database) user(name string) (*User, error) {
	id, numeric := number(name)
	u := &User{UID: id, Name: name, Home: "/"}
	found := false
	// The first entry counts, as for getpwnam(3).
	err := db.eachEntry(passwdPath, 7, func(f []string) bool {
		uid, ok := number(f[2])
		gid, ok2 := number(f[3])
		if !ok || !ok2 || numeric && uid != id || !numeric && f[0] != name {
			return true
		}
		found = true
		u.UID, u.GID, u.Name = uid, gid, f[0]
		if strings.HasPrefix(f[5], "/") {
			u.Home = f[5]
		}
		return false
	})
	if err != nil {
		return nil, err
	}
	if !found && name != "root" && !numeric {
		return nil, unknown("user", name, passwdPath)
	}
	if !found && u.UID == 0 {
		u.Name, u.Home = "root", "/root"
	}
	if !found {
		return u, nil
	}
	err = db.eachEntry(groupPath, 4, func(f []string) bool {
		gid, ok := number(f[2])
		if !ok || gid == u.GID {
			return true
		}
		for member := range strings.SplitSeq(f[3], ",") {
			if member == u.Name {
				u.Groups = append(u.Groups, gid)
				break
			}
		}
		return len(u.Groups) < maxGroups
	})
	return u, err
}

func (db Database) groupID(name string) (gid uint32, err error) {
	if gid, ok := number(name); ok {
		return gid, nil
	}
	found := name == "root"
	err = db.eachEntry(groupPath, 4, func(f []string) bool {
		n, ok := number(f[2])
		if !ok || f[0] != name {
			return true
		}
		gid, found = n, true
		return false
	})
	if err == nil && !found {
		err = unknown("group", name, groupPath)
	}
	return gid, err
}

func unknown(kind, name, path string) error {
	return api.WithHint(api.Errorf(api.ErrInvalid, "the guest has no %s %q: %s has no such entry", kind, name, path),
		"name another one with --user, such as root or 1000:1000")
}

// number reads an id. The largest number means "no id" to the kernel.
func number(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n < 1<<32-1
}

// eachEntry calls do with every line of a file that has that many fields or more,
// until it returns false.
func (db Database) eachEntry(path string, fields int, do func(f []string) bool) error {
	data, err := db(path, maxBytes+1)
	if err != nil {
		return err
	}
	if len(data) > maxBytes {
		return api.Errorf(api.ErrExhausted, "looking for a user: %s is larger than %d bytes", path, maxBytes)
	}
	for line := range bytes.Lines(data) {
		entry := strings.Split(strings.TrimSpace(string(line)), ":")
		if len(entry) >= fields && !strings.HasPrefix(entry[0], "#") && !do(entry) {
			return nil
		}
	}
	return nil
}
