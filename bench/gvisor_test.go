package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

//page:topic 2 gVisor: start and commands
// The reference is a bare `runsc run` of the same image, mounted read-only, with
// its changes in memory, without control groups and without a network, which is
// runsc at its fastest. Commands go into it by `runsc exec`.

// benchEnvironment is what the sandboxes run.
const benchEnvironment = "debian:12-build"

// gvisorFixture is what all these benchmarks share.
type gvisorFixture struct {
	engine *gvisor.Engine
	runsc  string
	image  string
}

func newGvisorFixture(b *testing.B) *gvisorFixture {
	b.Helper()
	runtime := os.Getenv("PYRO_RUNSC")
	if _, err := os.Stat(program("pyro-runsc")); err == nil && runtime == "" {
		runtime = program("pyro-runsc") // as pyro beside it finds it
	}
	e := gvisor.New(gvisor.Options{Runtime: runtime})
	caps := e.Probe(b.Context())
	testenv.Require(b, "gvisor", caps.Available, caps.Detail)
	runsc, err := e.Runtime(b.Context())
	check(b, err)
	testenv.RequireTools(b, "gvisor", "unshare", "mount")
	f := &gvisorFixture{engine: e, runsc: runsc}
	cache, err := statedir.DefaultCache(os.Getenv)
	check(b, err)
	envs, err := environment.Open(environment.Options{CacheDir: cache, Logger: slog.New(slog.DiscardHandler)})
	check(b, err)
	image, err := envs.Use(b.Context(), benchEnvironment, nil)
	check(b, err)
	b.Cleanup(func() { image.Close() })
	f.image = image.Path
	return f
}

// A sandbox runs shell scripts; end ends it.
type sandbox struct {
	sh  func(script string)
	end func()
}

// ours starts a machine of the engine and returns when its first command has
// ended.
func (f *gvisorFixture) ours(b *testing.B, ephemeral bool) sandbox {
	b.Helper()
	m, err := f.engine.Start(b.Context(), engine.MachineSpec{
		ID: "bench" + strconv.FormatInt(time.Now().UnixNano(), 36), Dir: b.TempDir(), RootImage: f.image,
		VCPUCount: 2, MemMiB: 4096, DiskMiB: 8192, AgentPath: program("pyro-agent"), Hostname: "bench",
		Ephemeral: ephemeral, Console: new(bytes.Buffer), Logger: slog.New(slog.DiscardHandler),
	})
	check(b, err)
	client := guestclient.New(m.DialGuest, guestclient.Options{Patience: 10 * time.Minute})
	s := sandbox{
		sh: func(script string) {
			r, err := client.Exec(b.Context(), guestproto.ExecRequest{Argv: []string{"sh", "-c", script}, Cwd: "/workspace"}, guestclient.ExecIO{})
			check(b, err)
			if r.ExitCode != 0 {
				b.Fatalf("%s: exit code %d", script, r.ExitCode)
			}
		},
		end: func() { check(b, m.Stop(context.Background(), 0)) },
	}
	b.Cleanup(func() { _ = m.Stop(context.Background(), 0) })
	s.sh("true")
	return s
}

// bareScript mounts the image where nobody else sees it and becomes runsc, so
// that the mount ends with the sandbox.
const bareScript = `mount -o loop,ro "$1" "$2/root" && shift 2 && exec "$@"`

// bareHostScript also puts the host's overlay over it.
const bareHostScript = `mkdir "$2/base" "$2/layer" && truncate -s 8G "$2/layer.ext4" && mke2fs -q -t ext4 "$2/layer.ext4" &&
	mount -o loop,ro "$1" "$2/base" && mount -o loop "$2/layer.ext4" "$2/layer" && mkdir "$2/layer/u" "$2/layer/w" &&
	mount -t overlay -o "lowerdir=$2/base,upperdir=$2/layer/u,workdir=$2/layer/w" overlay "$2/root" && shift 2 && exec "$@"`

// bare starts the image with runsc alone. args is the container's command; the
// returned Cmd is runsc run in the foreground.
func (f *gvisorFixture) bare(b *testing.B, overlay string, args ...string) (cmd *exec.Cmd, runsc func(...string) *exec.Cmd) {
	b.Helper()
	// Short, for runsc's sockets.
	dir, err := os.MkdirTemp("", "bare")
	check(b, err)
	b.Cleanup(func() { os.RemoveAll(dir) })
	for _, name := range []string{"root", "upper", "state"} {
		check(b, os.Mkdir(filepath.Join(dir, name), 0o700))
	}
	script := bareScript
	switch overlay {
	case "memory":
		overlay = "root:memory"
	case "dir":
		overlay = "root:dir=" + filepath.Join(dir, "upper")
	case "host":
		overlay, script = "none", bareHostScript
	}
	memory := func(dest string) specs.Mount { return specs.Mount{Destination: dest, Type: "tmpfs", Source: "tmpfs"} }
	config, err := json.Marshal(specs.Spec{
		Version: specs.Version, Hostname: "bare", Root: &specs.Root{Path: filepath.Join(dir, "root")},
		Process: &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"},
			Capabilities: &specs.LinuxCapabilities{Bounding: bareCapabilities, Effective: bareCapabilities, Permitted: bareCapabilities}},
		Mounts: []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}, memory("/dev"), memory("/tmp")},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
		}},
	})
	check(b, err)
	check(b, os.WriteFile(filepath.Join(dir, "config.json"), config, 0o600))
	flags := []string{f.runsc, "--root=" + filepath.Join(dir, "state"), "--platform=systrap", "--network=none", "--overlay2=" + overlay, "--ignore-cgroups"}
	id := "b" + strconv.FormatInt(time.Now().UnixNano(), 36)
	cmd = exec.Command("unshare", append(append([]string{"-m", "--propagation", "private", "sh", "-c", script, "sh", f.image, dir}, flags...),
		"run", "--bundle", dir, id)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd, func(args ...string) *exec.Cmd {
		args = append(args[:1:1], append([]string{id}, args[1:]...)...)
		return exec.Command(flags[0], append(flags[1:], args...)...)
	}
}

var bareCapabilities = []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"}

// theirs starts a bare sandbox and returns when its first command has ended.
func (f *gvisorFixture) theirs(b *testing.B, overlay string) sandbox {
	b.Helper()
	cmd, runsc := f.bare(b, overlay, "sleep", "infinity")
	check(b, cmd.Start())
	var once bool
	end := func() {
		if !once {
			once = true
			_ = runsc("kill", "KILL").Run()
			_ = cmd.Wait()
		}
	}
	b.Cleanup(end)
	for tries := 0; runsc("exec", "true").Run() != nil; tries++ {
		if tries == 100 {
			b.Fatal("runsc run does not come up")
		}
		time.Sleep(50 * time.Millisecond) // runsc tells nobody when it is up
	}
	return sandbox{sh: func(script string) {
		out, err := runsc("exec", "sh", "-c", "cd /workspace && "+script).CombinedOutput()
		if err != nil {
			b.Fatalf("%s: %v\n%s", script, err, out)
		}
	}, end: end}
}

// BenchmarkGvisorRun runs true in a guest of its own, from the start to the end
// of everything: by the whole command `pyro run`, and by the engine alone, called
// in this process.
//
//page:row start, one command, end
//page:aim ratio <= 2
func BenchmarkGvisorRun(b *testing.B) {
	f := newGvisorFixture(b)
	bare := func() time.Duration {
		cmd, _ := f.bare(b, "memory", "true")
		began := time.Now()
		out, err := cmd.CombinedOutput()
		if err != nil {
			b.Fatalf("runsc run: %v\n%s", err, out)
		}
		return time.Since(began)
	}
	b.Run("pyro run", func(b *testing.B) {
		d := newDesk(b, gvisor.Name)
		compare(b, 21, func() time.Duration { return d.timed("run", "--quiet", benchEnvironment, "--", "true") }, bare)
	})
	b.Run("engine alone", func(b *testing.B) {
		compare(b, 21, func() time.Duration {
			began := time.Now()
			f.ours(b, true).end()
			return time.Since(began)
		}, bare)
	})
}

// BenchmarkGvisorExec runs true in a running sandbox, through the guest agent,
// called in this process.
//
//page:row one command in a running sandbox
func BenchmarkGvisorExec(b *testing.B) {
	f := newGvisorFixture(b)
	ours, theirs := f.ours(b, false), f.theirs(b, "memory")
	compare(b, 21, timed(ours, "true"), timed(theirs, "true"))
}

func timed(s sandbox, script string) func() time.Duration {
	return func() time.Duration {
		began := time.Now()
		s.sh(script)
		return time.Since(began)
	}
}
