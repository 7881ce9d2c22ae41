package trees_test

import (
	"bufio"
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/testenv"
)

// maxResident is the most that pyro or a supervisor may have in memory at any
// time, in MiB, however large the tree is.
const maxResident = 256

// TestScale takes a large tree through the whole path, in bounded memory: 1,000
// files and 32 MiB, or, where PYRO_TEST_REQUIRE lists "many", 100,000 files and
// 2 GiB.
func TestScale(t *testing.T) {
	files, size := 1000, 32<<20
	if testenv.Wanted("many") {
		files, size = 100_000, 2<<30
	}
	u := newUser(t)
	u.peaks = &peaks{t: t, most: map[string]int{}}
	dir := filepath.Join(t.TempDir(), "large")
	plant(t, dir, files, size)

	timed := func(what string, f func()) {
		began := time.Now()
		f()
		t.Logf("%-28s %7.2f s", what, time.Since(began).Seconds())
	}
	var id string
	timed("create, seed new", func() { id = u.create("--seed-path", dir) })
	var ws api.Workspace
	u.decode(&ws, "workspace", "status", id)
	if n := ws.WorkspaceSeed.BytesWritten; n != int64(size) {
		t.Errorf("the seed holds %d bytes, want %d", n, size)
	}
	var second string
	timed("create, seed known", func() { second = u.create("--seed-path", dir) })
	u.pyro("workspace", "delete", second)
	timed("diff, nothing changed", func() {
		if out := u.pyro("workspace", "diff", id); len(out) > 0 {
			t.Errorf("an untouched workspace differs: %.300s", out)
		}
	})
	u.pyro("workspace", "exec", "--quiet", "--timeout-seconds", "900", id, "--", fmt.Sprintf(
		"for i in $(seq 100); do echo change >>%s/$i; done; rm -r 1; head -c %d /dev/urandom >big", "0", size/8))
	var patch []byte
	timed("diff, changes", func() { patch = u.pyro("workspace", "diff", id) })
	applied := t.TempDir()
	copyTree(t, dir, applied)
	apply(t, applied, patch)
	if !same(u.inside(id), onHost(t, applied)) {
		t.Error("git apply of the diff does not give the workspace")
	}
	var d api.Diff
	u.decode(&d, "workspace", "diff", id, "--name-only")
	if d.Summary.Modified != 100 || d.Summary.Added != 1 || d.Summary.Deleted == 0 {
		t.Errorf("the diff counts %+v", d.Summary)
	}
	timed("snapshot", func() { u.pyro("workspace", "snapshot", "create", id, "s") })
	timed("diff from the snapshot", func() { u.pyro("workspace", "diff", id, "--from", "s") })
	out := filepath.Join(t.TempDir(), "out")
	timed("export", func() { u.pyro("workspace", "export", id, ".", "--output", out) })
	timed("reset", func() { u.pyro("workspace", "reset", id, "--quiet") })
	if out := u.pyro("workspace", "diff", id); len(out) > 0 {
		t.Errorf("a reset workspace differs: %.300s", out)
	}
	timed("sync push into another", func() {
		second = u.create()
		u.pyro("workspace", "sync", "push", second, out)
	})
	timed("stop", func() { u.pyro("workspace", "stop", id) })
	timed("start", func() { u.pyro("workspace", "start", id, "--quiet") })
	timed("delete", func() { u.pyro("workspace", "delete", id, second) })
	u.peaks.report()
}

// plant writes files of random and of repeating content, size bytes together,
// in directories of a few hundred, "0" and "1" among them.
func plant(t *testing.T, dir string, files, size int) {
	t.Helper()
	random := rand.NewChaCha8([32]byte{1})
	perFile := size / files
	content := make([]byte, perFile)
	dirs := max(2, files/400)
	for i := range files {
		_, _ = random.Read(content[:perFile/2])
		for j := perFile / 2; j < perFile; j++ {
			content[j] = "text of lines\n"[j%14]
		}
		if i == files-1 {
			content = append(content, make([]byte, size-files*perFile)...)
		}
		path := filepath.Join(dir, strconv.Itoa(i%dirs), strconv.Itoa(i/dirs))
		if i/dirs == 0 {
			check(t, os.MkdirAll(filepath.Dir(path), 0o755))
		}
		check(t, os.WriteFile(path, content, 0o644))
	}
}

// peaks collects the most memory in MiB that commands and supervisors had.
type peaks struct {
	t    *testing.T
	mu   sync.Mutex
	most map[string]int
}

// watch samples the process and its children until the returned function is
// called: the most memory of a process is in its own record as long as it lives.
func (p *peaks) watch(what string, pid int) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	sample := func() {
		p.note(what, pid)
		for _, child := range supervisors() {
			p.note("supervisor during "+what, child)
		}
	}
	go func() {
		defer close(ended)
		for tick := time.NewTicker(20 * time.Millisecond); ; {
			select {
			case <-done:
				tick.Stop()
				return
			case <-tick.C:
				sample()
			}
		}
	}()
	return func() { close(done); <-ended }
}

func (p *peaks) note(what string, pid int) {
	mib := resident(pid)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.most[what] = max(p.most[what], mib)
}

// report prints what there was to print, and fails the test where it was too
// much or nothing at all was seen.
func (p *peaks) report() {
	var commands, supervisors int
	for what, mib := range p.most {
		if mib > maxResident {
			p.t.Errorf("%s had %d MiB in memory, the limit is %d", what, mib, maxResident)
		}
		if strings.HasPrefix(what, "supervisor") {
			supervisors = max(supervisors, mib)
		} else {
			commands = max(commands, mib)
		}
	}
	p.t.Logf("in memory at most: %d MiB of a command, %d MiB of a supervisor", commands, supervisors)
	if commands == 0 || supervisors == 0 {
		p.t.Error("no process was seen")
	}
}

// supervisors returns the processes of this test's pyro that supervise machines.
func supervisors() []int {
	var pids []int
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range procs {
		b, err := os.ReadFile(path)
		if words := bytes.Split(b, []byte{0}); err == nil && len(words) > 1 && strings.HasPrefix(string(words[0]), programs) && string(words[1]) == "supervise" {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, pid)
		}
	}
	return pids
}

// resident returns the most memory in MiB that a process has had, 0 if it is
// gone.
func resident(pid int) int {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "VmHWM:"); ok {
			kib, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
			return kib >> 10
		}
	}
	return 0
}
