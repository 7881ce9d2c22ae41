package bench

import (
	"io"
	"log/slog"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

//page:topic 4 QEMU: warm starts

// BenchmarkQEMUWarmStartToFirstExec starts a machine from a template, up to the
// end of its first command. The reference is the same machine booting. Since they
// are alternately measured, a busy host slows both down.
//
//page:row start to first command
//page:aim ratio <= 0.125
func BenchmarkQEMUWarmStartToFirstExec(b *testing.B) {
	f := newFixture(b)
	templates := b.TempDir()
	spec := func(templates string) engine.MachineSpec {
		return engine.MachineSpec{
			ID: "bench", Dir: b.TempDir(), RootImage: f.image.Path, Kernel: f.kernel.Kernel, Ephemeral: true, Templates: templates,
			VCPUCount: 1, MemMiB: 1024, AgentPath: program("pyro-agent"), Console: io.Discard, Logger: slog.New(slog.DiscardHandler),
		}
	}
	check(b, f.engine.Prepare(b.Context(), spec(templates)))
	start := func(templates string) func() time.Duration {
		return func() time.Duration {
			spec := spec(templates)
			began := time.Now()
			m, err := f.engine.Start(b.Context(), spec)
			check(b, err)
			g := &guest{guestclient.New(m.DialGuest, guestclient.Options{}), func() { check(b, m.Stop(b.Context(), 0)) }}
			defer g.end()
			reply, err := g.client.Exec(b.Context(), guestproto.ExecRequest{Argv: []string{"true"}}, guestclient.ExecIO{})
			took := time.Since(began)
			check(b, err)
			if warm, note := m.(engine.Beginner).Began(); reply.ExitCode != 0 || warm != (templates != "") {
				b.Fatalf("exit code %d, warm: %v (%s)", reply.ExitCode, warm, note)
			}
			return took
		}
	}
	compare(b, 9, start(templates), start(""))
}
