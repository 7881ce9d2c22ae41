package guestagent

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

// The files that say who a user is may be anything: the guest has made them.
func TestReadRegular(t *testing.T) {
	dir := t.TempDir()
	fifo, file, link := filepath.Join(dir, "fifo"), filepath.Join(dir, "file"), filepath.Join(dir, "link")
	if err := errors.Join(unix.Mkfifo(fifo, 0o600), os.WriteFile(file, []byte("abcdef"), 0o600), os.Symlink("file", link)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		path, want string
		wantErr    error
	}{
		{file, "abcd", nil},
		{link, "abcd", nil},
		{filepath.Join(dir, "absent"), "", nil},
		{filepath.Join(file, "below"), "", nil},
		{fifo, "", api.ErrInvalid},
		{dir, "", api.ErrInvalid},
	} {
		got, err := readRegular(tt.path, 4)
		if string(got) != tt.want || !errors.Is(err, tt.wantErr) {
			t.Errorf("%s: %q, error %v", filepath.Base(tt.path), got, err)
		}
	}
}
