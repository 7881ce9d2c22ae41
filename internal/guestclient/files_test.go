package guestclient_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func manifestFile(path string) string {
	return fmt.Sprintf(`{"path":%q,"type":"file","mode":420,"size":1,"sha256":%q}`+"\n", path, strings.Repeat("a", 64))
}

func manifestDir(path string) string {
	return fmt.Sprintf(`{"path":%q,"type":"directory","mode":493,"size":0}`+"\n", path)
}

func listedFile(path string) string {
	return fmt.Sprintf(`{"path":%q,"artifact_type":"file","size_bytes":1}`+"\n", path)
}

// TestManifestOfALiar refuses what no tree can hold.
func TestManifestOfALiar(t *testing.T) {
	end := func(n int) string { return frame(33, "") + frame(20, fmt.Sprintf(`{"entry_count":%d}`, n)) }
	data := func(text string) string { return frame(32, text) }
	digest := strings.Repeat("a", 64)
	for _, tt := range []struct {
		name, frames string
		want         []guestproto.Path // nil: an error
		class        error
		text         string
	}{
		{"nothing", end(0), []guestproto.Path{}, nil, ""},
		{"tree", data(manifestDir("a")+manifestFile("a/b")+manifestFile("a-b")) + end(3), []guestproto.Path{"a", "a/b", "a-b"}, nil, ""},
		{"over frames", data(manifestDir("a")[:9]) + data(manifestDir("a")[9:]+manifestFile("a/b")[:3]) + data(manifestFile("a/b")[3:]) + end(2),
			[]guestproto.Path{"a", "a/b"}, nil, ""},
		{"bits beyond permissions", data(`{"path":"a","type":"directory","mode":4095}`+"\n") + end(1), []guestproto.Path{"a"}, nil, ""},
		{"twice", data(manifestFile("a")+manifestFile("a")) + end(2), nil, api.ErrDamaged, "out of order"},
		{"descending", data(manifestFile("b")+manifestFile("a")) + end(2), nil, api.ErrDamaged, "out of order"},
		{"plain byte order", data(manifestDir("a")+manifestFile("a-b")+manifestFile("a/b")) + end(3), nil, api.ErrDamaged, "out of order"},
		{"below a file", data(manifestFile("a")+manifestFile("a/b")) + end(2), nil, api.ErrDamaged, "out of order"},
		{"below nothing", data(manifestFile("a/b")) + end(1), nil, api.ErrDamaged, "out of order"},
		{"below another", data(manifestDir("a")+manifestFile("ab/c")) + end(2), nil, api.ErrDamaged, "out of order"},
		{"parent", data(manifestFile("..")) + end(1), nil, api.ErrDamaged, "below a directory"},
		{"parent within", data(manifestDir("a")+manifestFile("a/../b")) + end(2), nil, api.ErrDamaged, "below a directory"},
		{"absolute", data(manifestFile("/etc")) + end(1), nil, api.ErrDamaged, "below a directory"},
		{"itself", data(manifestDir(".")) + end(1), nil, api.ErrDamaged, "below a directory"},
		{"no name", data(manifestFile("")) + end(1), nil, api.ErrDamaged, "empty"},
		{"double slash", data(manifestDir("a")+manifestFile("a//b")) + end(2), nil, api.ErrDamaged, "below a directory"},
		{"NUL", data(`{"path":"a\u0000","type":"directory","mode":0}`+"\n") + end(1), nil, api.ErrDamaged, "NUL"},
		{"long name", data(manifestFile(strings.Repeat("n", 256))) + end(1), nil, api.ErrDamaged, "has a name of more than 255 bytes"},
		{"deep", data(manifestFile(strings.Repeat("d/", 255)+"f")) + end(1), nil, api.ErrDamaged, "parts"},
		{"unknown type", data(`{"path":"a","type":"device","mode":0}`+"\n") + end(1), nil, api.ErrDamaged, "device"},
		{"no digest", data(`{"path":"a","type":"file","mode":0}`+"\n") + end(1), nil, api.ErrDamaged, "digest"},
		{"upper-case digest", data(`{"path":"a","type":"file","mode":0,"sha256":"`+strings.ToUpper(digest)+`"}`+"\n") + end(1), nil, api.ErrDamaged, "digest"},
		{"long digest", data(`{"path":"a","type":"file","mode":0,"sha256":"`+digest+`a"}`+"\n") + end(1), nil, api.ErrDamaged, "digest"},
		{"digest and error", data(`{"path":"a","type":"file","mode":0,"sha256":"`+digest+`","error":"x"}`+"\n") + end(1), nil, api.ErrDamaged, "digest"},
		{"negative size", data(`{"path":"a","type":"file","mode":0,"size":-1,"sha256":"`+digest+`"}`+"\n") + end(1), nil, api.ErrDamaged, "-1 bytes"},
		{"negative mode", data(`{"path":"a","type":"directory","mode":-1}`+"\n") + end(1), nil, api.ErrDamaged, "mode"},
		{"link without target", data(`{"path":"a","type":"symlink","mode":0}`+"\n") + end(1), nil, api.ErrDamaged, "symlink"},
		{"target of a file", data(`{"path":"a","type":"file","mode":0,"sha256":"`+digest+`","target":"x"}`+"\n") + end(1), nil, api.ErrDamaged, "target"},
		{"endless line", strings.Repeat(data(strings.Repeat("x", 30<<10)), 3), nil, api.ErrDamaged, "more than"},
		{"no newline", data(strings.TrimSuffix(manifestFile("a"), "\n")) + end(0), nil, api.ErrDamaged, "no end"},
		{"empty line", data("\n") + end(1), nil, api.ErrDamaged, "JSON object"},
		{"empty data", frame(32, "") + end(0), nil, api.ErrDamaged, "type 32"},
		{"wrong count", data(manifestFile("a")) + end(2), nil, api.ErrDamaged, "reports 2"},
		{"negative count", frame(33, "") + frame(20, `{"entry_count":0,"skipped_count":-1}`), nil, api.ErrDamaged, "counts"},
		{"no end", frame(20, `{"entry_count":0}`), nil, api.ErrDamaged, "type 20"},
		{"data after the end", frame(33, "") + data(manifestFile("a")), nil, api.ErrDamaged, "type 32"},
		{"error", data(manifestFile("a")) + frame(21, `{"code":"exhausted","message":"too many"}`), nil, api.ErrExhausted, "too many"},
		{"older agent", `{"error":"it needs protocol version 2","code":"unsupported"}` + "\n", nil, api.ErrUnsupported, "version 2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := dialPeer(t, quick, says(tt.frames))
			got := []guestproto.Path{}
			_, err := c.Manifest(testContext(t), "", func(e guestproto.ManifestEntry) error {
				if e.Mode > 0o777 {
					t.Errorf("mode %o", e.Mode)
				}
				got = append(got, e.Path)
				return nil
			})
			if tt.class != nil {
				if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("error %v, want %q of class %v", err, tt.text, tt.class)
				}
				return
			}
			if d := cmp.Diff(tt.want, got); err != nil || d != "" {
				t.Errorf("%v\n%s", err, d)
			}
		})
	}
}

// TestListingOfALiar refuses what does not lie in the directory asked for.
func TestListingOfALiar(t *testing.T) {
	for _, tt := range []struct {
		name, path string
		recursive  bool
		lines      string
		text       string // "": no error
	}{
		{"flat", "d", false, listedFile("/workspace/d/a") + listedFile("/workspace/d/b"), ""},
		{"deep", "d", true, listedFile("/workspace/d/a") + listedFile("/workspace/d/b/c"), ""},
		{"one file", "d", false, listedFile("/workspace/d"), ""},
		{"file and more", "d", false, listedFile("/workspace/d") + listedFile("/workspace/d/x"), "out of order"},
		{"deep in flat", "d", false, listedFile("/workspace/d/a/b"), "below a directory of"},
		{"twice", "d", true, listedFile("/workspace/d/a") + listedFile("/workspace/d/a"), "out of order"},
		{"elsewhere", "d", true, listedFile("/etc/passwd"), "not below"},
		{"beside", "d", true, listedFile("/workspace/d-b"), "not below"},
		{"parent", "d", true, listedFile("/workspace/d/../x"), "below a directory"},
		{"relative", "d", true, listedFile("a"), "not below"},
		{"unknown type", "d", true, `{"path":"/workspace/d/x","artifact_type":"socket"}` + "\n", "socket"},
		{"negative size", "d", true, `{"path":"/workspace/d/x","artifact_type":"file","size_bytes":-1}` + "\n", "-1 bytes"},
		{"link without target", "d", true, `{"path":"/workspace/d/x","artifact_type":"symlink","size_bytes":0}` + "\n", "symlink"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := strings.Count(tt.lines, "\n")
			c := dialPeer(t, quick, says(frame(32, tt.lines)+frame(33, "")+frame(20, fmt.Sprintf(`{"entry_count":%d}`, n))))
			got := 0
			_, err := c.ListFiles(testContext(t), tt.path, tt.recursive, func(guestproto.FileEntry) error { got++; return nil })
			if tt.text == "" {
				if err != nil || got != n {
					t.Errorf("%d entries, %v", got, err)
				}
				return
			}
			if !errors.Is(err, api.ErrDamaged) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestReadFileOfALiar(t *testing.T) {
	head := frame(22, `{"path":"/workspace/f","size_bytes":5}`)
	for _, tt := range []struct{ name, frames, want, text string }{
		{"good", head + frame(32, "12") + frame(32, "345") + frame(33, "") + frame(20, `{"size_bytes":5,"truncated":false}`), "12345", ""},
		{"too much", head + frame(32, "123456") + frame(33, "") + frame(20, `{"size_bytes":6,"truncated":false}`), "", "more than the 5 bytes"},
		{"too much in pieces", head + strings.Repeat(frame(32, "12"), 3), "", "more than the 5 bytes"},
		{"negative size", head + frame(33, "") + frame(20, `{"size_bytes":-1,"truncated":false}`), "", "-1 bytes"},
		{"no header", frame(32, "12"), "", "type 32"},
		{"no size", frame(22, `{"path":"/workspace/f"}`), "", "lacks"},
		{"no result", head + frame(33, ""), "", "hung up"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := dialPeer(t, quick, says(tt.frames))
			var out bytes.Buffer
			_, err := c.ReadFile(testContext(t), "f", 0, 5, &out)
			if tt.text == "" && (err != nil || out.String() != tt.want) || tt.text != "" && (err == nil || !strings.Contains(err.Error(), tt.text)) {
				t.Errorf("%q, %v", out.String(), err)
			}
		})
	}
}

// TestEndOfTheCaller returns what the caller's own functions say.
func TestEndOfTheCaller(t *testing.T) {
	own := errors.New("the caller is done")
	c := dialPeer(t, quick, says(frame(32, manifestFile("a"))))
	if _, err := c.Manifest(testContext(t), "", func(guestproto.ManifestEntry) error { return own }); !errors.Is(err, own) {
		t.Errorf("manifest: %v", err)
	}
	c = dialPeer(t, quick, says(frame(32, listedFile("/workspace/a"))))
	if _, err := c.ListFiles(testContext(t), ".", false, func(guestproto.FileEntry) error { return own }); !errors.Is(err, own) {
		t.Errorf("list: %v", err)
	}
	c = dialPeer(t, quick, func(conn net.Conn, _ []byte) { _, _ = io.Copy(io.Discard, conn) })
	if _, err := c.Sync(testContext(t), guestproto.SyncRequest{Destination: "."}, brokenReader{own}); !errors.Is(err, own) {
		t.Errorf("sync: %v", err)
	}
	for _, bad := range []string{"../x", "/etc/passwd", "", "."} {
		if _, err := c.ExportFiles(testContext(t), ".", slices.Values([]string{bad}), io.Discard); !errors.Is(err, api.ErrDenied) {
			t.Errorf("exporting %q: %v", bad, err)
		}
	}
}

type brokenReader struct{ err error }

func (b brokenReader) Read([]byte) (int, error) { return 0, b.err }

func TestExportFilesOfALiar(t *testing.T) {
	for _, tt := range []struct{ name, result, text string }{
		{"good", `{"archive_size":3,"entry_count":1,"bytes_written":1,"missing_count":1}`, ""},
		{"more than asked for", `{"archive_size":3,"entry_count":3,"bytes_written":1,"missing_count":-1}`, "counts"},
		{"other count", `{"archive_size":3,"entry_count":1,"bytes_written":1,"missing_count":0}`, "asked for 2"},
		{"other size", `{"archive_size":4,"entry_count":1,"bytes_written":1,"missing_count":1}`, "sent 3 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := dialPeer(t, guestclient.Options{Patience: quick.Patience, MaxArchive: 10}, func(conn net.Conn, _ []byte) {
				fr := guestproto.NewFrameReader(conn)
				var list []byte
				for {
					typ, p, err := fr.Next()
					if err != nil || typ == guestproto.FrameDataEnd {
						break
					}
					list = append(list, p...)
				}
				if string(list) != "a\x00b/c\x00" {
					t.Errorf("the list is %q", list)
				}
				_, _ = io.WriteString(conn, frame(32, "tar")+frame(33, "")+frame(20, tt.result))
			})
			_, err := c.ExportFiles(testContext(t), ".", slices.Values([]string{"a", "b//c"}), io.Discard)
			if tt.text == "" && err != nil || tt.text != "" && (!errors.Is(err, api.ErrDamaged) || !strings.Contains(err.Error(), tt.text)) {
				t.Errorf("error %v", err)
			}
		})
	}
	t.Run("too long", func(t *testing.T) {
		c := dialPeer(t, guestclient.Options{Patience: quick.Patience, MaxArchive: 10}, says(frame(32, "12345678901")))
		if _, err := c.ExportFiles(testContext(t), ".", slices.Values([]string{"a"}), io.Discard); !errors.Is(err, api.ErrExhausted) {
			t.Errorf("error %v", err)
		}
	})
}
