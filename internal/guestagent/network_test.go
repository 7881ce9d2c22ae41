package guestagent_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

func listenLoopback(t *testing.T, address string, serve func(*net.TCPConn)) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Skipf("this host has no %s: %v", address, err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

func TestDialTCP(t *testing.T) {
	a := startAgent(t)
	echo := func(c *net.TCPConn) {
		_, _ = io.Copy(c, c)
		_ = c.CloseWrite()
	}
	for name, address := range map[string]string{"V4": "127.0.0.1:0", "V6": "[::1]:0"} {
		t.Run(name, func(t *testing.T) {
			port := listenLoopback(t, address, echo)
			s, err := a.DialTCP(testContext(t), port)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			data := bytes.Repeat([]byte("pyro"), 1<<20)
			go func() {
				_, _ = s.Write(data)
				_ = s.CloseWrite()
			}()
			got, err := io.ReadAll(s)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes came back of %d, %v", len(got), len(data), err)
			}
		})
	}
	t.Run("FirstBytesAreTheServers", func(t *testing.T) {
		port := listenLoopback(t, "127.0.0.1:0", func(c *net.TCPConn) { _, _ = io.WriteString(c, "hello") })
		s, err := a.DialTCP(testContext(t), port)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if got, err := io.ReadAll(s); err != nil || string(got) != "hello" {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("Reset", func(t *testing.T) {
		port := listenLoopback(t, "127.0.0.1:0", func(c *net.TCPConn) {
			_, _ = c.Read(make([]byte, 1))
			_ = c.SetLinger(0)
		})
		s, err := a.DialTCP(testContext(t), port)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		_, _ = s.Write([]byte("xx"))
		if _, err := io.ReadAll(s); errors.Is(err, net.ErrClosed) {
			t.Errorf("the end reads as %v", err)
		}
	})
	t.Run("CallerGone", func(t *testing.T) {
		gone := make(chan error, 1)
		port := listenLoopback(t, "127.0.0.1:0", func(c *net.TCPConn) {
			_, err := c.Read(make([]byte, 1))
			gone <- err
		})
		s, err := a.DialTCP(testContext(t), port)
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		if err := <-gone; err == nil {
			t.Error("the server has read something")
		}
	})
	t.Run("NobodyListens", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		if _, err := a.DialTCP(testContext(t), l.Addr().(*net.TCPAddr).Port); !errors.Is(err, api.ErrUnavailable) {
			t.Errorf("got %v", err)
		}
	})
	for name, port := range map[string]int{"Zero": 0, "Negative": -1, "Huge": 65536} {
		t.Run(name, func(t *testing.T) {
			if _, err := a.DialTCP(testContext(t), port); !errors.Is(err, api.ErrInvalid) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A plain process has the network of its host, which is no guest's to change.
func TestAttachNetworkNeedsAGuest(t *testing.T) {
	_, err := startAgent(t).AttachNetwork(testContext(t), guestproto.AttachNetwork{
		MTU: 1500, Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.2/24")},
	})
	if !errors.Is(err, api.ErrUnsupported) || !strings.Contains(err.Error(), "no network of its own") {
		t.Errorf("got %v", err)
	}
}
