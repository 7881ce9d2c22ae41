package faults_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/pyro-mcp/pyro/api"
)

// needMemory skips the test where the engine cannot save a machine's memory.
func (l *lab) needMemory() {
	l.Helper()
	l.create("probe")
	defer l.ok("workspace", "delete", "probe")
	res := l.run("workspace", "snapshot", "create", "probe", "s", "--memory", "--json")
	if code := errorCode(res); code == api.Code(api.ErrUnsupported) {
		l.Skip("engine " + engineName() + " cannot save memory")
	}
	if res.code != 0 {
		l.Fatal(res)
	}
}

// memories returns the files of all saved memories.
func (l *lab) memories() []string {
	l.Helper()
	roots, err := filepath.Glob(filepath.Join(l.state, "layers", "*.memory"))
	if err != nil {
		l.Fatal(err)
	}
	var files []string
	for _, root := range roots {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err == nil && info.Mode().Perm()&0o077 != 0 {
				l.Errorf("%s has the mode %v", path, info.Mode())
			}
			if !d.IsDir() {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			l.Fatal(err)
		}
	}
	if len(files) == 0 {
		l.Fatal("no memory is saved")
	}
	return files
}

// flip changes one bit in the middle of a file, and says nothing of it in the
// file's times.
func (l *lab) flip(path string) {
	l.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		l.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		l.Fatal(err)
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], st.Size()/2); err != nil {
		l.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], st.Size()/2); err != nil {
		l.Fatal(err)
	}
	if err := os.Chtimes(path, st.ModTime(), st.ModTime()); err != nil {
		l.Fatal(err)
	}
}

// TestDamagedMemory flips a bit in each file of a full snapshot. Nothing starts
// from that, and the workspace has noticed nothing.
func TestDamagedMemory(t *testing.T) {
	thoroughOnly(t)
	l := newLab(t)
	l.needMemory()
	l.create("w")
	l.exec("w", "echo acknowledged > kept; sync")
	l.ok("workspace", "snapshot", "create", "w", "s", "--memory")
	l.exec("w", "echo running > /dev/shm/running")
	for _, path := range l.memories() {
		l.flip(path)
		l.refused(api.Code(api.ErrDamaged), "workspace", "reset", "w", "--snapshot", "s")
		l.refused(api.Code(api.ErrDamaged), "workspace", "fork", "w", "--snapshot", "s")
		if got := l.exec("w", "cat kept /dev/shm/running"); got != "acknowledged\nrunning\n" {
			l.Errorf("a reset that was refused left %q", got)
		}
		l.flip(path) // and back
	}
	if n := len(l.list()); n != 2 {
		l.Errorf("%d workspaces after forks that were refused", n)
	}
	l.ok("workspace", "reset", "w", "--snapshot", "s")
	if got := l.exec("w", "cat kept; ls /dev/shm"); got != "acknowledged\n" {
		l.Errorf("the mended snapshot holds %q", got)
	}
	l.ok("workspace", "delete", "w")
	l.check()
}
