package cli_test

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/internal/cli"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// pyro runs one command line and returns its exit status and output.
func pyro(args ...string) (status int, stdout, stderr string) {
	var out, err bytes.Buffer
	status = cli.Main(args, cli.Streams{In: strings.NewReader(""), Out: &out, Err: &err})
	return status, out.String(), err.String()
}

// diskImage makes the image of the product's example, with runtime paths.
func diskImage(t *testing.T) string {
	t.Helper()
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	testenv.RequireTools(t, "e2fsprogs", "mke2fs", "e2fsck", "debugfs")
	dir := t.TempDir()
	for name, content := range map[string]string{
		"workspace/note.txt":      "hello from disk\n",
		"workspace/src/child.txt": "child of src\n",
		"run/pyro-secrets/token":  "TOKEN",
		"run/pyro-services/a.log": "x",
		"run/pyro-shells/b":       "y",
	} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("note.txt", filepath.Join(dir, "workspace/link")); err != nil {
		t.Fatal(err)
	}
	img := filepath.Join(t.TempDir(), "disk.ext4")
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-d", dir, img, "16M").CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v\n%s", err, out)
	}
	return img
}

const listing = `{
  "entries": [
    {
      "artifact_type": "symlink",
      "link_target": "note.txt",
      "path": "/workspace/link",
      "size_bytes": 8
    },
    {
      "artifact_type": "file",
      "link_target": null,
      "path": "/workspace/note.txt",
      "size_bytes": 16
    },
    {
      "artifact_type": "directory",
      "link_target": null,
      "path": "/workspace/src",
      "size_bytes": 0
    },
    {
      "artifact_type": "file",
      "link_target": null,
      "path": "/workspace/src/child.txt",
      "size_bytes": 13
    }
  ],
  "path": "/workspace",
  "recursive": true
}
`

func TestDiskCommands(t *testing.T) {
	img := diskImage(t)
	out := filepath.Join(t.TempDir(), "out.ext4")
	const read = `{
  "content": "hello",
  "max_bytes": 5,
  "path": "/workspace/note.txt",
  "size_bytes": 16,
  "truncated": true
}
`
	empty := "{\n  \"entries\": [],\n  \"path\": \"/run\",\n  \"recursive\": true\n}\n"
	export, err := json.MarshalIndent(map[string]any{"bytes_written": 16 << 20, "disk_format": "ext4", "output_path": out}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	// In this order: later ones see what earlier ones did.
	tests := []struct {
		name   string
		args   []string
		status int
		stdout string
		stderr string // contained
	}{
		{"list as JSON", []string{"list", img, "--recursive", "--json"}, 0, listing, ""},
		{"list for people", []string{"list", img, "/workspace"}, 0,
			"symlink              8  /workspace/link -> note.txt\nfile                16  /workspace/note.txt\ndirectory            0  /workspace/src\n", ""},
		{"read as JSON", []string{"read", img, "/workspace/note.txt", "--max-bytes", "5", "--json"}, 0, read, ""},
		{"read for people", []string{"read", img, "/workspace/note.txt"}, 0, "hello from disk\n", "[disk-read] path=/workspace/note.txt size_bytes=16 truncated=false\n"},
		{"read content only", []string{"read", img, "/workspace/note.txt", "--max-bytes", "5", "--content-only"}, 0, "hello", ""},
		{"a missing path", []string{"list", img, "/nowhere"}, 3, "", "workspace disk path does not exist: /nowhere"},
		{"read a directory", []string{"read", img, "/workspace"}, 2, "", "regular files"},
		{"read nothing", []string{"read", img, "/workspace/note.txt", "--max-bytes", "0"}, 2, "", "max_bytes must be positive"},
		{"a missing image", []string{"list", img + "x"}, 3, "", "disk image does not exist"},
		{"a wrong format", []string{"list", img, "--format", "qcow2"}, 1, "", "no qcow2 image"},
		{"an unknown format", []string{"list", img, "--format", "vmdk"}, 2, "", "raw and qcow2"},
		{"both forms", []string{"read", img, "/workspace/note.txt", "--content-only", "--json"}, 2, "", "exclude each other"},
		{"export without output", []string{"export", img}, 2, "", "--output is required"},
		{"export", []string{"export", img, "--output", out, "--json"}, 0, string(export) + "\n", ""},
		{"export again", []string{"export", img, "--output", out}, 1, "", "output_path already exists: " + out},
		{"the export is scrubbed", []string{"list", out, "/run", "--recursive", "--json"}, 0, empty, ""},
		{"scrub", []string{"scrub", img}, 0, "removed /run/pyro-secrets\nremoved /run/pyro-services\nremoved /run/pyro-shells\n", ""},
		{"list after the scrub", []string{"list", img, "/run", "--recursive", "--json"}, 0, empty, ""},
		{"scrub again", []string{"scrub", img}, 0, "nothing to remove\n", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			status, stdout, stderr := pyro(append([]string{"disk"}, tt.args...)...)
			if status != tt.status || !strings.Contains(stderr, tt.stderr) {
				t.Errorf("status %d, want %d; stderr %q, want %q in it", status, tt.status, stderr, tt.stderr)
			}
			if diff := cmp.Diff(tt.stdout, stdout); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
		})
	}
}
