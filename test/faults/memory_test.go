package faults_test

import (
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
)

// needMemory skips the test where the engine cannot save a machine's memory.
func (l *lab) needMemory() {
	l.Helper()
	l.create("probe")
	defer l.ok("workspace", "delete", "probe")
	res := l.run("workspace", "snapshot", "create", "probe", "s", "--memory", "--json")
	if code := errorCode(res); code == api.Code(api.ErrUnsupported) {
		l.Skip("engine " + engineName() + " cannot save memory")
	}
	if res.code != 0 {
		l.Fatal(res)
	}
}

// newMemoryLab returns a lab with a workspace w that has something acknowledged on
// its disk, on an engine that can save memory.
func newMemoryLab(t *testing.T) *lab {
	t.Helper()
	thoroughOnly(t)
	l := newLab(t)
	l.needMemory()
	l.create("w")
	l.exec("w", "echo acknowledged > kept; sync")
	return l
}

// memories returns the files of all saved memories.
func (l *lab) memories() []string {
	l.Helper()
	roots, err := filepath.Glob(filepath.Join(l.state, "layers", "*.memory"))
	if err != nil {
		l.Fatal(err)
	}
	var files []string
	for _, root := range roots {
		if st, err := os.Lstat(root); err != nil || st.Mode().Perm()&0o077 != 0 {
			l.Errorf("%s is open to others: %v, %v", root, st, err)
		}
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			l.Fatal(err)
		}
	}
	if len(files) == 0 {
		l.Fatal("no memory is saved")
	}
	return files
}

// flip changes one bit in the middle of a file, and says nothing of it in the
// file's times.
func (l *lab) flip(path string) {
	l.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		l.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		l.Fatal(err)
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], st.Size()/2); err != nil {
		l.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], st.Size()/2); err != nil {
		l.Fatal(err)
	}
	if err := os.Chtimes(path, st.ModTime(), st.ModTime()); err != nil {
		l.Fatal(err)
	}
}

// TestDamagedMemory flips a bit in each file of a full snapshot. Nothing starts
// from that, and the workspace has noticed nothing.
func TestDamagedMemory(t *testing.T) {
	l := newMemoryLab(t)
	l.ok("workspace", "snapshot", "create", "w", "s", "--memory")
	l.exec("w", "echo running > /dev/shm/running")
	for _, path := range l.memories() {
		l.flip(path)
		l.refused(api.Code(api.ErrDamaged), "workspace", "reset", "w", "--snapshot", "s")
		l.refused(api.Code(api.ErrDamaged), "workspace", "fork", "w", "--snapshot", "s")
		if got := l.exec("w", "cat kept /dev/shm/running"); got != "acknowledged\nrunning\n" {
			l.Errorf("a reset that was refused left %q", got)
		}
		l.flip(path) // and back
	}
	if n := len(l.list()); n != 2 {
		l.Errorf("%d workspaces after forks that were refused", n)
	}
	l.ok("workspace", "reset", "w", "--snapshot", "s")
	if got := l.exec("w", "cat kept; ls /dev/shm"); got != "acknowledged\n" {
		l.Errorf("the mended snapshot holds %q", got)
	}
	l.ok("workspace", "delete", "w")
	l.check()
}

// TestDamagedSleep wakes a workspace whose memory cannot be used any more: it
// boots from its disk, and says what is lost.
func TestDamagedSleep(t *testing.T) {
	l := newMemoryLab(t)
	for what, damage := range map[string]func(path string){
		"changed": l.flip,
		"gone":    func(path string) { _ = os.Remove(path) },
	} {
		fallAsleep(l)
		for _, path := range l.memories() {
			damage(path)
		}
		if got := l.exec("w", "cat kept; ls /dev/shm"); got != "acknowledged\n" {
			l.Errorf("%s: the workspace holds %q", what, got)
		}
		if ws := l.status("w"); ws.LastError == nil || !strings.Contains(*ws.LastError, "lost") {
			l.Errorf("%s: nothing says that processes are lost: %+v", what, ws)
		}
		l.check()
	}
}

// TestDamagedSleepInCopies makes what it can of a sleeping workspace whose memory
// was changed: whatever would run it is refused.
func TestDamagedSleepInCopies(t *testing.T) {
	l := newMemoryLab(t)
	fallAsleep(l)
	for _, path := range l.memories() {
		l.flip(path)
	}
	l.refused(api.Code(api.ErrDamaged), "workspace", "fork", "w", "--memory")
	l.ok("workspace", "snapshot", "create", "w", "s", "--memory")
	l.refused(api.Code(api.ErrDamaged), "workspace", "fork", "w", "--snapshot", "s")
	l.refused(api.Code(api.ErrDamaged), "workspace", "reset", "w", "--snapshot", "s")
	l.ok("workspace", "fork", "w", "--name", "disk")
	if got := l.exec("disk", "cat kept; ls /dev/shm"); got != "acknowledged\n" {
		l.Errorf("a fork of the disk holds %q", got)
	}
	l.check()
}

// TestForgottenSleep leaves a sleeping workspace in every other way than waking
// it. Its disk is always what it was.
func TestForgottenSleep(t *testing.T) {
	l := newMemoryLab(t)
	fallAsleep(l)
	if ws := l.status("w"); ws.State != api.StatePaused || !ws.PausedToDisk {
		t.Errorf("asleep: %+v", ws)
	}
	if left := l.processesOfMachine(l.status("w").WorkspaceID); len(left) > 0 {
		t.Errorf("processes of a workspace that is paused to disk: %q", left)
	}
	// A fork from what sleeps, with and without its memory.
	l.ok("workspace", "fork", "w", "--name", "disk")
	l.ok("workspace", "fork", "w", "--name", "full", "--memory")
	if got := l.exec("disk", "cat kept; ls /dev/shm"); got != "acknowledged\n" {
		t.Errorf("a fork holds %q", got)
	}
	if got := l.exec("full", "cat kept /dev/shm/running"); got != "acknowledged\nrunning\n" {
		t.Errorf("a fork with memory holds %q", got)
	}
	l.ok("workspace", "snapshot", "create", "w", "asleep", "--memory")
	l.ok("workspace", "disk", "read", "w", "/workspace/kept")
	if !l.status("w").PausedToDisk {
		t.Error("something has woken it")
	}
	memoryKept(l)
	l.ok("workspace", "pause", "w", "--to-disk")
	l.ok("workspace", "stop", "w")
	if ws := l.status("w"); ws.State != api.StateStopped || ws.LastError != nil {
		t.Errorf("stopped: %+v", ws)
	}
	mustStart(l)
	if got := l.exec("w", "cat kept; ls /dev/shm"); got != "acknowledged\n" {
		t.Errorf("after stop: %q", got)
	}
	l.ok("workspace", "reset", "w", "--snapshot", "asleep")
	memoryKept(l)
	l.ok("workspace", "pause", "w", "--to-disk")
	l.ok("workspace", "reset", "w")
	if got := l.exec("w", "ls . /dev/shm"); strings.Contains(got, "kept") || strings.Contains(got, "running") {
		t.Errorf("after reset: %q", got)
	}
	fallAsleep(l)
	for _, name := range []string{"w", "disk", "full"} {
		l.ok("workspace", "delete", name)
	}
	l.check()
}

// TestSleepingPort connects to the published port of a workspace that is paused to
// disk, which wakes it, also after the supervisor that stands by was killed.
func TestSleepingPort(t *testing.T) {
	thoroughOnly(t)
	l := newLab(t)
	l.needMemory()
	l.ok(append(l.createArgs("w"), "--network-policy", api.NetworkEgressPublishing)...)
	var service api.Service
	l.json(&service, "workspace", "service", "start", "w", "web", "--publish", "8000", "--ready-tcp", "127.0.0.1:8000", "--json",
		"--", "python3", "-m", "http.server", "8000")
	url := fmt.Sprintf("http://127.0.0.1:%d/seeded", service.PublishedPorts[0].HostPort)
	get := func() (string, error) {
		// Each its own connection: one that was kept is broken by a pause.
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: within(time.Minute)}
		res, err := client.Get(url)
		if err != nil {
			return "", err
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		return string(b), err
	}
	mustGet := func() {
		t.Helper()
		if got, err := get(); err != nil || got != "from the seed\n" {
			t.Errorf("the service says %q, %v", got, err)
		}
	}
	asleep := func() {
		t.Helper()
		l.ok("workspace", "pause", "w", "--to-disk")
		if ws := l.status("w"); !ws.PausedToDisk {
			t.Fatalf("not asleep: %+v", ws)
		}
	}
	mustGet()
	asleep()
	var all sync.WaitGroup
	for range 10 {
		all.Go(mustGet)
	}
	all.Wait()
	if ws := l.status("w"); ws.State != api.StateStarted || ws.RunningServiceCount != 1 {
		t.Errorf("after a connection: %+v", ws)
	}
	asleep()
	l.exec("w", "true")
	mustGet()
	asleep()
	if err := l.supervisorOf("w").Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	l.eventually(within(5*time.Second), "the port is closed", func() bool { _, err := get(); return err != nil })
	l.check()
	if !l.status("w").PausedToDisk {
		t.Error("killing the supervisor that stands by has woken it")
	}
	l.exec("w", "true")
	mustGet()
	asleep()
	// Nobody but the supervisor that stands by can do this.
	l.ok("workspace", "update", "w", "--ttl-seconds", "1")
	_, rec := l.machineOf("w")
	l.eventually(within(20*time.Second), "the supervisor has ended", func() bool { return !rec.Supervisor.Alive() })
	if left, _ := filepath.Glob(filepath.Join(l.state, "layers", "*.memory")); len(left) > 0 {
		t.Errorf("an expired workspace has left %q", left)
	}
	l.check()
}

// TestMemoryWithoutTracing saves and copies a machine where root may not look into
// other users' processes, as in most containers.
func TestMemoryWithoutTracing(t *testing.T) {
	thoroughOnly(t)
	if engineName() != "qemu" {
		t.Skip("no other engine looks there")
	}
	setpriv, err := exec.LookPath("setpriv")
	if os.Geteuid() != 0 || err != nil {
		t.Skip("takes root and setpriv")
	}
	l := newLab(t)
	cmd := exec.Command(setpriv, "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace", "sh", "-c", `
		set -e
		pyro workspace create debian:12 --name w --mem-mib 384 --ttl-seconds 0 --quiet
		pyro workspace exec w --quiet -- "echo running > /dev/shm/running; echo acknowledged > kept; sync"
		pyro workspace fork w --memory --count 2 --name c --quiet
		for w in w c-1 c-2; do pyro workspace exec $w --quiet -- cat kept /dev/shm/running; done
		grep -h "QEMU itself saves" "$PYRO_STATE_DIR"/machines/*/supervisor.log
	`)
	cmd.Env = l.env
	res := finish(l, cmd)
	if res.code != 0 || strings.Count(res.stdout, "acknowledged\nrunning\n") != 3 {
		t.Error(res)
	}
	l.check()
}

// TestTenForks forks what runs ten times. Each goes on with its own random numbers,
// ids and name, the right clock, and with the memory that all have in common but
// once.
func TestTenForks(t *testing.T) {
	thoroughOnly(t)
	l := newLab(t)
	l.needMemory()
	l.ok(append(l.createArgs("w"), "--mem-mib", "1024")...)
	l.ok("workspace", "service", "start", "w", "hold", "--ready-file", "/run/ready", "--ready-timeout-seconds", "120", "--",
		"python3", "-c", "import os, time; b = os.urandom(1 << 20) * 300; open('/run/ready', 'w').close(); time.sleep(1e6)")
	markMemory(l)
	began := time.Now()
	l.ok("workspace", "fork", "w", "--memory", "--count", "10", "--name", "c")
	t.Logf("ten forks took %v", time.Since(began))
	memory := 0
	seen := map[string]string{}
	for i := range 10 {
		name := fmt.Sprintf("c-%d", i+1)
		_, rec := l.machineOf(name)
		for _, p := range rec.Processes {
			memory += pssKiB(p.PID)
		}
		var list struct{ Services []api.Service }
		l.json(&list, "workspace", "service", "list", name, "--json")
		if len(list.Services) != 1 || list.Services[0].State != api.ServiceRunning {
			t.Errorf("the services of %s: %+v", name, list)
		}
		from := time.Now()
		got := strings.Fields(l.exec(name, `date +%s.%N; cat /dev/shm/running; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'; echo
			cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id /etc/machine-id; hostname`))
		to := time.Now()
		if len(got) != 7 || got[1] != "running" {
			t.Errorf("%s says %q", name, got)
			continue
		}
		seconds, err := strconv.ParseFloat(got[0], 64)
		clock := time.UnixMicro(int64(seconds * 1e6))
		// Setting a clock takes as long as a busy guest takes to hear of it.
		slack := within(500 * time.Millisecond)
		if err != nil || clock.Before(from.Add(-slack)) || clock.After(to.Add(slack)) {
			t.Errorf("between %v and %v the clock of %s says %v", from, to, name, clock)
		}
		for _, value := range got[2:] {
			if other, ok := seen[value]; ok {
				t.Errorf("%s and %s both have %s", name, other, value)
			}
			seen[value] = name
		}
	}
	t.Logf("the machines have %d MiB each", memory/10>>10)
	if engineName() == "qemu" && memory/10 > 60<<10 {
		t.Errorf("the forks do not share their memory: %d MiB each", memory/10>>10)
	}
	if got := l.exec("w", "cat /dev/shm/running"); got != "running\n" {
		t.Errorf("the parent says %q", got)
	}
}

// pssKiB is a process's memory with its share of what others have, too.
func pssKiB(pid int) (kib int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if _, after, ok := strings.Cut(string(b), "\nPss:"); ok {
		_, _ = fmt.Sscan(after, &kib)
	}
	return kib
}

// sleeps is how often TestManySleeps pauses its workspace.
const sleeps = 20

// TestManySleeps pauses a workspace to disk more often than its disk may have
// layers until they are merged. It goes on with all that it had, in memory and on
// disk, and its layers are merged again and again.
func TestManySleeps(t *testing.T) {
	if engineName() == "qemu" && !thorough() {
		t.Skip("takes long on qemu: make test-faults runs it")
	}
	l := newMemoryLab(t)
	markMemory(l)
	// Whatever shows in a layer comes from the environment, a layer or both.
	l.exec("w", "mkdir moved-0; echo 0 > moved-0/file; echo first > first")
	most := 0
	for i := range sleeps {
		l.ok("workspace", "pause", "w", "--to-disk")
		files, err := os.ReadDir(filepath.Join(l.state, "layers"))
		if err != nil {
			t.Fatal(err)
		}
		most = max(most, len(files))
		l.exec("w", fmt.Sprintf("mv moved-%d moved-%d; echo %d >> moved-%d/file; echo %d > file-%d; rm -f file-%d; sync", i, i+1, i+1, i+1, i, i, i-5))
	}
	files, err := os.ReadDir(filepath.Join(l.state, "layers"))
	if err != nil {
		t.Fatal(err)
	}
	// The bystander has its own, and who sleeps a memory.
	if most > 24 || len(files) > 12 {
		t.Errorf("there were up to %d layers, and are %d", most, len(files))
	}
	want := ""
	for i := range sleeps + 1 {
		want += fmt.Sprintln(i)
	}
	if got := l.exec("w", "cat moved-*/file"); got != want {
		t.Errorf("the directory that was moved each time holds %q", got)
	}
	if got := l.exec("w", "cat first; ls -d file-*; cat kept /dev/shm/running"); got != "first\nfile-15\nfile-16\nfile-17\nfile-18\nfile-19\nacknowledged\nrunning\n" {
		t.Errorf("in the end there is %q", got)
	}
	l.ok("workspace", "stop", "w")
	l.ok("workspace", "start", "w")
	if got := l.exec("w", "cat moved-*/file kept"); got != want+"acknowledged\n" {
		t.Errorf("from its disk alone it has %q", got)
	}
}
