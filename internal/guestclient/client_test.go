package guestclient_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// A peer answers one connection as a guest might, honest or not.
type peer func(c net.Conn, request []byte)

// dialPeer returns a client of a peer on a real socket, whose buffers are
// bounded as a guest's are. It fails the test if a goroutine stays behind.
func dialPeer(t testing.TB, opts guestclient.Options, p peer) *guestclient.Client {
	t.Helper()
	before := runtime.NumGoroutine()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				line, err := guestproto.ReadLine(bufio.NewReaderSize(onebyte{c}, 16), guestproto.MaxLine)
				if err == nil {
					p(c, line)
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
		for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				buf := make([]byte, 1<<20)
				t.Errorf("%d goroutines stayed, at first there were %d:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
				return
			}
		}
	})
	return guestclient.New(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", l.Addr().String())
	}, opts)
}

// onebyte keeps a buffered reader from reading past the request line.
type onebyte struct{ r io.Reader }

func (o onebyte) Read(b []byte) (int, error) { return o.r.Read(b[:1]) }

// says answers with text and hangs up once the client does or has.
func says(text string) peer {
	return func(c net.Conn, _ []byte) {
		_, _ = io.WriteString(c, text)
		_ = c.(*net.UnixConn).CloseWrite()
		_, _ = io.Copy(io.Discard, c)
	}
}

// frame makes one frame as text.
func frame(t guestproto.FrameType, payload string) string {
	var b bytes.Buffer
	if err := guestproto.WriteFrame(&b, t, []byte(payload)); err != nil {
		panic(err)
	}
	return b.String()
}

const (
	started = `{"pid":7}`
	result0 = `{"exit_code":0,"duration_ms":5}`
)

var quick = guestclient.Options{Patience: 200 * time.Millisecond}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// call runs one request of the client, by name.
var calls = map[string]func(context.Context, *guestclient.Client) error{
	"hello": func(ctx context.Context, c *guestclient.Client) error { _, err := c.Hello(ctx); return err },
	"exec": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.Exec(ctx, guestproto.ExecRequest{Command: "x"}, guestclient.ExecIO{})
		return err
	},
	"exec plain": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.ExecPlain(ctx, guestproto.ExecRequest{Command: "x"})
		return err
	},
	"upload": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.UploadArchive(ctx, "/d", strings.NewReader("tar"))
		return err
	},
	"upload plain": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.UploadArchivePlain(ctx, "/d", strings.NewReader("tar"), 3)
		return err
	},
	"export": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.ExportArchive(ctx, "/d", io.Discard)
		return err
	},
	"export plain": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.ExportArchivePlain(ctx, "/d", io.Discard)
		return err
	},
	"own workspace": func(ctx context.Context, c *guestclient.Client) error { return c.OwnWorkspace(ctx, "app") },
	"flush":         func(ctx context.Context, c *guestclient.Client) error { return c.Flush(ctx) },
	"manifest": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.Manifest(ctx, "", func(guestproto.ManifestEntry) error { return nil })
		return err
	},
	"list files": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.ListFiles(ctx, ".", true, func(guestproto.FileEntry) error { return nil })
		return err
	},
	"read file": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.ReadFile(ctx, "f", 0, 10, io.Discard)
		return err
	},
	"write file": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.WriteFile(ctx, guestproto.WriteFileRequest{Path: "f"}, strings.NewReader("text"))
		return err
	},
	"sync": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.Sync(ctx, guestproto.SyncRequest{Destination: "."}, strings.NewReader("tar"))
		return err
	},
	"export files": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.ExportFiles(ctx, ".", slices.Values([]string{"a", "b"}), io.Discard)
		return err
	},
	"shutdown": func(ctx context.Context, c *guestclient.Client) error { return c.Shutdown(ctx, time.Second) },
	"open shell": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.OpenShell(ctx, guestproto.OpenShell{ShellID: "s"})
		return err
	},
	"read shell": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.ReadShell(ctx, guestproto.ReadShell{ShellID: "s"})
		return err
	},
	"write shell": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.WriteShell(ctx, guestproto.WriteShell{ShellID: "s"})
		return err
	},
	"signal shell": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.SignalShell(ctx, guestproto.SignalShell{ShellID: "s", Signal: "INT"})
		return err
	},
	"close shell": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.CloseShell(ctx, guestproto.CloseShell{ShellID: "s"})
		return err
	},
	"start service": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.StartService(ctx, guestproto.StartService{ServiceName: "s", Command: "x"})
		return err
	},
	"service status": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.StatusService(ctx, "s")
		return err
	},
	"service logs": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.LogsService(ctx, "s", nil)
		return err
	},
	"stop service": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.StopService(ctx, "s", -1)
		return err
	},
	"resize shell": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.ResizeShell(ctx, guestproto.ResizeShell{ShellID: "s", Cols: 80, Rows: 24})
		return err
	},
	"list shells": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.ListShells(ctx)
		return err
	},
	"attach shell": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.AttachShell(ctx, guestproto.AttachShell{ShellID: "s"}, guestclient.ExecIO{Stdout: io.Discard}, nil)
		return err
	},
	"list services": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.ListServices(ctx)
		return err
	},
	"stream service logs": func(ctx context.Context, c *guestclient.Client) error {
		_, err := c.StreamLogs(ctx, "s", nil, false, io.Discard, nil)
		return err
	},
}

// TestEveryCallSurvives lets every call meet every kind of bad answer: each is
// an error of a class that says so, in bounded time (RELIABILITY P1, P3, P5,
// P6).
func TestEveryCallSurvives(t *testing.T) {
	// On a slow machine the time limit may come before the size limit.
	damaged := []error{api.ErrDamaged, api.ErrUnavailable, api.ErrUnsupported, api.ErrDeadline}
	peers := []struct {
		name    string
		peer    peer
		classes []error
		text    string
	}{
		{"silence then end", says(""), damaged, ""},
		{"an array", says("[]\n"), damaged, ""},
		{"half an object", says(`{"a":`), damaged, ""},
		{"an error", says(`{"error":"it is broken","code":"busy"}` + "\n"), []error{api.ErrBusy}, "it is broken"},
		{"a line without end", func(c net.Conn, _ []byte) { _, _ = io.Copy(c, endless('x')) }, damaged, ""},
		{"an object without end", func(c net.Conn, _ []byte) {
			_, _ = io.WriteString(c, `{"a":"`)
			_, _ = io.Copy(c, endless('x'))
		}, damaged, ""},
		{"frames without meaning", says(strings.Repeat(frame(99, "x"), 10)), damaged, ""},
		{"a frame that is too long", says("\x11\xff\xff\xff\xff"), damaged, ""},
		{"a drip", func(c net.Conn, _ []byte) {
			for {
				if _, err := c.Write([]byte(" ")); err != nil {
					return
				}
				time.Sleep(20 * time.Millisecond)
			}
		}, damaged, ""},
		{"deep nesting", says(`{"a":` + strings.Repeat("[", 1<<20)), damaged, ""},
	}
	for _, p := range peers {
		for name, call := range calls {
			t.Run(p.name+"/"+name, func(t *testing.T) {
				t.Parallel()
				c := guestclient.New(pipeDialer(p.peer), quick)
				ctx := testContext(t)
				err := call(ctx, c)
				if err == nil {
					t.Fatal("no error")
				}
				if ctx.Err() != nil {
					t.Fatalf("only the test's own limit ended it: %v", err)
				}
				for _, class := range p.classes {
					if errors.Is(err, class) && strings.Contains(err.Error(), p.text) {
						return
					}
				}
				t.Errorf("error %q of class %s", err, api.Code(err))
			})
		}
	}
}

// pipeDialer connects to a peer without a listener.
func pipeDialer(p peer) guestclient.Dialer {
	return func(context.Context) (net.Conn, error) {
		ours, theirs, err := socketPair()
		if err != nil {
			return nil, err
		}
		go func() {
			defer theirs.Close()
			line, err := guestproto.ReadLine(bufio.NewReaderSize(onebyte{theirs}, 16), guestproto.MaxLine)
			if err == nil {
				p(theirs, line)
			}
		}()
		return ours, nil
	}
}

type endless byte

func (e endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = byte(e)
	}
	return len(b), nil
}

// pieces yields so many bytes at a time, without end.
type pieces int

func (p pieces) Read(b []byte) (int, error) { return min(int(p), len(b)), nil }

func TestHello(t *testing.T) {
	const good = `{"protocol":1,"agent_version":"1.0","boot_id":"b","capabilities":["tty"],"kernel":"6.1"`
	tests := []struct {
		name, reply, want string
		class             error
	}{
		{"good", good + "}", "", nil},
		{"newer with more", `{"protocol":9,"agent_version":"9","boot_id":"b","capabilities":[],"kernel":"","more":1}`, "", nil},
		{"older", `{"protocol":0,"agent_version":"0","boot_id":"b","capabilities":[],"kernel":""}`, "speaks protocol version 0, this pyro needs at least 1", api.ErrUnsupported},
		{"long text", `{"protocol":1,"boot_id":"` + strings.Repeat("x", 300) + `"}`, "text of 300 bytes", api.ErrDamaged},
		{"many capabilities", `{"protocol":1,"capabilities":[` + strings.Repeat(`"a",`, 100) + `"a"]}`, "101 capabilities", api.ErrDamaged},
		{"not a JSON object", `[1]`, "JSON object", api.ErrDamaged},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := dialPeer(t, quick, says(tt.reply+"\n"))
			_, err := c.Hello(testContext(t))
			if tt.class == nil && err != nil || tt.class != nil && (!errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error %v, want %q of class %v", err, tt.want, tt.class)
			}
		})
	}
}

func TestExecStream(t *testing.T) {
	tests := []struct {
		name, frames, want string
		class              error
	}{
		{"good", frame(16, started) + frame(17, "out") + frame(18, "err") + frame(20, result0), "", nil},
		{"output before the start", frame(17, "out"), "type 17", api.ErrDamaged},
		{"started twice", frame(16, started) + frame(16, started), "type 16", api.ErrDamaged},
		{"result without exit code", frame(16, started) + frame(20, `{}`), `lacks "exit_code"`, api.ErrDamaged},
		{"result with two exit codes", frame(16, started) + frame(20, `{"exit_code":1,"EXIT_CODE":0}`), "duplicate", api.ErrDamaged},
		{"impossible exit code", frame(16, started) + frame(20, `{"exit_code":256}`), "exit code 256", api.ErrDamaged},
		{"host's frame", frame(16, started) + frame(1, "x"), "type 1", api.ErrDamaged},
		{"short window", frame(16, started) + frame(19, "abc"), "3 bytes instead of 4", api.ErrDamaged},
		{"absurd window", frame(16, started) + frame(19, "\xff\xff\xff\xff"), "stdin window", api.ErrDamaged},
		{"error", frame(21, `{"code":"exhausted","message":"no room"}`), "no room", api.ErrExhausted},
		{"error after the start", frame(16, started) + frame(21, `{"code":"internal","message":"oh"}`), "oh", api.ErrInternal},
		{"error without code", frame(21, `{"message":"no room"}`), "lacks", api.ErrDamaged},
		{"end without result", frame(16, started), "hung up", api.ErrUnavailable},
		{"end in a frame", frame(16, started) + frame(17, "abcdef")[:8], "hung up", api.ErrUnavailable},
		{"plain answer", `{"stdout":"","stderr":"","exit_code":0,"duration_ms":1}`, "plain form", api.ErrUnsupported},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := dialPeer(t, quick, says(tt.frames))
			var out, errs bytes.Buffer
			pid := 0
			r, err := c.Exec(testContext(t), guestproto.ExecRequest{Command: "x"},
				guestclient.ExecIO{Stdout: &out, Stderr: &errs, Started: func(p int) { pid = p }})
			if tt.class != nil {
				if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want %q of class %v", err, tt.want, tt.class)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if out.String() != "out" || errs.String() != "err" || pid != 7 || r.DurationMS != 5 {
				t.Errorf("%q %q %d %+v", out.String(), errs.String(), pid, r)
			}
		})
	}
}

// TestSilentCommand waits for a command that says nothing for longer than the
// guest may take for one piece of an answer (RELIABILITY L6).
func TestSilentCommand(t *testing.T) {
	c := dialPeer(t, quick, func(conn net.Conn, _ []byte) {
		_, _ = io.WriteString(conn, frame(16, started))
		time.Sleep(3 * quick.Patience)
		_, _ = io.WriteString(conn, frame(20, result0))
	})
	if _, err := c.Exec(testContext(t), guestproto.ExecRequest{Command: "x"}, guestclient.ExecIO{}); err != nil {
		t.Error(err)
	}
}

// TestDripWithinAFrame is given up although every byte comes in time
// (RELIABILITY P3).
func TestDripWithinAFrame(t *testing.T) {
	c := dialPeer(t, quick, func(conn net.Conn, _ []byte) {
		_, _ = io.WriteString(conn, frame(16, started))
		for _, b := range []byte(frame(17, strings.Repeat("x", 1000))) {
			if _, err := conn.Write([]byte{b}); err != nil {
				return
			}
			time.Sleep(quick.Patience / 10)
		}
	})
	_, err := c.Exec(testContext(t), guestproto.ExecRequest{Command: "x"}, guestclient.ExecIO{})
	if !errors.Is(err, api.ErrDeadline) {
		t.Errorf("error %v", err)
	}
}

// TestStdinIsNotRead is RELIABILITY P12: a guest that neither reads nor grants
// does not keep the host, whose other ends still work.
func TestStdinIsNotRead(t *testing.T) {
	t.Run("credit", func(t *testing.T) {
		var got atomic.Int64
		c := dialPeer(t, quick, func(conn net.Conn, _ []byte) {
			_, _ = io.WriteString(conn, frame(16, started))
			fr := guestproto.NewFrameReader(conn)
			for got.Load() < guestproto.StdinWindow {
				typ, p, err := fr.Next()
				if err != nil || typ != guestproto.FrameStdin {
					return
				}
				got.Add(int64(len(p)))
			}
			// No more may come now: the command's end does.
			_ = conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if _, _, err := fr.Next(); err == nil {
				got.Add(1)
			}
			_, _ = io.WriteString(conn, frame(20, result0))
		})
		_, err := c.Exec(testContext(t), guestproto.ExecRequest{Command: "x"}, guestclient.ExecIO{Stdin: pieces(30_000)})
		if err != nil || got.Load() != guestproto.StdinWindow {
			t.Errorf("%d bytes were sent, %v", got.Load(), err)
		}
	})
	t.Run("nothing is read", func(t *testing.T) {
		release := make(chan struct{})
		c := dialPeer(t, quick, func(conn net.Conn, _ []byte) {
			// Grants without end, reads nothing: the socket fills up.
			_, _ = io.WriteString(conn, frame(16, started)+frame(19, "\x03\x00\x00\x00"))
			<-release
		})
		_, err := c.Exec(testContext(t), guestproto.ExecRequest{Command: "x"}, guestclient.ExecIO{Stdin: io.LimitReader(endless('x'), 100<<20)})
		close(release)
		if !errors.Is(err, api.ErrDeadline) {
			t.Errorf("error %v", err)
		}
	})
}

// TestCancel ends every call at once and hangs up on the guest.
func TestCancel(t *testing.T) {
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			hungUp := make(chan struct{})
			asked := make(chan struct{})
			c := dialPeer(t, guestclient.Options{Patience: time.Hour}, func(conn net.Conn, _ []byte) {
				close(asked)
				_, _ = io.Copy(io.Discard, conn)
				close(hungUp)
			})
			ctx, cancel := context.WithCancel(testContext(t))
			go func() {
				<-asked
				cancel()
			}()
			if err := call(ctx, c); !errors.Is(err, context.Canceled) {
				t.Errorf("error %v", err)
			}
			<-hungUp
		})
	}
}

// TestExecDeadline gives up on a guest that does not end a command in time.
func TestExecDeadline(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	c := dialPeer(t, quick, func(conn net.Conn, _ []byte) {
		_, _ = io.WriteString(conn, frame(16, started))
		_, _ = io.Copy(io.Discard, conn)
	})
	_, err := c.Exec(ctx, guestproto.ExecRequest{Command: "x"}, guestclient.ExecIO{})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

// TestExportPlain is RELIABILITY P2.
func TestExportPlain(t *testing.T) {
	head := func(size string) string {
		return `{"workspace_path":"/d","artifact_type":"file","archive_size":` + size + `,"entry_count":1,"bytes_written":4}` + "\n"
	}
	const limit = 1000
	tests := []struct {
		name, reply, wrote, want string
		class                    error
	}{
		{"good", head("4") + "data", "data", "", nil},
		{"empty", head("0"), "", "", nil},
		{"shorter", head("5") + "data", "", "ends 1 bytes before", api.ErrDamaged},
		{"longer", head("3") + "data", "", "longer than the 3 bytes", api.ErrDamaged},
		{"negative", head("-1"), "", "-1 bytes", api.ErrDamaged},
		{"above the cap", head("1001") + strings.Repeat("x", 1001), "", "limit is 1000", api.ErrExhausted},
		{"largest", head("9223372036854775807"), "", "limit is 1000", api.ErrExhausted},
		{"overflow", head("9223372036854775808"), "", "archive_size", api.ErrDamaged},
		{"fraction", head("4.0") + "data", "", "archive_size", api.ErrDamaged},
		{"exponent", head("4e0") + "data", "", "archive_size", api.ErrDamaged},
		{"text", head(`"4"`) + "data", "", "archive_size", api.ErrDamaged},
		{"null", head(`[]`), "", "archive_size", api.ErrDamaged},
		{"twice", head(`4,"Archive_Size":3`) + "data", "", "duplicate", api.ErrDamaged},
		{"type unknown", strings.Replace(head("4"), `"file"`, `"socket"`, 1) + "data", "", "artifact type", api.ErrDamaged},
		{"error", `{"error":"gone","code":"not_found"}` + "\n", "", "gone", api.ErrNotFound},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := dialPeer(t, guestclient.Options{Patience: quick.Patience, MaxArchive: limit}, says(tt.reply))
			var w bytes.Buffer
			h, err := c.ExportArchivePlain(testContext(t), "/d", &w)
			if tt.class == nil {
				if err != nil || w.String() != tt.wrote {
					t.Errorf("wrote %q, %v", w.String(), err)
				}
				return
			}
			if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q of class %v", err, tt.want, tt.class)
			}
			if h != (guestproto.ExportHeader{}) {
				t.Errorf("a header came with the error: %+v", h)
			}
		})
	}
}

func TestExportStream(t *testing.T) {
	const head = `{"workspace_path":"/d","artifact_type":"file"}`
	result := func(size string) string {
		return frame(20, `{"workspace_path":"/d","artifact_type":"file","archive_size":`+size+`,"entry_count":1,"bytes_written":4}`)
	}
	h, d, e := frame(22, head), frame(32, "data"), frame(33, "")
	tests := []struct {
		name, reply, want string
		class             error
	}{
		{"good", h + d + e + result("4"), "", nil},
		{"data before the header", d, "type 32", api.ErrDamaged},
		{"result before the end", h + d + result("4"), "type 20", api.ErrDamaged},
		{"data after the end", h + e + d, "type 32", api.ErrDamaged},
		{"two ends", h + e + e, "type 33", api.ErrDamaged},
		{"lying size", h + d + e + result("5"), "sent 4 bytes of archive and reports 5", api.ErrDamaged},
		{"too much", h + strings.Repeat(d, 300), "longer than the limit", api.ErrExhausted},
		{"error in the middle", h + d + frame(21, `{"code":"busy","message":"it shrank"}`), "it shrank", api.ErrBusy},
		{"cut", h + d, "hung up", api.ErrUnavailable},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := dialPeer(t, guestclient.Options{Patience: quick.Patience, MaxArchive: 1000}, says(tt.reply))
			var w bytes.Buffer
			_, err := c.ExportArchive(testContext(t), "/d", &w)
			if tt.class == nil {
				if err != nil || w.String() != "data" {
					t.Errorf("wrote %q, %v", w.String(), err)
				}
				return
			}
			if !errors.Is(err, tt.class) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q of class %v", err, tt.want, tt.class)
			}
		})
	}
	t.Run("a drip of small frames", func(t *testing.T) {
		c := dialPeer(t, quick, func(conn net.Conn, _ []byte) {
			_, _ = io.WriteString(conn, h)
			for {
				if _, err := io.WriteString(conn, frame(32, "x")); err != nil {
					return
				}
				time.Sleep(quick.Patience / 20)
			}
		})
		if _, err := c.ExportArchive(testContext(t), "/d", io.Discard); !errors.Is(err, api.ErrDeadline) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("a slow caller", func(t *testing.T) {
		c := dialPeer(t, quick, says(h+d+d+e+result("8")))
		slow := writerFunc(func(p []byte) (int, error) {
			time.Sleep(2 * quick.Patience)
			return len(p), nil
		})
		if _, err := c.ExportArchive(testContext(t), "/d", slow); err != nil {
			t.Error(err)
		}
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestOwnWriterFails names the caller's own fault as the reason.
func TestOwnWriterFails(t *testing.T) {
	full := errors.New("disk full")
	fails := writerFunc(func([]byte) (int, error) { return 0, full })
	c := dialPeer(t, quick, says(frame(16, started)+frame(17, "x")+frame(20, result0)))
	if _, err := c.Exec(testContext(t), guestproto.ExecRequest{Command: "x"}, guestclient.ExecIO{Stdout: fails}); !errors.Is(err, full) {
		t.Errorf("exec: %v", err)
	}
	c = dialPeer(t, quick, says(frame(22, `{"workspace_path":"/d","artifact_type":"file"}`)+frame(32, "x")))
	if _, err := c.ExportArchive(testContext(t), "/d", fails); !errors.Is(err, full) {
		t.Errorf("export: %v", err)
	}
}

// TestUploadRefused explains with the guest's words when it stops reading.
func TestUploadRefused(t *testing.T) {
	refuse := func(answer string) peer {
		return func(c net.Conn, _ []byte) {
			_, _ = io.ReadFull(c, make([]byte, 1000))
			_, _ = io.WriteString(c, answer)
			_ = c.(*net.UnixConn).CloseRead() // further writes fail at once
			time.Sleep(50 * time.Millisecond)
		}
	}
	c := dialPeer(t, quick, refuse(frame(21, `{"code":"exhausted","message":"disk full"}`)))
	if _, err := c.UploadArchive(testContext(t), "/d", endless('x')); !errors.Is(err, api.ErrExhausted) || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("stream: %v", err)
	}
	c = dialPeer(t, quick, refuse(`{"error":"disk full","code":"exhausted"}`))
	if _, err := c.UploadArchivePlain(testContext(t), "/d", endless('x'), 1<<30); !errors.Is(err, api.ErrExhausted) || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("plain: %v", err)
	}
}

// TestUploadPlainIsExact sends exactly what it announced.
func TestUploadPlainIsExact(t *testing.T) {
	var tarball bytes.Buffer
	if err := tar.NewWriter(&tarball).Close(); err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 1)
	c := dialPeer(t, quick, func(conn net.Conn, request []byte) {
		body := make([]byte, 1024)
		_, err := io.ReadFull(conn, body)
		got <- fmt.Sprintf("%s%d%v", request, len(body), err)
		_, _ = io.WriteString(conn, `{"destination":"/d","entry_count":0,"bytes_written":0}`+"\n")
	})
	if _, err := c.UploadArchivePlain(testContext(t), "/d", &tarball, 1024); err != nil {
		t.Fatal(err)
	}
	want := `{"action":"extract_archive","destination":"/d","archive_size":1024}1024<nil>`
	if d := cmp.Diff(want, <-got); d != "" {
		t.Error(d)
	}
	if _, err := c.UploadArchivePlain(testContext(t), "/d", strings.NewReader("abc"), 4); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("a short source: %v", err)
	}
}

// TestPlainRequests holds the plain form of SURFACE section 6, byte for byte,
// and that replies come back whole.
func TestPlainRequests(t *testing.T) {
	const shell = `"shell_id":"s","cwd":"/w","cols":80,"rows":24,"state":"running","started_at":1700000000.5,"ended_at":null,"exit_code":null`
	const service = `"service_name":"s","command":"x","cwd":"/w","state":"exited","started_at":1,"ready_at":2,"ended_at":3,"exit_code":0,"pid":null,"readiness":{"type":"tcp","address":"127.0.0.1:80"},"stop_reason":null`
	tail := int64(5)
	tests := []struct {
		name, request, reply string
		call                 func(context.Context, *guestclient.Client) (any, error)
	}{
		{"exec", `{"action":"exec","command":"ls","timeout_seconds":30,"env":{"A":"b"},"cwd":"/w"}`,
			`{"stdout":"o","stderr":"","exit_code":0,"duration_ms":1}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				return c.ExecPlain(ctx, guestproto.ExecRequest{Command: "ls", TimeoutSeconds: 30, Env: map[string]string{"A": "b"}, Cwd: "/w"})
			}},
		{"open_shell", `{"action":"open_shell","shell_id":"s","cwd":"/w","cols":80,"rows":24,"env":{"A":"b"}}`, `{` + shell + `}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				return c.OpenShell(ctx, guestproto.OpenShell{ShellID: "s", Cwd: "/w", Cols: 80, Rows: 24, Env: map[string]string{"A": "b"}})
			}},
		{"read_shell", `{"action":"read_shell","shell_id":"s","cursor":3,"max_chars":10}`,
			`{` + shell + `,"cursor":3,"next_cursor":5,"output":"ab","truncated":false}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				return c.ReadShell(ctx, guestproto.ReadShell{ShellID: "s", Cursor: 3, MaxChars: 10})
			}},
		{"write_shell", `{"action":"write_shell","shell_id":"s","input":"ls","append_newline":true}`,
			`{` + shell + `,"input_length":2,"append_newline":true}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				return c.WriteShell(ctx, guestproto.WriteShell{ShellID: "s", Input: "ls", AppendNewline: true})
			}},
		{"signal_shell", `{"action":"signal_shell","shell_id":"s","signal":"INT"}`, `{` + shell + `,"signal":"INT"}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				return c.SignalShell(ctx, guestproto.SignalShell{ShellID: "s", Signal: "INT"})
			}},
		{"close_shell", `{"action":"close_shell","shell_id":"s"}`, `{` + shell + `,"closed":true}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				return c.CloseShell(ctx, guestproto.CloseShell{ShellID: "s"})
			}},
		{"start_service", `{"action":"start_service","service_name":"s","command":"x","cwd":"/w","readiness":{"type":"file","path":"/r"},"ready_timeout_seconds":30,"ready_interval_ms":500,"env":{"A":"b"}}`, `{` + service + `}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				return c.StartService(ctx, guestproto.StartService{ServiceName: "s", Command: "x", Cwd: "/w",
					Readiness: &guestproto.Readiness{Type: "file", Path: "/r"}, ReadyTimeoutSeconds: 30, ReadyIntervalMS: 500, Env: map[string]string{"A": "b"}})
			}},
		{"status_service", `{"action":"status_service","service_name":"s"}`, `{` + service + `}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) { return c.StatusService(ctx, "s") }},
		{"logs_service", `{"action":"logs_service","service_name":"s","tail_lines":5}`,
			`{` + service + `,"stdout":"o","stderr":"e","tail_lines":5,"truncated":true}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) { return c.LogsService(ctx, "s", &tail) }},
		{"stop_service", `{"action":"stop_service","service_name":"s"}`, `{` + service + `}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) { return c.StopService(ctx, "s", -1) }},
		{"stop_service with a grace", `{"action":"stop_service","service_name":"s","grace_ms":0}`, `{` + service + `}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) { return c.StopService(ctx, "s", 0) }},
		{"read_shell that waits", `{"action":"read_shell","shell_id":"s","cursor":3,"wait_ms":5,"wait_for_idle_ms":6}`,
			`{` + shell + `,"cursor":5,"next_cursor":6,"output":"b","missed_bytes":2,"truncated":true}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				return c.ReadShell(ctx, guestproto.ReadShell{ShellID: "s", Cursor: 3, WaitMS: 5, WaitForIdleMS: 6})
			}},
		{"resize_shell", `{"action":"resize_shell","shell_id":"s","cols":80,"rows":24}`, `{` + shell + `}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				return c.ResizeShell(ctx, guestproto.ResizeShell{ShellID: "s", Cols: 80, Rows: 24})
			}},
		{"list_shells", `{"action":"list_shells"}`, `{"shells":[{` + shell + `}]}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				all, err := c.ListShells(ctx)
				return guestproto.ListShells{Shells: all}, err
			}},
		{"list_services", `{"action":"list_services"}`, `{"services":[{` + service + `}]}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				all, err := c.ListServices(ctx)
				return guestproto.ListServices{Services: all}, err
			}},
		{"start_service with argv", `{"action":"start_service","service_name":"s","command":"x y","argv":["x","y"],"restart":"on-failure"}`, `{` + service + `}`,
			func(ctx context.Context, c *guestclient.Client) (any, error) {
				return c.StartService(ctx, guestproto.StartService{ServiceName: "s", Command: "x y", Argv: []string{"x", "y"}, Restart: guestproto.RestartOnFailure})
			}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			asked := make(chan string, 1)
			c := dialPeer(t, quick, func(conn net.Conn, request []byte) {
				asked <- string(request)
				_, _ = io.WriteString(conn, tt.reply+"\n")
			})
			got, err := tt.call(testContext(t), c)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.request, <-asked); d != "" {
				t.Errorf("request (-want +got):\n%s", d)
			}
			line, err := guestproto.Encode(got)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.reply+"\n", string(line)); d != "" {
				t.Errorf("reply (-want +got):\n%s", d)
			}
		})
	}
}

// TestAnswerForAnother is RELIABILITY P4: an answer that is about something
// else than was asked.
func TestAnswerForAnother(t *testing.T) {
	c := dialPeer(t, quick, says(`{"shell_id":"other","state":"running","cursor":0,"next_cursor":0,"output":"","input_length":0,"signal":"INT","closed":true,"service_name":"other"}`))
	for name, call := range calls {
		if strings.HasPrefix(name, "list") || strings.HasPrefix(name, "attach") || strings.HasPrefix(name, "stream") {
			continue // of many, or in frames
		}
		if strings.Contains(name, "shell") || strings.Contains(name, "service") {
			if err := call(testContext(t), c); !errors.Is(err, api.ErrDamaged) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// TestHeaderWithoutEndIsBounded is RELIABILITY P1: what a guest sends without a
// newline does not pile up.
func TestHeaderWithoutEndIsBounded(t *testing.T) {
	var sent atomic.Int64
	c := dialPeer(t, quick, func(conn net.Conn, _ []byte) {
		buf := bytes.Repeat([]byte("x"), 64<<10)
		for sent.Load() < 1<<30 {
			n, err := conn.Write(buf)
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := c.ExportArchivePlain(testContext(t), "/d", io.Discard)
	runtime.ReadMemStats(&after)
	if !errors.Is(err, api.ErrDamaged) {
		t.Errorf("error %v", err)
	}
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 10<<20 {
		t.Errorf("allocated %d bytes", grown)
	}
	if sent.Load() > 4<<20 {
		t.Errorf("took %d bytes of it", sent.Load())
	}
}

// FuzzReplies lets every call read arbitrary bytes as the guest's answer.
func FuzzReplies(f *testing.F) {
	f.Add([]byte(frame(16, started) + frame(17, "out") + frame(20, result0)))
	f.Add([]byte(frame(22, `{"workspace_path":"/d","artifact_type":"file"}`) + frame(32, "x") + frame(33, "")))
	f.Add([]byte(`{"workspace_path":"/d","artifact_type":"file","archive_size":2,"entry_count":1,"bytes_written":1}` + "\nab"))
	f.Add([]byte(`{"protocol":1}`))
	f.Add([]byte(frame(32, manifestFile("a")) + frame(33, "") + frame(20, `{"entry_count":1}`)))
	f.Add([]byte(frame(32, listedFile("/workspace/a")) + frame(33, "") + frame(20, `{"entry_count":1}`)))
	f.Add([]byte(frame(22, `{"path":"/workspace/f","size_bytes":2}`) + frame(32, "x") + frame(33, "") + frame(20, `{"size_bytes":2,"truncated":true}`)))
	f.Fuzz(func(t *testing.T, data []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		c := guestclient.New(pipeDialer(says(string(data))), guestclient.Options{Patience: time.Second, MaxArchive: 1 << 20})
		for name, call := range calls {
			if err := call(ctx, c); errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s did not end: %v", name, err)
			}
		}
	})
}
