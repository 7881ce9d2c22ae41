package engines_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pyro-mcp/pyro/internal/artifact"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/engine/qemu"
	"github.com/pyro-mcp/pyro/internal/guestclient"
	"github.com/pyro-mcp/pyro/internal/guestproto"
	"github.com/pyro-mcp/pyro/internal/hostproc"
)

// warmSubject is qemuSubject with a template that was made for it.
func warmSubject(t *testing.T) (*qemu.Engine, enginetest.Subject) {
	t.Helper()
	e, s := qemuSubject(t)
	s.Spec.Templates = filepath.Join(t.TempDir(), "templates")
	if err := e.Prepare(t.Context(), preparing(t, s.Spec)); err != nil {
		t.Fatal(err)
	}
	if got := e.Warmth(t.Context(), s.Spec); got != engine.WarmthWarm {
		t.Fatalf("after Prepare the next start is %s", got)
	}
	return e, s
}

func preparing(t *testing.T, s engine.MachineSpec) engine.MachineSpec {
	s.ID, s.Dir, s.Console, s.Logger = "template", t.TempDir(), io.Discard, slog.New(slog.DiscardHandler)
	return s
}

// mustBegin fails the test unless the machine began so.
func mustBegin(t *testing.T, g *enginetest.Guest, wantWarm bool, wantNote string) {
	t.Helper()
	warm, note := g.Machine.(engine.Beginner).Began()
	if warm != wantWarm || wantNote == "" && note != "" || !strings.Contains(note, wantNote) {
		t.Errorf("began warm: %v, note %q; want %v and %q in the note", warm, note, wantWarm, wantNote)
	}
}

// maxSkew is how wrong a guest's clock may be that was just set. A host whose cores
// were all busy has been seen to take 600 ms to bring an emulated guest the time.
const maxSkew = time.Second

// skew is by how much the guest's clock is surely wrong.
func skew(t *testing.T, g *enginetest.Guest) time.Duration {
	t.Helper()
	before := time.Now()
	out := strings.TrimSpace(guestRuns(t, g, "date +%s%N"))
	after := time.Now()
	ns, err := strconv.ParseInt(out, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	at := time.Unix(0, ns)
	return max(before.Sub(at), at.Sub(after), 0)
}

// identity is what no two machines may share.
func identity(t *testing.T, g *enginetest.Guest) map[string]string {
	t.Helper()
	hello, err := g.Client.Hello(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	id := map[string]string{"hello": hello.BootID}
	for name, command := range map[string]string{
		"random":     "head -c 32 /dev/urandom | base64",
		"uuid":       "cat /proc/sys/kernel/random/uuid",
		"boot id":    "cat /proc/sys/kernel/random/boot_id",
		"machine id": "cat /etc/machine-id",
		"hostname":   "hostname",
	} {
		if id[name] = guestRuns(t, g, command); strings.TrimSpace(id[name]) == "" {
			t.Errorf("the guest has no %s", name)
		}
	}
	return id
}

// TestQEMUWarm runs the suite on machines that did not boot.
func TestQEMUWarm(t *testing.T) {
	e, s := warmSubject(t)
	enginetest.Run(t, enginetest.Subject{Engine: e, Spec: s.Spec, SmallestMiB: qemu.MinMemMiB})
	if got := e.Warmth(t.Context(), s.Spec); got != engine.WarmthWarm {
		t.Errorf("after the suite the next start is %s", got)
	}
}

// TestWarmStarts begins machines of one template: they share its memory, and
// nothing that tells them apart.
func TestWarmStarts(t *testing.T) {
	e, s := warmSubject(t)
	disk := enginetest.NewStack(t).Disk
	started := map[string]*enginetest.Guest{}
	identities := map[string]map[string]string{}
	for _, name := range []string{"one", "two"} {
		g := enginetest.Boot(t, s, func(m *engine.MachineSpec) {
			m.Hostname = "warm-" + name
			if name == "two" { // another size of disk, that outlives its machine
				m.Disk, m.DiskMiB = disk, 10<<10
			}
		})
		started[name] = g
		mustBegin(t, g, true, "")
		if d := skew(t, g); d > maxSkew {
			t.Errorf("the clock of machine %s is wrong by %v", name, d)
		}
		identities[name] = identity(t, g)
		if got := strings.TrimSpace(identities[name]["hostname"]); got != "warm-"+name {
			t.Errorf("machine %s is called %q", name, got)
		}
		if again := identity(t, g); again["boot id"] != identities[name]["boot id"] || again["machine id"] != identities[name]["machine id"] {
			t.Errorf("the ids of machine %s have changed", name)
		}
	}
	for what, one := range identities["one"] {
		if two := identities["two"][what]; one == two {
			t.Errorf("both machines have the %s %q", what, one)
		}
	}
	if a, b := templateMemory(t, started["one"]), templateMemory(t, started["two"]); a != b {
		t.Errorf("the machines have memories of their own: %v and %v", a, b)
	}
	g := started["two"]
	if kib, err := strconv.Atoi(strings.TrimSpace(guestRuns(t, g, "df -k / | awk 'NR==2{print $2}'"))); err != nil || kib < 9<<20 {
		t.Errorf("a disk of 10 GiB has %d KiB for files, %v", kib, err)
	}
	guestRuns(t, g, "echo kept > /workspace/file && sync")
	if err := g.Stop(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	// The next one on that disk, with the template's memory filled anew or not.
	g = enginetest.Boot(t, s, func(m *engine.MachineSpec) { m.Disk, m.DiskMiB = disk, 10<<10 })
	mustBegin(t, g, true, "")
	if got := guestRuns(t, g, "cat /workspace/file"); got != "kept\n" {
		t.Errorf("the file on the disk holds %q", got)
	}
	// As the same template serves, so does snapshotting.
	spare := enginetest.NewStack(t).Disk
	if frozen, err := g.Machine.(engine.DiskSnapshotter).SnapshotDisk(t.Context(), spare); err != nil || frozen != disk {
		t.Errorf("freezing the disk of a warm machine: %s, %v", frozen, err)
	}
	guestRuns(t, g, "echo after >> /workspace/file && sync && cat /workspace/file")
	if freed, err := e.PruneTemplates(t.Context(), s.Spec.Templates, true); err != nil || freed == 0 {
		t.Errorf("removing the template under its machines: %d bytes, %v", freed, err)
	}
	guestRuns(t, g, "python3 -c 'print(1)' || perl -e 1 || true")
}

// templateMemory is the inode of the template's memory that the machine maps.
func templateMemory(t *testing.T, g *enginetest.Guest) uint64 {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", g.PIDs()[0])
	fds, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		path := filepath.Join(dir, fd.Name())
		if link, err := os.Readlink(path); err == nil && strings.HasPrefix(link, "/memfd:pyro-template-") {
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			return st.Ino
		}
	}
	t.Fatal("the machine has no memory of a template")
	return 0
}

// TestWarmColdLeavesATemplate boots once without Prepare.
func TestWarmColdLeavesATemplate(t *testing.T) {
	e, s := qemuSubject(t)
	s.Spec.Templates = filepath.Join(t.TempDir(), "templates")
	g := enginetest.Boot(t, s, func(m *engine.MachineSpec) { m.Hostname = "first" })
	mustBegin(t, g, false, "")
	if got := guestRuns(t, g, "hostname"); got != "first\n" {
		t.Errorf("the machine is called %q", got)
	}
	if d := skew(t, g); d > maxSkew {
		t.Errorf("the clock is wrong by %v", d)
	}
	if err := g.Stop(t.Context(), 0); err != nil { // waits for the template
		t.Fatal(err)
	}
	if got := e.Warmth(t.Context(), s.Spec); got != engine.WarmthWarm {
		t.Errorf("after a boot the next start is %s", got)
	}
}

// TestWarmTemplateOfNoUse damages the template in two ways. The machine boots all
// the same.
func TestWarmTemplateOfNoUse(t *testing.T) {
	e, s := warmSubject(t)
	dir := s.Spec.Templates
	store, err := artifact.Open(artifact.Options{Dir: dir, Noun: "template"})
	if err != nil {
		t.Fatal(err)
	}
	ref := func() artifact.Ref {
		t.Helper()
		refs, err := store.Refs()
		if err != nil || len(refs) != 1 {
			t.Fatalf("templates %v, %v; want one", refs, err)
		}
		return refs[0]
	}
	boots := func(wantNote string) {
		t.Helper()
		g := enginetest.Boot(t, s, nil)
		mustBegin(t, g, false, wantNote)
		guestRuns(t, g, "true")
		if err := g.Stop(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
	}
	// A byte of its memory.
	path := filepath.Join(store.ObjectDir(ref().Digest), "memory")
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("x"), 1<<20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	boots("not what was installed")
	if got := e.Warmth(t.Context(), s.Spec); got != engine.WarmthWarm {
		t.Errorf("after a boot in place of a damaged template the next start is %s", got)
	}
	// Devices that QEMU cannot load, in a template that is whole otherwise.
	r := ref()
	h, err := store.Acquire(t.Context(), r.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	memory, err := os.ReadFile(h.Path("memory"))
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Forget(r.Name); err != nil {
		t.Fatal(err)
	}
	install := func() {
		t.Helper()
		bad, err := store.Do(t.Context(), artifact.Install{Name: r.Name, Recipe: r.Recipe, Build: func(_ context.Context, b *artifact.Build) error {
			return errors.Join(os.WriteFile(filepath.Join(b.Out, "memory"), memory, 0o600),
				os.WriteFile(filepath.Join(b.Out, "state"), []byte("QEVM\x00\x00\x00\x03 and nonsense"), 0o600))
		}})
		if err != nil {
			t.Fatal(err)
		}
		bad.Close()
	}
	install()
	boots("of no use")
	if err := store.Forget(ref().Name); err != nil {
		t.Fatal(err)
	}
	install()
	boots("of no use")
	boots("have failed since the host booted")
}

// TestWarmPrepareKilled kills -9 the process that makes a template, at several
// moments: nothing half is ever used, and nothing runs on.
func TestWarmPrepareKilled(t *testing.T) {
	e, s := qemuSubject(t)
	s.Spec.Templates = filepath.Join(t.TempDir(), "templates")
	if os.Getenv("PYRO_TEST_PREPARE") != "" {
		s.Spec.Templates = os.Getenv("PYRO_TEST_PREPARE")
		s.Spec.AgentPath = os.Getenv("PYRO_TEST_AGENT")
		spec := preparing(t, s.Spec)
		spec.Dir = os.Getenv("PYRO_TEST_DIR")
		if err := e.Prepare(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		return
	}
	for i, moment := range []func(dir string) bool{
		func(dir string) bool { return exists(filepath.Join(dir, "initramfs.cpio")) },
		func(dir string) bool { return exists(filepath.Join(dir, "template-memory")) },
		func(string) bool { return exists(filepath.Join(s.Spec.Templates, "build", "*", "out", "memory")) },
	} {
		t.Run(strconv.Itoa(i), func(t *testing.T) {
			dir := t.TempDir()
			cmd := exec.Command(os.Args[0], "-test.run", "^TestWarmPrepareKilled$")
			cmd.Env = append(os.Environ(), "PYRO_TEST_PREPARE="+s.Spec.Templates, "PYRO_TEST_DIR="+dir, "PYRO_TEST_AGENT="+s.Spec.AgentPath,
				"TMPDIR="+t.TempDir()) // what it leaves there is ours to remove
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			machine := []hostproc.Identity{}
			for !moment(dir) {
				if len(machine) == 0 {
					machine = children(cmd.Process.Pid)
				}
				select {
				case err := <-ended:
					t.Fatalf("it ended before the moment came: %v", err)
				case <-time.After(time.Millisecond): // until a file is there
				}
			}
			_ = cmd.Process.Kill()
			<-ended
			for _, id := range machine {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				if err := id.WaitGone(ctx); err != nil {
					t.Errorf("process %d runs on: %v", id.PID, err)
				}
				cancel()
			}
			if got := e.Warmth(t.Context(), s.Spec); got != engine.WarmthCold {
				t.Errorf("the next start is %s", got)
			}
		})
	}
	if err := e.Prepare(t.Context(), preparing(t, s.Spec)); err != nil {
		t.Fatal(err)
	}
	g := enginetest.Boot(t, s, nil)
	mustBegin(t, g, true, "")
	if left, _ := filepath.Glob(filepath.Join(s.Spec.Templates, "build", "*", "out", "*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func exists(pattern string) bool {
	found, err := filepath.Glob(pattern)
	return err == nil && len(found) > 0
}

// children are the processes that a process of one thread or more has started.
func children(pid int) []hostproc.Identity {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	var out []hostproc.Identity
	for _, path := range lists {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for word := range strings.FieldsSeq(string(b)) {
			n, err := strconv.Atoi(word)
			if err != nil {
				continue
			}
			if name, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", n)); err != nil || !strings.Contains(name, "qemu-system") {
				continue
			}
			if id, err := hostproc.Identify(n); err == nil {
				out = append(out, id)
			}
		}
	}
	return out
}

// TestWarmPause lets a guest's clock stand still.
func TestWarmPause(t *testing.T) {
	_, s := warmSubject(t)
	g := enginetest.Boot(t, s, nil)
	mustBegin(t, g, true, "")
	before := identity(t, g)
	p := g.Machine.(engine.Pauser)
	if err := p.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-time.After(3 * time.Second) // what is tested is that time passes
	if err := p.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := skew(t, g); d > maxSkew {
		t.Errorf("after a pause of 3 s the clock is wrong by %v", d)
	}
	after := identity(t, g)
	for _, what := range []string{"hello", "boot id", "machine id", "hostname"} {
		if before[what] != after[what] {
			t.Errorf("a pause has changed the %s", what)
		}
	}
}

// TestWarmMany starts ten machines at once.
func TestWarmMany(t *testing.T) {
	e, s := warmSubject(t)
	const count = 10
	machines := make([]engine.Machine, count)
	errs := make([]error, count)
	seen := map[string]bool{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	began := time.Now()
	for i := range count {
		spec := preparing(t, s.Spec)
		spec.ID = fmt.Sprint("many", i)
		wg.Go(func() {
			m, err := e.Start(t.Context(), spec)
			if err != nil {
				errs[i] = err
				return
			}
			machines[i] = m
			var out bytes.Buffer
			_, errs[i] = guestclient.New(m.DialGuest, guestclient.Options{Patience: 3 * time.Minute}).Exec(t.Context(),
				guestproto.ExecRequest{Command: "head -c 32 /dev/urandom | base64; cat /proc/sys/kernel/random/boot_id"}, guestclient.ExecIO{Stdout: &out})
			mu.Lock()
			defer mu.Unlock()
			for line := range strings.Lines(out.String()) {
				seen[line] = true
			}
			t.Logf("machine %d has run its first command after %v", i, time.Since(began))
		})
	}
	wg.Wait()
	defer func() {
		for _, m := range machines {
			if m != nil {
				_ = m.Stop(context.Background(), 0)
			}
		}
	}()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	for i, m := range machines {
		if warm, note := m.(engine.Beginner).Began(); !warm {
			t.Errorf("machine %d booted: %s", i, note)
		}
		t.Logf("machine %d has %d KiB of memory (Pss)", i, pss(t, m.PIDs()[0]))
	}
	if len(seen) != 2*count {
		t.Errorf("ten machines have %d different random numbers and boot ids, want %d", len(seen), 2*count)
	}
}

func pss(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
			kib, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
			if err != nil {
				t.Fatal(err)
			}
			return kib
		}
	}
	t.Fatal("no Pss")
	return 0
}
