package engines_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
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
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/supervisor"
	"github.com/pyro-mcp/pyro/test/netns"
)

// supervised starts a machine with a supervisor of its own, as pyro does.
func supervised(t *testing.T, e engine.Engine, policy string, outside *netns.Outside, change ...func(*engine.MachineSpec)) (*supervisor.Process, machine) {
	t.Helper()
	state, err := statedir.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	dir := state.Machine("net")
	spec := bootable(t)
	spec.ID, spec.Dir, spec.Hostname = "net", dir.EngineDir(), "pyro-test"
	for _, c := range change {
		c(&spec)
	}
	config := supervisor.Config{Dir: dir.Path(), Engine: e.Name(), Leased: true, Ephemeral: true, Spec: spec, Network: policy}
	if outside != nil {
		config.NetworkAllow = []netip.Prefix{outside.Network}
	}
	p, err := supervisor.Spawn(t.Context(), supervisor.SpawnOptions{Binary: filepath.Join(programs, "pyro"), Config: config})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(dir.SupervisorLog())
			t.Logf("supervisor:\n%s", log)
		}
		if err := p.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return p, machine{guestclient.New(p.DialGuest, guestclient.Options{Patience: 3 * time.Minute}), time.Duration(max(1, p.Status.TimeScale))}
}

// TestNetworkOff wants a guest that has been given nothing to have nothing.
func TestNetworkOff(t *testing.T) {
	e := isolating(t)
	outside := netns.New(t)
	l := outside.Listen(t)
	connected := make(chan struct{})
	go func() {
		if _, err := l.Accept(); err == nil {
			close(connected)
		}
	}()
	p, m := supervised(t, e, api.NetworkOff, outside)
	for _, command := range []string{
		"tail -n +3 /proc/net/dev | grep -v '^ *lo:'",
		"set -- " + l.Addr().String() + " " + net.JoinHostPort(outside.Host.String(), "22") + "; " + connects,
		"curl -sS -m 5 http://" + l.Addr().String() + " 2>/dev/null",
	} {
		if out, _, _ := m.sh(t, command, 0); out != "" {
			t.Errorf("%s gives %s", command, out)
		}
	}
	select {
	case <-connected:
		t.Error("the guest has reached the outside")
	default:
	}
	status, err := p.Client.Status(t.Context())
	if err != nil || status.Network != nil {
		t.Errorf("status is %+v, %v", status, err)
	}
	if _, err := p.Publish(t.Context(), supervisor.PublishedPort{GuestPort: 80}); !errors.Is(err, api.ErrDenied) {
		t.Errorf("publishing a port: %v", err)
	}
}

// TestNetworkHeld wants a guest with egress to keep it when its device breaks,
// and its supervisor to stay small.
func TestNetworkHeld(t *testing.T) {
	e := isolating(t)
	outside := netns.New(t)
	l := outside.Listen(t)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "from outside") })}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	p, m := supervised(t, e, api.NetworkEgress, outside)
	fetch := "curl -sS -m 30 http://" + l.Addr().String()
	if out, errs, _ := m.sh(t, fetch, 0); out != "from outside\n" {
		t.Fatalf("got %q, %s", out, errs)
	}
	status, err := p.Client.Status(t.Context())
	if err != nil || status.Network == nil || !status.Network.Attached || status.Network.TCP != 1 || status.Network.Policy != api.NetworkEgress {
		t.Errorf("status is %+v, %v", status.Network, err)
	}
	t.Logf("the supervisor has %s", residentSize(t, p.Status))
	// Another one is refused while the supervisor holds the first.
	req := guestproto.AttachNetwork{MTU: 1500, Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.9.9/24")}}
	if _, err := m.AttachNetwork(m.within(t, time.Minute), req); !errors.Is(err, api.ErrBusy) {
		t.Errorf("attaching again: %v", err)
	}
	if _, err := p.Publish(t.Context(), supervisor.PublishedPort{GuestPort: 80}); !errors.Is(err, api.ErrDenied) {
		t.Errorf("publishing a port: %v", err)
	}
	if e.Name() == "qemu" {
		// What a guest does to its device is its own loss, for a moment.
		m.sh(t, "ip link delete eth0", 0)
		for deadline := m.within(t, time.Minute); ; {
			if out, _, _ := m.sh(t, fetch+" 2>/dev/null", 0); out == "from outside\n" {
				break
			}
			if deadline.Err() != nil {
				t.Fatal("the network has not come back")
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// residentSize reads the supervisor's memory, proc_pid_status(5).
func residentSize(t *testing.T, status supervisor.Status) string {
	t.Helper()
	parent := 0
	for _, pid := range status.PIDs {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(line, "PPid:"); ok {
				parent, _ = strconv.Atoi(strings.TrimSpace(v))
			}
		}
		break
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", parent))
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "Name") || strings.HasPrefix(line, "VmRSS") || strings.HasPrefix(line, "RssAnon") || strings.HasPrefix(line, "VmHWM") {
			out = append(out, strings.Join(strings.Fields(line), " "))
		}
	}
	return strings.Join(out, ", ")
}

// echoes answers every connection on port 7000 with what it sends, on port 7001
// of ::1 with one line, and on 7002 with nothing for ever.
const echoes = `exec python3 -c '
import socket, threading
def echo(c):
    while (b := c.recv(65536)): c.sendall(b)
    c.shutdown(socket.SHUT_WR); c.close()
def line(c): c.sendall(b"from ::1\n"); c.close()
def mute(c): c.recv(1)
def serve(family, host, port, f):
    s = socket.create_server((host, port), family=family, backlog=512)
    def run():
        while True: threading.Thread(target=f, args=(s.accept()[0],), daemon=True).start()
    threading.Thread(target=run).start()
serve(socket.AF_INET, "127.0.0.1", 7000, echo)
serve(socket.AF_INET6, "::1", 7001, line)
serve(socket.AF_INET, "127.0.0.1", 7002, mute)
print("up", flush=True)'`

func TestPublish(t *testing.T) {
	p, m := supervised(t, isolating(t), api.NetworkEgressPublishing, nil)
	up := make(chan struct{})
	go func() {
		_, _ = m.Exec(t.Context(), guestproto.ExecRequest{Command: echoes}, guestclient.ExecIO{
			Stdout: writerFunc(func(b []byte) (int, error) { close(up); return len(b), nil }),
			Stderr: os.Stderr,
		})
	}()
	<-up
	publish := func(guest int) string {
		t.Helper()
		port, err := p.Publish(t.Context(), supervisor.PublishedPort{GuestPort: guest})
		if err != nil {
			t.Fatal(err)
		}
		return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	}
	echo := publish(7000)
	dial := func(t *testing.T, address string) *net.TCPConn {
		t.Helper()
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		_ = c.SetDeadline(time.Now().Add(5 * time.Minute))
		return c.(*net.TCPConn)
	}
	t.Run("HalfClose", func(t *testing.T) {
		c := dial(t, echo)
		data := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
		go func() {
			_, _ = c.Write(data)
			_ = c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
			t.Errorf("%d bytes came back of %d, %v", len(got), len(data), err)
		}
	})
	t.Run("V6Loopback", func(t *testing.T) {
		got, err := io.ReadAll(dial(t, publish(7001)))
		if err != nil || string(got) != "from ::1\n" {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("NobodyListens", func(t *testing.T) {
		c, err := net.DialTimeout("tcp", publish(7999), time.Minute)
		if errors.Is(err, syscall.ECONNRESET) {
			return // refused before the dial had returned
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read %d, %v", n, err)
		}
	})
	t.Run("OnlyLoopback", func(t *testing.T) {
		_, port, _ := net.SplitHostPort(echo)
		addrs, _ := net.InterfaceAddrs()
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && !n.IP.IsLoopback() && !n.IP.IsLinkLocalUnicast() {
				if c, err := net.DialTimeout("tcp", net.JoinHostPort(n.IP.String(), port), time.Second); err == nil {
					c.Close()
					t.Errorf("published on %s", n.IP)
				}
			}
		}
	})
	t.Run("Long", func(t *testing.T) {
		c := dial(t, echo)
		r := bufio.NewReader(c)
		for i := range 200 {
			fmt.Fprintln(c, "message", i)
			if line, err := r.ReadString('\n'); err != nil || line != fmt.Sprintln("message", i) {
				t.Fatalf("message %d: %q, %v", i, line, err)
			}
		}
	})
	t.Run("Many", func(t *testing.T) {
		began := time.Now()
		const connections, at = 2000, 50
		var wg sync.WaitGroup
		work := make(chan int)
		for range at {
			wg.Go(func() {
				for i := range work {
					c, err := net.Dial("tcp", echo)
					if err != nil {
						t.Error(err)
						continue
					}
					fmt.Fprint(c, "n", i)
					_ = c.(*net.TCPConn).CloseWrite()
					if got, err := io.ReadAll(c); err != nil || string(got) != fmt.Sprint("n", i) {
						t.Errorf("connection %d: %q, %v", i, got, err)
					}
					c.Close()
				}
			})
		}
		for i := range connections {
			work <- i
		}
		close(work)
		wg.Wait()
		t.Logf("%d connections took %v; the supervisor has %s", connections, time.Since(began), residentSize(t, p.Status))
	})
	t.Run("Unpublish", func(t *testing.T) {
		address := publish(7002)
		c := dial(t, address)
		_, port, _ := net.SplitHostPort(address)
		n, _ := strconv.Atoi(port)
		if _, err := p.Publish(t.Context(), supervisor.PublishedPort{HostPort: n, GuestPort: 7000}); !errors.Is(err, api.ErrBusy) {
			t.Errorf("publishing a taken port: %v", err)
		}
		if err := p.Unpublish(t.Context(), supervisor.PublishedPort{HostPort: n}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the connection lives on: %v", err)
		}
		if c, err := net.Dial("tcp", address); err == nil {
			c.Close()
			t.Error("the port is still open")
		}
		if err := p.Unpublish(t.Context(), supervisor.PublishedPort{HostPort: n}); !errors.Is(err, api.ErrNotFound) {
			t.Errorf("unpublishing again: %v", err)
		}
		if port, err := p.Publish(t.Context(), supervisor.PublishedPort{HostPort: n, GuestPort: 7000}); err != nil || port != n {
			t.Errorf("publishing the same port again: %d, %v", port, err)
		}
	})
	t.Run("Refused", func(t *testing.T) {
		for name, port := range map[string]supervisor.PublishedPort{
			"NoGuestPort":  {},
			"HugePort":     {GuestPort: 65536},
			"NegativePort": {GuestPort: 80, HostPort: -1},
			"HostName":     {GuestPort: 80, Host: "localhost"},
			"Elsewhere":    {GuestPort: 80, Host: "192.0.2.1"},
		} {
			if _, err := p.Publish(t.Context(), port); !errors.Is(err, api.ErrInvalid) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	status, err := p.Client.Status(t.Context())
	if err != nil || len(status.Published) != 4 {
		t.Errorf("published are %+v, %v", status.Published, err)
	}
}
