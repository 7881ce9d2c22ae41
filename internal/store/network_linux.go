package store

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// networkFileSystems are those by whose locks several hosts, or a host and its
// guest, cannot be kept apart (statfs(2), linux/magic.h). FUSE is not among
// them: it is as often local.
var networkFileSystems = map[uint32]string{
	unix.NFS_SUPER_MAGIC:   "NFS",
	unix.SMB_SUPER_MAGIC:   "SMB",
	unix.CIFS_SUPER_MAGIC:  "CIFS",
	unix.SMB2_SUPER_MAGIC:  "SMB2",
	unix.V9FS_MAGIC:        "9P",
	unix.AFS_SUPER_MAGIC:   "AFS",
	unix.AFS_FS_MAGIC:      "AFS",
	unix.CODA_SUPER_MAGIC:  "Coda",
	unix.CEPH_SUPER_MAGIC:  "Ceph",
	unix.NCP_SUPER_MAGIC:   "NCP",
	unix.OCFS2_SUPER_MAGIC: "OCFS2",
	0x0bd00bd0:             "Lustre", // not in magic.h
	0x47504653:             "GPFS",   // not in magic.h
}

// statfs is replaced in tests: few machines have such a file system.
var statfs = unix.Statfs

// refuseNetwork is an error where dir lies on a network file system.
func refuseNetwork(dir string) error {
	var st unix.Statfs_t
	if err := statfs(dir, &st); err != nil {
		return fmt.Errorf("looking at the file system of %s: %w", dir, err)
	}
	if name, ok := networkFileSystems[uint32(st.Type)]; ok {
		return api.WithHint(api.Errorf(api.ErrUnsupported, "%s lies on a network file system (%s), whose locks cannot protect a database", dir, name),
			"point PYRO_STATE_DIR at a directory on a disk of this machine")
	}
	return nil
}
