package guestclient_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/internal/archive"
	"github.com/pyro-mcp/pyro/internal/guestclient"
)

// What a guest calls its files reaches the host only through an archive that is
// unpacked below a root (RELIABILITY P7): no name leads out of it, and names
// that are merely odd arrive as they are.
func TestNamesOfALyingPeer(t *testing.T) {
	long := strings.Repeat("n", 4096)
	for _, test := range []struct {
		name, entry string
		fine        bool
	}{
		{"parent", "../escaped", false},
		{"parent inside", "a/../../escaped", false},
		{"absolute", "/tmp/pyro-escaped", false},
		{"dot dot alone", "..", false},
		{"too long", long, false},
		{"newline", "a\n/etc/passwd", true},
		{"shell", "$(touch escaped);`id`", true},
		{"escape codes", "\x1b]52;c;ZXZpbA==\a", true},
		{"not utf-8", "\xff\xfe", true},
		{"dashes", "--checkpoint-action=exec=sh", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			var tarball bytes.Buffer
			w := tar.NewWriter(&tarball)
			if err := w.WriteHeader(&tar.Header{Name: test.entry, Typeflag: tar.TypeReg, Mode: 0o644, Size: 4}); err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(w, "data")
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			reply := fmt.Sprintf(`{"workspace_path":"/d","artifact_type":"directory","archive_size":%d,"entry_count":1,"bytes_written":4}`+"\n", tarball.Len())
			c := dialPeer(t, guestclient.Options{Patience: quick.Patience}, says(reply+tarball.String()))
			var got bytes.Buffer
			if _, err := c.ExportArchivePlain(testContext(t), "/d", &got); err != nil {
				t.Fatal(err)
			}
			outer := t.TempDir()
			inner := filepath.Join(outer, "inner")
			if err := os.Mkdir(inner, 0o700); err != nil {
				t.Fatal(err)
			}
			root, err := os.OpenRoot(inner)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			_, err = archive.Extract(testContext(t), root, &got, archive.ExtractOptions{Links: archive.LinksInside, Fresh: true})
			if (err == nil) != test.fine {
				t.Errorf("Extract: %v, want success %v", err, test.fine)
			}
			if around, err := os.ReadDir(outer); err != nil || len(around) != 1 {
				t.Errorf("outside the root there is %v, %v", around, err)
			}
			if b, err := root.ReadFile(test.entry); test.fine && (err != nil || string(b) != "data") {
				t.Errorf("the file reads %q, %v", b, err)
			}
		})
	}
	if _, err := os.Lstat("/tmp/pyro-escaped"); err == nil {
		t.Error("an absolute name was followed")
	}
}
