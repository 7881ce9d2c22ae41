package statedir_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/statedir"
)

func TestDefaults(t *testing.T) {
	for _, test := range []struct {
		name         string
		env          map[string]string
		state, cache string // "" for an error
	}{
		{"Home", map[string]string{"HOME": "/h"}, "/h/.local/state/pyro", "/h/.cache/pyro"},
		{"XDG", map[string]string{"HOME": "/h", "XDG_STATE_HOME": "/s", "XDG_CACHE_HOME": "/c"}, "/s/pyro", "/c/pyro"},
		{"Own", map[string]string{"PYRO_STATE_DIR": "/a/../b", "PYRO_CACHE_DIR": "/c", "XDG_STATE_HOME": "/s"}, "/b", "/c"},
		{"RelativeXDGIsIgnored", map[string]string{"HOME": "/h", "XDG_STATE_HOME": "s"}, "/h/.local/state/pyro", "/h/.cache/pyro"},
		{"RelativeOwn", map[string]string{"HOME": "/h", "PYRO_STATE_DIR": "s", "PYRO_CACHE_DIR": "c"}, "", ""},
		{"NoHome", map[string]string{}, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			getenv := func(k string) string { return test.env[k] }
			for want, get := range map[string]func(func(string) string) (string, error){
				"state " + test.state: statedir.DefaultState, "cache " + test.cache: statedir.DefaultCache,
			} {
				got, err := get(getenv)
				if want = want[len("state "):]; want == "" {
					if !errors.Is(err, api.ErrInvalid) || api.Hint(err) == "" {
						t.Errorf("got %q, %v; want ErrInvalid with a hint", got, err)
					}
				} else if got != want || err != nil {
					t.Errorf("got %q, %v; want %q", got, err, want)
				}
			}
		})
	}
}

func TestOpenMakesItPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "state")
	if _, err := statedir.Open(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := statedir.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, d.MachinesDir(), d.WorkspacesDir(), d.LayersDir(), d.SeedsDir()} {
		st, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != 0o700 {
			t.Errorf("%s has mode %v", p, st.Mode().Perm())
		}
	}
}

func TestOpenRefusesWhatIsNotOurs(t *testing.T) {
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	if err := os.Mkdir(target, 0o700); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	if _, err := statedir.Open(link); !errors.Is(err, api.ErrDenied) || api.Hint(err) == "" {
		t.Errorf("a link: %v, want ErrDenied with a hint", err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(target, 12345, 12345); err != nil {
			t.Fatal(err)
		}
		if _, err := statedir.Open(target); !errors.Is(err, api.ErrDenied) {
			t.Errorf("somebody else's: %v, want ErrDenied", err)
		}
	}
}

func TestWorkspaceFiles(t *testing.T) {
	path := t.TempDir()
	d, err := statedir.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	w := d.Workspace("ws-1")
	for got, want := range map[string]string{
		d.Database():                "state.db",
		d.Layer("l1.qcow2"):         "layers/l1.qcow2",
		w.Path():                    "workspaces/ws-1",
		w.LockFile():                "workspaces/ws-1/lock",
		w.RecordFile():              "workspaces/ws-1/workspace.json",
		w.Output(12, "stderr"):      "workspaces/ws-1/commands/12.stderr",
		filepath.Join(path, w.ID()): "ws-1",
	} {
		if got != filepath.Join(path, want) {
			t.Errorf("got %s, want %s below %s", got, want, path)
		}
	}
}

func TestWriteReservedJSON(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.json")
	if err := statedir.WriteReservedJSON(path, "nothing was reserved"); err != nil {
		t.Fatal(err)
	}
	const room = 64 << 10
	if err := statedir.Reserve(path, room); err != nil {
		t.Fatal(err)
	}
	reserved, err := os.Stat(path + ".spare")
	if err != nil || reserved.Size() != room || reserved.Mode().Perm() != 0o600 {
		t.Fatalf("reserved: %v, %v", reserved, err)
	}
	if err := statedir.WriteReservedJSON(path, "short"); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "\"short\"\n" {
		t.Errorf("read back %q, %v", b, err)
	}
	if st, err := os.Stat(path); err != nil || !os.SameFile(st, reserved) {
		t.Errorf("it is not in the room that was reserved: %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("%d files are left, %v", len(entries), err)
	}
}

func TestWriteJSONReplacesInOneStep(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.json")
	for i := range 3 {
		if err := statedir.WriteJSON(path, map[string]int{"n": i}); err != nil {
			t.Fatal(err)
		}
	}
	var got map[string]int
	if err := statedir.ReadJSON(path, &got); err != nil || got["n"] != 2 {
		t.Errorf("read back %v, %v", got, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%d files are left, %v", len(entries), err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

// What would fail later and darkly is refused at the door.
func TestOpenRefusesPathsThatCannotWork(t *testing.T) {
	for name, path := range map[string]string{
		"Long":    filepath.Join(t.TempDir(), strings.Repeat("d/", 250)),
		"NotUTF8": filepath.Join(t.TempDir(), "st\xffate"),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := statedir.Open(path); !errors.Is(err, api.ErrInvalid) || api.Hint(err) == "" {
				t.Errorf("got %v, want ErrInvalid with a hint", err)
			}
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("it was made: %v", err)
			}
		})
	}
}
