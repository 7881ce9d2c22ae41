//go:build linux

package workspacedisk

import (
	"os"
	"testing"
)

// ReplayedBlocks returns the 1 KiB pieces of an image, by byte offset, that the
// replay of its journal changes, as the replayed filesystem shows them.
func ReplayedBlocks(t testing.TB, img string) map[int64][]byte {
	t.Helper()
	d, err := Open(t.Context(), Source{Path: img, Format: FormatRaw}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	raw, err := os.ReadFile(img)
	if err != nil {
		t.Fatal(err)
	}
	const piece = 1024
	changed := map[int64][]byte{}
	for off := int64(0); off+piece <= d.fs.Size(); off += piece {
		p := make([]byte, piece)
		if err := d.fs.ReadDevice(p, off); err != nil {
			t.Fatal(err)
		}
		if string(p) != string(raw[off:off+piece]) {
			changed[off] = p
		}
	}
	return changed
}
