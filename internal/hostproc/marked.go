package hostproc

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// KillMarked kills every process of this user whose initial environment holds
// marker ("NAME=VALUE"), and again until there is none left, because a process
// may fork while it is being looked for. It is for processes that run on the
// host without any isolation, where nothing better than an inherited variable
// ties them together; one that has cleared its environment escapes it.
func KillMarked(ctx context.Context, marker string) error {
	for ctx.Err() == nil {
		ids, err := marked(marker)
		if err != nil || len(ids) == 0 {
			return err
		}
		for _, id := range ids {
			if err := id.KillLadder(ctx, 0); err != nil && !errors.Is(err, unix.EPERM) {
				return err
			}
		}
	}
	return ctx.Err()
}

func marked(marker string) ([]Identity, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var ids []Identity
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		env, err := os.ReadFile("/proc/" + e.Name() + "/environ")
		if err != nil || !holds(env, marker) {
			continue // gone, or not ours
		}
		if id, err := Identify(pid); err == nil && id.Alive() {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

func holds(environ []byte, marker string) bool {
	for v := range bytes.SplitSeq(environ, []byte{0}) {
		if string(v) == marker {
			return true
		}
	}
	return false
}
