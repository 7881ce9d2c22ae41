package guestagent

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/archive"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// maxSecrets bounds how many secrets a guest is given.
const maxSecrets = 256

// setSecrets writes the guest's secrets to files that never reach a disk.
func (q *request) setSecrets(line []byte) error {
	var req guestproto.SetSecrets
	if err := decodeRequest(line, &req, "secrets"); err != nil {
		return err
	}
	if len(req.Secrets) > maxSecrets {
		return api.Errorf(api.ErrInvalid, "%d secrets are more than the limit of %d", len(req.Secrets), maxSecrets)
	}
	for name := range req.Secrets {
		if err := guestproto.CheckWorkloadName(name); err != nil {
			return fmt.Errorf("a secret's name: %w", err)
		}
	}
	if q.server.Root != "/" {
		// Everything below the root of our own lies on the host's disk.
		return q.reply(guestproto.SetSecretsReply{})
	}
	// Whose commands the workspace is for can read them.
	var owner *archive.Owner
	if p, err := q.server.openPlace(defaultCwd); err == nil {
		owner, _ = q.server.owner(p.workspace)
		p.close()
	}
	if err := storeSecrets(guestproto.SecretsDir, req.Secrets, owner); err != nil {
		return api.Errorf(api.ErrUnavailable, "storing secrets: %w", err)
	}
	return q.reply(guestproto.SetSecretsReply{Stored: true})
}

// storeSecrets makes dir anew, on a tmpfs, with one file for each secret. They
// are owner's, root's if that is nil.
func storeSecrets(dir string, secrets map[string][]byte, owner *archive.Owner) error {
	if owner == nil {
		owner = &archive.Owner{}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if st.Type != unix.TMPFS_MAGIC {
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0700,size=16m"); err != nil {
			return err
		}
	}
	if err := os.Lchown(dir, owner.UID, owner.GID); err != nil {
		return err
	}
	old, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range old {
		if _, kept := secrets[e.Name()]; !kept {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	for name, value := range secrets {
		path := filepath.Join(dir, name)
		// Anew, so that neither a link nor a wider mode of somebody's stays.
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if _, err = f.Write(value); err == nil {
			err = f.Chown(owner.UID, owner.GID)
		}
		if closeErr := f.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			return err
		}
	}
	return nil
}
