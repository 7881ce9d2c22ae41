package workspace

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// TestStages gathers many exports at one place at the same time, beside what a
// killed one has left, and what only looks like that.
func TestStages(t *testing.T) {
	dir := t.TempDir()
	left, foreign := filepath.Join(dir, stagePrefix+newID()), filepath.Join(dir, stagePrefix+"notes")
	for _, d := range []string{filepath.Join(left, "tree"), foreign} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(dir, stagePrefix+newID())
	if err := os.Symlink(foreign, link); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for range 50 {
				o, err := newOutput(filepath.Join(dir, fmt.Sprint(i)))
				if err != nil {
					t.Error(err)
					return
				}
				if err := o.root.WriteFile("file", nil, 0o600); err != nil {
					t.Errorf("a stage that is in use was removed: %v", err)
				}
				if _, err := os.Lstat(filepath.Join(dir, o.stage, "file")); err != nil {
					t.Errorf("a stage that is in use was removed: %v", err)
				}
				o.discard()
			}
		})
	}
	all.Wait()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("%d entries, %v; want %s and %s", len(entries), err, foreign, link)
	}
}
