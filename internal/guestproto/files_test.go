package guestproto_test

import (
	"bytes"
	"errors"
	"path"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func TestPathForms(t *testing.T) {
	for _, tt := range []struct{ name, path, json string }{
		{"plain", "a/b", `"a/b"`},
		{"empty", "", `""`},
		{"newline", "a\nb", `"a\nb"`},
		{"replacement character", "\uFFFD", "\"\uFFFD\""},
		{"not utf-8", "\xff", `{"base64":"/w=="}`},
		{"half a character", "a\xc3", `{"base64":"YcM="}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			line, err := guestproto.Encode(guestproto.ReadFileRequest{Path: guestproto.Path(tt.path)})
			if err != nil || !bytes.Contains(line, []byte(`"path":`+tt.json)) {
				t.Errorf("encoded %s, %v", line, err)
			}
			var got guestproto.ReadFileRequest
			if err := guestproto.Decode(line, &got); err != nil || string(got.Path) != tt.path {
				t.Errorf("decoded %q, %v", got.Path, err)
			}
		})
	}
}

func TestBadPaths(t *testing.T) {
	for _, tt := range []struct{ name, json string }{
		{"number", `1`},
		{"null", `null`},
		{"array", `["a"]`},
		{"empty object", `{}`},
		{"another name", `{"base32":"/w=="}`},
		{"other case", `{"Base64":"/w=="}`},
		{"two names", `{"base64":"/w==","x":1}`},
		{"twice", `{"base64":"/w==","base64":"/w=="}`},
		{"no string", `{"base64":1}`},
		{"no base64", `{"base64":"!"}`},
		{"line break", `{"base64":"/w=\n="}`},
		{"no padding", `{"base64":"/w"}`},
		{"loose bits", `{"base64":"/x=="}`},
		{"url alphabet", `{"base64":"_w=="}`},
		{"valid UTF-8", `{"base64":"YQ=="}`},
		{"empty base64", `{"base64":""}`},
		{"NUL", `"a\u0000b"`},
		{"NUL in base64", `{"base64":"/wA="}`},
		{"too long", `"` + strings.Repeat("x", guestproto.MaxPath+1) + `"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got guestproto.ReadFileRequest
			if err := guestproto.Decode([]byte(`{"path":`+tt.json+`}`), &got); !errors.Is(err, api.ErrDamaged) {
				t.Errorf("decoded %q, %v", got.Path, err)
			}
		})
	}
}

func TestWorkspacePath(t *testing.T) {
	for _, tt := range []struct {
		in, want string
		class    error
	}{
		{".", "/workspace", nil},
		{"/workspace", "/workspace", nil},
		{"/workspace/", "/workspace", nil},
		{"a//b/./c", "/workspace/a/b/c", nil},
		{"a/../b", "/workspace/b", nil},
		{"/workspace/../workspace/x", "/workspace/x", nil},
		{"", "", api.ErrInvalid},
		{"a\x00", "", api.ErrInvalid},
		{strings.Repeat("a/", 3000), "", api.ErrInvalid},
		{strings.Repeat("a/", 300), "", api.ErrInvalid},
		{strings.Repeat("a", 256), "", api.ErrInvalid},
		{"..", "", api.ErrDenied},
		{"../workspacex", "", api.ErrDenied},
		{"/workspacex", "", api.ErrDenied},
		{"/", "", api.ErrDenied},
		{"/etc/passwd", "", api.ErrDenied},
		{"a/../../etc", "", api.ErrDenied},
	} {
		got, err := guestproto.WorkspacePath(guestproto.Path(tt.in))
		if string(got) != tt.want || !errors.Is(err, tt.class) {
			t.Errorf("%q is %q, %v; want %q, %v", tt.in, got, err, tt.want, tt.class)
		}
	}
}

func FuzzEntries(f *testing.F) {
	f.Add([]byte(`{"path":"a","type":"file","mode":420,"size":0,"sha256":"` + strings.Repeat("0", 64) + `"}`))
	f.Add([]byte(`{"path":{"base64":"/w=="},"type":"symlink","mode":511,"size":1,"target":"x"}`))
	f.Add([]byte(`{"path":"/workspace/a","artifact_type":"symlink","size_bytes":1,"link_target":"x"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var m guestproto.ManifestEntry
		if err := guestproto.Decode(data, &m, "path"); err == nil && m.Check() == nil {
			p := string(m.Path)
			if p == "" || path.Clean(p) != p || path.IsAbs(p) || strings.HasPrefix(p+"/", "../") || strings.Contains(p, "\x00") ||
				m.Mode > 0o777 || m.Size < 0 || len(m.Error) > 310 {
				t.Errorf("accepted %+v", m)
			}
			line, err := guestproto.Encode(m)
			if err != nil || len(line) > guestproto.MaxEntryLine {
				t.Errorf("an entry of %d bytes, %v", len(line), err)
			}
			var again guestproto.ManifestEntry
			if err := guestproto.Decode(line, &again); err != nil || again != m {
				t.Errorf("%+v comes back as %+v, %v", m, again, err)
			}
		}
		var e guestproto.FileEntry
		if err := guestproto.Decode(data, &e, "path"); err == nil && e.Check("/workspace", true) == nil {
			if p := string(e.Path); path.Clean(p) != p || !strings.HasPrefix(p, "/workspace") || e.SizeBytes < 0 {
				t.Errorf("accepted %+v", e)
			}
		}
		if w, err := guestproto.WorkspacePath(guestproto.Path(data)); err == nil && path.Clean(string(w)) != string(w) {
			t.Errorf("%q became %q", data, w)
		}
	})
}
