package engines_test

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pyro-mcp/pyro/api"
	"github.com/pyro-mcp/pyro/internal/engine"
	"github.com/pyro-mcp/pyro/internal/engine/enginetest"
	"github.com/pyro-mcp/pyro/internal/engine/gvisor"
	"github.com/pyro-mcp/pyro/internal/guestproto"
)

// fullSubject is the engine that PYRO_TEST_ENGINE names, if its machines can be
// saved with their memory.
func fullSubject(t *testing.T) enginetest.Subject {
	t.Helper()
	switch os.Getenv("PYRO_TEST_ENGINE") {
	case "qemu":
		_, s := warmSubject(t)
		return s
	case gvisor.Name:
		return gvisorSubject(t)
	}
	t.Skip("runs with PYRO_TEST_ENGINE=qemu or gvisor")
	return enginetest.Subject{}
}

// TestFullSnapshot copies a machine while a service of it counts and a file has
// not reached its disk.
func TestFullSnapshot(t *testing.T) {
	s := fullSubject(t)
	dir := t.TempDir()
	disk, spare, memory := filepath.Join(dir, "disk"), filepath.Join(dir, "spare"), filepath.Join(dir, "memory")
	g := enginetest.Boot(t, s, func(m *engine.MachineSpec) { m.Disk, m.Hostname = disk, "original" })
	service, err := g.Client.StartService(t.Context(), guestproto.StartService{
		ServiceName: "counter", Command: "i=0; while :; do i=$((i+1)); echo $i > /run/count; cat /proc/sys/kernel/random/uuid > /workspace/uuid-$i; sleep 0.05; done",
	})
	if err != nil {
		t.Fatal(err)
	}
	guestRuns(t, g, "head -c 5000000 /dev/urandom > /workspace/file; cat /workspace/file | md5sum > /run/sum; head -c 32 /dev/urandom > /run/private")
	before := identity(t, g)
	at := count(t, g)
	standStill(t, g)
	began := time.Now()
	frozen, err := g.Machine.(engine.FullSnapshotter).SnapshotFull(t.Context(), spare, memory)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(memory)
	if err != nil || st.Mode().Perm()&0o077 != 0 || frozen != disk && frozen != spare {
		t.Fatalf("the snapshot: %v %v, frozen %s", st, err, frozen)
	}
	t.Logf("the snapshot took %v", time.Since(began))

	copies := map[string]*enginetest.Guest{"original": g}
	ids := map[string]map[string]string{"original": identity(t, g)}
	for _, name := range []string{"copy-1", "copy-2"} {
		began := time.Now()
		c := enginetest.Boot(t, s, func(m *engine.MachineSpec) {
			m.Layers, m.Disk, m.Memory, m.Hostname = []string{frozen}, filepath.Join(dir, name), memory, name
		})
		t.Logf("%s answers after %v", name, time.Since(began))
		copies[name], ids[name] = c, identity(t, c)
		if now, err := c.Client.StatusService(t.Context(), "counter"); err != nil || now.PID == nil || *now.PID != *service.PID || now.State != service.State {
			t.Errorf("the service in %s: %+v, %v; want that of before, %+v", name, now, err, service)
		}
		if d := skew(t, c); d > 500*time.Millisecond {
			t.Errorf("the clock of %s is wrong by %v", name, d)
		}
	}
	for name, c := range copies {
		first := count(t, c)
		if first < at {
			t.Errorf("%s counts %d after %d", name, first, at)
		}
		for end := time.Now().Add(30 * time.Second); count(t, c) <= first; {
			if time.Now().After(end) {
				t.Fatalf("%s does not count on from %d", name, first)
			}
		}
		guestRuns(t, c, "md5sum < /workspace/file | cmp - /run/sum && test -s /run/private")
		guestRuns(t, c, "echo "+name+" > /workspace/mine && sync")
		for other, id := range ids {
			for what, value := range id {
				if other != name && ids[name][what] == value {
					t.Errorf("%s and %s have the same %s", name, other, what)
				}
			}
		}
	}
	for _, what := range []string{"hello", "boot id", "machine id", "hostname"} {
		if before[what] != ids["original"][what] {
			t.Errorf("being saved has changed the %s", what)
		}
	}
	for name, c := range copies {
		if got := strings.TrimSpace(guestRuns(t, c, "cat /workspace/mine")); got != name {
			t.Errorf("%s has the file of %s", name, got)
		}
	}
	if _, err := g.Machine.(engine.FullSnapshotter).SnapshotFull(t.Context(), filepath.Join(dir, "spare-2"), memory); !errors.Is(err, api.ErrExists) {
		t.Errorf("saving to a file that is there: %v, want ErrExists", err)
	}
}

func count(t *testing.T, g *enginetest.Guest) int {
	t.Helper()
	// The file is empty for a moment whenever it is written.
	for {
		if n, err := strconv.Atoi(strings.TrimSpace(guestRuns(t, g, "cat /run/count"))); err == nil {
			return n
		}
	}
}

// standStill suspends the guest for a while in which its service would count.
func standStill(t *testing.T, g *enginetest.Guest) {
	t.Helper()
	err := g.Client.Suspend(t.Context())
	if errors.Is(err, api.ErrUnsupported) {
		return // its copies need nothing before they may run
	}
	if err != nil {
		t.Fatal(err)
	}
	uuids := func() int {
		t.Helper()
		list, err := g.Client.ListFiles(t.Context(), "/workspace", false, func(guestproto.FileEntry) error { return nil })
		if err != nil {
			t.Fatal(err)
		}
		return int(list.EntryCount)
	}
	before := uuids()
	<-time.After(2 * time.Second) // nothing is to happen
	if after := uuids(); after != before {
		t.Errorf("a suspended guest has made %d files", after-before)
	}
	r := guestproto.Resume{TimeNS: time.Now().UnixNano(), Entropy: make([]byte, guestproto.MinEntropy)}
	if err := g.Client.Resume(t.Context(), r); err != nil {
		t.Fatal(err)
	}
}
