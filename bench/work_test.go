package bench

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

//page:topic 0 Work in a guest
// Everybody works in the same image, debian:12-build, with two processors. Native
// is a chroot in it on the host, on an overlay of an ext4 image. The runsc are
// bare `runsc run`: with the changes in memory and in a file, which both are lost
// with the sandbox, and on the host's overlay, where they are on the host's disk at
// once and survive whatever ends the sandbox. That is what gvisor does, in a
// workspace; gvisor run is the machine of a `pyro run`, whose changes end with it.
// QEMU without KVM is an emulator.

// BenchmarkWork runs everyday work. Its setup is not measured.
//
//page:row work
//page:aim gvisor/best-runsc <= 1.3
//page:aim gvisor-run/best-runsc <= 1.3
func BenchmarkWork(b *testing.B) {
	f := newGvisorFixture(b)
	places := []*place{
		{name: "native", sandbox: f.native(b)},
		{name: "runsc-memory", sandbox: f.theirs(b, "memory")},
		{name: "runsc-file", sandbox: f.theirs(b, "dir")},
		{name: "runsc-overlay", sandbox: f.theirs(b, "host")},
		{name: "gvisor", sandbox: f.ours(b, false)},
		{name: "gvisor-run", sandbox: f.ours(b, true)},
		{name: "qemu", sandbox: f.emulated(b), slow: true},
	}
	for _, p := range places {
		p.sh(makeTree)
	}
	for _, work := range []struct {
		name, setup, script string
		rounds              int
	}{
		{"starting Python five times", "true", "for i in 1 2 3 4 5; do python3 -c pass; done", 5},
		{"unpacking 20,000 small files", "rm -rf t", "tar xf /workspace/t.tar", 3},
		{"git status of 20,000 files", "cd t && { test -d .git || { git init -q . && git add .; }; }", "cd t && git status >/dev/null", 5},
		{"compiling C three times", "true", "for i in 1 2 3; do gcc -o h h.c; done", 5},
		{"1,000 processes", "true", "i=0; while [ $i -lt 1000 ]; do /bin/true; i=$((i+1)); done", 3},
	} {
		b.Run(work.name, func(b *testing.B) {
			took := map[string]time.Duration{}
			times := map[string][]time.Duration{}
			for range b.N {
				for round := range work.rounds + 1 {
					for _, p := range places {
						// The first round warms everything up, but for the machine
						// to which a round is minutes.
						if p.slow && len(times[p.name]) > 0 {
							continue
						}
						p.sh(work.setup)
						began := time.Now()
						p.sh(work.script)
						if round > 0 || p.slow {
							times[p.name] = append(times[p.name], time.Since(began))
						}
					}
				}
			}
			b.ReportMetric(0, "ns/op")
			for _, p := range places {
				took[p.name] = median(times[p.name])
				b.ReportMetric(ms(took[p.name]), p.name+"-ms")
			}
			ratio := func(of, to string, best time.Duration) {
				b.ReportMetric(float64(took[of])/float64(best), of+"/"+to)
			}
			best := min(took["runsc-memory"], took["runsc-file"], took["runsc-overlay"])
			ratio("gvisor", "best-runsc", best)
			ratio("gvisor-run", "best-runsc", best)
			ratio("gvisor", "runsc-overlay", took["runsc-overlay"])
			ratio("gvisor", "native", took["native"])
			ratio("qemu", "native", took["native"])
		})
	}
}

// A place is where the work is done.
type place struct {
	name string
	sandbox
	slow bool
}

// nativeScript puts the image and an overlay together as bareHostScript does, and
// stays, so that the mounts do.
const nativeScript = `mkdir "$2/base" "$2/layer" && truncate -s 8G "$2/layer.ext4" && mke2fs -q -t ext4 "$2/layer.ext4" &&
	mount -o loop,ro "$1" "$2/base" && mount -o loop "$2/layer.ext4" "$2/layer" && mkdir "$2/layer/u" "$2/layer/w" &&
	mount -t overlay -o "lowerdir=$2/base,upperdir=$2/layer/u,workdir=$2/layer/w" overlay "$2/root" &&
	mount -t proc proc "$2/root/proc" && mount --bind /dev "$2/root/dev" && echo up && exec sleep infinity`

// native returns a chroot in the image on this host.
func (f *gvisorFixture) native(b *testing.B) sandbox {
	b.Helper()
	dir, err := os.MkdirTemp("", "native")
	check(b, err)
	b.Cleanup(func() { os.RemoveAll(dir) })
	check(b, os.Mkdir(filepath.Join(dir, "root"), 0o755))
	cmd := exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", nativeScript, "sh", f.image, dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	check(b, err)
	check(b, cmd.Start())
	end := func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	b.Cleanup(end)
	if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
		b.Fatalf("mounting the image: %v", err)
	}
	return sandbox{sh: func(script string) {
		out, err := exec.Command("nsenter", "--mount=/proc/"+strconv.Itoa(cmd.Process.Pid)+"/ns/mnt",
			"chroot", filepath.Join(dir, "root"), "/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
			"sh", "-c", "cd /workspace && "+script).CombinedOutput()
		if err != nil {
			b.Fatalf("%s: %v\n%s", script, err, out)
		}
	}, end: end}
}

// emulated starts a virtual machine of the image; on KVM where that works.
func (f *gvisorFixture) emulated(b *testing.B) sandbox {
	b.Helper()
	q := newFixture(b)
	m, err := q.engine.Start(b.Context(), engine.MachineSpec{
		ID: "bench", Dir: b.TempDir(), RootImage: f.image, Kernel: q.kernel.Kernel,
		VCPUCount: 2, MemMiB: 2048, DiskMiB: 8192, AgentPath: program("pyro-agent"), Hostname: "bench",
		Console: io.Discard, Logger: slog.New(slog.DiscardHandler),
	})
	check(b, err)
	b.Cleanup(func() { _ = m.Stop(context.Background(), 0) })
	client := guestclient.New(m.DialGuest, guestclient.Options{Patience: 30 * time.Minute})
	return sandbox{sh: func(script string) {
		r, err := client.ExecPlain(b.Context(), guestproto.ExecRequest{Command: script, Cwd: "/workspace"})
		check(b, err)
		if r.ExitCode != 0 {
			b.Fatalf("%s: exit code %d: %s", script, r.ExitCode, r.Stderr)
		}
	}}
}

// makeTree makes an archive of 20,000 small files, and a C program.
var makeTree = fmt.Sprintf(`python3 -c '
import tarfile, io
t = tarfile.open("t.tar", "w")
for d in range(200):
    for f in range(%d):
        b = ("line %%d %%d\n" %% (d, f) * 300).encode()[:3300]
        i = tarfile.TarInfo("t/d%%d/f%%d.c" %% (d, f))
        i.size = len(b)
        t.addfile(i, io.BytesIO(b))
t.close()
open("h.c", "w").write("#include <stdio.h>\nint main(void) { puts(\"hi\"); return 0; }\n")
'`, 100)
