package artifact

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// makeRoom is the way out of a full disk. Artifacts lie in the cache and in the
// state directory.
const makeRoom = "free some space there, for example with pyro env prune and pyro workspace prune, or set PYRO_CACHE_DIR and PYRO_STATE_DIR to directories on a larger disk"

// CheckFree reports api.ErrExhausted if fewer than need bytes are free for
// this user on the file system of dir.
func CheckFree(dir string, need int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("measuring the free space of %s: %w", dir, err)
	}
	free := int64(st.Bavail) * st.Bsize
	if free >= need {
		return nil
	}
	return api.WithHint(api.Errorf(api.ErrExhausted, "%s has %d MiB free and %d MiB are needed", dir, free>>20, need>>20), makeRoom)
}

// explainFull gives a failure for want of space its class and way out.
func explainFull(err error, dir string) error {
	if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
		return err
	}
	return api.WithHint(api.Errorf(api.ErrExhausted, "%w", err), "%s is on a full disk; %s", dir, makeRoom)
}
