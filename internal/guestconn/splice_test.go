package guestconn_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestconn"
)

// splicedPair returns the two ends of a pipe, and what gives both a new
// connection.
func splicedPair(t *testing.T) (host, guest *guestconn.SplicedPipe, attach func() error) {
	t.Helper()
	a, b := pipePair(t)
	host, guest = guestconn.NewSplicedPipe(a, guestconn.Host), guestconn.NewSplicedPipe(b, guestconn.Guest)
	t.Cleanup(func() { host.Close(); guest.Close() })
	return host, guest, func() error {
		a, b := pipePair(t)
		return errors.Join(host.Attach(a), guest.Attach(b))
	}
}

// TestSplicedSession moves a session with full streams in both directions from
// one connection to the next, again and again.
func TestSplicedSession(t *testing.T) {
	checkGoroutines(t)
	ctx := testContext(t)
	hostPipe, guestPipe, attach := splicedPair(t)
	served := make(chan *guestconn.Mux)
	go func() {
		m, err := guestconn.NewMux(ctx, guestPipe, guestconn.Guest)
		if err != nil {
			t.Error(err)
		}
		served <- m
		echo(m)
	}()
	host, err := guestconn.NewMux(ctx, hostPipe, guestconn.Host)
	if err != nil {
		t.Fatal(err)
	}
	guest := <-served
	var streams sync.WaitGroup
	done := make(chan struct{})
	for i := range 8 {
		streams.Go(func() {
			c, err := host.Open(ctx)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			exchange(t, c, i, 8<<20+i)
		})
	}
	go func() { streams.Wait(); close(done) }()
	moved := 0
	for going := true; going; moved++ {
		if err := hostPipe.Detach(ctx); err != nil {
			t.Fatal(err)
		}
		<-guestPipe.Detached()
		if err := attach(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-done:
			going = false
		default:
		}
	}
	if moved < 20 {
		t.Errorf("the session was moved %d times only", moved)
	}
	_, _ = host.Close(), guest.Close()
}

// A guest that does not read, or does not close, is waited for as long as the
// caller wants, and the session goes on all the same.
func TestDetachGivesUp(t *testing.T) {
	checkGoroutines(t)
	for _, reads := range []bool{false, true} {
		t.Run(fmt.Sprintf("guest reads %v", reads), func(t *testing.T) {
			a, b := pipePair(t)
			host := guestconn.NewSplicedPipe(a, guestconn.Host)
			defer host.Close()
			sent := make(chan error, 1)
			data := bytes.Repeat([]byte("x"), 4<<20)
			go func() { _, err := host.Write(data); sent <- err }()
			var got bytes.Buffer
			if reads {
				if _, err := io.CopyN(&got, b, int64(len(data))); err != nil {
					t.Fatal(err)
				}
			} else if _, err := io.CopyN(&got, b, 1); err != nil { // the write has begun
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			defer cancel()
			heard := make(chan string, 1)
			go func() { text, _ := io.ReadAll(host); heard <- string(text) }()
			if err := host.Detach(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("Detach: %v, want the end of its time", err)
			}
			c, d := pipePair(t)
			err := host.Attach(c)
			if !reads {
				// Nothing was taken from it.
				if !errors.Is(err, api.ErrState) {
					t.Fatalf("Attach: %v, want ErrState", err)
				}
				if _, err := io.Copy(&got, io.LimitReader(b, int64(len(data)-1))); err != nil || got.Len() != len(data) {
					t.Errorf("read %d bytes, %v", got.Len(), err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := host.Detach(testContext(t)); err == nil {
				t.Error("detached again before the first connection has ended")
			}
			if _, err := io.WriteString(host, "after"); err != nil {
				t.Error(err)
			}
			buf := make([]byte, 5)
			if _, err := io.ReadFull(d, buf); err != nil || string(buf) != "after" {
				t.Errorf("over the new connection came %q, %v", buf, err)
			}
			// What comes late still comes first.
			_, _ = io.WriteString(d, "two")
			_, _ = io.WriteString(b, "one ")
			_ = b.(io.Closer).Close()
			time.Sleep(10 * time.Millisecond)
			_ = d.(io.Closer).Close()
			if text := <-heard; text != "one two" {
				t.Errorf("the host heard %q", text)
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSplicedPipeEnds(t *testing.T) {
	checkGoroutines(t)
	host, guest, attach := splicedPair(t)
	if err := attach(); !errors.Is(err, api.ErrState) {
		t.Errorf("attaching to a pipe with a connection: %v, want ErrState", err)
	}
	go func() { _, _ = io.Copy(io.Discard, guest) }()
	ended := make(chan error, 2)
	go func() { _, err := host.Read(make([]byte, 1)); ended <- err }()
	if err := host.Detach(testContext(t)); err != nil {
		t.Fatal(err)
	}
	go func() { _, err := host.Write([]byte("x")); ended <- err }()
	_ = host.Close()
	_ = host.Close()
	for range 2 {
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			t.Errorf("reading or writing meanwhile: %v, want net.ErrClosed", err)
		}
	}
	if err := host.Detach(testContext(t)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Detach: %v", err)
	}
	if err := host.Attach(nil); !errors.Is(err, api.ErrState) {
		t.Errorf("Attach: %v", err)
	}
	_ = guest.Close()

	// A guest that dies is the end of the host's session.
	a, b := pipePair(t)
	host = guestconn.NewSplicedPipe(a, guestconn.Host)
	defer host.Close()
	_ = b.Close()
	if _, err := host.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("reading from a guest that is gone: %v, want io.EOF", err)
	}
}

func TestGreeting(t *testing.T) {
	for _, tt := range []struct {
		line, token string
		ok          bool
	}{
		{"begin 0123456789abcdef0123456789abcdef\nrest", "0123456789abcdef0123456789abcdef", true},
		{"continue\nrest", "", true},
		{"begin \nrest", "", false},
		{"start\nrest", "", false},
		{strings.Repeat("b", 1000), "", false},
		{"beg", "", false},
	} {
		a, b := pipePair(t)
		go func() { _, _ = io.WriteString(a, tt.line); _ = a.Close() }()
		token, err := guestconn.ReadGreeting(b)
		if token != tt.token || (err == nil) != tt.ok {
			t.Errorf("%q is read as %q, %v", tt.line, token, err)
		}
		if rest, _ := io.ReadAll(b); tt.ok && string(rest) != "rest" {
			t.Errorf("%q: %q is left", tt.line, rest)
		}
		_ = b.Close()
	}
	a, b := pipePair(t)
	defer a.Close()
	defer b.Close()
	if err := errors.Join(guestconn.GreetBegin(a, "token"), guestconn.GreetContinue(a)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"token", ""} {
		if got, err := guestconn.ReadGreeting(b); err != nil || got != want {
			t.Errorf("the greeting is %q, %v; want %q", got, err, want)
		}
	}
	_ = a.SetDeadline(time.Unix(1, 0))
	if err := guestconn.GreetContinue(a); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("greeting a peer that is gone: %v", err)
	}
}
