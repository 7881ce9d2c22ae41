package guestagent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/api"
)

const passwdText = `# users
root:x:0:0:root:/root:/bin/sh
app:x:1000:1001:An App:/home/app:/bin/sh
app:x:0:0:the first entry counts:/root:/bin/sh
short:x:7
huge:x:4294967296:0:::
none:x:4294967295:0:::
homeless:x:1002:1002:::
elsewhere:x:1003:1003::relative:
` + "crlf:x:1004:1004::/home/crlf:/bin/sh\r\n"

const groupText = `root:x:0:
staff:x:50:app,homeless
app:x:1001:app
audio:x:63:other,app
video:x:64:apple
broken:x:-1:app
`

func TestUser(t *testing.T) {
	dir := t.TempDir()
	db := userDatabase{filepath.Join(dir, "passwd"), filepath.Join(dir, "group")}
	for path, text := range map[string]string{db.passwd: passwdText, db.group: groupText} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	empty := userDatabase{filepath.Join(dir, "absent"), filepath.Join(dir, "passwd", "below-a-file")}
	is := func(uid, gid uint32, groups []uint32, name, home string) *user {
		return &user{cred: syscall.Credential{Uid: uid, Gid: gid, Groups: groups}, name: name, home: home}
	}
	tests := []struct {
		name, text string
		db         userDatabase
		want       *user
		wantErr    error
	}{
		{"Name", "app", db, is(1000, 1001, []uint32{50, 63}, "app", "/home/app"), nil},
		{"Number", "1000", db, is(1000, 1001, []uint32{50, 63}, "app", "/home/app"), nil},
		{"NameAndGroup", "app:staff", db, is(1000, 50, nil, "app", "/home/app"), nil},
		{"NumberAndNumber", "1000:7", db, is(1000, 7, nil, "app", "/home/app"), nil},
		{"UnknownNumber", "77", db, is(77, 0, nil, "77", "/"), nil},
		{"UnknownNumberAndGroup", "77:audio", db, is(77, 63, nil, "77", "/"), nil},
		{"WithoutHome", "homeless", db, is(1002, 1002, []uint32{50}, "homeless", "/"), nil},
		{"RelativeHome", "elsewhere", db, is(1003, 1003, nil, "elsewhere", "/"), nil},
		{"CarriageReturn", "crlf", db, is(1004, 1004, nil, "crlf", "/home/crlf"), nil},
		{"Root", "root", db, is(0, 0, nil, "root", "/root"), nil},
		{"UnknownName", "nosuch", db, nil, api.ErrInvalid},
		{"UnknownGroup", "app:nosuch", db, nil, api.ErrInvalid},
		{"ShortEntry", "short", db, nil, api.ErrInvalid},
		{"OverflowingEntry", "huge", db, nil, api.ErrInvalid},
		{"NoIDEntry", "none", db, nil, api.ErrInvalid},
		{"Comment", "# users", db, nil, api.ErrInvalid},
		{"RootWithoutFiles", "root", empty, is(0, 0, nil, "root", "/root"), nil},
		{"RootGroupWithoutFiles", "root:root", empty, is(0, 0, nil, "root", "/root"), nil},
		{"NumberWithoutFiles", "1000:1000", empty, is(1000, 1000, nil, "1000", "/"), nil},
		{"ZeroWithoutFiles", "0", empty, is(0, 0, nil, "root", "/root"), nil},
		{"NameWithoutFiles", "app", empty, nil, api.ErrInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.db.look(tt.text)
			if !errors.Is(err, tt.wantErr) {
				t.Fatalf("error %v, want %v", err, tt.wantErr)
			}
			if tt.wantErr != nil {
				if api.Hint(err) == "" {
					t.Errorf("%v has no hint", err)
				}
				return
			}
			if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(*got)); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestUserDatabaseBounds gives the agent files that would take its time or its
// memory.
func TestUserDatabaseBounds(t *testing.T) {
	dir := t.TempDir()
	fifo, large, many := filepath.Join(dir, "fifo"), filepath.Join(dir, "large"), filepath.Join(dir, "many")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(large)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(1 << 40); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(many, []byte("app:x:1000:0::/:\n"+strings.Repeat("g:x:5:app\n", 3*maxGroups)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		path    string
		wantErr error
	}{{fifo, api.ErrInvalid}, {dir, api.ErrInvalid}, {large, api.ErrExhausted}} {
		if _, err := (userDatabase{tt.path, tt.path}).look("app"); !errors.Is(err, tt.wantErr) {
			t.Errorf("%s: error %v, want %v", filepath.Base(tt.path), err, tt.wantErr)
		}
	}
	u, err := userDatabase{many, many}.look("app")
	if err != nil || len(u.cred.Groups) != maxGroups {
		t.Errorf("%d groups, want %d, and error %v", len(u.cred.Groups), maxGroups, err)
	}
}
