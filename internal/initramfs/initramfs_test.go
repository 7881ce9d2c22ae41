package initramfs_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/initramfs"
)

type entry struct {
	Mode, Major, Minor uint64
	Content            string
}

// readCPIO is the kernel's side of the format.
func readCPIO(t *testing.T, b []byte) (names []string, entries map[string]entry) {
	t.Helper()
	entries = map[string]entry{}
	align := func(n int) int { return (n + 3) &^ 3 }
	for pos := 0; ; {
		if len(b) < pos+110 || string(b[pos:pos+6]) != "070701" {
			t.Fatalf("no header at offset %d", pos)
		}
		field := func(i int) uint64 {
			v, err := strconv.ParseUint(string(b[pos+6+8*i:pos+14+8*i]), 16, 32)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
		if mtime := field(5); mtime != 0 {
			t.Errorf("the entry at %d has the time %d", pos, mtime)
		}
		size, nameSize := int(field(6)), int(field(11))
		name := string(b[pos+110 : pos+110+nameSize-1])
		data := align(pos + 110 + nameSize)
		if name == "TRAILER!!!" {
			return names, entries
		}
		names = append(names, name)
		entries[name] = entry{field(1), field(9), field(10), string(b[data : data+size])}
		pos = align(data + size)
	}
}

func writeFiles(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestWrite(t *testing.T) {
	dir := writeFiles(t, map[string]string{"agent": "the agent", "b.ko": "module b", "a.ko": "module a!"})
	spec := initramfs.Spec{
		Init:    filepath.Join(dir, "agent"),
		Modules: []string{filepath.Join(dir, "b.ko"), filepath.Join(dir, "a.ko")},
	}
	var first, second bytes.Buffer
	if err := initramfs.Write(&first, spec); err != nil {
		t.Fatal(err)
	}
	if err := initramfs.Write(&second, spec); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("two archives of the same files differ")
	}
	if first.Len()%512 != 0 {
		t.Errorf("the archive has %d bytes", first.Len())
	}
	names, entries := readCPIO(t, first.Bytes())
	want := map[string]entry{
		"init":            {0o100755, 0, 0, "the agent"},
		"modules/00-b.ko": {0o100400, 0, 0, "module b"},
		"modules/01-a.ko": {0o100400, 0, 0, "module a!"},
		"modules/order":   {0o100400, 0, 0, "/modules/00-b.ko\n/modules/01-a.ko\n"},
		"dev/console":     {0o020600, 5, 1, ""},
	}
	for _, d := range []string{"dev", "modules", "newroot", "proc", "run", "sys", "tmp"} {
		want[d] = entry{0o040755, 0, 0, ""}
	}
	if diff := cmp.Diff(want, entries); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
	// The kernel makes no parents.
	seen := map[string]bool{".": true}
	for _, name := range names {
		if !seen[filepath.Dir(name)] {
			t.Errorf("%s comes before its directory", name)
		}
		seen[name] = true
	}
}

type failing struct{ after int }

var errFull = errors.New("full")

func (f *failing) Write(p []byte) (int, error) {
	if f.after -= len(p); f.after < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestErrors(t *testing.T) {
	dir := writeFiles(t, map[string]string{"agent": "the agent", "m.ko": strings.Repeat("m", 3<<20)})
	agent, mod := filepath.Join(dir, "agent"), filepath.Join(dir, "m.ko")
	for _, tt := range []struct {
		name string
		spec initramfs.Spec
		room int
		want error
	}{
		{"no agent", initramfs.Spec{Init: filepath.Join(dir, "nothing")}, 1 << 30, fs.ErrNotExist},
		{"no module", initramfs.Spec{Init: agent, Modules: []string{filepath.Join(dir, "nothing.ko")}}, 1 << 30, fs.ErrNotExist},
		{"directory", initramfs.Spec{Init: dir}, 1 << 30, api.ErrInvalid},
		{"full at once", initramfs.Spec{Init: agent, Modules: []string{mod}}, 0, errFull},
		{"full in a module", initramfs.Spec{Init: agent, Modules: []string{mod}}, 2 << 20, errFull},
		{"full at the end", initramfs.Spec{Init: agent}, 100, errFull},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := initramfs.Write(&failing{tt.room}, tt.spec); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	huge := filepath.Join(dir, "huge")
	f, err := os.Create(huge)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 30); err != nil {
		t.Fatal(err)
	}
	if err := initramfs.Write(&failing{1 << 40}, initramfs.Spec{Init: huge}); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("a file of 1 GiB gave %v", err)
	}
}
