package guestconn_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestconn"
)

var quiet = slog.New(slog.DiscardHandler)

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// checkGoroutines fails the test if it leaves goroutines.
func checkGoroutines(t testing.TB) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				buf := make([]byte, 1<<20)
				t.Errorf("%d goroutines stayed, at first there were %d:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
				return
			}
		}
	})
}

// serve runs ServeHybrid in front of dial and returns the socket's path.
func serve(t testing.TB, dial func(context.Context, uint32) (net.Conn, error)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := guestconn.ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- guestconn.ServeHybrid(ctx, l, dial, quiet) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); err == nil {
			t.Error("the socket file stayed")
		}
	})
	return path
}

// exchange sends size bytes, others for each seed, to a peer that sends back what it
// gets, and compares.
func exchange(t testing.TB, c net.Conn, seed, size int) {
	t.Helper()
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{byte(seed)}).Read(data)
	go func() {
		_, _ = c.Write(data)
		_ = c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
		t.Errorf("connection %d: sent %d bytes, got %d, %v", seed, len(data), len(got), err)
	}
}

func TestHybridHandshake(t *testing.T) {
	tests := []struct {
		name, answer string
		want         error
		text         string
	}{
		// The guest may speak right behind the OK.
		{"ok", "OK 1073741824\nfirst bytes", nil, ""},
		{"hangs up", "", guestconn.ErrRefused, "hung up"},
		{"cut", "OK 10", guestconn.ErrRefused, "hung up"},
		{"another word", "NO\n", guestconn.ErrRefused, `"NO"`},
		{"no number", "OK x\n", guestconn.ErrRefused, `"OK x"`},
		{"negative", "OK -1\n", guestconn.ErrRefused, "OK -1"},
		{"endless", strings.Repeat("O", 1000), guestconn.ErrRefused, "longer than"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			checkGoroutines(t)
			path := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			heard := make(chan string, 1)
			go func() {
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				buf := make([]byte, 100)
				n, _ := c.Read(buf)
				heard <- string(buf[:n])
				_, _ = io.WriteString(c, tt.answer)
				if tt.want == nil {
					_, _ = io.Copy(io.Discard, c)
				}
			}()
			c, err := guestconn.DialHybrid(testContext(t), path, 5005)
			if got := <-heard; got != "CONNECT 5005\n" {
				t.Errorf("the client said %q", got)
			}
			if tt.want != nil {
				if !errors.Is(err, tt.want) || !errors.Is(err, api.ErrUnavailable) || errors.Is(err, guestconn.ErrNobody) ||
					!strings.Contains(err.Error(), tt.text) {
					t.Errorf("error %v, want one with %q", err, tt.text)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			buf := make([]byte, 100)
			n, _ := c.Read(buf)
			if string(buf[:n]) != "first bytes" {
				t.Errorf("behind the handshake came %q", buf[:n])
			}
		})
	}
}

func TestDialNobody(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	for _, path := range []string{dead, filepath.Join(dir, "absent"), filepath.Join(dir, "no", "dir"), filepath.Join(dir, strings.Repeat("d", 100), "s")} {
		_, err := guestconn.DialHybrid(testContext(t), path, 5005)
		if !errors.Is(err, guestconn.ErrNobody) || errors.Is(err, guestconn.ErrRefused) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestLongPath listens and connects where a socket address is too short
// (RELIABILITY L4).
func TestLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("x", 120))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "guest.sock")
	l, err := guestconn.ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if l.Addr().String() != path {
		t.Errorf("the address is %s", l.Addr())
	}
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.WriteString(c, "hello")
			_ = c.Close()
		}
	}()
	c, err := guestconn.DialUnix(testContext(t), path)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(c); string(b) != "hello" {
		t.Errorf("read %q", b)
	}
	_ = c.Close()
	_ = l.Close()
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket file stayed")
	}
	if _, err := guestconn.ListenUnix(filepath.Join(dir, strings.Repeat("n", 100))); !errors.Is(err, api.ErrInvalid) {
		t.Errorf("a name that fits no address: %v", err)
	}
}

// TestListenUnix replaces what is dead and nothing else (RELIABILITY L3).
func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false)
	if _, err := guestconn.ListenUnix(path); !errors.Is(err, api.ErrBusy) {
		t.Errorf("a live socket: %v", err)
	}
	_ = old.Close()
	l, err := guestconn.ListenUnix(path)
	if err != nil {
		t.Fatalf("a dead socket: %v", err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	_ = l.Close()
	if err := os.WriteFile(path, []byte("keep"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := guestconn.ListenUnix(path); !errors.Is(err, api.ErrExists) {
		t.Errorf("a file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "keep" {
		t.Errorf("the file is now %q", b)
	}
}

func TestDialCancelled(t *testing.T) {
	checkGoroutines(t)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(testContext(t))
	go func() {
		c, err := l.Accept()
		if err == nil {
			cancel()
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}
	}()
	if _, err := guestconn.DialHybrid(ctx, path, 5005); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestDialUnsupported(t *testing.T) {
	_, err := guestconn.Dial(testContext(t), guestconn.Address{})
	if !errors.Is(err, api.ErrUnsupported) || !strings.Contains(err.Error(), "not supported") {
		t.Errorf("no way at all: %v", err)
	}
	if _, err := os.Stat("/dev/vhost-vsock"); err != nil {
		_, err := guestconn.Dial(testContext(t), guestconn.Address{CID: 3})
		if !errors.Is(err, api.ErrUnsupported) || !strings.Contains(err.Error(), "not supported") {
			t.Errorf("vsock: %v", err)
		}
	}
}

// muxPair returns the two ends of a session over a pipe of real sockets.
func muxPair(t testing.TB) (host, guest *guestconn.Mux) {
	t.Helper()
	a, b := pipePair(t)
	return sync2(t, a, b)
}

func pipePair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "p"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err = net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

func sync2(t testing.TB, a, b io.ReadWriteCloser) (host, guest *guestconn.Mux) {
	t.Helper()
	var wg sync.WaitGroup
	var herr, gerr error
	wg.Go(func() { host, herr = guestconn.NewMux(testContext(t), a, guestconn.Host) })
	wg.Go(func() { guest, gerr = guestconn.NewMux(testContext(t), b, guestconn.Guest) })
	wg.Wait()
	if herr != nil || gerr != nil {
		t.Fatal(herr, gerr)
	}
	t.Cleanup(func() { _ = host.Close(); _ = guest.Close() })
	return host, guest
}

// echo answers every stream with what it says, to its end.
func echo(guest *guestconn.Mux) {
	for {
		c, err := guest.Accept()
		if err != nil {
			return
		}
		go func() {
			_, _ = io.Copy(c, c)
			_ = c.(interface{ CloseWrite() error }).CloseWrite()
			_, _ = io.Copy(io.Discard, c)
			_ = c.Close()
		}()
	}
}

// TestThroughEverything sends data through a hybrid socket, the splice behind
// it, and a multiplexed stream, on many connections at once, and back.
func TestThroughEverything(t *testing.T) {
	checkGoroutines(t)
	host, guest := muxPair(t)
	go echo(guest)
	path := serve(t, func(ctx context.Context, port uint32) (net.Conn, error) {
		if port != 5005 {
			return nil, errors.New("another port")
		}
		return host.Open(ctx)
	})
	if _, err := guestconn.DialHybrid(testContext(t), path, 22); !errors.Is(err, guestconn.ErrRefused) {
		t.Errorf("another port: %v", err)
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			c, err := guestconn.DialHybrid(testContext(t), path, 5005)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			exchange(t, c, i, 1<<20+i)
		})
	}
	wg.Wait()
}

// TestAbortReachesTheGuest tells a client that went away from one that only
// ended its sending side.
func TestAbortReachesTheGuest(t *testing.T) {
	checkGoroutines(t)
	host, guest := muxPair(t)
	path := serve(t, func(ctx context.Context, _ uint32) (net.Conn, error) { return host.Open(ctx) })
	for _, abort := range []bool{true, false} {
		t.Run(fmt.Sprintf("abort %v", abort), func(t *testing.T) {
			c, err := guestconn.DialHybrid(testContext(t), path, 5005)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(c, "request"); err != nil {
				t.Fatal(err)
			}
			g, err := guest.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer g.Close()
			if _, err := io.ReadFull(g, make([]byte, 7)); err != nil {
				t.Fatal(err)
			}
			if abort {
				_ = c.Close()
				if _, err := g.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
					t.Errorf("the guest reads %v, want an abort", err)
				}
				return
			}
			_ = c.(*net.UnixConn).CloseWrite()
			if _, err := g.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("the guest reads %v, want an end", err)
			}
			if _, err := io.WriteString(g, "answer"); err != nil {
				t.Fatal(err)
			}
			_ = g.(interface{ CloseWrite() error }).CloseWrite()
			if b, err := io.ReadAll(c); string(b) != "answer" || err != nil {
				t.Errorf("the client reads %q, %v", b, err)
			}
			_ = c.Close()
		})
	}
}

// TestClientGivesUpWhileDialling ends the dial's context.
func TestClientGivesUpWhileDialling(t *testing.T) {
	checkGoroutines(t)
	ended := make(chan struct{})
	began := make(chan struct{})
	path := serve(t, func(ctx context.Context, _ uint32) (net.Conn, error) {
		close(began)
		<-ctx.Done()
		close(ended)
		return nil, ctx.Err()
	})
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(c, "CONNECT 5005\n")
	<-began
	_ = c.Close()
	<-ended
}

// TestHandshakeGarbage hangs up on clients that speak something else.
func TestHandshakeGarbage(t *testing.T) {
	checkGoroutines(t)
	path := serve(t, func(context.Context, uint32) (net.Conn, error) {
		t.Error("the guest was dialled")
		return nil, io.EOF
	})
	for _, text := range []string{"GET / HTTP/1.1\r\n\r\n", "CONNECT x\n", "CONNECT 99999999999\n", "CONNECT -1\n", strings.Repeat("C", 1000)} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, text)
		if b, _ := io.ReadAll(c); len(b) > 0 {
			t.Errorf("%q was answered with %q", text, b)
		}
		_ = c.Close()
	}
}

// TestStalledStreamHoldsUpNoOther fills one stream that nobody reads.
func TestStalledStreamHoldsUpNoOther(t *testing.T) {
	checkGoroutines(t)
	host, guest := muxPair(t)
	stalled, err := host.Open(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	g, err := guest.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	_ = stalled.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	n, err := stalled.Write(make([]byte, 64<<20))
	if !errors.Is(err, os.ErrDeadlineExceeded) || n > 1<<20 {
		t.Errorf("wrote %d bytes to a stream that nobody reads, %v", n, err)
	}
	go echo(guest)
	c, err := host.Open(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _ = io.WriteString(c, "through")
	buf := make([]byte, 7)
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "through" {
		t.Errorf("another stream: %q, %v", buf, err)
	}
	_ = stalled.Close()
}

// TestGuestOpensNothing is RELIABILITY P9: the guest cannot start a stream.
func TestGuestOpensNothing(t *testing.T) {
	host, guest := muxPair(t)
	c, err := guest.Open(testContext(t))
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		_, err = c.Read(make([]byte, 1))
		if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the guest's stream was not refused: %v", err)
		}
	}
	go echo(guest)
	if c, err := host.Open(testContext(t)); err != nil {
		t.Errorf("the session did not survive: %v", err)
	} else {
		_ = c.Close()
	}
}

// A port is a virtio-serial port's two ends: the guest's stays while hosts come
// and go, and may miss that one went.
type port struct {
	io.Reader
	io.Writer
	close func() error
}

func (p port) Close() error { return p.close() }

// TestHostReplacesHost starts sessions over a pipe in which an older host left
// half a frame, with a guest that has not noticed.
func TestHostReplacesHost(t *testing.T) {
	for _, left := range []struct {
		name string
		data []byte
	}{
		{"nothing", nil},
		{"half a record", []byte("PYROMUX\nh\x01")},
		{"half a header", []byte{0, 0, 0, 0}},
		{"a header that wants data", []byte{0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0x7f, 0xff, 'x', 'y'}},
		{"noise", bytes.Repeat([]byte("PYRO"), 5000)},
	} {
		t.Run(left.name, func(t *testing.T) {
			a, b := pipePair(t)
			defer a.Close()
			defer b.Close()
			ctx := testContext(t)
			served := make(chan struct{})
			go func() { // the guest's loop
				defer close(served)
				for {
					m, err := guestconn.NewMux(ctx, port{b, b, func() error { return b.SetDeadline(time.Unix(1, 0)) }}, guestconn.Guest)
					if err != nil {
						return
					}
					echo(m)
					_ = m.Close()
					_ = b.SetDeadline(time.Time{})
				}
			}()
			// Two hosts, one after the other; the first dies without a word.
			for i := range 2 {
				keep := func() error { return a.SetDeadline(time.Unix(1, 0)) }
				host, err := guestconn.NewMux(ctx, port{a, a, keep}, guestconn.Host)
				if err != nil {
					t.Fatal(err)
				}
				c, err := host.Open(ctx)
				if err != nil {
					t.Fatal(err)
				}
				_, _ = fmt.Fprintf(c, "hello %d", i)
				buf := make([]byte, 7)
				if _, err := io.ReadFull(c, buf); err != nil || string(buf) != fmt.Sprintf("hello %d", i) {
					t.Fatalf("host %d read %q, %v", i, buf, err)
				}
				_ = host.Close()
				_ = a.SetDeadline(time.Time{})
				if i == 0 {
					if _, err := a.Write(left.data); err != nil {
						t.Fatal(err)
					}
				}
			}
			_ = a.Close()
			<-served
		})
	}
}

func TestMuxEndsWithItsPipe(t *testing.T) {
	checkGoroutines(t)
	a, b := pipePair(t)
	host, guest := sync2(t, a, b)
	c, err := host.Open(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := guest.Accept(); err != nil { // else it may be had after the end, too
		t.Fatal(err)
	}
	_ = b.Close()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a stream outlived its pipe")
	}
	<-host.Done()
	<-guest.Done()
	if _, err := host.Open(testContext(t)); !errors.Is(err, guestconn.ErrRefused) {
		t.Errorf("opening: %v", err)
	}
	if _, err := guest.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accepting: %v", err)
	}
}

func TestNewMuxGivesUp(t *testing.T) {
	checkGoroutines(t)
	for _, role := range []guestconn.Role{guestconn.Host, guestconn.Guest} {
		a, b := pipePair(t)
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		if _, err := guestconn.NewMux(ctx, a, role); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a silent peer: %v", err)
		}
		cancel()
		_ = b.Close()
		a, b = pipePair(t)
		_ = b.Close()
		if _, err := guestconn.NewMux(testContext(t), a, role); err == nil {
			t.Error("a peer that hung up")
		}
	}
}

// FuzzGuestBytes lets a host agree on a session with arbitrary bytes, and the
// session read what follows.
func FuzzGuestBytes(f *testing.F) {
	f.Add([]byte("PYROMUX\na\x01"), false)
	f.Add([]byte{0, 1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0}, true)
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff}, true)
	f.Fuzz(func(t *testing.T, data []byte, agreed bool) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		a, b := pipePair(t)
		go func() {
			defer b.Close()
			if agreed {
				// Agree honestly on the records, then lie.
				hello := make([]byte, 32)
				for {
					if _, err := io.ReadFull(b, hello); err != nil {
						return
					}
					if hello[8] == 'h' {
						hello[8] = 'a'
					} else {
						hello[8] = 'r'
					}
					_, _ = b.Write(hello)
					if hello[8] == 'r' {
						break
					}
				}
			}
			_, _ = b.Write(data)
		}()
		m, err := guestconn.NewMux(ctx, a, guestconn.Host)
		if err != nil {
			return
		}
		defer m.Close()
		c, err := m.Open(ctx)
		if err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, c)
	})
}
