package engines_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/network"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/test/netns"
)

// isolating returns the engine that PYRO_TEST_ENGINE names, if its guests have a
// network of their own.
func isolating(t *testing.T) engine.Engine {
	t.Helper()
	var e engine.Engine
	name := os.Getenv("PYRO_TEST_ENGINE")
	switch name {
	case qemu.Name:
		e = qemu.New(qemu.Options{Accel: os.Getenv("PYRO_QEMU_ACCEL")})
	case gvisor.Name:
		e = gvisor.New(gvisor.Options{Runtime: filepath.Join(programs, "pyro-runsc")})
	default:
		t.Skip("runs with PYRO_TEST_ENGINE=qemu or gvisor")
	}
	caps := e.Probe(t.Context())
	testenv.Require(t, name, caps.Available, caps.Detail)
	return e
}

// connects prints a line for each of HOST:PORT... that it can connect to.
const connects = `python3 - "$@" <<'E'
import socket, sys, time
for a in sys.argv[1:]:
    host, _, port = a.rpartition(":")
    began = time.monotonic()
    try:
        socket.create_connection((host.strip("[]"), int(port)), 5)
        print("reached", a)
    except OSError as e:
        if time.monotonic() - began > 2: print("no answer from", a)
E`

// TestNetwork gives a guest a gateway in this process and looks at what it can
// reach. All in one machine.
func TestNetwork(t *testing.T) {
	e := isolating(t)
	outside := netns.New(t)
	l := outside.Listen(t)
	var hits atomic.Int64
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		hits.Add(1)
		if r.Method == http.MethodPost {
			n, _ := io.Copy(io.Discard, r.Body)
			fmt.Fprintln(w, n)
			return
		}
		n, _ := strconv.Atoi(r.URL.Query().Get("bytes"))
		fmt.Fprintln(w, "from outside")
		_, _ = io.CopyN(w, zeros{}, int64(n))
	})}
	go func() { _ = server.Serve(l) }()
	defer server.Close()

	g := enginetest.Boot(t, enginetest.Subject{Engine: e, Spec: bootable(t)}, nil)
	m := machine{g.Client, time.Duration(max(1, e.Probe(t.Context()).TimeScale))}
	if out, _, _ := m.sh(t, "ls /sys/class/net; tail -n +3 /proc/net/dev | cut -d: -f1", 0); strings.Contains(out, "eth") {
		t.Errorf("devices before there is a network: %s", out)
	}
	if out, _, _ := m.sh(t, "set -- "+l.Addr().String()+"; "+connects, 0); out != "" {
		t.Errorf("without a network: %s", out)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	resolver := &stubResolver{answers: map[string][]netip.Addr{
		"site.test.":    {outside.Addr},
		"rebound.test.": {netip.MustParseAddr("127.0.0.1"), outside.Host},
	}}
	var denied sync.Map
	gw, err := network.New(network.Config{
		Allow:    []netip.Prefix{outside.Network},
		Resolver: resolver,
		Events: func(e network.Event) {
			if e.Verdict == network.Denied {
				denied.Store(e.Destination.String(), e.Reason)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer gw.Close()
	detach := attach(t, m, gw)

	t.Run("HTTP", func(t *testing.T) {
		out, errs, _ := m.sh(t, "curl -sS http://"+l.Addr().String(), 0)
		if out != "from outside\n" {
			t.Errorf("got %q, %s", out, errs)
		}
		out, errs, _ = m.sh(t, "head -c 30000000 /dev/zero | curl -sS --data-binary @- http://"+l.Addr().String(), 0)
		if out != "30000000\n" {
			t.Errorf("sending got %q, %s", out, errs)
		}
		out, errs, _ = m.sh(t, "curl -sS http://"+l.Addr().String()+"/?bytes=30000000 | wc -c", 0)
		if out != "30000013\n" {
			t.Errorf("receiving got %q, %s", out, errs)
		}
	})
	t.Run("Names", func(t *testing.T) {
		out, errs, _ := m.sh(t, "curl -sS http://site.test:"+port, 0)
		if out != "from outside\n" {
			t.Errorf("got %q, %s", out, errs)
		}
		for _, name := range []string{"rebound.test", "nowhere.test"} {
			if out, _, r := m.sh(t, "getent hosts "+name, 0); r.ExitCode == 0 {
				t.Errorf("%s is %s", name, out)
			}
		}
		if out, _, _ := m.sh(t, "cat /etc/resolv.conf", 0); !strings.Contains(out, "nameserver 10.213.0.1\n") {
			t.Errorf("resolv.conf is %q", out)
		}
	})
	t.Run("HalfClose", func(t *testing.T) {
		out, errs, _ := m.sh(t, `python3 -c '
import socket, sys
s = socket.create_connection(("`+outside.Addr.String()+`", `+port+`))
s.sendall(b"GET / HTTP/1.0\r\n\r\n")
s.shutdown(socket.SHUT_WR)
data = b""
while (b := s.recv(4096)): data += b
print(data.decode().splitlines()[-1])'`, 0)
		if out != "from outside\n" {
			t.Errorf("got %q, %s", out, errs)
		}
	})
	t.Run("UDP", func(t *testing.T) {
		c := outside.ListenPacket(t)
		go func() {
			buf := make([]byte, 1<<16)
			for {
				n, from, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = c.WriteTo(buf[:n], from)
			}
		}()
		_, port, _ := net.SplitHostPort(c.LocalAddr().String())
		out, errs, _ := m.sh(t, `python3 -c '
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
for n in 0, 1, 1400, 60000:
    s.sendto(b"x" * n, ("`+outside.Addr.String()+`", `+port+`))
    print(len(s.recv(65536)))'`, 0)
		if out != "0\n1\n1400\n60000\n" {
			t.Errorf("got %q, %s", out, errs)
		}
	})
	t.Run("NothingOfTheHost", func(t *testing.T) { testNothingOfTheHost(t, m, outside) })
	t.Run("Storm", func(t *testing.T) {
		before := hits.Load()
		began := time.Now()
		out, errs, _ := m.sh(t, `python3 -c '
import socket, concurrent.futures as f
def one(i):
    s = socket.create_connection(("`+outside.Addr.String()+`", `+port+`), 60)
    s.sendall(b"GET / HTTP/1.0\r\n\r\n")
    data = b""
    while (b := s.recv(4096)): data += b
    s.close()
    return data.endswith(b"from outside\n")
with f.ThreadPoolExecutor(50) as pool: print(sum(pool.map(one, range(2000))))'`, 0)
		if out != "2000\n" || hits.Load()-before != 2000 {
			t.Errorf("got %q, the server saw %d; %s", out, hits.Load()-before, errs)
		}
		t.Logf("2000 connections took %v; %+v", time.Since(began), gw.Stats())
	})
	t.Run("Again", func(t *testing.T) {
		detach()
		if out, _, _ := m.sh(t, "cat /etc/resolv.conf; set -- "+l.Addr().String()+"; "+connects, 0); out != "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n" {
			t.Errorf("after the network's end: %s", out)
		}
		defer attach(t, m, gw)()
		if out, errs, _ := m.sh(t, "curl -sS http://"+l.Addr().String(), 0); out != "from outside\n" {
			t.Errorf("got %q, %s", out, errs)
		}
	})
	for open := gw.Stats(); open.TCPOpen > 0; open = gw.Stats() {
		if m.within(t, 10*time.Second).Err() != nil {
			t.Fatalf("%d connections stay open", open.TCPOpen)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// testNothingOfTheHost listens on all addresses of this host and lets the guest
// try them, in every writing.
func testNothingOfTheHost(t *testing.T, m machine, outside *netns.Outside) {
	var accepted atomic.Int64
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			c.Close()
		}
	}()
	port := l.Addr().(*net.TCPAddr).Port
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	hosts := []string{
		outside.Host.String(), "0.0.0.0", "10.213.0.1", "fd70:7972:6f00::1", "10.0.2.2", "169.254.169.254", "100.100.100.200",
		"168.63.129.16", "fd00:ec2::254", "192.168.127.254", "::ffff:10.0.2.2", "64:ff9b::a9fe:a9fe",
		"2002:7f00:1::1", "::169.254.169.254", "198.18.0.1", "240.0.0.1",
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && !n.IP.IsLoopback() {
			hosts = append(hosts, n.IP.String())
			if v4 := n.IP.To4(); v4 != nil {
				hosts = append(hosts, "::ffff:"+v4.String())
			}
		}
	}
	command := "set --"
	for _, h := range hosts {
		command += " " + net.JoinHostPort(h, strconv.Itoa(port))
	}
	began := time.Now()
	out, errs, _ := m.sh(t, command+"; "+connects, 0)
	// 0.0.0.0 is the guest itself, where nobody listens.
	if out != "" || errs != "" || accepted.Load() != 0 {
		t.Errorf("%s%s, %d connections came", out, errs, accepted.Load())
	}
	t.Logf("%d addresses were refused in %v", len(hosts), time.Since(began))
	// A program with every right in the guest has no other way out: the
	// loopback addresses are its own.
	if out, _, _ := m.sh(t, "set -- 127.0.0.1:"+strconv.Itoa(port)+" [::1]:"+strconv.Itoa(port)+"; "+connects, 0); out != "" {
		t.Errorf("the guest's loopback: %s", out)
	}
	// The gateway has one port.
	out, _, _ = m.sh(t, `set -- $(seq -f 10.213.0.1:%g 1 200) 10.213.0.1:8080; `+connects, 0)
	if out != "reached 10.213.0.1:53\n" {
		t.Errorf("the gateway has %q", out)
	}
}

// attach gives the guest the network until the returned function is called.
func attach(t *testing.T, m machine, gw *network.Gateway) (detach func()) {
	t.Helper()
	s, err := m.AttachNetwork(m.within(t, time.Minute), gw.Request())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- gw.Serve(ctx, s) }()
	var once sync.Once
	detach = func() {
		once.Do(func() {
			cancel()
			if err := <-served; !errors.Is(err, context.Canceled) {
				t.Errorf("serving the network: %v", err)
			}
		})
	}
	t.Cleanup(detach)
	return detach
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// A stubResolver knows some names.
type stubResolver struct{ answers map[string][]netip.Addr }

func (r *stubResolver) LookupNetIP(_ context.Context, network, host string) ([]netip.Addr, error) {
	if a, ok := r.answers[host]; ok && network == "ip4" {
		return a, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}
