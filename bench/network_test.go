package bench

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestkernel"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/supervisor"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/test/netns"
)

//page:topic 8 Network of a guest
// The reference is a process of the host that connects to the same server in the
// same network namespace, over the same pair of devices.

// networked is a guest with egress, and a server outside.
type networked struct {
	client  *guestclient.Client
	process *supervisor.Process
	server  net.Listener
}

// newNetworked starts both. The server answers each connection's first line:
// "get N" with N bytes, "put N" with a line once N bytes have come, and
// anything else with that line.
func newNetworked(b *testing.B, name string) *networked {
	b.Helper()
	var e engine.Engine
	switch name {
	case qemu.Name:
		e = qemu.New(qemu.Options{Accel: os.Getenv("PYRO_QEMU_ACCEL")})
	case gvisor.Name:
		e = gvisor.New(gvisor.Options{Runtime: program("pyro-runsc")})
	}
	caps := e.Probe(b.Context())
	testenv.Require(b, e.Name(), caps.Available, caps.Detail)
	outside := netns.New(b)
	n := &networked{server: outside.Listen(b)}
	go serveBytes(n.server)
	cache, err := statedir.DefaultCache(os.Getenv)
	check(b, err)
	envs, err := environment.Open(environment.Options{CacheDir: cache})
	check(b, err)
	image, err := envs.Use(b.Context(), "debian:12", nil)
	check(b, err)
	b.Cleanup(func() { image.Close() })
	kernels, err := guestkernel.Open(guestkernel.Options{CacheDir: cache})
	check(b, err)
	kernel, err := kernels.Use(b.Context(), nil)
	check(b, err)
	b.Cleanup(func() { kernel.Close() })
	state, err := statedir.Open(filepath.Join(b.TempDir(), "state"))
	check(b, err)
	dir := state.Machine("bench")
	n.process, err = supervisor.Spawn(b.Context(), supervisor.SpawnOptions{
		Binary: program("pyro"),
		Config: supervisor.Config{
			Dir: dir.Path(), Engine: e.Name(), Leased: true, Ephemeral: true,
			Network: api.NetworkEgressPublishing, NetworkAllow: []netip.Prefix{outside.Network},
			Spec: engine.MachineSpec{
				ID: "bench", Dir: dir.EngineDir(), RootImage: image.Path, Kernel: kernel.Kernel,
				VCPUCount: 1, MemMiB: 1024, AgentPath: program("pyro-agent"), Ephemeral: true,
			},
		},
	})
	check(b, err)
	b.Cleanup(func() { check(b, n.process.Shutdown(context.Background())) })
	n.client = guestclient.New(n.process.DialGuest, guestclient.Options{})
	return n
}

func serveBytes(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			var line strings.Builder
			one := make([]byte, 1)
			for one[0] != '\n' {
				if _, err := c.Read(one); err != nil {
					return
				}
				line.Write(one)
			}
			verb, arg, _ := strings.Cut(strings.TrimSpace(line.String()), " ")
			size, _ := strconv.ParseInt(arg, 10, 64)
			switch verb {
			case "get":
				buf := make([]byte, 256<<10)
				for size > 0 {
					k, err := c.Write(buf[:min(size, int64(len(buf)))])
					if size -= int64(k); err != nil {
						return
					}
				}
			case "put":
				_, _ = io.CopyN(io.Discard, c, size)
				fmt.Fprintln(c, "got it")
			default:
				fmt.Fprint(c, line.String())
			}
		}()
	}
}

// transfer is a program for the guest. It prints how many seconds the work of
// argument 3 took: get or put of so many bytes, or so many connections.
const transfer = `import socket, sys, time
host, port, verb, n = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
buf = bytearray(1 << 18)
began = time.monotonic()
if verb == "connect":
    for i in range(n):
        s = socket.create_connection((host, port)); s.sendall(b"hello\n"); s.recv(100); s.close()
else:
    s = socket.create_connection((host, port))
    s.sendall(b"%s %d\n" % (verb.encode(), n))
    if verb == "put":
        left = n
        while left > 0: left -= s.send(memoryview(buf)[:min(left, len(buf))])
        s.recv(100)
    else:
        while s.recv_into(buf): pass
print(time.monotonic() - began)`

// inGuest runs the transfer in the guest.
func (n *networked) inGuest(b *testing.B, verb string, count int) time.Duration {
	b.Helper()
	addr := n.server.Addr().(*net.TCPAddr)
	r, err := n.client.ExecPlain(b.Context(), guestproto.ExecRequest{
		Argv: []string{"python3", "-c", transfer, addr.IP.String(), strconv.Itoa(addr.Port), verb, strconv.Itoa(count)},
	})
	check(b, err)
	seconds, err := strconv.ParseFloat(strings.TrimSpace(r.Stdout), 64)
	if err != nil {
		b.Fatalf("the guest says %q, %s", r.Stdout, r.Stderr)
	}
	return time.Duration(seconds * float64(time.Second))
}

// direct does the same from this process.
func (n *networked) direct(b *testing.B, verb string, count int) time.Duration {
	b.Helper()
	began := time.Now()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", n.server.Addr().String())
		check(b, err)
		return c
	}
	buf := make([]byte, 256<<10)
	if verb == "connect" {
		for range count {
			c := dial()
			_, err := io.WriteString(c, "hello\n")
			check(b, err)
			_, err = c.Read(buf)
			check(b, err)
			c.Close()
		}
		return time.Since(began)
	}
	c := dial()
	defer c.Close()
	fmt.Fprintf(c, "%s %d\n", verb, count)
	if verb == "put" {
		for left := count; left > 0; {
			k, err := c.Write(buf[:min(left, len(buf))])
			check(b, err)
			left -= k
		}
		_, err := c.Read(buf)
		check(b, err)
	} else {
		for {
			if _, err := c.Read(buf); err != nil {
				break
			}
		}
	}
	return time.Since(began)
}

const networkBytes = 128 << 20

// compareNetwork does the same in a guest of each engine and directly.
func compareNetwork(b *testing.B, verb string, count int) {
	for _, engine := range []string{gvisor.Name, qemu.Name} {
		b.Run(engine, func(b *testing.B) {
			n := newNetworked(b, engine)
			compare(b, 5, func() time.Duration { return n.inGuest(b, verb, count) }, func() time.Duration { return n.direct(b, verb, count) })
		})
	}
}

// BenchmarkNetworkDownload reads 128 MiB from the server.
//
//page:row 128 MiB to the guest
func BenchmarkNetworkDownload(b *testing.B) { compareNetwork(b, "get", networkBytes) }

// BenchmarkNetworkUpload writes 128 MiB to the server.
//
//page:row 128 MiB from the guest
func BenchmarkNetworkUpload(b *testing.B) { compareNetwork(b, "put", networkBytes) }

// BenchmarkNetworkConnect makes 200 connections, one after the other.
//
//page:row 200 connections
func BenchmarkNetworkConnect(b *testing.B) { compareNetwork(b, "connect", 200) }
