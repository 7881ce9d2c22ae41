package bench

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestconn"
	"github.com/pyro-mcp/pyro/internal/guestkernel"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/initramfs"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/supervisor"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

//page:topic 4 QEMU: start and commands
// The reference is the same QEMU, kernel, initramfs and image, started
// with the command line that a person would write, and spoken to over its
// serial port by this process: no supervisor, no socket in between, no
// confinement.

// BenchmarkQEMUColdStartToFirstOutput runs echo by pyro run, up to the first
// byte that it prints, in a guest that has to boot.
//
//page:row cold start to first output
func BenchmarkQEMUColdStartToFirstOutput(b *testing.B) {
	f := newFixture(b)
	compare(b, 9, func() time.Duration {
		cmd := exec.Command(program("pyro"), "run", "--quiet", "--engine", "qemu", "debian:12", "--", "echo", "up")
		cmd.Env = append(os.Environ(), "PYRO_WARM=off", "PYRO_STATE_DIR="+filepath.Join(b.TempDir(), "state"))
		out, err := cmd.StdoutPipe()
		check(b, err)
		began := time.Now()
		check(b, cmd.Start())
		_, err = io.ReadFull(out, make([]byte, 3))
		took := time.Since(began)
		check(b, err)
		check(b, cmd.Wait())
		return took
	}, func() time.Duration {
		began := time.Now()
		g := f.byHand(b)
		defer g.end()
		first := make(chan time.Duration, 1)
		_, err := g.client.Exec(b.Context(), guestproto.ExecRequest{Argv: []string{"echo", "up"}}, guestclient.ExecIO{
			Stdout: writerFunc(func(p []byte) (int, error) { first <- time.Since(began); return len(p), nil }),
		})
		check(b, err)
		return <-first
	})
}

// BenchmarkQEMUExecTrue runs true in a running machine, through the supervisor.
//
//page:row one command in a running machine
func BenchmarkQEMUExecTrue(b *testing.B) {
	f := newFixture(b)
	ours, theirs := f.supervised(b), f.byHand(b)
	defer ours.end()
	defer theirs.end()
	compare(b, 30, func() time.Duration { return ours.execTrue(b) }, func() time.Duration { return theirs.execTrue(b) })
}

// BenchmarkQEMUStreamOut reads 64 MiB from a command's standard output.
//
//page:row 64 MiB of output
func BenchmarkQEMUStreamOut(b *testing.B) {
	f := newFixture(b)
	ours, theirs := f.supervised(b), f.byHand(b)
	defer ours.end()
	defer theirs.end()
	compare(b, 5, func() time.Duration { return ours.streamOut(b) }, func() time.Duration { return theirs.streamOut(b) })
}

// BenchmarkQEMUStreamIn writes 64 MiB to a command's standard input.
//
//page:row 64 MiB of input
func BenchmarkQEMUStreamIn(b *testing.B) {
	f := newFixture(b)
	ours, theirs := f.supervised(b), f.byHand(b)
	defer ours.end()
	defer theirs.end()
	compare(b, 5, func() time.Duration { return ours.streamIn(b) }, func() time.Duration { return theirs.streamIn(b) })
}

const streamSize = 64 << 20

// fixture is what both sides start from.
type fixture struct {
	engine *qemu.Engine
	image  *environment.Image
	kernel *guestkernel.Kernel
}

func newFixture(b *testing.B) *fixture {
	b.Helper()
	f := &fixture{engine: qemu.New(qemu.Options{Accel: os.Getenv("PYRO_QEMU_ACCEL")})}
	caps := f.engine.Probe(b.Context())
	testenv.Require(b, "qemu", caps.Available, caps.Detail)
	cache, err := statedir.DefaultCache(os.Getenv)
	check(b, err)
	envs, err := environment.Open(environment.Options{CacheDir: cache})
	check(b, err)
	f.image, err = envs.Use(b.Context(), "debian:12", nil)
	check(b, err)
	b.Cleanup(func() { f.image.Close() })
	kernels, err := guestkernel.Open(guestkernel.Options{CacheDir: cache})
	check(b, err)
	f.kernel, err = kernels.Use(b.Context(), nil)
	check(b, err)
	b.Cleanup(func() { f.kernel.Close() })
	return f
}

// guest is a running machine of either side.
type guest struct {
	client *guestclient.Client
	end    func()
}

// supervised starts a machine as pyro run does.
func (f *fixture) supervised(b *testing.B) *guest {
	state, err := statedir.Open(filepath.Join(b.TempDir(), "state"))
	check(b, err)
	dir := state.Machine("bench")
	p, err := supervisor.Spawn(b.Context(), supervisor.SpawnOptions{
		Binary: program("pyro"),
		Config: supervisor.Config{
			Dir: dir.Path(), Engine: qemu.Name, Leased: true, Ephemeral: true,
			Spec: engine.MachineSpec{
				ID: "bench", Dir: dir.EngineDir(), RootImage: f.image.Path, Kernel: f.kernel.Kernel,
				VCPUCount: 1, MemMiB: 1024, AgentPath: program("pyro-agent"), Ephemeral: true,
			},
		},
	})
	check(b, err)
	return &guest{guestclient.New(p.DialGuest, guestclient.Options{}), func() { check(b, p.Shutdown(context.Background())) }}
}

// byHand starts the reference, with more arguments if need be.
func (f *fixture) byHand(b *testing.B, more ...string) *guest {
	dir := b.TempDir()
	overlay := filepath.Join(dir, "disk.qcow2")
	out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", f.image.Path, overlay).CombinedOutput()
	if err != nil {
		b.Fatalf("qemu-img: %v: %s", err, out)
	}
	var cpio bytes.Buffer
	check(b, initramfs.Write(&cpio, initramfs.Spec{Init: program("pyro-agent"), Modules: f.kernel.Modules}))
	initrd := filepath.Join(dir, "initrd")
	check(b, os.WriteFile(initrd, cpio.Bytes(), 0o600))
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	check(b, err)
	defer l.Close()

	accel := "tcg"
	cpu := "Nehalem"
	if f.engine.Probe(b.Context()).FullSpeed {
		accel, cpu = "kvm", "host"
	}
	var stderr bytes.Buffer
	cmd := exec.Command("qemu-system-x86_64", "-M", "q35,accel="+accel, "-cpu", cpu, "-m", strconv.Itoa(1024),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", f.kernel.Image, "-initrd", initrd,
		"-append", "console=ttyS0 quiet panic=-1 reboot=t mitigations=off nokaslr pyro.root=/dev/vda",
		"-serial", "file:"+filepath.Join(dir, "console"),
		"-drive", "file="+overlay+",format=qcow2,if=virtio,discard=unmap,cache=unsafe",
		"-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
		"-chardev", "socket,id=agent,path="+socket, "-device", "virtserialport,chardev=agent,name=agent")
	cmd.Args = append(cmd.Args, more...)
	cmd.Stderr = &stderr
	check(b, cmd.Start())
	conn, err := l.Accept()
	check(b, err)
	mux, err := guestconn.NewMux(b.Context(), conn, guestconn.Host)
	if err != nil {
		b.Fatalf("%v; qemu said %s", err, stderr.String())
	}
	g := &guest{guestclient.New(mux.Open, guestclient.Options{}), func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		mux.Close()
	}}
	_, err = g.client.Hello(b.Context())
	check(b, err)
	return g
}

func (g *guest) execTrue(b *testing.B) time.Duration {
	began := time.Now()
	reply, err := g.client.Exec(b.Context(), guestproto.ExecRequest{Argv: []string{"true"}}, guestclient.ExecIO{})
	check(b, err)
	if reply.ExitCode != 0 {
		b.Fatalf("true exits with %d", reply.ExitCode)
	}
	return time.Since(began)
}

func (g *guest) streamOut(b *testing.B) time.Duration {
	began := time.Now()
	var n int64
	_, err := g.client.Exec(b.Context(), guestproto.ExecRequest{Command: fmt.Sprintf("head -c %d /dev/zero", streamSize)},
		guestclient.ExecIO{Stdout: writerFunc(func(p []byte) (int, error) { n += int64(len(p)); return len(p), nil })})
	check(b, err)
	if n != streamSize {
		b.Fatalf("%d bytes came out", n)
	}
	return time.Since(began)
}

func (g *guest) streamIn(b *testing.B) time.Duration {
	began := time.Now()
	var out bytes.Buffer
	_, err := g.client.Exec(b.Context(), guestproto.ExecRequest{Command: "wc -c"},
		guestclient.ExecIO{Stdin: io.LimitReader(zeros{}, streamSize), Stdout: &out})
	check(b, err)
	if got := string(bytes.TrimSpace(out.Bytes())); got != strconv.Itoa(streamSize) {
		b.Fatalf("%s bytes went in", got)
	}
	return time.Since(began)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func check(b *testing.B, err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}
