// Package engines_test runs the suite of package enginetest on the engines of
// this host: always on host, and on the one that PYRO_TEST_ENGINE names.
package engines_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/engine/host"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/environment"
	"github.com/pyro-mcp/pyro/internal/guestkernel"
	"github.com/pyro-mcp/pyro/internal/statedir"
	"github.com/pyro-mcp/pyro/internal/testenv"
	"github.com/pyro-mcp/pyro/test/build"
)

var programs string

func TestMain(m *testing.M) { os.Exit(build.Main(m, &programs, false)) }

func TestHost(t *testing.T) {
	enginetest.Run(t, enginetest.Subject{Engine: host.New(), Spec: spec()})
}

func TestQEMU(t *testing.T) {
	if os.Getenv("PYRO_TEST_ENGINE") != "qemu" {
		t.Skip("runs with PYRO_TEST_ENGINE=qemu")
	}
	e := qemu.New(qemu.Options{Accel: os.Getenv("PYRO_QEMU_ACCEL")})
	caps := e.Probe(t.Context())
	testenv.Require(t, "qemu", caps.Available, caps.Detail)
	enginetest.Run(t, enginetest.Subject{Engine: e, Spec: bootable(t), SmallestMiB: qemu.MinMemMiB})
}

func TestGVisor(t *testing.T) {
	if os.Getenv("PYRO_TEST_ENGINE") != gvisor.Name {
		t.Skip("runs with PYRO_TEST_ENGINE=gvisor")
	}
	enginetest.Run(t, gvisorSubject(t))
}

func gvisorSubject(t *testing.T) enginetest.Subject {
	t.Helper()
	e := gvisor.New(gvisor.Options{Runtime: filepath.Join(programs, "pyro-runsc")})
	caps := e.Probe(t.Context())
	testenv.Require(t, "gvisor", caps.Available, caps.Detail)
	return enginetest.Subject{Engine: e, Spec: bootable(t)}
}

func spec() engine.MachineSpec {
	return engine.MachineSpec{VCPUCount: 1, MemMiB: 512, AgentPath: filepath.Join(programs, "pyro-agent")}
}

// bootable returns a spec with an image and a kernel out of the user's cache,
// built first if they are not there. They stay locked until the test ends.
func bootable(t *testing.T) engine.MachineSpec {
	t.Helper()
	cache, err := statedir.DefaultCache(os.Getenv)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	envs, err := environment.Open(environment.Options{CacheDir: cache, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	image, err := envs.Use(t.Context(), "debian:12", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { image.Close() })
	kernels, err := guestkernel.Open(guestkernel.Options{CacheDir: cache, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := kernels.Use(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kernel.Close() })
	s := spec()
	s.RootImage, s.Kernel = image.Path, kernel.Kernel
	return s
}
