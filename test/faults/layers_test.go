package faults_test

import (
	"io/fs"
	"path/filepath"
	"syscall"
	"testing"
)

// layerBytes is the room that all layers take on the host's disk.
func (l *lab) layerBytes() (total int64) {
	l.Helper()
	err := filepath.WalkDir(filepath.Join(l.state, "layers"), func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err == nil {
			total += st.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	})
	if err != nil {
		l.Fatal(err)
	}
	return total
}

// TestDeletedSnapshotGivesItsRoomBack deletes a snapshot that the disk stands on:
// what only it held is gone, and the rest is there.
func TestDeletedSnapshotGivesItsRoomBack(t *testing.T) {
	if engineName() != "gvisor" {
		t.Skip("is about files, which the layers of gVisor alone hold")
	}
	l := newLab(t)
	l.create("w")
	l.exec("w", "echo acknowledged > kept; dd if=/dev/urandom of=large bs=1M count=32; sync")
	l.ok("workspace", "stop", "w")
	l.ok("workspace", "snapshot", "create", "w", "first")
	l.ok("workspace", "start", "w")
	l.exec("w", "rm large; echo later > later; sync")
	l.ok("workspace", "stop", "w")
	before := l.layerBytes()
	l.ok("workspace", "snapshot", "delete", "w", "first")
	if freed := before - l.layerBytes(); freed < 24<<20 {
		t.Errorf("of %d bytes only %d came back", before, freed)
	}
	l.ok("workspace", "start", "w")
	if got := l.exec("w", "cat kept later; ls"); got != "acknowledged\nlater\nkept\nlater\nseeded\nsub\n" {
		t.Errorf("afterwards there is %q", got)
	}
}
