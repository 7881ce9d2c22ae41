package passwd_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/passwd"
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

// files is a database of files that are held in memory.
func files(text map[string]string) passwd.Database {
	return func(path string, limit int64) ([]byte, error) {
		data := text[path]
		return []byte(data[:min(int64(len(data)), limit)]), nil
	}
}

func TestLook(t *testing.T) {
	db := files(map[string]string{"/etc/passwd": passwdText, "/etc/group": groupText})
	empty := files(nil)
	is := func(uid, gid uint32, groups []uint32, name, home string) *passwd.User {
		return &passwd.User{UID: uid, GID: gid, Groups: groups, Name: name, Home: home}
	}
	tests := []struct {
		name, text string
		db         passwd.Database
		want       *passwd.User
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
			got, err := tt.db.Look(tt.text)
			if !errors.Is(err, tt.wantErr) {
				t.Fatalf("error %v, want %v", err, tt.wantErr)
			}
			if tt.wantErr != nil {
				if api.Hint(err) == "" {
					t.Errorf("%v has no hint", err)
				}
				return
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// A guest may have written files that would take time or memory.
func TestBounds(t *testing.T) {
	large := files(map[string]string{"/etc/passwd": strings.Repeat("\n", 5<<20)})
	if _, err := large.Look("app"); !errors.Is(err, api.ErrExhausted) {
		t.Errorf("a large file: error %v", err)
	}
	many := files(map[string]string{"/etc/passwd": "app:x:1000:0::/:\n", "/etc/group": strings.Repeat("g:x:5:app\n", 3000)})
	if u, err := many.Look("app"); err != nil || len(u.Groups) != 1000 {
		t.Errorf("many groups: %+v, %v", u, err)
	}
	broken := passwd.Database(func(string, int64) ([]byte, error) { return nil, api.ErrDamaged })
	for _, user := range []string{"app", "1000", "1000:staff"} {
		if _, err := broken.Look(user); !errors.Is(err, api.ErrDamaged) {
			t.Errorf("%s in what cannot be read: error %v", user, err)
		}
	}
}
